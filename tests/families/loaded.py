"""A folder as transformers loads it: its parameters, each once, and the floating-point buffers that are stored."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests import oracle
from tests.families.save import FAMILIES


def tensors(folder: Path) -> dict[str, Tensor]:
    """What is stored."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def load(folder: Path, family: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[family][0]).from_pretrained(folder)


def parameters(folder: Path, family: str) -> dict[str, oracle.Array]:
    """The model that a merge has to agree with, whatever the files look like."""
    model, stored = load(folder, family), tensors(folder)
    computed = model._keys_to_ignore_on_save or ()  # Marian's positions are parameters in memory alone
    trained = {n: p for n, p in model.named_parameters() if not any(re.search(each, n) for each in computed)}
    buffers = {n: b for n, b in model.named_buffers() if n in stored and b.is_floating_point()}
    return {n: oracle.from_torch(t.detach()) for n, t in {**trained, **buffers}.items()}


def shared_names(folder: Path, family: str) -> list[list[str]]:
    """Names that are one parameter in the loaded model."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in load(folder, family).state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    return [group for group in names.values() if len(group) > 1]


def ties_by_default(family: str) -> bool | None:
    import transformers

    found: bool | None = getattr(
        getattr(transformers, FAMILIES[family][0]).config_class(), "tie_word_embeddings", None
    )  # fmt: skip
    return found


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
