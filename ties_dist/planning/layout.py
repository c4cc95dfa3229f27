"""Output shards: which tensors, which headers, which byte offsets. Pure: it opens no file.

All headers exist before any tensor is computed, so any worker can write any range, in any order, twice.
Inside a shard tensors stand widest dtype first, then by name (the safetensors library's own order), and the header is
padded with spaces so that data start at a multiple of 4096: every element is then aligned to its size in the file,
and a cut at a multiple of 1 MiB never splits one.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ties_dist.dtypes import ITEM_BYTES
from ties_dist.values.items import WorkItem

DATA_ALIGNMENT = 4096
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor to be written. source: the input tensor it is made from (an alias's is the embedding's).

    name: of the parameter; in its file it is called as `stored_name` says.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    merged: bool
    source: str
    counted: bool

    @cached_property
    def numel(self) -> int:
        numel = 1
        for extent in self.shape:
            numel *= extent
        return numel

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.numel * self.item_bytes


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Elements [start, stop) of a tensor, at byte `offset` of its output shard."""

    tensor: TensorSpec
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_BYTES[self.tensor.dtype]


@dataclass(frozen=True, kw_only=True)
class OutputShard:
    """One file to be written. starts: absolute byte offset of each tensor, in file order."""

    name: str
    tensors: tuple[TensorSpec, ...]
    starts: tuple[int, ...]
    header: bytes
    size: int

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """The tensor slices inside bytes [start, stop) of the file, in file order; empty tensors have none."""
        for i in range(max(0, bisect_right(self.starts, start) - 1), len(self.tensors)):
            tensor, begin = self.tensors[i], self.starts[i]
            if begin >= stop:
                return
            item = ITEM_BYTES[tensor.dtype]
            low, high = max(start, begin), min(stop, begin + tensor.nbytes)
            if low < high:
                yield Segment(tensor=tensor, start=(low - begin) // item, stop=(high - begin) // item, offset=low)


@dataclass(frozen=True, kw_only=True)
class Layout:
    shards: tuple[OutputShard, ...]

    @cached_property
    def by_name(self) -> Mapping[str, OutputShard]:
        return {shard.name: shard for shard in self.shards}

    def placed(self, item: WorkItem) -> Iterator[tuple[Segment, int]]:
        """The tensor slices that an item writes, each with its place among the item's bytes."""
        before = 0
        for each in item.ranges:
            for segment in self.by_name[each.file].segments(each.start, each.stop):
                yield segment, before + segment.offset - each.start
            before += each.nbytes

    @property
    def tensors(self) -> list[TensorSpec]:
        """All of them, by name."""
        return sorted((t for shard in self.shards for t in shard.tensors), key=lambda t: t.name)

    def most_segments(self, unit_bytes: int) -> int:
        """Tensor slices of the unit that has the most: those that begin in it, and one that began before."""
        begun = Counter((shard.name, start // unit_bytes) for shard in self.shards for start in shard.starts)
        return 1 + max(begun.values(), default=0)

    @property
    def total_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @cached_property
    def indexes(self) -> Mapping[str, str]:
        """Texts of the index files by name: one for each folder with several shards."""
        folders: dict[str, list[OutputShard]] = {}
        for shard in self.shards:
            folders.setdefault(folder_of(shard.name), []).append(shard)
        return {f"{folder}{INDEX_NAME}": _index(found) for folder, found in folders.items() if len(found) > 1}


def folder_of(file: str) -> str:
    """What a file's name has before its last part: empty, or with a slash at its end."""
    return file[: file.rfind("/") + 1]


def stored_name(tensor: str, file: str) -> str:
    """What a parameter is called in its file: weights of a module in a folder are named behind that in the model."""
    return tensor.removeprefix(folder_of(file))


def _index(shards: Sequence[OutputShard]) -> str:
    weight_map = {
        stored_name(t.name, s.name): s.name.removeprefix(folder_of(s.name)) for s in shards for t in s.tensors
    }
    total = sum(t.nbytes for shard in shards for t in shard.tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2) + "\n"


def lay_out(
    tensors: Sequence[TensorSpec],
    shard_of: Mapping[str, str],
    max_shard_bytes: int | None = None,
    *,
    single: str = SINGLE_NAME,
) -> Layout:
    """Assign tensors to shards: as the base has them, or greedily by name up to `max_shard_bytes` of tensor data.

    tensors: sorted by name. shard_of: the base's file for each tensor, whose folder it stays in. A tensor larger than
    the limit gets a shard of its own. File names are the base's where they are usable, else
    `model-00001-of-0000N.safetensors`; `single` is the name of an only shard.
    """
    folders: dict[str, list[TensorSpec]] = {}
    for tensor in tensors:
        folders.setdefault(folder_of(shard_of[tensor.name]), []).append(tensor)
    shards: list[OutputShard] = []
    for folder, inside in sorted(folders.items()) or [("", [])]:
        names, groups = _grouped(inside, shard_of, max_shard_bytes)
        count = len(groups)
        if count == 1:
            names = [single]
        elif not _numbered(names, count):
            names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        shards += [_shard(f"{folder}{name}", group) for name, group in zip(names, groups, strict=True)]
    return Layout(shards=tuple(shards))


def _grouped(
    tensors: Sequence[TensorSpec], shard_of: Mapping[str, str], max_shard_bytes: int | None
) -> tuple[list[str], list[list[TensorSpec]]]:
    """The tensors of one folder by shard, and the names that the base has for these."""
    if max_shard_bytes is None:
        files = sorted({shard_of[t.name] for t in tensors})
        by_file: dict[str, list[TensorSpec]] = {file: [] for file in files}
        for tensor in tensors:
            by_file[shard_of[tensor.name]].append(tensor)
        return [file.removeprefix(folder_of(file)) for file in files], list(by_file.values()) or [[]]
    groups: list[list[TensorSpec]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return [], groups


def _numbered(names: Sequence[str], count: int) -> bool:
    return len(names) == count and all(re.fullmatch(rf"[\w.-]+-\d{{5}}-of-{count:05d}\.safetensors", n) for n in names)


def _shard(name: str, tensors: Sequence[TensorSpec]) -> OutputShard:
    ordered = sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.dtype, t.name))
    document: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, position = [], 0
    for tensor in ordered:
        offsets.append(position)
        document[stored_name(tensor.name, name)] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    data_start = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    header = (data_start - 8).to_bytes(8, "little") + text.ljust(data_start - 8)
    return OutputShard(
        name=name,
        tensors=tuple(ordered),
        starts=tuple(data_start + offset for offset in offsets),
        header=header,
        size=data_start + position,
    )
