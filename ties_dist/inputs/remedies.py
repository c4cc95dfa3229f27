"""What to do about tensors that do not fit: only what was tried against the whole list of them.

A remedy is said where it and the others said with it leave nothing of the list. One that would hide what is wrong (an
expert of another depth, an untied head, another model altogether) is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ties_dist.inputs.names import hits, is_numbered
from ties_dist.messages import show

Kind = Literal["shape", "rows", "empty", "missing", "extra", "float64", "dtype", "non_float", "scales"]

_BUFFER: Final = re.compile(r"(^|\.)(inv_freq|rotary_emb\.\w+|attn\.masked_bias|attention\.masked_bias|masked_bias)$")
_MASK: Final = re.compile(r"(^|\.)(attn|attention)\.bias$")
_GLOBS: Final = 4
_FEW: Final = 0.5
"""Share of all tensors from which on two models are no fine-tunes of one another, whatever is excluded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """A tensor that does not fit. found: what is wrong with it. ndim: of the tensor, where it is stored."""

    name: str
    found: str
    kind: Kind
    ndim: int = 0

    @property
    def is_buffer(self) -> bool:
        """Stored by some versions, computed by others: GPT-2's causal mask is one, the bias of a layer is not."""
        return bool(_BUFFER.search(self.name)) or (bool(_MASK.search(self.name)) and self.ndim == 4)


def remedies(
    mismatches: Sequence[Mismatch],
    names: Collection[str],
    *,
    base_word: str,
    vocabulary: Collection[str],
    rows_fit: bool,
    short_rows_fit: bool,
) -> list[str]:
    """Sentences; none where nothing that is known helps.

    names: of all tensors of all models; vocabulary: those with a row per token. rows_fit: whether `vocab: base` merges
    tensors that differ in these; short_rows_fit: those with fewer than the base's, too.
    """
    said: list[str] = []
    rest = list(mismatches)

    def heal(kinds: Collection[Kind], text: str) -> None:
        nonlocal rest
        left = [each for each in rest if each.kind not in kinds]
        if len(left) < len(rest):
            said.append(text)
        rest = left

    heal(["float64"], "Convert F64 to F32 first (arithmetic is float32).")
    heal(["non_float"], "Keep the base's with `non_float: base`.")
    heal(["scales"], "Exclude the scales, too.")
    heal(
        ["empty"],
        "Empty tensors are what DeepSpeed ZeRO-3 leaves where it saves without gathering: make whole ones of its "
        "checkpoint with `zero_to_fp32.py`, or save with `stage3_gather_16bit_weights_on_model_save`.",
    )
    if rows_fit:
        heal(
            ["rows"],
            "`vocab: base` merges the rows that both have; rows of tokens that only one has stay the base's."
            if short_rows_fit
            else "`vocab: base` drops the rows that the base does not have.",
        )
    buffers = {each.name for each in rest if each.is_buffer}
    if buffers and (globs := shortest_globs(buffers, names)) is not None:
        said.append(f"`exclude: {_listed(globs)}` leaves alone a buffer that models compute themselves.")
        rest = [each for each in rest if each.name not in buffers]
    if rest and _may_be_left_out(rest, names, vocabulary):
        globs = shortest_globs({each.name for each in rest}, names)
        if globs is not None:
            said.append(f"`exclude: {_listed(globs)}` merges the others: what the base has of these is copied.")
            rest = []
    if rest:
        return [
            f"No option mends this: these models have other parts than the {base_word}. Name the base that "
            "each was tuned from."
        ]
    return said


def _may_be_left_out(rest: Sequence[Mismatch], names: Collection[str], vocabulary: Collection[str]) -> bool:
    """Whether excluding makes sense: of a few parts beside the layers, which one of the models does not have."""
    left_out = {each.name for each in rest}
    return (
        all(each.kind in ("missing", "extra") for each in rest)
        and len(left_out) < _FEW * len(names)
        and not any(map(is_numbered, left_out))
        and left_out.isdisjoint(vocabulary)
    )


def shortest_globs(wanted: Collection[str], names: Collection[str]) -> list[str] | None:
    """Globs over whole names that match all that is wanted and none else, each with as few words of a name as do.

    None where it takes more than a person would write.
    """
    found: list[str] = []
    covered: set[str] = set()
    for name in sorted(wanted):
        if name in covered:
            continue
        if len(found) == _GLOBS:
            return None
        for glob in _globs(name):
            matched = hits(glob, names)
            if matched <= set(wanted):
                found.append(glob)
                covered |= matched
                break
    return found


def _globs(name: str) -> Iterator[str]:
    """From its last word to the whole of it."""
    words = [re.sub(r"([\[*?])", r"[\1]", word) for word in name.split(".")]
    yield from ("*." + ".".join(words[-count:]) for count in range(1, len(words)))
    yield ".".join(words)


def _listed(globs: Sequence[str]) -> str:
    return "[" + ", ".join(f"'{show(glob)}'" for glob in globs) + "]"
