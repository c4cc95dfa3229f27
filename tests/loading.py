"""What a loader would make of OUT at any moment: nothing, or one whole model; never anything in between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ties_dist.output.journal import Record, read_journals
from ties_dist.storage.local_place import LocalPlace

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

Version = Mapping[str, str]
"""File name -> digest, of everything beside `.ties_dist` in a finished OUT."""


def version_of(out: Path) -> Version:
    """Digests of the files of OUT. Files come and go while others work on it: those that go are left out."""
    found = {}
    for path in sorted(out.iterdir()) if out.is_dir() else []:
        if path.is_file():
            with open(path, "rb") as file:
                found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
    return found


def standing(out: Path, versions: Mapping[str, Version]) -> str | None:
    """Name of the version that a loader finds in OUT; None where it finds no model.

    A loader takes `model.safetensors`, else the shards that the index names (transformers' order). Asserts that what
    it takes is one version, whole, with that version's companions, and that no weights of another lie beside it.
    """
    found = version_of(out)
    if SINGLE not in found and INDEX not in found:
        return None
    if INDEX in found:
        named = set(json.loads((out / INDEX).read_text())["weight_map"].values())
        assert named <= found.keys(), f"the index names what is not there: {sorted(named - found.keys())}"
    weights = {name for name in found if name.endswith(".safetensors")}
    for name, version in versions.items():
        if all(found.get(file) == digest for file, digest in version.items()):
            assert weights == {file for file in version if file.endswith(".safetensors")}, f"{name} and {weights}"
            return name
    differing = {
        name: sorted(file for file in version.keys() | weights if found.get(file) != version.get(file))
        for name, version in versions.items()
    }
    raise AssertionError(f"OUT can be loaded, but is no whole model; differing files by version: {differing}")


def journals_of(run: Path, counters: Sequence[str] | None = None) -> Record:
    """What the journals in a run's folder say together."""
    return read_journals(LocalPlace(run.parent), run.name, counters)
