"""What stands beside the weights: the base's own small files, the resolved recipe, the card."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ties_dist.recipe.recipe import Recipe

CARD = "README.md"
RECIPE_COPY = "ties_dist_recipe.yml"
COMPANIONS = (
    r"config\.json|generation_config\.json|tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|"
    r".*\.tiktoken|sentencepiece.*|spiece\.model|chat_template.*|.*preprocessor_config\.json|processor_config\.json|"
    r".*\.py|(LICENSE|LICENCE|NOTICE|USE_POLICY).*"
)
"""Names of files copied from the base beside the weights, where it has them."""


def companion_files(
    found: Mapping[str, bytes], recipe: Recipe, card: str, made: Mapping[str, bytes]
) -> dict[str, bytes]:
    """What stands beside the weights. found: the base's `COMPANIONS`; made: others that the merge made."""
    files = {name: found[name] for name in sorted(found)}
    if recipe.output_dtype is not None and "config.json" in files:
        files["config.json"] = with_dtype(files["config.json"], recipe.output_dtype)
    note = "# The resolved recipe. Model paths are as they were written: relative to the folder of the original.\n"
    files[RECIPE_COPY] = (note + recipe.to_yaml()).encode()
    files[CARD] = card.encode()
    return {**files, **made}


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json byte for byte, but for the value of its dtype fields."""
    return re.sub(rb'("(?:torch_)?dtype"\s*:\s*)"(?:torch\.)?\w+"', rb'\1"' + dtype.encode() + b'"', config)
