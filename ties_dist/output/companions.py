"""What stands beside the weights: the base's own small files, the resolved recipe, the card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress

from ties_dist.inputs.configs import untied
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
    if recipe.options.tie_word_embeddings is False and "config.json" in files:
        files["config.json"] = with_untied(files["config.json"])
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
