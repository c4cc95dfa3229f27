"""What of the base's folder goes beside the merged weights: all that is neither weights nor a trace of its training.

A list of names lost whatever it did not know: the pooling of embedding models, tokenizers of other makes. So it is the
other way round. A folder with weights in another container (onnx, openvino, original) is left out whole: beside a
merged model it would be a graph of the base.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ties_dist.checkpoints.elsewhere import OTHER_WEIGHTS
from ties_dist.errors import CheckpointError
from ties_dist.messages import listing, readable, show
from ties_dist.recipe.references import ADAPTER_CONFIG
from ties_dist.storage.base import Reader
from ties_dist.storage.links import followed
from ties_dist.storage.readers import open_reader

FILE_BYTES, ALL_BYTES = 64 << 20, 256 << 20
"""Copied unasked: a file of at most this size, and all together. The largest tokenizers have 35 MB."""
MOST_FILES = 10_000
PIECE_BYTES = 8 << 20

SAFETENSORS = ".safetensors"
_WEIGHTS = (
    *(SAFETENSORS, ".index.json", *OTHER_WEIGHTS),
    *(
        ".gguf",
        ".onnx_data",
        ".onnx.data",
        ".tflite",
        ".mlmodel",
        ".keras",
        ".pb",
        ".ot",
        ".nemo",
        ".pte",
        ".distcp",
        ".npy",
    ),
    *(".pkl", ".pickle", ".safetensors.part"),
)
_TRACE = re.compile(
    r"(optimizer|scheduler|scaler)\.\w+|(rng_state|random_states).*|(training_args|trainer_state|trainer_log)\..*|latest|"
    r"(all|train|eval|test|predict|generate)_results\..*|.*_evaluation_.*results?\.csv|events\.out\.tfevents.*|"
    r"training_.*loss\.png|zero_to_fp32\.py|log_history\.json|.*\.log|nohup\.out|.*\.partial|.*\.incomplete"
)
_TRACE_FOLDERS = re.compile(r"(tmp-)?checkpoint-\d+|global_step\d+|runs|logs|wandb|mlruns|tensorboard|eval|__pycache__")
_NEVER = re.compile(rf"(?i:readme)(\..*)?|{re.escape(ADAPTER_CONFIG)}")
"""The card is made anew, and beside a model an adapter's config would have loaders apply it."""
_PROCESSOR = re.compile(
    r"tokenizer.*|vocab\..*|merges\.txt|.*\.(tiktoken|spm|model|codes)|tekken\.json|.*processor.*\.json|dict\..*txt"
)


@dataclass(frozen=True, kw_only=True)
class Companions:
    """Files of a folder, by their names below it, with their sizes in bytes.

    config: the model's own, which is the first module's. notes: what is left out, or missing.
    """

    folder: Path = field(default_factory=Path)
    config: str = "config.json"
    sizes: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def pieces(self, name: str) -> Iterator[memoryview]:
        """A file's bytes, some at a time. Raises CheckpointError where it is not what it was when it was found."""
        reader = self._open(name)
        for start in range(0, self.sizes[name], PIECE_BYTES):
            span = reader.read(name, start, min(start + PIECE_BYTES, self.sizes[name]))
            yield span.view
            span.release()

    def read(self, name: str) -> bytes:
        """A small file."""
        return b"".join(self.pieces(name))

    def _open(self, name: str) -> Reader:
        reader = open_reader(self.folder, "pread")
        try:
            size = reader.size(name)
        except OSError as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error.strerror or error}.") from error
        if size != self.sizes[name]:
            raise CheckpointError(
                f"{self.folder / name} has {size:,} bytes, {self.sizes[name]:,} when the merge began. Run again."
            )
        return reader


def find_companions(
    path: Path, *, name: str, modules: Collection[str], listed: Sequence[str], is_model: bool
) -> Companions:
    """What goes beside the merged weights of a base.

    name: the base's, for messages. modules: folders in it that are parts of the model. listed: globs of what is wanted
    beside the usual. is_model: whether it will be loaded by itself, and not as an adapter.
    Raises CheckpointError with everything that cannot be copied, or not unasked.
    """
    sort = _Sorting(path, modules, listed)
    if path.is_dir():
        sort.walk()
    if sort.problems:
        title = f"files of '{name}' ({path}) cannot go beside the merged weights:"
        raise CheckpointError(listing(title, sort.problems))
    if sort.left:
        found = ", ".join(
            f"{show(each)} ({show(why)})" if why else show(each) for each, why in sorted(sort.left.items())
        )
        sort.notes.append(f"'{name}': left out, as it holds weights that are not merged: {found}")
    if is_model and (missing := _missing(sort.taken, modules)):
        sort.notes.append(f"'{name}' has no {missing}: the result will not load before that is put beside it")
    config = next((each for folder in modules if (each := f"{folder}/config.json") in sort.taken), "config.json")
    config = "config.json" if "config.json" in sort.taken else config
    return Companions(folder=path, config=config, sizes=dict(sorted(sort.taken.items())), notes=tuple(sort.notes))


def _missing(taken: Collection[str], modules: Collection[str]) -> str | None:
    """What loaders need and will not find."""
    names = {file.rpartition("/")[2] for file in taken if file.rpartition("/")[0] in {"", *modules}}
    config = None if "config.json" in names else "config.json"
    tokenizer = None if any(map(_PROCESSOR.fullmatch, names)) else "tokenizer"
    return " and no ".join(filter(None, (config, tokenizer))) or None


class _Sorting:
    """A folder's files, while it is found out what becomes of each."""

    def __init__(self, root: Path, modules: Collection[str], listed: Sequence[str]) -> None:
        self.root, self.modules, self.listed = root, {"", *modules}, listed
        self.taken: dict[str, int] = {}
        self.left: dict[str, str] = {}  # a folder with an example of why, or a file with ''
        self.asked: set[str] = set()
        self.problems: list[str] = []
        self.notes: list[str] = []

    def walk(self) -> None:
        files = self._files()
        self.asked = {name for name in files if any(fnmatchcase(name, glob) for glob in self.listed)}
        self.problems += [
            f"`companions: {glob}` fits no file" for glob in self.listed if not any(fnmatchcase(n, glob) for n in files)
        ]
        with_weights: dict[str, str] = {}
        for name in files:
            home, rest = self._home(name)
            if "/" in rest and rest.endswith(_WEIGHTS) and not _is_trace(rest):
                with_weights.setdefault(f"{home}{rest.partition('/')[0]}/", name)
        for name in files:
            home, rest = self._home(name)
            folder = f"{home}{rest.partition('/')[0]}/" if "/" in rest else None
            if name in self.asked:
                if not name.endswith((SAFETENSORS, f"{SAFETENSORS}.index.json")):
                    self._take(name)
            elif folder in with_weights:
                self.left[folder] = with_weights[folder]
            elif _is_trace(rest) or _NEVER.fullmatch(rest.rpartition("/")[2]):
                continue
            elif not rest.endswith(_WEIGHTS):
                self._take(name)
            elif not rest.endswith((SAFETENSORS, ".index.json")):
                self.left[name] = ""
        self._limit()

    def _files(self) -> list[str]:
        """All below the folder but what is hidden; folders that are links are not entered."""
        found: list[str] = []
        for at, folders, files in os.walk(self.root, onerror=self._unreadable):
            below = Path(at).relative_to(self.root)
            folders[:] = sorted(f for f in folders if not f.startswith(".") and not _TRACE_FOLDERS.fullmatch(f))
            found += [str(below / file) for file in sorted(files) if not file.startswith(".")]
            found += [str(below / folder) for folder in folders if (Path(at) / folder).is_symlink()]
            if len(found) > MOST_FILES:
                self.problems.append(f"it holds more than {MOST_FILES:,} files. Move away what is not of the model")
                return []
        return found

    def _unreadable(self, error: OSError) -> None:
        self.problems.append(f"{error.filename}: {error.strerror}")

    def _home(self, name: str) -> tuple[str, str]:
        """The module's folder that a file lies in, with a slash at its end, and the rest of its name."""
        parts = name.split("/")
        depth = max(i for i in range(len(parts)) if "/".join(parts[:i]) in self.modules)
        return "".join(f"{part}/" for part in parts[:depth]), "/".join(parts[depth:])

    def _take(self, name: str) -> None:
        try:
            path = followed(self.root, name)
            if not path.exists():
                self.problems.append(f"{show(name)}: is a link to what is not there")
            elif not path.is_file():
                self.problems.append(f"{show(name)}: is no file, but a link to a folder, a pipe, a socket or a device")
            elif not name.isprintable():
                self.problems.append(f"{name!r}: control characters in a name")
            else:
                self.taken[name] = path.stat().st_size
        except OSError as error:
            self.problems.append(f"{show(name)}: {error}")
        except CheckpointError as error:
            self.problems.append(str(error))

    def _limit(self) -> None:
        """Name what is too large to be copied unasked: single files, then the largest until the rest fits."""
        unasked = {name: size for name, size in self.taken.items() if name not in self.asked}
        total, large = sum(unasked.values()), []
        for name, size in sorted(unasked.items(), key=lambda item: -item[1]):
            if size <= FILE_BYTES and total <= ALL_BYTES:
                break
            large.append(name)
            total -= size
        self.problems += [
            f"{show(name)} has {readable(unasked[name])}, and unasked go {readable(FILE_BYTES)} a file and "
            f"{readable(ALL_BYTES)} together: list it under `companions` in the block `ties_dist` if it belongs to the "
            "model, else move it away"
            for name in large
        ]


def _is_trace(name: str) -> bool:
    return _TRACE.fullmatch(name.rpartition("/")[2]) is not None
