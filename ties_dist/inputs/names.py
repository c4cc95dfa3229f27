"""What a tensor's name says of its part in a model: the token embedding, the output head, one row per token.

A numbered part before the name means a layer's own tensor (`layers.0.attention.output.weight`), not the model's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import translate
from typing import Final

_EMBEDDINGS: Final = (
    "shared", "embed_tokens", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "tokens_embed",
    "token_embedding", "embed_in", "embeddings", "embedding",
)  # fmt: skip
"""Best first: of several names of one parameter the first gives the canonical one."""
_EMBEDDING: Final = re.compile(rf"(?:^|\.)({'|'.join(_EMBEDDINGS)})\.weight$")
_HEADS: Final = (
    "lm_head", "lm_head.linear", "lm_head.out_proj", "lm_head.decoder", "generator_lm_head", "embed_out", "output",
    "output_layer", "output_projection", "proj_out", "ff_out", "decoder", "predictions.decoder", "vocab_projector",
    "lm_loss", "pred_layer.proj", "head",
)  # fmt: skip
_HEAD: Final = re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, _HEADS))})\.weight$")
_HEAD_BIAS: Final = re.compile(r"(^|\.)(lm_head|cls\.predictions|cls\.predictions\.decoder)\.bias$")
_NUMBERED: Final = re.compile(r"(^|\.)\d+\.")

NO_EMBEDDING: Final = len(_EMBEDDINGS)


def embedding_rank(name: str) -> int:
    """How good a name for a token embedding it is, 0 best; `NO_EMBEDDING` where it is none."""
    match = _EMBEDDING.search(name)
    return _EMBEDDINGS.index(match[1]) if match and not is_numbered(name) else NO_EMBEDDING


def is_embedding(name: str) -> bool:
    return embedding_rank(name) < NO_EMBEDDING


def is_head(name: str) -> bool:
    """Of a language model: what makes scores of tokens."""
    return bool(_HEAD.search(name)) and not is_numbered(name)


def is_vocabulary(name: str) -> bool:
    """Whether it has a row, or an entry, per token."""
    return is_embedding(name) or is_head(name) or (bool(_HEAD_BIAS.search(name)) and not is_numbered(name))


def is_numbered(name: str) -> bool:
    """Whether it is of one layer, or expert, of several."""
    return bool(_NUMBERED.search(name))


def hits(glob: str, names: Collection[str]) -> set[str]:
    """Those that a glob is of, whole."""
    match = re.compile(translate(glob)).match
    return {name for name in names if match(name)}


def matching(patterns: Iterable[str], names: Collection[str]) -> set[str]:
    """Those that one of the globs is of, whole."""
    return {name for pattern in patterns for name in hits(pattern, names)}
