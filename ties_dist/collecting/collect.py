"""`collect`: runs a model over calibration data, for its Fisher diagonal or the Gram matrices of its linear layers.

As many tensors at a time as the budget has room for, each time over all examples; what is done is durable, so that a
killed run goes on with the next tensors.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from ties_dist.checkpoints.catalogue import Checkpoint, open_checkpoint
from ties_dist.collecting.subjects import Example, Subject, load_subject
from ties_dist.dtypes import MERGEABLE
from ties_dist.errors import NumericError, OutputError, PlanError, RecipeError, StoppedError
from ties_dist.inputs.opening import identify
from ties_dist.messages import listing, readable
from ties_dist.output.lock import STATE, RunLock
from ties_dist.planning.options import RunOptions
from ties_dist.progress import LogProgress, Progress, phase
from ties_dist.statistics.collected import ExpertStatistics, Kind, Origin
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.readers import open_reader

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn import Parameter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One array to be collected: of a tensor of the checkpoint, from a parameter or a linear layer of the module.

    held_bytes: while it is collected.
    """

    tensor: str
    owner: Any
    shape: tuple[int, ...]
    held_bytes: int
    transposed: bool = False


def collect(
    kind: Kind,
    checkpoint: Path | str,
    data: Path | str,
    out: Path | str,
    *,
    model: str | None = None,
    examples: int | None = None,
    max_length: int = 512,
    memory_budget: int = RunOptions.memory_budget,
    device: str = "cpu",
    fresh: bool = False,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> ExpertStatistics:
    """Collect a store of statistics for `merge`; goes on with an unfinished one of the same data.

    kind: `fisher`, the mean over examples of squared gradients of their log-likelihood (Matena and Raffel 2022,
    equation 4, with the data's labels); or `gram`, X^T X of every linear layer's inputs X, over all tokens, and how
    many those are (Jin et al. 2023). data: JSON lines; `text` each, and `label` or `target` where the model is a
    classifier or maps text to text.
    model: a function of yours instead (`subjects`). memory_budget: bytes for what is collected, beside the model.
    Raises CheckpointError, PlanError, RecipeError, OutputError, NumericError, StoppedError.
    """
    checkpoint, data, out = Path(checkpoint), Path(data), Path(out)
    catalogue = open_checkpoint(checkpoint, name=checkpoint.name, reader=open_reader)
    lines, size, digest = _survey(data, examples)
    origin = Origin(
        kind=kind,
        checkpoint=identify(catalogue),
        calibration=xxhash.xxh3_128_hexdigest(f"{digest} {model or ''} {max_length}".encode()),
        examples=lines,
    )
    _check(out)
    with RunLock(LocalPlace(out)).held(stop=stop):
        store = _open_store(out, origin, fresh=fresh)
        if store.finished:
            logger.info("%s is collected already", out)
            return store
        subject = load_subject(checkpoint, kind, function=model, max_length=max_length)
        subject.module.to(device).eval()
        left = [w for w in _wanted(kind, subject, catalogue) if w.tensor not in store.arrays]
        for group in _groups(left, memory_budget):
            _collect(kind, subject, group, store, data, lines, size, progress or LogProgress(), stop)
        if kind == "fisher":  # buffers and frozen tensors: nothing is known of them, and a merge takes the mean
            known = {name for names, _ in _stored(subject, catalogue).values() for name in names}
            for name, entry in sorted(catalogue.parameters.items()):
                if entry.dtype in MERGEABLE and name not in known | store.arrays.keys():
                    store.add(name, np.zeros(entry.shape, np.float32))
        store.finish()
    return store


def _check(out: Path) -> None:
    """Raises OutputError where no store can be made."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file. Choose a folder for the store.")
    if out.is_dir() and any(p.name != STATE for p in out.iterdir()) and ExpertStatistics.look(out) is None:
        raise OutputError(f"{out} is not empty, and is no store of statistics. Choose another folder.")


def _open_store(out: Path, origin: Origin, *, fresh: bool) -> ExpertStatistics:
    """A new store, or the one that stands there, if it is of the same model and data."""
    found = ExpertStatistics.look(out)
    if found is not None and not fresh:
        if problem := found.outdated():
            raise OutputError(problem)
        if found.arrays and found.origin != origin:
            differs = [k for k, v in vars(origin).items() if getattr(found.origin, k) != v]
            raise OutputError(
                f"{out} holds statistics of something else ({', '.join(differs)} differ). Choose another STORE, or "
                "discard it with --fresh."
            )
        if found.origin == origin:
            return found
    store = ExpertStatistics(out, origin)
    store.create()
    return store


def _survey(data: Path, most: int | None) -> tuple[int, int, str]:
    """How many examples there are, their bytes, and a digest of them.

    Raises RecipeError naming every line that is none.
    """
    hashed, count, size, problems = xxhash.xxh3_128(), 0, 0, []
    try:
        with open(data, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip() or (most is not None and count >= most):
                    continue
                try:
                    good = isinstance(json.loads(line), dict)
                except ValueError:
                    good = False
                if not good:
                    problems.append(f"line {number}: no JSON object: {line[:60]!r}")
                hashed.update(line)
                count, size = count + 1, size + len(line)
    except OSError as error:
        raise RecipeError(f"--data {data} cannot be read: {error.strerror or error}.") from error
    if problems:
        raise RecipeError(listing(f"--data {data} has lines that are no examples:", problems, limit=20))
    if not count:
        raise RecipeError(f"--data {data} has no examples: one JSON object a line is needed.")
    return count, size, hashed.hexdigest()


def _examples(data: Path, count: int) -> Iterator[tuple[int, Example]]:
    """(bytes of the line, example)."""
    with open(data, "rb") as file:
        for line in file:
            if line.strip() and count:
                count -= 1
                yield len(line), json.loads(line)


def _wanted(kind: Kind, subject: Subject, catalogue: Checkpoint) -> list[Wanted]:
    """In the order of the module. Raises PlanError where nothing of it is in the checkpoint."""
    found = _parameters(subject, catalogue) if kind == "fisher" else _layers(subject, catalogue)
    unique = list({w.tensor: w for w in found}.values())
    if not unique:
        raise PlanError(
            f"none of the model's {'parameters' if kind == 'fisher' else 'linear layers'} has a name that is in the "
            f"checkpoint (it has {', '.join(sorted(catalogue.parameters)[:3])}, ...)."
        )
    return unique


def _parameters(subject: Subject, catalogue: Checkpoint) -> Iterator[Wanted]:
    """Of a tied parameter's names the first that is stored."""
    for first, (_, parameter) in _stored(subject, catalogue).items():
        # The sum, the gradient, its square.
        yield Wanted(tensor=first, owner=parameter, shape=tuple(parameter.shape), held_bytes=12 * parameter.numel())


def _stored(subject: Subject, catalogue: Checkpoint) -> dict[str, tuple[list[str], Parameter]]:
    """The module's parameters that are in the checkpoint: by the first name, all stored names of each."""
    found: dict[int, tuple[list[str], Parameter]] = {}
    for name, parameter in subject.module.named_parameters(remove_duplicate=False):
        tensor = catalogue.find(name)
        if tensor is not None and tuple(parameter.shape) == catalogue.parameters[tensor].shape:
            found.setdefault(id(parameter), ([], parameter))[0].append(tensor)
    return {names[0]: (names, parameter) for names, parameter in found.values()}


def _layers(subject: Subject, catalogue: Checkpoint) -> Iterator[Wanted]:
    for name, layer in subject.module.named_modules():
        tensor = catalogue.find(f"{name}.weight")
        by_inputs = type(layer).__name__ == "Conv1D"  # GPT-2's: stored (in, out)
        if tensor is None or not (_is_linear(layer) or by_inputs):
            continue
        inputs = catalogue.parameters[tensor].shape[0 if by_inputs else 1]
        # The sum in float64, one example's product in float32.
        held = 12 * inputs**2
        yield Wanted(tensor=tensor, owner=layer, shape=(inputs, inputs), held_bytes=held, transposed=by_inputs)


def _is_linear(layer: nn.Module) -> bool:
    import torch

    return isinstance(layer, torch.nn.Linear)


def _groups(wanted: Sequence[Wanted], budget: int) -> Iterator[list[Wanted]]:
    """As many at a time as the budget has room for. Raises PlanError where one alone does not fit."""
    if wanted and (largest := max(wanted, key=lambda w: w.held_bytes)).held_bytes > budget:
        raise PlanError(
            f"'{largest.tensor}' needs {readable(largest.held_bytes)} while it is collected; --memory-budget is "
            f"{readable(budget)}. Raise it."
        )
    group: list[Wanted] = []
    for each in wanted:
        if group and sum(w.held_bytes for w in group) + each.held_bytes > budget:
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _collect(
    kind: Kind,
    subject: Subject,
    group: Sequence[Wanted],
    store: ExpertStatistics,
    data: Path,
    count: int,
    size: int,
    progress: Progress,
    stop: threading.Event | None,
) -> None:
    import torch

    name = f"{kind} {len(store.arrays) + 1}-{len(store.arrays) + len(group)}"
    watch = _squares if kind == "fisher" else _products
    with phase(progress, name, size), torch.set_grad_enabled(kind == "fisher"), watch(subject, group) as watched:
        for read, example in _examples(data, count):
            if stop is not None and stop.is_set():
                raise StoppedError("stopped; the same command goes on behind the last whole group of tensors.")
            watched.see(example)
            progress.advance(read)
        scale = 1 / count if kind == "fisher" else 1.0
        found = {w.tensor: (watched.sums[w.tensor] * scale).to(torch.float32).cpu().numpy() for w in group}
    if bad := [t for t, values in found.items() if not np.isfinite(values).all()]:
        raise NumericError(
            listing("statistics are not finite:", bad, "Is a text too long for the model, or a weight NaN?", limit=5)
        )
    for each in group:
        store.add(each.tensor, found[each.tensor], rows=watched.rows.get(each.tensor, 0), transposed=each.transposed)


@dataclass(frozen=True, kw_only=True)
class Watched:
    """see: runs the model on an example. sums: by tensor, over the examples seen; rows: inputs in a Gram's sum."""

    see: Callable[[Example], None]
    sums: Mapping[str, Tensor]
    rows: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def _squares(subject: Subject, group: Sequence[Wanted]) -> Iterator[Watched]:
    """Squared gradients of the log-likelihood, example by example."""
    import torch

    for parameter in subject.module.parameters():
        parameter.requires_grad_(False)
    parameters = [w.owner.requires_grad_(True) for w in group]
    sums = {w.tensor: torch.zeros(w.shape, device=w.owner.device) for w in group}

    def see(example: Example) -> None:
        score = subject.score(subject.module, example)
        for each, gradient in zip(group, torch.autograd.grad(score, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                sums[each.tensor] += gradient.float() ** 2

    yield Watched(see=see, sums=sums)


@contextmanager
def _products(subject: Subject, group: Sequence[Wanted]) -> Iterator[Watched]:
    """X^T X of the layers' inputs, by hooks on their forward passes."""
    import torch

    sums = {w.tensor: torch.zeros(w.shape, dtype=torch.float64, device=w.owner.weight.device) for w in group}
    rows = dict.fromkeys(sums, 0)

    def hook(tensor: str) -> Callable[..., None]:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            sums[tensor] += (seen.T @ seen).double()
            rows[tensor] += len(seen)

        return before

    with ExitStack() as hooks:
        for each in group:
            hooks.callback(each.owner.register_forward_pre_hook(hook(each.tensor)).remove)

        def see(example: Example) -> None:
            subject.score(subject.module, example)

        yield Watched(see=see, sums=sums, rows=rows)
