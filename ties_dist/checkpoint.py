"""Catalogue of a safetensors checkpoint: which tensor lies where, read from headers alone.

Reads kilobytes per shard, never weights, and refuses whatever `safetensors.safe_open` refuses, plus what the library
lets through against its own format text: duplicate keys, unknown fields, a header that does not start with '{'. All
problems of a checkpoint are collected into one CheckpointError. Format: https://github.com/huggingface/safetensors,
limits and arithmetic as in its `tensor.rs`; a property test mutates real files and compares.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Final

from xxhash import xxh3_128_hexdigest

from ties_dist.errors import CheckpointError, listing
from ties_dist.storage.base import Reader

MAX_HEADER_BYTES: Final = 100_000_000
"""The library's limit for a header; ours for an index and a config.json too."""

DTYPE_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of every dtype safetensors 0.8 knows."""

_LENGTH_BYTES: Final = 8
_U64_MAX: Final = 2**64 - 1
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
_SUFFIX: Final = ".safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")
_SHARD: Final = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


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


@dataclass(frozen=True, kw_only=True, slots=True)
class FileHeader:
    """One safetensors file: bytes in it, offset of its first tensor byte, xxh3_128 of the raw JSON header (hex)."""

    size: int
    data_start: int
    header_digest: str

    @property
    def identity(self) -> str:
        """Names the layout of the file without another read. Equal for files that differ in values only."""
        return f"{self.header_digest}-{self.size}"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The catalogue of one checkpoint.

    name: the model's short name, for messages. files: by file name, `shards` is their order. config: config.json, None
    where there is none (a single file never has one). metadata: `__metadata__` of the shards, the first shard wins.
    index_file: the index that was read, None where one file holds everything. notes: things to say, not errors.
    """

    name: str
    reader: Reader
    shards: tuple[str, ...]
    files: Mapping[str, FileHeader]
    tensors: Mapping[str, TensorEntry]
    config: Mapping[str, object] | None
    metadata: Mapping[str, str]
    index_file: str | None
    index_metadata: Mapping[str, object]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(entry.nbytes for entry in self.tensors.values())


def open_checkpoint(path: Path, *, name: str, reader: Callable[[Path], Reader]) -> Checkpoint:
    """The catalogue of a directory of safetensors or of one .safetensors file.

    reader: opens a directory; for a single file its parent, of which nothing but that file is looked at.
    Raises CheckpointError with all problems of this checkpoint.
    """
    if path.is_dir():
        catalogue = _Catalogue(reader(path))
        try:
            names = catalogue.reader.names()
        except OSError as error:
            raise CheckpointError(f"checkpoint '{name}': {path} cannot be listed: {error}") from error
        catalogue.choose(names)
        if "config.json" in names:
            catalogue.read_config()
    elif path.is_file():
        catalogue = _Catalogue(reader(path.parent))
        catalogue.choose_file(path.name)
    else:
        raise CheckpointError(f"checkpoint '{name}': {path} is neither a directory nor a file.")
    catalogue.read_shards()
    if catalogue.problems:
        count = len(catalogue.problems)
        title = f"checkpoint '{name}' ({path}) has {'a problem' if count == 1 else f'{count} problems'}:"
        raise CheckpointError(listing(title, catalogue.problems))
    return catalogue.finish(name)


class _Catalogue:
    """A checkpoint while it is read: every step adds what it finds, or a line to `problems`, and goes on."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.shards: tuple[str, ...] = ()
        self.weight_map: dict[str, str] | None = None  # None: no index
        self.index_file: str | None = None
        self.index_metadata: dict[str, object] = {}
        self.config: dict[str, object] | None = None
        self.files: dict[str, FileHeader] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        self.places: dict[str, list[str]] = {}  # tensor -> every shard that stores it

    # -- which files --------------------------------------------------------------------------------------------------

    def choose(self, names: Iterable[str]) -> None:
        """Settle which files of a directory are the checkpoint: its index, else model.safetensors, else its only file.

        An index wins over files it does not name, and `model.safetensors` over its neighbours, as in transformers;
        what is left aside is said.
        """
        names = sorted(names)
        weights = [n for n in names if n.endswith(_SUFFIX)]
        indexes = [n for n in names if n.endswith(_INDEX_SUFFIX)]
        if "model" + _INDEX_SUFFIX in indexes:
            indexes = ["model" + _INDEX_SUFFIX]
        if "adapter_config.json" in names:
            self.problems.append(f"adapter_config.json: {_ADAPTER}")
        elif len(indexes) > 1:
            self.problems.append(f"{len(indexes)} indexes ({_some(indexes)}): keep the one that is the model.")
        elif indexes:
            self._read_index(indexes[0])
        elif "model" + _SUFFIX in weights:
            self.shards = ("model" + _SUFFIX,)
        elif len(weights) == 1:
            self.choose_file(weights[0])
            if (shard := _SHARD.search(weights[0])) and int(shard[2]) > 1:
                self.problems.append(
                    f"{weights[0]}: is shard {int(shard[1])} of {int(shard[2])}; the others and the index are missing."
                )
        elif weights:
            self.problems.append(
                f"{len(weights)} .safetensors files ({_some(weights)}) and no {_INDEX_SUFFIX[1:]}: which of them are "
                "the model? Add the index, or name one file in the recipe."
            )
        elif other := [n for n in names if n.endswith(_OTHER_WEIGHTS)]:
            self.problems.append(f"{_some(other)}: only safetensors are read; {_CONVERT}")
        else:
            self.problems.append(f"no .safetensors file among {len(names)} files.")
        if self.shards and (stray := sorted(set(weights) - set(self.shards))):
            self.notes.append(f"files that are not part of the model are left aside: {_some(stray)}")

    def choose_file(self, file: str) -> None:
        """Settle on one file, which is then the whole checkpoint."""
        if file == "adapter_model.safetensors":
            self.problems.append(f"{file}: {_ADAPTER}")
        elif file.endswith(_INDEX_SUFFIX):
            self.problems.append(f"{file}: is an index; name the directory instead.")
        elif not file.endswith(_SUFFIX):
            self.problems.append(f"{file}: not a .safetensors file; {_CONVERT}")
        else:
            self.shards = (file,)

    def _read_index(self, file: str) -> None:
        self.index_file = file
        index = self._read_json(file, unique_keys=True)
        if index is None:
            return
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self.problems.append(f"{file}: 'weight_map' must map tensor names to files, found {_found(weight_map)}.")
            return
        if odd := [n for n, shard in weight_map.items() if not isinstance(shard, str)]:
            for n in odd:
                self.problems.append(f"{file}: {show(n)} must name a file, found {_found(weight_map[n])}.")
            return
        # A name that leaves the directory would let a downloaded index read any file of the machine.
        shards = sorted(set(weight_map.values()))
        plain = [shard for shard in shards if _is_plain(shard)]
        for shard in sorted(set(shards) - set(plain)):
            self.problems.append(f"{file}: {shard!r} is not the plain name of a .safetensors file in this directory.")
        self.weight_map = weight_map
        self.shards = tuple(plain)
        metadata = index.get("metadata")
        if isinstance(metadata, dict):
            self.index_metadata = metadata

    # -- what is in them ----------------------------------------------------------------------------------------------

    def read_config(self) -> None:
        """config.json. NaN, Infinity and repeated keys are accepted: transformers writes (Mamba-2) and reads them."""
        self.config = self._read_json("config.json", unique_keys=False)

    def read_shards(self) -> None:
        """All headers; then what they hold against what the index says."""
        unread = set(self.shards)
        for shard in self.shards:
            before = len(self.problems)
            try:
                self._read_shard(shard)
            except FileNotFoundError:
                missing = "is named in the index but missing." if self.weight_map is not None else "is missing."
                self.problems.append(f"{shard}: {missing}")
            except (OSError, CheckpointError) as error:
                self.problems.append(f"{shard}: cannot be read: {error}")
            if len(self.problems) == before:
                unread.discard(shard)
        # One unread shard would make every tensor in it look lost.
        self._compare_with_index(readable=set(self.shards) - unread)

    def _compare_with_index(self, *, readable: set[str]) -> None:
        """Each tensor must be in the shard the index names and nowhere else.

        A stored tensor without an index entry is an error too: some loaders read whole shards, others follow the index,
        so they would not agree on what the model is.
        """
        if self.weight_map is None:
            return
        for name, shard in self.weight_map.items():
            if shard in readable and shard not in self.places.get(name, ()):
                where = f"it is in {_some(self.places[name])}" if name in self.places else "no shard has it"
                self.problems.append(f"{shard}: {show(name)} should be here according to {self.index_file}; {where}.")
        for name, shards in self.places.items():
            if name not in self.weight_map:
                self.problems.append(f"{_some(shards)}: holds {show(name)}, which {self.index_file} does not list.")
            elif len(shards) > 1 and self.weight_map[name] in shards:
                self.problems.append(f"{_some(shards)}: {show(name)} is stored {len(shards)} times.")

    def _read_shard(self, file: str) -> None:
        size = self.reader.size(file)
        if size < _LENGTH_BYTES:
            self.problems.append(
                f"{file}: {size} bytes, too short for the 8-byte length every file starts with{_AGAIN}."
            )
            return
        head = self._read(file, 0, _LENGTH_BYTES)
        if head == b"version ":
            self.problems.append(f"{file}: is a git-lfs pointer, not the weights; run `git lfs pull`.")
            return
        length = int.from_bytes(head, "little")
        data_start = _LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES:
            self.problems.append(f"{file}: header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed.")
        elif data_start > size:
            ends = f"header ends at byte {data_start:,}, the file at {size:,}"
            self.problems.append(f"{file}: truncated: {ends}{_AGAIN}.")
        else:
            raw = self._read(file, _LENGTH_BYTES, data_start)
            self.files[file] = FileHeader(size=size, data_start=data_start, header_digest=xxh3_128_hexdigest(raw))
            entries, metadata, problems = parse_header(raw, file=file, size=size)
            self.problems += [f"{file}: {problem}" for problem in problems]
            for name in entries:
                self.places.setdefault(name, []).append(file)
            self.tensors.update(entries)
            self.metadata = {**metadata, **self.metadata}

    def _read(self, file: str, start: int, stop: int) -> bytes:
        span = self.reader.read(file, start, stop)
        try:
            return bytes(span.view)
        finally:
            span.release()

    def _read_json(self, file: str, *, unique_keys: bool) -> dict[str, object] | None:
        """A companion's JSON object; None, and a problem, where it is not one."""
        repeated: list[str] = []
        try:
            size = self.reader.size(file)
            if size > MAX_HEADER_BYTES:
                self.problems.append(f"{file}: {size:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed.")
                return None
            raw = self._read(file, 0, size)
            value = json.loads(raw.decode(), object_pairs_hook=_collector(repeated) if unique_keys else None)
        except (OSError, CheckpointError) as error:
            self.problems.append(f"{file}: cannot be read: {error}")
            return None
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            self.problems.append(f"{file}: not valid JSON: {error}")
            return None
        self.problems += [f"{file}: key {show(key)} appears twice." for key in repeated]
        if not isinstance(value, dict):
            self.problems.append(f"{file}: must be a JSON object, found {_found(value)}.")
            return None
        return value

    def finish(self, name: str) -> Checkpoint:
        """The catalogue, once nothing is wrong with it."""
        # Shared tensors and old writers make total_size wrong in the wild; no loader depends on it.
        held = sum(entry.nbytes for entry in self.tensors.values())
        said = self.index_metadata.get("total_size", held)
        if said != held:
            self.notes.append(f"{self.index_file} says total_size {_found(said)}, the shards hold {held}")
        return Checkpoint(
            name=name,
            reader=self.reader,
            shards=self.shards,
            files=self.files,
            tensors=self.tensors,
            config=self.config,
            metadata=self.metadata,
            index_file=self.index_file,
            index_metadata=self.index_metadata,
            notes=tuple(f"'{name}': {note}" for note in self.notes),
        )


# -- the header of one file -------------------------------------------------------------------------------------------


def parse_header(raw: bytes, *, file: str, size: int) -> tuple[dict[str, TensorEntry], dict[str, str], list[str]]:
    """Tensors (in the order of their bytes), `__metadata__`, and what is wrong with the header of one file.

    raw: the JSON, padding included, without the 8-byte length. size: bytes in the whole file.
    """
    repeated: list[str] = []
    if not raw.startswith(b"{"):
        return {}, {}, [f"header must start with '{{', found {raw[:1]!r}."]
    try:
        header = json.loads(
            raw.decode(), object_pairs_hook=_collector(repeated), parse_int=_number, parse_constant=_refuse
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
    data_start = _LENGTH_BYTES + len(raw)
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
        raise ValueError(f"expected an object of dtype, shape and data_offsets, found {_found(declared)}.")
    dtype, shape, offsets = declared["dtype"], declared["shape"], declared["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}.")
    if not _are_natural(shape):
        raise ValueError(f"shape must be a list of integers from 0 to 2^64-1, found {_found(shape)}.")
    if not _are_natural(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets must be [start, stop], 0 <= start <= stop < 2^64, found {_found(offsets)}.")
    # The library multiplies in 64 bits from the left: [2^32, 2^32, 0] overflows, [0, 2^32, 2^32] does not.
    bits = 1
    for factor in (*shape, DTYPE_BITS[dtype]):
        bits *= factor
        if bits > _U64_MAX:
            raise ValueError(f"shape {_found(shape)} of {dtype} overflows 64 bits.")
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
        problems.append(f"truncated: the tensors end at byte {covered:,}, the file at {size:,}{_AGAIN}.")
    elif covered < size:
        problems.append(f"trailing bytes: the tensors end at byte {covered:,}, the file at {size:,}.")
    return problems


def _are_natural(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n <= _U64_MAX for n in value)


def _number(text: str) -> int | float:
    """Integers of a header; -1 and the library's trap -0 become floats, which no field accepts."""
    return float(text) if text[0] == "-" else int(text)


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _collector(repeated: list[str]) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    """A hook for json that notes repeated keys, which Python would drop silently."""

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            counts = Counter(key for key, _ in pairs)
            repeated.extend(key for key, count in counts.items() if count > 1)
        return unique

    return collect


# -- words for messages -----------------------------------------------------------------------------------------------

_AGAIN: Final = "; copy or download it again"
_CONVERT: Final = "convert it to safetensors first (transformers: `save_pretrained(..., safe_serialization=True)`)."
_ADAPTER: Final = "PEFT adapters are not supported yet; merge it into its base first (peft: `merge_and_unload`)."


def show(name: str) -> str:
    """A tensor's name as messages print it: quoted where it could disturb a terminal or vanish."""
    return name if name.isprintable() and name.strip() else repr(name)


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(show(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _found(value: object, limit: int = 80) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "something deeply nested"
    return text if len(text) <= limit else f"{text[:limit]}..."


def _is_plain(file: str) -> bool:
    """A file name of this directory on any operating system: no separators, drives, dots alone, control characters."""
    inside = PurePosixPath(file).name == file == PureWindowsPath(file).name
    return inside and file.isprintable() and file.endswith(_SUFFIX)
