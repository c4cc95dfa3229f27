"""What a checkpoint's config.json says: of itself, and of the language model that is part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

Config = Mapping[str, object] | None

_KEY: Final = "tie_word_embeddings"
TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config")
_PARTS: Final = (*TEXT_CONFIGS, "decoder")
"""Of models that are encoder and decoder the latter is the language model, as far as a head goes."""
_SCALED_BY_TYING: Final = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers", "pop2piano", "udop"})
"""Families that multiply what their decoder gives by d_model ** -0.5 where config.json says that weights are tied."""


def configs(config: Config) -> Iterator[Mapping[str, object]]:
    """config.json and, for multimodal models, the language model's part of it."""
    config = config or {}
    yield config
    for key in _PARTS:
        if isinstance(part := config.get(key), dict):
            yield part


def says_tied(config: Config) -> bool | None:
    """`tie_word_embeddings`; None where config.json does not say. Where its parts contradict each other, true."""
    said = [part[_KEY] for part in configs(config) if _KEY in part]
    return any(value is True for value in said) if said else None


def untied(config: Mapping[str, object]) -> dict[str, object]:
    """The same, but that no part of it is tied: where one says nothing, its class may tie by default."""
    parts = {key: part for key in _PARTS if isinstance(part := config.get(key), dict)}
    return {**config, **{k: {**p, _KEY: False} for k, p in parts.items()}, _KEY: False}


def classes(config: Config) -> list[str]:
    """Of transformers, that the checkpoint is of."""
    listed = (config or {}).get("architectures")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def is_scaled_by_tying(config: Config) -> bool:
    """Whether `tie_word_embeddings` means more than that two names are one parameter."""
    return any(part.get("model_type") in _SCALED_BY_TYING for part in configs(config))
