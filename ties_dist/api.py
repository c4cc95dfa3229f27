"""The Python interface; the command line is a thin coat over it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ties_dist.checkpoint import Checkpoint, TensorEntry
from ties_dist.engine import run
from ties_dist.errors import RecipeError
from ties_dist.executors.local import LocalExecutor
from ties_dist.kernels.merge import KernelKind
from ties_dist.layout import ITEM_BYTES
from ties_dist.methods import METHODS
from ties_dist.passes import Forgetful, Passes
from ties_dist.planning import MergePlan
from ties_dist.prepare import Job, Resources, assemble, prepare
from ties_dist.progress import LogProgress, Progress
from ties_dist.recipe import load_recipe
from ties_dist.report import MergeReport
from ties_dist.scan import sample_slices
from ties_dist.statistics import StatisticsStore, cache_folder
from ties_dist.storage.local import Backend, open_reader
from ties_dist.storage.memory import MemoryReader, MemoryWriter
from ties_dist.threshold import predict
from ties_dist.work import TORCH_DTYPES, Worker

Recipe = Path | str | Mapping[str, object]
"""A file, YAML text (a str of more than one line), or the document itself."""
ExecutorName = Literal["auto", "local", "ray"]
ThresholdPass = Literal["auto", "speculate", "scan"]
Device = Literal["auto", "cpu", "cuda"]


def merge(
    recipe: Recipe,
    out: Path | str,
    *,
    semantics: str | None = None,
    executor: ExecutorName = "auto",
    threads: int | None = None,
    memory_budget: int = 2 << 30,
    unit_size: int | None = None,
    device: Device = "auto",
    read_backend: Backend = "auto",
    max_shard_size: int | None = None,
    cache_dir: Path | str | None = None,
    kernel: KernelKind = "auto",
    fresh: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    trust_journal: bool = False,
    threshold_pass: ThresholdPass = "auto",
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    told: Callable[[Sequence[str]], None] | None = None,
) -> MergeReport:
    """Merge the models of a recipe into the folder `out`; resumes an interrupted run of the same merge.

    memory_budget, unit_size, max_shard_size: bytes. threshold_pass: whether whole-model thresholds are scanned for, or
    taken from a sample and proven by the merge's counts; `auto` does the latter where it is likely to hold. stop: set
    it to end after the unit at hand (StoppedError; the same call resumes). told: is given the plan's notes before the
    work starts. Raises the errors of `ties_dist.errors`.
    """
    _supported(executor, device)
    resources = Resources(
        threads=threads, memory_budget=memory_budget, unit_bytes=unit_size, kernel=kernel, backend=read_backend
    )
    job = prepare(_source(recipe), semantics=semantics, resources=resources, max_shard_bytes=max_shard_size)
    if told is not None:
        told(job.notes)
    torch.set_num_threads(resources.thread_count)
    stop = stop or threading.Event()
    return run(
        job,
        Path(out),
        executor=LocalExecutor(resources.thread_count, stop),
        progress=progress or LogProgress(),
        store=StatisticsStore(cache_folder(Path(cache_dir) if cache_dir is not None else None)),
        fresh=fresh,
        overwrite=overwrite,
        wait=wait,
        trust_journal=trust_journal,
        speculate={"auto": None, "speculate": True, "scan": False}[threshold_pass],
        stop=stop,
    )


def _source(recipe: Recipe) -> Recipe:
    return Path(recipe) if isinstance(recipe, str) and "\n" not in recipe else recipe


def _supported(executor: ExecutorName, device: Device) -> None:
    if executor == "ray":
        raise RecipeError("--executor ray is not supported yet; `local` merges on this machine, whatever the size.")
    if device == "cuda":
        raise RecipeError("--device cuda is not supported yet; `cpu` gives the same bytes.")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Predictions from some pages of every model. thresholds, kept_fractions: per expert, whole-model trims only."""

    thresholds: tuple[float | None, ...]
    kept_fractions: tuple[float | None, ...]
    zero_fractions: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What a merge will do. passes and bytes: best and worst case. disk_free_bytes: None without an OUT."""

    method: str
    semantics: str
    tensors: int
    merged_tensors: int
    elements: int
    experts: tuple[str, ...]
    shards: int
    units: int
    unit_bytes: int
    passes: tuple[int, int]
    read_bytes: tuple[int, int]
    write_bytes: int
    projected_bytes: int
    memory_budget: int
    threads: int
    disk_needed_bytes: int
    disk_free_bytes: int | None
    fingerprint: str
    notes: tuple[str, ...]
    sample: Sample | None = None


def plan(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    semantics: str | None = None,
    threads: int | None = None,
    memory_budget: int = 2 << 30,
    unit_size: int | None = None,
    read_backend: Backend = "auto",
    max_shard_size: int | None = None,
    sample: bool = False,
) -> PlanReport:
    """What `merge` would do, from headers alone; with `sample`, some pages of every model as well."""
    resources = Resources(threads=threads, memory_budget=memory_budget, unit_bytes=unit_size, backend=read_backend)
    job = prepare(_source(recipe), semantics=semantics, resources=resources, max_shard_bytes=max_shard_size)
    chosen = job.plan
    passes = _passes(chosen)
    return PlanReport(
        method=chosen.method.name,
        semantics=job.recipe.options.semantics,
        tensors=len(chosen.tensors),
        merged_tensors=sum(t.merged for t in chosen.tensors),
        elements=chosen.elements,
        experts=tuple(e.name for e in chosen.experts),
        shards=len(chosen.layout.shards),
        units=sum(1 for _ in chosen.units()),
        unit_bytes=chosen.unit_bytes,
        passes=passes,
        read_bytes=(passes[0] * chosen.input_bytes, passes[1] * chosen.input_bytes + _guess_bytes(chosen)),
        write_bytes=chosen.layout.total_bytes,
        projected_bytes=chosen.projected_bytes,
        memory_budget=chosen.memory_budget,
        threads=chosen.threads,
        disk_needed_bytes=chosen.layout.total_bytes,
        disk_free_bytes=None if out is None else _free(Path(out)),
        fingerprint=chosen.fingerprint,
        notes=job.notes,
        sample=_sample(job) if sample else None,
    )


def _passes(chosen: MergePlan) -> tuple[int, int]:
    """Reads of the inputs, best and worst: cached statistics save the scan, a wrong guess adds a read.

    Ties that are cut are counted in another one, a wrong prediction on 16-bit models is merged once more, and units
    with exact cancellations are read again where the majority sign was not what they assumed.
    """
    rule = chosen.method.trim
    if rule is None:
        return 1, 1
    extra = (rule.tie_policy == "exact_k" or chosen.is_16_bit) + chosen.method.asks_majority
    if rule.scope == "tensor":
        return 3, 3 + extra  # all but the first from the page cache, where it has room
    return 1, 3 + extra


def _guess_bytes(chosen: MergePlan) -> int:
    """Of the sample by which a whole-model scan guesses where to count finely."""
    if chosen.method.trim is None or chosen.method.trim.scope == "tensor":
        return 0
    models = (chosen.base, *chosen.experts)
    return sum(
        (stop - start) * ITEM_BYTES[m.tensors[name].dtype]
        for name, start, stop in sample_slices(chosen)[0]
        for m in models
    )


def _free(out: Path) -> int:
    existing = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free


def _sample(job: Job) -> Sample:
    """Thresholds and kept shares as the sampled slices have them, and the time at the rate they were counted."""
    chosen = job.plan
    worker = Worker(chosen, partial(open_reader, backend=job.resources.backend), job.resources.kernel)
    rule = chosen.method.trim
    thresholds: list[float | None] = []
    kept: list[float | None] = []
    zeros: list[float] = []
    magnitudes, weights = worker.sample(*sample_slices(chosen)) if chosen.method.operand == "delta" else ([], None)
    for i, sampled in enumerate(magnitudes):
        assert weights is not None
        zeros.append(float(weights[sampled == 0].sum() / weights.sum()) if sampled.size else 0.0)
        density = job.recipe.experts[i].parameters["density"].constant if rule else None
        rank = rule.rank(chosen.elements, density) if rule and density and rule.scope == "model" else None
        if not rank or not sampled.size:
            thresholds.append(None)
            kept.append(density)
            continue
        found = predict(sampled, weights, rank / chosen.elements)
        share = found.above + found.equal
        thresholds.append(found.value)
        kept.append(min(share, density or 1.0) if rule and rule.tie_policy == "exact_k" else share)
    return Sample(
        thresholds=tuple(thresholds),
        kept_fractions=tuple(kept),
        zero_fractions=tuple(zeros),
        seconds=_predict_seconds(chosen, worker),
    )


def _predict_seconds(chosen: MergePlan, worker: Worker) -> float:
    """Time of the likely case, at the rate one unit in the middle is read from where it lies and touched once."""
    units = list(chosen.units())
    unit = units[len(units) // 2]
    began, read = time.monotonic(), worker.requested_bytes
    for segment in worker.segments(unit):
        for model in worker.operands if segment.tensor.merged else [worker.base]:
            span = model.read(segment.tensor.source, segment.start, segment.stop)
            torch.frombuffer(span.view, dtype=torch.uint8).max()
            span.release()
    rate = (worker.requested_bytes - read) / max(time.monotonic() - began, 1e-6)
    likely = 1 if chosen.method.trim is None else 2
    return (likely * chosen.input_bytes + chosen.layout.total_bytes) / rate


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    method: str = "ties",
    semantics: str | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    parameters: Mapping[str, object] | None = None,
    expert_parameters: Sequence[Mapping[str, object]] | None = None,
    elect_from: Mapping[str, Tensor] | None = None,
    kernel: KernelKind = "auto",
    threads: int | None = None,
    **options: object,
) -> dict[str, Tensor]:
    """Merge tensors in memory, with the semantics and the bytes of `merge`.

    base, experts, elect_from: name -> CPU tensor. parameters, expert_parameters, options: as in a recipe's
    `parameters`, under each model, and in its `ties_dist:` block. Returns name -> tensor of the base's dtype, or of
    `out_dtype`.
    """
    names = [f"memory/expert-{i}" for i in range(len(experts))]
    given = expert_parameters or [{}] * len(experts)
    if len(given) != len(experts):
        raise RecipeError(f"expert_parameters has {len(given)} entries for {len(experts)} experts; give one each.")
    block = dict(options) | ({"elect_from": "memory/elect-from"} if elect_from is not None else {})
    document: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": n, "parameters": dict(p)} for n, p in zip(names, given, strict=True)],
        "parameters": dict(parameters or {}),
    }
    document |= {"base_model": "memory/base"} if base is not None else {}
    document |= {"ties_dist": block} if block else {}
    document |= {key: value for key, value in (("dtype", dtype), ("out_dtype", out_dtype)) if value}
    recipe = load_recipe(document, methods=METHODS, semantics=semantics, fetch=lambda location: Path(location.text))
    parts = [base if base is not None else experts[0], *experts, *([elect_from] if elect_from is not None else [])]
    opened = [_in_memory(name, tensors) for name, tensors in zip(("base", *names, "elect_from"), parts, strict=False)]
    job = assemble(recipe, opened, [str(i) for i in range(len(opened))], Resources(threads=threads, kernel=kernel))
    readers = {
        m.path: c.reader for m, c in zip((job.plan.base, *job.plan.experts, *job.plan.extras), opened, strict=True)
    }
    writer = MemoryWriter()
    for shard in job.plan.layout.shards:
        writer.create(shard.name, shard.size)
    passes = Passes(
        plan=job.plan,
        worker=Worker(job.plan, lambda path: readers[str(path)], kernel),
        executor=LocalExecutor(job.plan.threads),
        writer=writer,
        keeper=Forgetful(),
        progress=LogProgress(),
    )
    passes.find_thresholds()
    passes.merge_missing()
    passes.prove()
    passes.settle_majority()
    passes.check_numbers()
    return _tensors(job, writer, parts[0])


_HEADER_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _in_memory(name: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A state dict as a checkpoint: each tensor is a file of its own."""
    entries, files = {}, {}
    for key, tensor in tensors.items():
        if tensor.dtype not in _HEADER_NAMES:
            raise RecipeError(f"{name}: tensor '{key}' has dtype {tensor.dtype}, which cannot be merged or copied.")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        files[key] = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        entries[key] = TensorEntry(
            name=key,
            dtype=_HEADER_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            file=key,
            start=0,
            stop=tensor.numel() * tensor.element_size(),
        )
    return Checkpoint(
        name=name,
        reader=MemoryReader(files),
        shards=("memory",),
        files={},
        tensors=entries,
        config=None,
        metadata={},
        index_file=None,
        index_metadata={},
        notes=(),
    )


def _tensors(job: Job, writer: MemoryWriter, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    dtypes = {name: dtype for dtype, name in _HEADER_NAMES.items()}
    for shard in job.plan.layout.shards:
        for spec, start in zip(shard.tensors, shard.starts, strict=True):
            content = memoryview(writer.files[shard.name])[start : start + spec.nbytes]
            flat = (
                torch.frombuffer(content, dtype=dtypes[spec.dtype])
                if spec.nbytes
                else torch.empty(0, dtype=dtypes[spec.dtype])
            )
            merged[spec.name] = flat.reshape(spec.shape)
    return {name: merged[name] for name in base}
