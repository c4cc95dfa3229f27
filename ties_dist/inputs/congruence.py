"""Do base and experts fit together, and which tensors does a merge write, from the catalogues alone.

Every mismatch of every expert goes into one CheckpointError. What only bytes can tell (counters that moved) is handed
on as `EqualCheck`s. The base decides names, shapes and dtypes of the output; for methods that merge weights, not
deltas, the first model is the base.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final, Literal

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.dtypes import DTYPE_BITS, FLOATS, PACKING, QUANTISED
from ties_dist.errors import CheckpointError
from ties_dist.inputs.aliases import Aliases
from ties_dist.inputs.configs import configs, says_tied
from ties_dist.inputs.equality import same_numbers
from ties_dist.inputs.names import hits, is_head, is_vocabulary
from ties_dist.inputs.remedies import Kind, Mismatch, remedies
from ties_dist.messages import listing, show

# How GPTQ, AWQ, compressed-tensors, bitsandbytes and MXFP4 name the matrices of integers they pack weights into.
_PACKED: Final = re.compile(r"(^|[._])(weight|qweight|qzeros|weight_packed|packed_weight|blocks|scales)$")

_SHOWN: Final = 20  # lines of one error
_FAMILIES: Final = 2_000  # names that difflib is asked about


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputTensor:
    """A tensor of the output.

    action: "merge", or "copy" of the base's bytes. source: the parameter to read in every checkpoint, by its canonical
    name; of several tensors that one parameter is written as, one is `counted`: a merged parameter is part of d once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    action: Literal["merge", "copy"]
    source: str
    counted: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualCheck:
    """A tensor that is not merged, of the base and of an expert, counted from 1: its bytes must be equal.

    message: for when they are not.
    """

    base: Parameter
    expert: int
    other: Parameter
    message: str


@dataclass(frozen=True, kw_only=True)
class MergeSet:
    """What a merge writes, sorted by name; what to say; what to check once bytes are read."""

    tensors: tuple[OutputTensor, ...]
    notes: tuple[str, ...]
    equal: tuple[EqualCheck, ...]

    @property
    def elements(self) -> int:
        """d, the number of mergeable elements."""
        return sum(tensor.numel for tensor in self.tensors if tensor.counted)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why models may not fit, by what is not tensors. rows_fit: whether only the numbers of tokens may differ."""

    lines: Sequence[str] = ()
    rows_fit: bool = True


def compare(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    exclude: Sequence[str],
    non_float: str,
    operand: str,
    aliases: Aliases | None = None,
    explain: Callable[[], Explanation] | None = None,
) -> MergeSet:
    """The mergeable set of base and experts, whose parameters have their canonical names, by `aliases`.

    exclude: fnmatch globs over whole tensor names; what they match is copied from the base, and ignored in experts.
    non_float: "base" skips the check of non-float tensors. operand: of the method; for "weight" `base` is the
    first model and may stand among the experts too. explain: asked where something does not fit.
    Raises CheckpointError with everything that does not fit.
    """
    comparison = _Comparison(base, experts, aliases or Aliases(), non_float=non_float, operand=operand)
    comparison.apply_exclude(exclude)
    comparison.refuse_quantised()
    for name in sorted(base.parameters):
        comparison.add(base.parameters[name])
    comparison.add_extra()
    comparison.refuse_lone_scales()
    comparison.raise_problems(explain)
    return comparison.merge_set()


def compare_bytes(opened: Sequence[Checkpoint], merge_set: MergeSet) -> None:
    """Read the few tensors that must be equal though they are not merged. Raises CheckpointError naming all."""
    base = opened[0].opened
    problems = [
        check.message
        for check in merge_set.equal
        if not same_numbers(base, check.base, opened[check.expert].opened, check.other)
    ]
    if problems:
        raise CheckpointError(listing("tensors that must be equal are not:", problems))


class _Comparison:
    """The comparison while it runs. Linear in tensors x checkpoints: 100,000 x 4 is an ordinary mixture of experts."""

    def __init__(
        self, base: Checkpoint, experts: Sequence[Checkpoint], aliases: Aliases, *, non_float: str, operand: str
    ) -> None:
        self.base, self.aliases = base, aliases
        self.base_word = "base" if operand != "weight" else f"first model '{base.name}'"
        kind = "expert" if operand != "weight" else "model"
        # (position, how messages call it, catalogue); a first model listed again among the models is itself.
        self.experts = [
            (i, f"{kind} '{expert.name}'", expert) for i, expert in enumerate(experts, start=1) if expert is not base
        ]
        self.models = [(0, self.base_word, base), *self.experts]
        self.delta = operand != "weight"
        self.check_non_float = non_float != "base"
        self.names = set(aliases.canonical).union(*(model.parameters for _, _, model in self.models))
        self.excluded: set[str] = set()
        self.packed: set[str] = set()  # modules of the base that hold quantised weights, excluded ones included
        self.problems = list(aliases.problems)  # with a checkpoint or an option as a whole
        self.mismatches: list[Mismatch] = []
        self.advice = dict.fromkeys(aliases.advice)  # whole sentences
        self.notes = list(aliases.notes)
        self.counts: Counter[tuple[str, str]] = Counter()  # notes with a number of tensors in between
        self.tensors: list[OutputTensor] = []
        self.equal: list[EqualCheck] = []
        self.lacks_rows = False  # of its vocabulary, an expert

    # -- options and whole checkpoints --------------------------------------------------------------------------------

    def apply_exclude(self, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            matched = hits(pattern, self.names)
            if not matched:
                self.problems.append(f"exclude: '{pattern}' matches no tensor{_nearest(pattern, self.names)}.")
                self.advice["Patterns of `exclude` are globs over whole names: '*.bias', 'model.layers.0.*'."] = None
            self.excluded |= matched

    def refuse_quantised(self) -> None:
        """Numbers whose meaning is in other tensors. By what is stored: a config's word may be left over.

        Such a model is compared no further: every code and scale of it would be a line.
        """
        refused: set[int] = set()
        for i, label, model in self.models:
            found: dict[str, list[str]] = {}
            for entry in model.parameters.values():
                if not _is_quantised(entry):
                    continue
                if i == 0:
                    self.packed.add(entry.name.rpartition(".")[0])
                # Fractions of a byte have no element boundary at which a copy could be cut.
                if entry.name not in self.excluded or (i == 0 and DTYPE_BITS[entry.dtype] < 8):
                    found.setdefault(entry.dtype, []).append(entry.name)
            said = _quantisation(model)
            for dtype, names in sorted(found.items()):
                method = f", by {said}" if said else ""
                self.problems.append(
                    f"{label}: {_tensors(len(names))} quantised as {dtype} ({show(min(names))}){method}."
                )
                refused.add(i)
            if said and not any(map(_is_quantised, model.parameters.values())):
                self.notes.append(f"{label}: config.json has a quantization_config ({said}), and its weights are plain")
        if refused:
            self.advice["Quantised weights are not read yet: name the model that they were made from."] = None
        if 0 in refused:
            self.packed, self.experts = set(), []
        self.experts = [each for each in self.experts if each[0] not in refused]

    def refuse_lone_scales(self) -> None:
        """A quantised weight copied from the base keeps its meaning only with the base's scales."""
        for tensor in self.tensors:
            module, _, last = tensor.name.rpartition(".")
            if tensor.action == "merge" and "scale" in last and module in self.packed:
                self._mismatch("scales", tensor.name, "scales quantised weights that are excluded")

    # -- tensor by tensor ---------------------------------------------------------------------------------------------

    def add(self, base: Parameter) -> None:
        """One parameter of the base against every expert's."""
        name, excluded = base.name, base.name in self.excluded
        if excluded:
            self.counts["exclude: ", f" copied from the {self.base_word}"] += 1
        else:
            if base.dtype == "F64":
                self._mismatch("float64", name, f"{self.base_word} has dtype F64")
            for i, label, expert in self.experts:
                self._compare(base, i, label, expert)
        merged = not excluded and base.dtype in FLOATS
        for i, written in enumerate(self.aliases.written.get(name, (name,))):
            self.tensors.append(
                OutputTensor(
                    name=written,
                    dtype=base.dtype,
                    shape=base.shape,
                    action="merge" if merged else "copy",
                    source=name,
                    counted=merged and i == 0,
                )
            )

    def _compare(self, base: Parameter, i: int, label: str, expert: Checkpoint) -> None:
        entry = expert.parameters.get(base.name)
        if entry is None:
            if base.dtype in FLOATS:
                tied = is_head(base.name) and says_tied(expert.config)
                hint = " (its config.json says tie_word_embeddings: true)" if tied else ""
                self._mismatch("missing", base.name, f"missing in {label}{hint}", len(base.shape))
            else:
                self.counts[f"{label}: ", f" absent, not floating point; the {self.base_word}'s stay"] += 1
        elif (base.dtype in FLOATS) != (entry.dtype in FLOATS):
            self._mismatch("dtype", base.name, f"{label} has dtype {entry.dtype}, {self.base_word} {base.dtype}")
        elif base.dtype in FLOATS:
            self._compare_float(base, label, entry)
        elif self.check_non_float:
            self._compare_non_float(base, i, label, entry)

    def _compare_float(self, base: Parameter, label: str, entry: Parameter) -> None:
        if entry.dtype == "F64":
            self._mismatch("float64", base.name, f"{label} has dtype F64, {self.base_word} {base.dtype}")
        elif entry.dtype != base.dtype:
            self.counts[f"{label}: ", f" stored as {entry.dtype}, {self.base_word} {base.dtype}"] += 1
        if entry.shape == base.shape:
            return
        rows = is_vocabulary(base.name) and entry.shape[1:] == base.shape[1:]
        kind: Kind = "empty" if entry.numel == 0 < base.numel else "rows" if rows else "shape"
        found = f"{label} has shape {entry.shape}, {self.base_word} {base.shape}"
        self._mismatch(kind, base.name, found, len(base.shape))
        self.lacks_rows |= rows and entry.shape < base.shape

    def _compare_non_float(self, base: Parameter, i: int, label: str, entry: Parameter) -> None:
        if (entry.dtype, entry.shape) != (base.dtype, base.shape):
            found = f"{label} has {_kind(entry)}, {self.base_word} {_kind(base)}"
            self._mismatch("non_float", base.name, found, len(base.shape))
            return
        message = (
            f"{show(base.name)} ({_kind(base)}, not merged): {label} differs from the {self.base_word}. "
            "`non_float: base` takes the base's all the same."
        )
        self.equal.append(EqualCheck(base=base, expert=i, other=entry, message=message))

    def add_extra(self) -> None:
        """Tensors of experts that the base does not have."""
        for _, label, expert in self.experts:
            for name in sorted(expert.parameters.keys() - self.base.parameters.keys()):
                if name in self.excluded:
                    self.counts[f"{label}: ", f" excluded that the {self.base_word} does not have"] += 1
                elif expert.parameters[name].dtype in FLOATS:
                    ndim = len(expert.parameters[name].shape)
                    self._mismatch("extra", name, f"extra in {label}, {self.base_word} does not have it", ndim)
                else:
                    self.counts[f"{label}: ", f" dropped, not floating point and not in the {self.base_word}"] += 1

    # -- outcome ------------------------------------------------------------------------------------------------------

    def _mismatch(self, kind: Kind, name: str, found: str, ndim: int = 0) -> None:
        self.mismatches.append(Mismatch(name=name, found=found, kind=kind, ndim=ndim))

    def raise_problems(self, explain: Callable[[], Explanation] | None) -> None:
        """Everything in one error, in the layout of style.md; a long list folds the numbers of layers."""
        if not self.mismatches and not self.problems:
            return
        explained = explain() if explain is not None and self.mismatches else Explanation()
        title = f"the models do not fit the {self.base_word}:"
        if wrong := len({each.name for each in self.mismatches}):
            title = f"{wrong} of {len(self.names)} tensors do not match the {self.base_word}:"
        rows = sorted(((each.name, each.found) for each in self.mismatches), key=lambda row: row[0])
        problems = [*explained.lines, *self.problems]
        if len(rows) + len(problems) > _SHOWN:
            rows = _folded(rows)
        width = max((len(show(name)) for name, _ in rows[:_SHOWN]), default=0) + 1
        lines = problems + [f"{show(name) + ':':<{width}} {found}" for name, found in rows]
        said = remedies(
            self.mismatches,
            self.names,
            base_word=self.base_word,
            vocabulary={name for name in self.names if is_vocabulary(name)},
            rows_fit=explained.rows_fit and (self.delta or not self.lacks_rows),
            short_rows_fit=self.delta,
        )
        raise CheckpointError(listing(title, lines, " ".join([*said, *self.advice]), limit=_SHOWN))

    def merge_set(self) -> MergeSet:
        notes = [*self.notes, *(f"{before}{_tensors(count)}{after}" for (before, after), count in self.counts.items())]
        if not any(tensor.counted and tensor.numel for tensor in self.tensors):
            notes.append(f"nothing to merge (d = 0): the output is a copy of the {self.base_word}")
        tensors = sorted(self.tensors, key=lambda tensor: tensor.name)
        return MergeSet(tensors=tuple(tensors), notes=tuple(notes), equal=tuple(self.equal))


# -- what names, configs and headers say ------------------------------------------------------------------------------


def _quantisation(model: Checkpoint) -> str | None:
    """The method that config.json names; None where it names none."""
    for config in configs(model.config):
        if said := config.get("quantization_config") or config.get("compression_config"):
            return str(said.get("quant_method", "no method")) if isinstance(said, dict) else "no method"
    return None


def _is_quantised(entry: Parameter) -> bool:
    packed = entry.dtype in PACKING and len(entry.shape) > 1 and _PACKED.search(entry.name) is not None
    return packed or entry.dtype in QUANTISED


# -- words for messages -----------------------------------------------------------------------------------------------


def _kind(entry: Parameter) -> str:
    return f"{entry.dtype} {entry.shape}"


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count:,} tensors"


def _fold(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _folded(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows that differ only in numbers within the name, as one row with a glob and their count."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, found in rows:
        groups.setdefault((_fold(name), found), []).append(name)
    return [
        (names[0], found) if len(names) == 1 else (family, f"{found} ({len(names):,} tensors)")
        for (family, found), names in groups.items()
    ]


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The nearest names, layer numbers folded: difflib over 100,000 names takes a minute, over the families none."""
    families = sorted({_fold(name) for name in names})[:_FAMILIES]
    close = get_close_matches(_fold(pattern), families, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(show(name) for name in close)}" if close else ""
