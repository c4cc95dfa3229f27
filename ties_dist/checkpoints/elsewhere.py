"""A folder that holds no checkpoint that can be read: what it is instead, and what to name in its place.

Looked at only when a checkpoint is refused, so nothing here has to be fast.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ties_dist.messages import show

OTHER_WEIGHTS: Final = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")
_HUB_FOLDER: Final = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([^/]+)")
"""Of the hub's cache: files are links into `blobs`, which is filled and emptied file by file."""

CONVERT: Final = (
    "only safetensors are read; convert it first: load it with the library that wrote it (transformers: "
    "`AutoModelForCausalLM.from_pretrained(...)`, or the model's own class), then `save_pretrained` into a new folder."
)
QUANTISED_FILE: Final = (
    "holds rounded weights for llama.cpp, and a merge would round them again: name the model in safetensors that it "
    "was made from."
)


def instead(folder: Path, names: Sequence[str]) -> str:
    """One sentence. names: of the files directly in the folder, links to nothing left out."""
    lost = [path.name for path in folder.iterdir() if path.name.endswith(".safetensors")]
    if said := lost_links(folder, sorted(lost)):
        return f"{some(lost)}: {said}"
    if below := sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.safetensors"))):
        parts = (
            "a pipeline of diffusers: models are its parts" if "model_index.json" in names else "models are below it"
        )
        return f"is no model itself, {parts} ({some(below)}). Name the one that is meant: '{folder.name}/{below[0]}'."
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"{some(gguf)}: {QUANTISED_FILE}"
    if other := [name for name in names if name.endswith(OTHER_WEIGHTS)]:
        return f"{some(other)}: {CONVERT}"
    return f"no .safetensors file among {len(names)} files."


def lost_links(folder: Path, files: Sequence[str]) -> str | None:
    """What is said of these where they are links to files that are not there; None where none of them is one."""
    lost = [path for path in map(folder.joinpath, files) if path.is_symlink() and not path.exists()]
    if not lost:
        return None
    what = f"{'is a link' if len(lost) == 1 else 'are links'} to what is not there ({lost[0].readlink()})"
    if match := _HUB_FOLDER.search(folder.absolute().as_posix()):
        hub = f"{match[1]}/{match[2]}@{match[3]}"
        return (
            f"{what}: the download is unfinished, or was removed in part. Write '{hub}' in the recipe instead of this "
            "folder: what is missing is fetched."
        )
    return f"{what}. Copy the files themselves here (`cp -L`, `rsync -L`)."


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few, as a list for people."""
    shown = ", ".join(show(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
