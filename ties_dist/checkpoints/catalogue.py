"""Catalogue of a safetensors checkpoint: which tensor lies where, read from headers alone.

Reads kilobytes per shard, never weights. All problems of a checkpoint are collected into one CheckpointError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from xxhash import xxh3_128_hexdigest

from ties_dist.checkpoints.elsewhere import CONVERT, OTHER_WEIGHTS, QUANTISED_FILE, instead, lost_links, some
from ties_dist.checkpoints.forms.known import parameters_of
from ties_dist.checkpoints.header import AGAIN, LENGTH_BYTES, TensorEntry, collector, parse_header
from ties_dist.checkpoints.modules import MODULES, Below, module_folders
from ties_dist.checkpoints.parameters import OpenFiles, Parameter
from ties_dist.errors import CheckpointError
from ties_dist.messages import brief, listing, reason, show
from ties_dist.storage.base import Reader
from ties_dist.storage.place import is_plain

MAX_HEADER_BYTES: Final = 100_000_000
"""The library's limit for a header; ours for an index and a config.json too."""

_SUFFIX: Final = ".safetensors"
_INDEX_SUFFIX: Final = ".safetensors.index.json"
_SHARD: Final = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


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

    name: the model's short name, for messages. files: by file name, `shards` is their order. tensors: what they store;
    parameters: what that is of the model, and how it is read. config: config.json, None where there is none (a single
    file never has one). metadata: `__metadata__` of the shards, the first shard wins. index_file: the index that was
    read, None where one file holds everything. notes: things to say, not errors. modules: of a sentence-transformers
    model the folders of its modules, in order ('' is the model's own). Weights of the first are called as they are
    stored, those of another one behind its folder: `2_Dense/linear.weight`.
    """

    name: str
    opened: OpenFiles
    shards: tuple[str, ...]
    files: Mapping[str, FileHeader]
    tensors: Mapping[str, TensorEntry]
    parameters: Mapping[str, Parameter]
    config: Mapping[str, object] | None
    metadata: Mapping[str, str]
    index_file: str | None
    index_metadata: Mapping[str, object]
    notes: tuple[str, ...]
    modules: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def find(self, name: str) -> str | None:
        """What a module's parameter is called here: models with a head have the body's names behind one more word."""
        if name in self.parameters:
            return name
        shorter = name.partition(".")[2]
        if shorter and shorter in self.parameters:
            return shorter
        longer = self._behind_a_word.get(name, [])
        return longer[0] if len(longer) == 1 else None

    @cached_property
    def _behind_a_word(self) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for name in self.parameters:
            if rest := name.partition(".")[2]:
                found.setdefault(rest, []).append(name)
        return found


def open_checkpoint(path: Path, *, name: str, reader: Callable[[Path], Reader]) -> Checkpoint:
    """The catalogue of a directory of safetensors or of one .safetensors file.

    reader: opens a directory; for a single file its parent, of which nothing but that file is looked at.
    Raises CheckpointError with all problems of this checkpoint.
    """
    if path.is_dir():
        catalogue = _Catalogue(reader(path), path)
        catalogue.read_folder(_names(catalogue.reader, path, name), lambda folder: reader(path / folder))
    elif path.is_file():
        catalogue = _Catalogue(reader(path.parent), path.parent)
        catalogue.choose_file(path.name)
        catalogue.read_shards()
    else:
        raise CheckpointError(f"checkpoint '{name}': {path} is neither a directory nor a file.")
    catalogue.read_parameters()
    if catalogue.problems:
        count = len(catalogue.problems)
        title = f"checkpoint '{name}' ({path}) has {'a problem' if count == 1 else f'{count} problems'}:"
        raise CheckpointError(listing(title, catalogue.problems))
    return catalogue.finish(name)


def _names(reader: Reader, path: Path, name: str) -> Sequence[str]:
    try:
        return reader.names()
    except OSError as error:
        raise CheckpointError(f"checkpoint '{name}': {path} cannot be listed: {error}") from error


class _Catalogue:
    """A checkpoint while it is read: every step adds what it finds, or a line to `problems`, and goes on."""

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self.folder = reader, folder
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.shards: tuple[str, ...] = ()
        self.weight_map: dict[str, str] | None = None  # None: no index
        self.index_file: str | None = None
        self.index_metadata: dict[str, object] = {}
        self.config: dict[str, object] | None = None
        self.files: dict[str, FileHeader] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self.parameters: dict[str, Parameter] = {}
        self.metadata: dict[str, str] = {}
        self.places: dict[str, list[str]] = {}  # tensor -> every shard that stores it
        self.modules: tuple[str, ...] = ()

    def read_folder(self, names: Sequence[str], below: Callable[[str], Reader]) -> None:
        """A model's folder, with those of its modules. below: opens a folder in it."""
        if MODULES in names:
            self.modules = module_folders(self._read_value, self.problems)
        first, *others = self.modules or ("",)
        if first and not _weights_in(names):
            self._read_module(first, below, lead="")
        else:
            others = [folder for folder in self.modules if folder]
            self.choose(names)
            if "config.json" in names:
                self.read_config()
            self.read_shards()
        for folder in others:
            self._read_module(folder, below, lead=f"{folder}/")
        if self.modules and not self.shards and not self.problems:
            self.problems.append(f"no .safetensors file in any folder that {MODULES} names.")

    def _read_module(self, folder: str, below: Callable[[str], Reader], *, lead: str) -> None:
        """What a module's folder adds: often no weights. One without files is missing in repositories.

        lead: what its tensors' names begin with.
        """
        part = _Catalogue(Below(self.reader, folder, below(folder)), self.folder / folder)
        try:
            names = part.reader.names()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            self.problems.append(f"{folder}: cannot be listed: {error}")
            return
        if not lead and "config.json" in names:
            part.read_config()
            self.config = part.config
        if _weights_in(names):
            part.choose(names)
            part.read_shards()
        self._take(part, folder, lead)

    def _take(self, part: _Catalogue, folder: str, lead: str) -> None:
        """What was found in a folder, under names that hold for the whole model."""
        if twice := self.tensors.keys() & {f"{lead}{name}" for name in part.tensors}:
            self.problems.append(f"{folder}: {some(sorted(twice))} is stored twice.")
        self.tensors |= {
            f"{lead}{name}": replace(entry, name=f"{lead}{name}", file=f"{folder}/{entry.file}")
            for name, entry in part.tensors.items()
        }
        self.shards += tuple(f"{folder}/{shard}" for shard in part.shards)
        self.files |= {f"{folder}/{file}": header for file, header in part.files.items()}
        self.metadata = {**part.metadata, **self.metadata}
        self.problems += [f"{folder}: {problem}" for problem in part.problems]
        self.notes += [f"{folder}: {note}" for note in part.notes]

    # -- which files --------------------------------------------------------------------------------------------------

    def choose(self, names: Iterable[str]) -> None:
        """Settle which files of a directory are the checkpoint: model.safetensors, else its index, else its only file.

        transformers' order: a `model.safetensors` wins even over an index beside it, whichever was written later. What
        is left aside is said.
        """
        names = sorted(names)
        weights = [n for n in names if n.endswith(_SUFFIX)]
        indexes = [n for n in names if n.endswith(_INDEX_SUFFIX)]
        if "model" + _INDEX_SUFFIX in indexes:
            indexes = ["model" + _INDEX_SUFFIX]
        if "adapter_config.json" in names and "adapter_model.safetensors" in names:
            self.shards = ("adapter_model.safetensors",)
            self.notes.append("a PEFT adapter: what it adds to its base, not a model")
        elif "model" + _SUFFIX in weights:
            self.shards = ("model" + _SUFFIX,)
            if indexes:
                self.notes.append(f"model{_SUFFIX} is read, as transformers does, and not what {some(indexes)} names")
        elif len(indexes) > 1:
            self.problems.append(f"{len(indexes)} indexes ({some(indexes)}): keep the one that is the model.")
        elif indexes:
            self._read_index(indexes[0])
        elif len(weights) == 1:
            self.choose_file(weights[0])
            if (shard := _SHARD.search(weights[0])) and int(shard[2]) > 1:
                self.problems.append(
                    f"{weights[0]}: is shard {int(shard[1])} of {int(shard[2])}; the others and the index are missing."
                )
        elif weights:
            self.problems.append(
                f"{len(weights)} .safetensors files ({some(weights)}) and no {_INDEX_SUFFIX[1:]}: which of them are "
                "the model? Add the index, or name one file in the recipe."
            )
        else:
            self.problems.append(instead(self.folder, names))
        if self.shards and (stray := sorted(set(weights) - set(self.shards))):
            self.notes.append(f"files that are not part of the model are left aside: {some(stray)}")

    def choose_file(self, file: str) -> None:
        """Settle on one file, which is then the whole checkpoint."""
        if file.endswith(_INDEX_SUFFIX):
            self.problems.append(f"{file}: is an index; name the directory instead.")
        elif not file.endswith(_SUFFIX):
            self.problems.append(f"{file}: {QUANTISED_FILE if file.endswith('.gguf') else CONVERT}")
        else:
            self.shards = (file,)

    def _read_index(self, file: str) -> None:
        self.index_file = file
        index = self._read_json(file, unique_keys=True)
        if index is None:
            return
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            self.problems.append(f"{file}: 'weight_map' must map tensor names to files, found {brief(weight_map)}.")
            return
        if odd := [n for n, shard in weight_map.items() if not isinstance(shard, str)]:
            for n in odd:
                self.problems.append(f"{file}: {show(n)} must name a file, found {brief(weight_map[n])}.")
            return
        # A name that leaves the directory would let a downloaded index read any file of the machine.
        shards = sorted(set(weight_map.values()))
        plain = [shard for shard in shards if is_plain(shard) and shard.endswith(_SUFFIX)]
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
                gone = "is named in the index but missing." if self.weight_map is not None else "is missing."
                self.problems.append(f"{shard}: {lost_links(self.folder, [shard]) or gone}")
            except (OSError, CheckpointError) as error:
                self.problems.append(f"{shard}: cannot be read: {_why(error)}")
            if len(self.problems) == before:
                unread.discard(shard)
        # One unread shard would make every tensor in it look lost.
        self._compare_with_index(readable=set(self.shards) - unread)
        # Shared tensors and old writers make total_size wrong in the wild; no loader depends on it.
        held = sum(entry.nbytes for entry in self.tensors.values())
        said = self.index_metadata.get("total_size", held)
        if said != held and not self.problems:
            self.notes.append(f"{self.index_file} says total_size {brief(said)}, the shards hold {held}")

    def read_parameters(self) -> None:
        if not self.problems:
            try:
                self.parameters = parameters_of(self.tensors)
            except CheckpointError as error:
                self.problems.append(str(error))

    def _compare_with_index(self, *, readable: set[str]) -> None:
        """Each tensor must be in the shard the index names and nowhere else.

        A stored tensor without an index entry is an error too: some loaders read whole shards, others follow the index,
        so they would not agree on what the model is.
        """
        if self.weight_map is None:
            return
        for name, shard in self.weight_map.items():
            if shard in readable and shard not in self.places.get(name, ()):
                where = f"it is in {some(self.places[name])}" if name in self.places else "no shard has it"
                self.problems.append(f"{shard}: {show(name)} should be here according to {self.index_file}; {where}.")
        for name, shards in self.places.items():
            if name not in self.weight_map:
                self.problems.append(f"{some(shards)}: holds {show(name)}, which {self.index_file} does not list.")
            elif len(shards) > 1 and self.weight_map[name] in shards:
                self.problems.append(f"{some(shards)}: {show(name)} is stored {len(shards)} times.")

    def _read_shard(self, file: str) -> None:
        size = self.reader.size(file)
        if size < LENGTH_BYTES:
            self.problems.append(
                f"{file}: {size} bytes, too short for the 8-byte length every file starts with{AGAIN}."
            )
            return
        head = self._read(file, 0, LENGTH_BYTES)
        if head == b"version ":
            self.problems.append(f"{file}: is a git-lfs pointer, not the weights; run `git lfs pull`.")
            return
        length = int.from_bytes(head, "little")
        data_start = LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES:
            self.problems.append(f"{file}: header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed.")
        elif data_start > size:
            ends = f"header ends at byte {data_start:,}, the file at {size:,}"
            self.problems.append(f"{file}: truncated: {ends}{AGAIN}.")
        else:
            raw = self._read(file, LENGTH_BYTES, data_start)
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

    def _read_value(self, file: str) -> object:
        """The value of a JSON file; None where there is no such file."""
        try:
            self.reader.size(file)
        except OSError:
            return None
        return self._read_any_json(file, unique_keys=False)

    def _read_json(self, file: str, *, unique_keys: bool) -> dict[str, object] | None:
        """A companion's JSON object; None, and a problem, where it is not one."""
        before, value = len(self.problems), self._read_any_json(file, unique_keys=unique_keys)
        if isinstance(value, dict):
            return value
        if len(self.problems) == before:
            self.problems.append(f"{file}: must be a JSON object, found {brief(value)}.")
        return None

    def _read_any_json(self, file: str, *, unique_keys: bool) -> object:
        """None, and a problem, where it is not JSON."""
        repeated: list[str] = []
        try:
            size = self.reader.size(file)
            if size > MAX_HEADER_BYTES:
                self.problems.append(f"{file}: {size:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed.")
                return None
            raw = self._read(file, 0, size)
            value: object = json.loads(raw.decode(), object_pairs_hook=collector(repeated) if unique_keys else None)
        except (OSError, CheckpointError) as error:
            self.problems.append(f"{file}: cannot be read: {_why(error)}")
            return None
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            self.problems.append(f"{file}: not valid JSON: {error}")
            return None
        self.problems += [f"{file}: key {show(key)} appears twice." for key in repeated]
        return value

    def finish(self, name: str) -> Checkpoint:
        """The catalogue, once nothing is wrong with it."""
        return Checkpoint(
            name=name,
            opened=OpenFiles((self.reader,)),
            shards=self.shards,
            files=self.files,
            tensors=self.tensors,
            parameters=self.parameters,
            config=self.config,
            metadata=self.metadata,
            index_file=self.index_file,
            index_metadata=self.index_metadata,
            notes=tuple(f"'{name}': {note}" for note in self.notes),
            modules=self.modules,
        )


# -- words for messages -----------------------------------------------------------------------------------------------


def _weights_in(names: Iterable[str]) -> bool:
    return any(name.endswith((_SUFFIX, _INDEX_SUFFIX, ".gguf", *OTHER_WEIGHTS)) for name in names)


def _why(error: OSError | CheckpointError) -> str:
    return reason(error) if isinstance(error, OSError) else str(error)
