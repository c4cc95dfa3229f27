"""config.json beside the weights: byte for byte the base's, but for what the recipe changes."""

from __future__ import annotations

import json

import pytest

from ties_dist.output.companions import with_untied


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (b'{"a": 1.0,\n "tie_word_embeddings" :true}', b'{"a": 1.0,\n "tie_word_embeddings" :false}'),
        (b'{"tie_word_embeddings": false}\n', b'{"tie_word_embeddings": false}\n'),
        (b'{"tie_word_embeddings": null}', b'{"tie_word_embeddings": false}'),
        (b'{\n  "a": 1e5\n}\n', b'{\n  "tie_word_embeddings": false,\n  "a": 1e5\n}\n'),
        (
            b'{"tie_word_embeddings": true, "text_config": {"tie_word_embeddings": true}}',
            b'{"tie_word_embeddings": false, "text_config": {"tie_word_embeddings": false}}',
        ),
    ],
)
def test_the_value_alone_changes(config: bytes, expected: bytes) -> None:
    assert with_untied(config) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"tie_word_embeddings": False}),
        (
            {"text_config": {"a": "\u00e9"}},
            {"text_config": {"a": "\u00e9", "tie_word_embeddings": False}, "tie_word_embeddings": False},
        ),
        (
            {"text_config": {}, "vision_config": {"tie_word_embeddings": True}},
            {
                "text_config": {"tie_word_embeddings": False},
                "vision_config": {"tie_word_embeddings": True},
                "tie_word_embeddings": False,
            },
        ),
    ],
)
def test_a_part_that_ties_by_default_is_told_so_too(config: object, expected: object) -> None:
    assert json.loads(with_untied(json.dumps(config).encode())) == expected
