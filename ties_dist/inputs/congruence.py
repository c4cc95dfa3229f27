"""Do base and experts fit together, and which tensors does a merge write, from the catalogues alone.

Every mismatch of every expert goes into one CheckpointError. What only bytes can tell (tied weights that differ,
counters that moved) is handed to the engine as `EqualCheck`s. The base decides names, shapes and dtypes of the output;
for methods that merge weights, not deltas, the first model is the base.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from typing import Final, Literal

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.dtypes import DTYPE_BITS, FLOATS, PACKING, QUANTISED
from ties_dist.errors import CheckpointError
from ties_dist.messages import listing, show

# How GPTQ, AWQ, compressed-tensors, bitsandbytes and MXFP4 name the matrices of integers they pack weights into.
_PACKED: Final = re.compile(r"(^|[._])(weight|qweight|qzeros|weight_packed|packed_weight|blocks|scales)$")

# Tensors of one row per vocabulary entry, best match first. A numbered part before the name means a layer's own tensor
# (`layers.0.attention.output.weight`), not the model's.
_LOOKUPS: Final = "shared embed_tokens wte word_embeddings embed_in tok_embeddings token_embedding embeddings embedding"
_EMBEDDING: Final = re.compile(rf"(?:^|\.)({_LOOKUPS.replace(' ', '|')})\.weight$")
_SURE_HEAD: Final = re.compile(r"(^|\.)(lm_head|lm_head\.linear|generator_lm_head|embed_out)\.weight$")
_OTHER_HEAD: Final = re.compile(r"(^|\.)(output|output_layer|proj_out|ff_out|cls\.predictions\.decoder)\.weight$")
_HEAD_BIAS: Final = re.compile(r"(^|\.)(lm_head|cls\.predictions|cls\.predictions\.decoder)\.bias$")
_NUMBERED: Final = re.compile(r"(^|\.)\d+\.")
# Stored by some versions, computed by others.
_BUFFER: Final = re.compile(r"(inv_freq|rotary_emb\.\w+|masked_bias|attn\.bias)$")

_TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config", "decoder")
_SHOWN: Final = 20  # lines of one error
_FAMILIES: Final = 2_000  # names that difflib is asked about


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputTensor:
    """A tensor of the output.

    action: "merge", or "copy" of the base's bytes. source: the tensor to read in every checkpoint; another name than
    `name` only for a tied head, whose source is the embedding. counted: part of d (merged, and no alias).
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
    """Two stored tensors of one dtype and shape whose bytes must be equal; `message` is for when they are not.

    left_model, right_model: 0 is the base, i the i-th expert counted from 1. Tied heads against the embedding of the
    same checkpoint, and non-float tensors of an expert against the base's.
    """

    reason: Literal["tied", "non_float"]
    left_model: int
    left: Parameter
    right_model: int
    right: Parameter
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


def compare(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    *,
    exclude: Sequence[str],
    vocab: str,
    non_float: str,
    operand: str,
) -> MergeSet:
    """The mergeable set of base and experts.

    exclude: fnmatch globs over whole tensor names; what they match is copied from the base, and ignored in experts.
    vocab: "error" or "truncate". non_float: "base" skips the check of non-float tensors. operand: "delta" or "weight";
    in the latter `base` is the first model and may stand among the experts too.
    Raises CheckpointError with everything that does not fit.
    """
    comparison = _Comparison(base, experts, vocab=vocab, non_float=non_float, operand=operand)
    comparison.apply_exclude(exclude)
    comparison.refuse_quantised()
    comparison.find_tied()
    for name in sorted(base.parameters):
        comparison.add(base.parameters[name])
    comparison.add_extra()
    comparison.refuse_lone_scales()
    comparison.raise_problems()
    return comparison.merge_set()


class _Comparison:
    """The comparison while it runs. Linear in tensors x checkpoints: 100,000 x 4 is an ordinary mixture of experts."""

    def __init__(
        self, base: Checkpoint, experts: Sequence[Checkpoint], *, vocab: str, non_float: str, operand: str
    ) -> None:
        self.base = base
        self.base_word = "base" if operand == "delta" else f"first model '{base.name}'"
        kind = "expert" if operand == "delta" else "model"
        # (position, how messages call it, catalogue); a first model listed again among the models is itself.
        self.experts = [
            (i, f"{kind} '{expert.name}'", expert) for i, expert in enumerate(experts, start=1) if expert is not base
        ]
        self.models = [(0, self.base_word, base), *self.experts]
        self.truncate = vocab == "truncate"
        self.check_non_float = non_float != "base"
        self.names = set().union(*(model.parameters for _, _, model in self.models))
        self.excluded: set[str] = set()
        self.quantised: dict[int, set[str]] = {i: set() for i, _, _ in self.models}  # reported, by model
        self.packed: set[str] = set()  # modules of the base that hold quantised weights, excluded ones included
        self.alias: dict[str, str] = {}  # tied head -> embedding
        self.problems: list[str] = []  # with a checkpoint or an option as a whole
        self.mismatches: list[tuple[str, str]] = []  # (tensor, what is wrong with it)
        self.remedies: dict[str, None] = {}  # "a, or b, or c": ordered, each once
        self.advice: dict[str, None] = {}  # whole sentences
        self.notes: dict[str, None] = {}
        self.counts: Counter[tuple[str, str]] = Counter()  # notes with a number of tensors in between
        self.tensors: list[OutputTensor] = []
        self.equal: list[EqualCheck] = []

    # -- options and whole checkpoints --------------------------------------------------------------------------------

    def apply_exclude(self, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            match = re.compile(translate(pattern)).match
            hits = {name for name in self.names if match(name)}
            if not hits:
                self.problems.append(f"exclude: '{pattern}' matches no tensor{_nearest(pattern, self.names)}.")
                self.advice["Patterns of `exclude` are globs over whole names: '*.bias', 'model.layers.0.*'."] = None
            self.excluded |= hits

    def refuse_quantised(self) -> None:
        """Quantised weights, by config and by what is stored: numbers whose meaning is in other tensors."""
        before = len(self.problems)
        for i, label, model in self.models:
            for config in _configs(model):
                if method := config.get("quantization_config") or config.get("compression_config"):
                    name = method.get("quant_method") if isinstance(method, dict) else None
                    self.problems.append(f"{label}: config.json has a quantization_config ({name or 'no method'}).")
                    break
            found: dict[str, list[str]] = {}
            for entry in model.parameters.values():
                if not _is_quantised(entry):
                    continue
                if i == 0:
                    self.packed.add(entry.name.rpartition(".")[0])
                # Fractions of a byte have no element boundary at which a copy could be cut.
                if entry.name not in self.excluded or (i == 0 and DTYPE_BITS[entry.dtype] < 8):
                    self.quantised[i].add(entry.name)
                    found.setdefault(entry.dtype, []).append(entry.name)
            for dtype, names in sorted(found.items()):
                self.problems.append(f"{label}: {_tensors(len(names))} quantised as {dtype} ({show(min(names))}).")
        if len(self.problems) > before:
            self.advice["Quantised weights are not supported yet: dequantise the model first."] = None

    def refuse_lone_scales(self) -> None:
        """A quantised weight copied from the base keeps its meaning only with the base's scales."""
        for tensor in self.tensors:
            module, _, last = tensor.name.rpartition(".")
            if tensor.action == "merge" and "scale" in last and module in self.packed:
                self.mismatches.append((tensor.name, "scales quantised weights that are excluded; exclude it too"))

    # -- tied weights -------------------------------------------------------------------------------------------------

    def find_tied(self) -> None:
        """Heads that are another name of an embedding, because config.json says `tie_word_embeddings: true`.

        An expert whose config says nothing is as the base is. A head that only a tied expert stores is an alias too: it
        is dropped, and checked against that expert's embedding.
        """
        embeddings = sorted(
            name for name in self.base.parameters if _EMBEDDING.search(name) and not _NUMBERED.search(name)
        )
        heads = sorted(name for name in self.names if _is_head(name))
        base_tied = _says_tied(self.base)
        for i, label, model in self.models:
            tied = _says_tied(model)
            stored = [model.parameters[name] for name in embeddings if name in model.parameters]
            for head in heads:
                if base_tied and tied is False and (head in model.parameters or head in self.base.parameters):
                    self.problems.append(
                        f"{label}: config.json says tie_word_embeddings: false, the {self.base_word}'s says true, "
                        f"so {show(head)} is a tensor of its own in one and the embedding in the other."
                    )
                    break
                ignored = head in self.excluded and head not in self.base.parameters
                if (base_tied if tied is None else tied) and head in model.parameters and stored and not ignored:
                    entry = model.parameters[head]
                    self._tie(i, label, entry, max(stored, key=lambda e: _likeness(entry, e)))

    def _tie(self, i: int, label: str, head: Parameter, embedding: Parameter) -> None:
        pair = f"{label}: {show(head.name)} and {show(embedding.name)}"
        if head.shape != embedding.shape and not _SURE_HEAD.search(head.name):
            return  # another tensor that happens to be called `output`
        if i == 0 or head.name not in self.base.parameters:
            self.alias[head.name] = embedding.name
        if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
            self.problems.append(
                f"{pair} are tied (tie_word_embeddings: true), but one is {_kind(head)}, the other {_kind(embedding)}."
            )
        elif i == 0 or embedding.name not in self.excluded:
            message = (
                f"{pair} differ, though config.json says tie_word_embeddings: true. Loaders use the embedding alone: "
                "remove the head, or let config.json say false if the model has two."
            )
            check = EqualCheck(reason="tied", left_model=i, left=head, right_model=i, right=embedding, message=message)
            self.equal.append(check)

    # -- tensor by tensor ---------------------------------------------------------------------------------------------

    def add(self, base: Parameter) -> None:
        """One tensor of the base against every expert's."""
        name, word = base.name, self.base_word
        source = self.alias.get(name, name)
        excluded = source in self.excluded
        if name in self.quantised[0]:
            return
        if source != name:
            if name in self.excluded and not excluded:
                self.mismatches.append((name, f"is tied to {show(source)}: exclude both or neither"))
            self.notes[f"{show(name)} is tied to {show(source)} and counted once"] = None
        elif excluded:
            self.counts["exclude: ", f" copied from the {word}"] += 1
        else:
            if base.dtype == "F64":
                self._mismatch(name, f"{word} has dtype F64", "convert F64 to F32 first (arithmetic is float32)")
            for i, label, expert in self.experts:
                if name not in self.quantised[i]:
                    self._compare(base, i, label, expert)
        merged = not excluded and base.dtype in FLOATS
        self.tensors.append(
            OutputTensor(
                name=name,
                dtype=base.dtype,
                shape=base.shape,
                action="merge" if merged else "copy",
                source=source,
                counted=merged and source == name,
            )
        )

    def _compare(self, base: Parameter, i: int, label: str, expert: Checkpoint) -> None:
        entry = expert.parameters.get(base.name)
        if entry is None:
            if base.dtype in FLOATS:
                tied = _is_head(base.name) and _says_tied(expert)
                hint = " (its config.json says tie_word_embeddings: true)" if tied else ""
                self._mismatch(base.name, f"missing in {label}{hint}")
            else:
                self.counts[f"{label}: ", f" absent, not floating point; the {self.base_word}'s stay"] += 1
        elif (base.dtype in FLOATS) != (entry.dtype in FLOATS):
            self._mismatch(base.name, f"{label} has dtype {entry.dtype}, {self.base_word} {base.dtype}")
        elif base.dtype in FLOATS:
            self._compare_float(base, label, entry)
        elif self.check_non_float:
            self._compare_non_float(base, i, label, entry)

    def _compare_float(self, base: Parameter, label: str, entry: Parameter) -> None:
        if entry.dtype == "F64":
            found = f"{label} has dtype F64, {self.base_word} {base.dtype}"
            self._mismatch(base.name, found, "convert F64 to F32 first (arithmetic is float32)")
        elif entry.dtype != base.dtype:
            self.counts[f"{label}: ", f" stored as {entry.dtype}, {self.base_word} {base.dtype}"] += 1
        if entry.shape == base.shape:
            return
        vocabulary = _is_vocabulary(base.name)
        extra = _extra_rows(entry.shape, base.shape) if vocabulary else 0
        if extra and self.truncate:
            self.counts[f"{label}: vocab: truncate drops {extra} rows of ", ""] += 1
            return
        remedies = ["resize the vocabulary first", "drop the extra rows with `vocab: truncate`"][
            : vocabulary + (extra > 0)
        ]
        self._mismatch(base.name, f"{label} has shape {entry.shape}, {self.base_word} {base.shape}", *remedies)

    def _compare_non_float(self, base: Parameter, i: int, label: str, entry: Parameter) -> None:
        if (entry.dtype, entry.shape) != (base.dtype, base.shape):
            found = f"{label} has {_kind(entry)}, {self.base_word} {_kind(base)}"
            self._mismatch(base.name, found, "keep the base's with `non_float: base`")
            return
        message = (
            f"{show(base.name)} ({_kind(base)}, not merged): {label} differs from the {self.base_word}. "
            "`non_float: base` takes the base's all the same."
        )
        check = EqualCheck(reason="non_float", left_model=0, left=base, right_model=i, right=entry, message=message)
        self.equal.append(check)

    def add_extra(self) -> None:
        """Tensors of experts that the base does not have."""
        for _, label, expert in self.experts:
            for name in sorted(expert.parameters.keys() - self.base.parameters.keys()):
                if name in self.excluded:
                    self.counts[f"{label}: ", f" excluded that the {self.base_word} does not have"] += 1
                elif name in self.alias:
                    self.notes[f"{label}: {show(name)}, tied to {show(self.alias[name])}, is dropped"] = None
                elif expert.parameters[name].dtype in FLOATS:
                    self._mismatch(name, f"extra in {label}, {self.base_word} does not have it")
                else:
                    self.counts[f"{label}: ", f" dropped, not floating point and not in the {self.base_word}"] += 1

    # -- outcome ------------------------------------------------------------------------------------------------------

    def _mismatch(self, name: str, found: str, *remedies: str) -> None:
        self.mismatches.append((name, found))
        self.remedies |= dict.fromkeys(remedies)
        if _BUFFER.search(name):
            last = name.rpartition(".")[2]
            self.advice[f"`exclude: ['*.{last}']` leaves alone a buffer that models compute themselves."] = None

    def raise_problems(self) -> None:
        """Everything in one error, in the layout of style.md; a long list folds the numbers of layers."""
        if not self.mismatches and not self.problems:
            return
        title = f"the models do not fit the {self.base_word}:"
        if wrong := len({name for name, _ in self.mismatches}):
            title = f"{wrong} of {len(self.names)} tensors do not match the {self.base_word}:"
        rows = sorted(self.mismatches, key=lambda row: row[0])
        if len(rows) + len(self.problems) > _SHOWN:
            rows = _folded(rows)
        width = max((len(show(name)) for name, _ in rows[:_SHOWN]), default=0) + 1
        lines = self.problems + [f"{show(name) + ':':<{width}} {found}" for name, found in rows]
        remedies = [*self.remedies, *(["list these names under `exclude`"] if self.mismatches else [])]
        sentences = [_sentence(remedies)] if remedies else []
        raise CheckpointError(listing(title, lines, " ".join([*sentences, *self.advice]), limit=_SHOWN))

    def merge_set(self) -> MergeSet:
        notes = [*self.notes, *(f"{before}{_tensors(count)}{after}" for (before, after), count in self.counts.items())]
        if not any(tensor.counted and tensor.numel for tensor in self.tensors):
            notes.append(f"nothing to merge (d = 0): the output is a copy of the {self.base_word}")
        return MergeSet(tensors=tuple(self.tensors), notes=tuple(notes), equal=tuple(self.equal))


# -- what names, configs and headers say ------------------------------------------------------------------------------


def _is_quantised(entry: Parameter) -> bool:
    packed = entry.dtype in PACKING and len(entry.shape) > 1 and _PACKED.search(entry.name) is not None
    return packed or entry.dtype in QUANTISED


def _is_head(name: str) -> bool:
    return bool(_SURE_HEAD.search(name) or _OTHER_HEAD.search(name)) and not _NUMBERED.search(name)


def _is_vocabulary(name: str) -> bool:
    return _is_head(name) or (bool(_EMBEDDING.search(name) or _HEAD_BIAS.search(name)) and not _NUMBERED.search(name))


def _likeness(head: Parameter, embedding: Parameter) -> tuple[bool, int, int]:
    """How well an embedding fits a head: same shape, same part of a multimodal model, the likelier name."""
    parts = zip(head.name.split("."), embedding.name.split("."), strict=False)
    common = next((i for i, (a, b) in enumerate(parts) if a != b), 0)
    kind = _EMBEDDING.search(embedding.name)
    assert kind is not None  # chosen by that pattern
    return head.shape == embedding.shape, common, -_LOOKUPS.split().index(kind[1])


def _extra_rows(shape: tuple[int, ...], base: tuple[int, ...]) -> int:
    """Rows that `shape` has beyond `base` where nothing else differs; 0 otherwise."""
    same = len(shape) == len(base) > 0 and shape[1:] == base[1:]
    return max(0, shape[0] - base[0]) if same else 0


def _configs(model: Checkpoint) -> Iterator[Mapping[str, object]]:
    """config.json and, for multimodal models, the language model's part of it."""
    config = model.config or {}
    yield config
    for key in _TEXT_CONFIGS:
        if isinstance(part := config.get(key), dict):
            yield part


def _says_tied(model: Checkpoint) -> bool | None:
    """`tie_word_embeddings`; None where config.json does not say.

    Where the parts of a config contradict each other, true: two stored tensors that differ are then an error, while a
    wrong "untied" would count the head twice and never be noticed.
    """
    said = [config["tie_word_embeddings"] for config in _configs(model) if "tie_word_embeddings" in config]
    return any(value is True for value in said) if said else None


# -- words for messages -----------------------------------------------------------------------------------------------


def _kind(entry: Parameter) -> str:
    return f"{entry.dtype} {entry.shape}"


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count:,} tensors"


def _sentence(remedies: Sequence[str]) -> str:
    text = ", or ".join(remedies)
    return f"{text[0].upper()}{text[1:]}."


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
