"""What stands beside the weights: the base's own small files, the resolved recipe, the card."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial

from ties_dist.inputs.companions import Companions
from ties_dist.inputs.configs import untied
from ties_dist.recipe.recipe import Recipe

CARD = "README.md"
RECIPE_COPY = "ties_dist_recipe.yml"

Content = bytes | Callable[[], Iterator[memoryview]]
"""Of a file: at once, or in pieces."""


def companion_files(copied: Companions, recipe: Recipe, card: str, made: Mapping[str, bytes]) -> dict[str, Content]:
    """What stands beside the weights. copied: of the base; made: others that the merge made."""
    files: dict[str, Content] = {name: partial(copied.pieces, name) for name in copied.sizes}
    for name in files:
        if name.rpartition("/")[2] == "config.json":
            config = copied.read(name)
            if recipe.output_dtype is not None:
                config = with_dtype(config, recipe.output_dtype)
            if recipe.options.tie_word_embeddings is False and name == copied.config:
                config = with_untied(config)
            files[name] = config
    note = "# The resolved recipe. Model paths are as they were written: relative to the folder of the original.\n"
    files[RECIPE_COPY] = (note + recipe.to_yaml()).encode()
    files[CARD] = card.encode()
    return {**files, **made}


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json byte for byte, but for the value of its dtype fields."""
    return re.sub(rb'("(?:torch_)?dtype"\s*:\s*)"(?:torch\.)?\w+"', rb'\1"' + dtype.encode() + b'"', config)


def with_untied(config: bytes) -> bytes:
    """config.json byte for byte, but that nothing is tied; written anew where a part of it has to be told so, too."""
    wanted = untied(json.loads(config))
    edited, count = re.subn(rb'("tie_word_embeddings"\s*:\s*)(?:true|null|false)', rb"\1false", config)
    if not count:
        edited = config.replace(b"{", b'{\n  "tie_word_embeddings": false,', 1)
    with suppress(ValueError):
        if json.loads(edited) == wanted:
            return edited
    return (json.dumps(wanted, indent=2, ensure_ascii=False) + "\n").encode()
