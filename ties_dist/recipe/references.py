"""Where the models of a recipe are: local folders or safetensors files, else repositories of the Hugging Face hub.

Finding (`locate`) is split from downloading (`fetch`), so that a misspelt key is reported before gigabytes move.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ties_dist.errors import RecipeError
from ties_dist.recipe.hub import Repository, check_room, list_files

# `org/name` or `org/name@revision`; the hub's own rule is [\w.-]+, and a leading dot would be a path.
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?")

# All but the duplicates in other formats and what is no part of the model: whatever stands beside the weights may be.
# Folders that begin with a digit are modules of embedding models, `2_Dense`; others with weights are not read.
_UNWANTED = (
    *(
        "*.bin",
        "*.pt",
        "*.pth",
        "*.ckpt",
        "*.gguf",
        "*.h5",
        "*.msgpack",
        "*.onnx*",
        "*.ot",
        "*.tflite",
        "*.pb",
        "*.npz",
    ),
    *("[!0-9]*/*.safetensors", "consolidated*", "original/*", "onnx/*", "openvino/*", "checkpoint-*", "runs/*"),
    *("README*", ".git*"),
)


ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter. Beside a whole model that was saved later, a config alone is none."""
    if not (path / ADAPTER_CONFIG).is_file():
        return False
    return (path / ADAPTER_WEIGHTS).exists() or not any(path.glob("*.safetensors"))


@dataclass(frozen=True, kw_only=True)
class ModelReference:
    """One input model, found."""

    text: str
    """As written in the recipe."""
    name: str
    """Short, unique among the recipe's models, for people."""
    path: Path
    """Absolute: a folder, or a `.safetensors` file."""
    adapter: Path | None = None
    """The folder of a PEFT adapter that is applied to it."""
    revision: str | None = None
    """Of a hub id that names one."""

    def relative_to(self, folder: str) -> list[str]:
        """Its paths as seen from a folder: the model's, and the adapter's."""
        return [os.path.relpath(p, folder) for p in (self.path, self.adapter) if p is not None]


def as_seen_from(folder: str, parts: Sequence[str]) -> str:
    """The text of a model, or of model+adapter, from what `ModelReference.relative_to` gave."""
    return "+".join(str((Path(folder) / part).resolve()) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Location:
    """A model reference understood, not yet downloaded. Equal to another that means the same model."""

    identity: tuple[str, str | None]
    """(real path, None) or (repository, revision)."""
    adapter: Location | None = None
    """Of an adapter that is named behind it, `model+adapter`."""
    text: str = field(compare=False)
    path: Path | None = field(default=None, compare=False)
    """None: on the hub."""
    where: str = field(default="", compare=False)
    tried: tuple[Path, ...] = field(default=(), compare=False)

    @property
    def revision(self) -> str | None:
        """Of a hub id that names one."""
        return self.identity[1]

    @property
    def is_hub_id(self) -> bool:
        """Whether it is written as the hub names models."""
        return self.path is None and _HUB_ID.fullmatch(self.identity[0]) is not None

    @property
    def short_name(self) -> str:
        """The last part of the path; a file's name without its suffix, or its folder's where that is just `model`."""
        if self.adapter is not None:
            return self.adapter.short_name
        if self.path is None:
            return self.identity[0].rpartition("/")[2]
        path = self.path if self.path.name not in ("", "..") else self.path.resolve()
        if path.suffix == ".safetensors":
            path = path.parent if path.stem == "model" else path.with_suffix("")
        return path.name or "model"


def spell(value: object) -> str | None:
    """A model as text: a path, or mergekit's long form, `{model: {path: P, revision: R}, lora: {path: L}}`.

    None where it is neither.
    """
    if isinstance(value, str | os.PathLike):
        return os.fspath(value) or None
    if not isinstance(value, Mapping) or not value:
        return None
    if value.keys() <= {"path", "revision"}:
        path, revision = spell(value.get("path")), value.get("revision")
        return f"{path}@{revision}" if path and isinstance(revision, str) else path if revision is None else None
    if not value.keys() <= {"model", "lora", "override_architecture"}:
        return None
    model, lora = spell(value.get("model")), value.get("lora")
    adapter = spell(lora)
    return f"{model}+{adapter}" if model and adapter else model if lora is None else None


def anywhere(text: str, roots: Sequence[Path], where: str = "") -> Location | str:
    """As `locate`, for a recipe of another machine: what is not there is taken for what it is called."""
    found = locate(text, roots, where)
    written = _expanded(text)
    if isinstance(found, Location) or any(os.path.lexists(root.absolute() / written) for root in roots):
        return found
    return Location(identity=(written, None), text=text, where=where)


def _expanded(text: str) -> str:
    """`~` and `$HOME` as a shell has them; of slashes in a row one, as every system but for a name's start has it."""
    return re.sub("/{2,}", "/", os.path.expandvars(os.path.expanduser(text)))


def locate(text: str, roots: Sequence[Path], where: str = "") -> Location | str:
    """The model a text names, or what is wrong with it. Relative paths are looked up in each root, in order.

    A path that exists wins over a hub id, as in mergekit; two different ones that exist are ambiguous.
    """
    written = _expanded(text)
    tried = tuple(dict.fromkeys(root.absolute() / written for root in roots))
    existing = [path for path in tried if os.path.exists(path)]
    if len({path.resolve() for path in existing}) > 1:
        return f"'{text}' is ambiguous: {existing[0]} and {existing[1]} both exist; write one of them in full"
    if existing:
        path = existing[0].parent if existing[0].name == ADAPTER_WEIGHTS else existing[0]
        if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
            return f"'{text}' cannot be read: permission denied"
        if path.is_dir() or path.suffix == ".safetensors":
            return Location(identity=(str(path.resolve()), None), text=text, path=path, where=where, tried=tried)
        return f"'{text}' is neither a folder nor a .safetensors file; name the folder that holds the model"
    if "+" in text:
        return _locate_pair(text, roots, where)
    match = _HUB_ID.fullmatch(written.removesuffix("/"))
    if match is None or text.endswith(".safetensors"):
        return f"'{text}' is not there (no {_places(tried)}), and it is not a hub id (`org/name`, `org/name@revision`)"
    return Location(identity=(match["repo"], match["revision"]), text=text, where=where, tried=tried)


def _locate_pair(text: str, roots: Sequence[Path], where: str) -> Location | str:
    """`model+adapter`; paths may have a plus of their own."""
    wrong = ""
    for at in (i for i, letter in enumerate(text) if letter == "+"):
        model, adapter = (locate(part, roots, where) for part in (text[:at], text[at + 1 :]))
        if isinstance(model, Location) and isinstance(adapter, Location):
            return replace(model, text=text, adapter=adapter)
        wrong = wrong or next(part for part in (model, adapter) if isinstance(part, str))
    return f"'{text}' is read as model+adapter, but {wrong}"


def find(location: Location) -> Repository | Exception:
    """What a hub has of a model, or why that cannot be told."""
    repository, revision = location.identity
    try:
        return list_files(repository, revision, unwanted=_UNWANTED)
    except Exception as error:  # the hub's, the network's and the disk's errors share no root
        return error


def fetch(location: Location, *, offline: bool = False) -> Path:
    """The model's folder or file, downloaded if need be. Raises RecipeError naming both interpretations tried.

    huggingface_hub decides on cache, offline mode (HF_HUB_OFFLINE) and credentials. offline: take the cache's.
    Raises PlanError where there is no room for it.
    """
    if location.path is not None:
        return location.path
    from huggingface_hub import snapshot_download  # here, because importing it costs a second of `--help`

    repository, revision = location.identity
    found = None if offline else find(location)
    if isinstance(found, Repository):
        check_room(sum(found.absent.values()))
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            ignore_patterns=list(_UNWANTED),
            local_files_only=offline,
        )
    except Exception as error:  # they share no root here either
        raise unreachable(location, error) from error
    return Path(folder).absolute()


def unreachable(location: Location, error: Exception) -> RecipeError:
    """What to say of a model that is neither here nor to be had."""
    repository, revision = location.identity
    reason = (str(error).strip().splitlines() or [""])[0]
    return RecipeError(
        f"{location.where}: '{location.text}' is neither a local path (no {_places(location.tried)}) nor could "
        f"'{repository}'{f' at revision {revision!r}' if revision else ''} be fetched from the Hugging Face hub: "
        f"{type(error).__name__}: {reason}"
    )


def _places(tried: Sequence[Path]) -> str:
    return " or ".join(str(path) for path in tried)


def unique_name(name: str, taken: set[str]) -> str:
    """The name, or the first free of `name#2`, `name#3`, ...; marks it as taken."""
    free = name
    repetition = 1
    while free in taken:
        repetition += 1
        free = f"{name}#{repetition}"
    taken.add(free)
    return free
