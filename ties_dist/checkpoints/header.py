"""The header of one safetensors file: parsed, and refused where `safetensors.safe_open` refuses it, or stricter.

Stricter where the library lets through what its own format text forbids: duplicate keys, unknown fields, a header that
does not start with '{'. Format: https://github.com/huggingface/safetensors, limits and arithmetic as in its
`tensor.rs`; a property test mutates real files and compares.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from ties_dist.dtypes import DTYPE_BITS
from ties_dist.messages import brief, show

LENGTH_BYTES: Final = 8
AGAIN: Final = "; copy or download it again"
_U64_MAX: Final = 2**64 - 1
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One stored tensor: `dtype` as the header spells it, [start, stop) in bytes from the beginning of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def parse_header(raw: bytes, *, file: str, size: int) -> tuple[dict[str, TensorEntry], dict[str, str], list[str]]:
    """Tensors (in the order of their bytes), `__metadata__`, and what is wrong with the header of one file.

    raw: the JSON, padding included, without the 8-byte length. size: bytes in the whole file.
    """
    repeated: list[str] = []
    if not raw.startswith(b"{"):
        return {}, {}, [f"header must start with '{{', found {raw[:1]!r}."]
    try:
        header = json.loads(
            raw.decode(), object_pairs_hook=collector(repeated), parse_int=natural, parse_constant=refuse
        )
        if b"\\u" in raw:  # an escaped lone surrogate parses, but is no text
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        return {}, {}, [f"header is not valid JSON: {error}"]
    problems = [f"key {show(key)} appears twice in the header." for key in repeated]
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append("__metadata__ must map text to text.")
        metadata = {}
    data_start = LENGTH_BYTES + len(raw)
    entries = []
    for name, declared in header.items():
        try:
            dtype, shape, start, stop = _declared(declared)
        except ValueError as error:
            problems.append(f"{show(name)}: {error}")
            continue
        start, stop = data_start + start, data_start + stop
        entries.append(TensorEntry(name=name, dtype=dtype, shape=shape, file=file, start=start, stop=stop))
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    if not problems:
        problems = _uncovered(entries, data_start=data_start, size=size)
    return {entry.name: entry for entry in entries}, metadata, problems


def _declared(declared: object) -> tuple[str, tuple[int, ...], int, int]:
    """Checked (dtype, shape, start, stop) of a tensor's JSON, offsets from the start of the data. Raises ValueError."""
    if not isinstance(declared, dict) or declared.keys() != _FIELDS:
        raise ValueError(f"expected an object of dtype, shape and data_offsets, found {brief(declared)}.")
    dtype, shape, offsets = declared["dtype"], declared["shape"], declared["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}.")
    if not _are_natural(shape):
        raise ValueError(f"shape must be a list of integers from 0 to 2^64-1, found {brief(shape)}.")
    if not _are_natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets must be [start, stop], 0 <= start <= stop < 2^64, found {brief(offsets)}.")
    # The library multiplies in 64 bits from the left: [2^32, 2^32, 0] overflows, [0, 2^32, 2^32] does not.
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):
        bits *= factor
        if bits > _U64_MAX:
            raise ValueError(f"shape {brief(shape)} of {dtype} overflows 64 bits.")
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        need = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits"
        raise ValueError(
            f"shape {shape} of {dtype} needs {need}, data_offsets {offsets} span {offsets[1] - offsets[0]}."
        )
    return dtype, tuple(shape), offsets[0], offsets[1]


def _uncovered(entries: Iterable[TensorEntry], *, data_start: int, size: int) -> list[str]:
    """Where tensors, in the order of their bytes, leave gaps, overlap, or do not end with the file."""
    problems = []
    covered = data_start
    for entry in entries:
        if entry.start != covered:
            what = "leaves a gap after" if entry.start > covered else "overlaps"
            at = f"it starts at data byte {entry.start - data_start}, expected {covered - data_start}"
            problems.append(f"{show(entry.name)}: {what} the tensor before: {at}.")
        covered = max(covered, entry.stop)
    if covered > size:
        problems.append(f"truncated: the tensors end at byte {covered:,}, the file at {size:,}{AGAIN}.")
    elif covered < size:
        problems.append(f"trailing bytes: the tensors end at byte {covered:,}, the file at {size:,}.")
    return problems


def _are_natural(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n <= _U64_MAX for n in value)


def natural(text: str) -> int | float:
    """Integers of a header; -1 and the library's trap -0 become floats, which no field accepts."""
    return float(text) if text[0] == "-" else int(text)


def refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def collector(repeated: list[str]) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    """A hook for json that notes repeated keys, which Python would drop silently."""

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.extend(key for key, count in counts.items() if count > 1)
        return unique

    return collect
