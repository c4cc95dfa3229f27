"""Do the tokenizers of two models give the same ids to the same tokens? From their files alone, nothing is imported.

Two tokenizers of equal size may be of different languages: no shape tells. Special, added and reserved tokens are where
fine-tunes rename (`<|im_start|>` in the place of an `<unused>`), so they are told apart from the text's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from ties_dist.storage.digests import digest

FILES: Final = (
    r"tokenizer\.json|tokenizer_config\.json|added_tokens\.json|vocab\.json|vocab\.txt|tokenizer\.model|spiece\.model|"
    r"sentencepiece\.bpe\.model"
)
"""Names of the files that ids are read from."""
TOLERATED: Final = 0.001
"""Share of the ids that both have; beyond, texts are cut into other pieces and the same rows mean other things."""

_RESERVED: Final = re.compile(
    r"reserved|unused|placeholder|extra_?id|extra_\d|dummy|control_\d|special_\d|^\[PAD\d*\]$|^<[|/]?.*[|]?>$|^\[[A-Z_]+\d*\]$",
    re.IGNORECASE,
)
_PIECE_KINDS: Final = {3: "control", 4: "user defined", 5: "unused"}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """tokens: by id. apart: ids of special, added and reserved ones."""

    tokens: Mapping[int, str] = field(default_factory=dict)
    apart: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of ids that both have: how many are the text's own, how many of these differ, and how many of the others.

    example: an id, and what the two call it.
    """

    shared: int
    other: int
    renamed: int
    example: tuple[int, str, str] | None = None

    @property
    def refused(self) -> bool:
        return self.other > TOLERATED * self.shared


class Tokenizer:
    """A model's, by its files; parsed only where somebody asks, for it takes a second per 30 MB."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files = files
        self.digest = digest(repr([(name, digest(files[name])) for name in sorted(files)]).encode()) if files else None

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        return vocabulary(self._files)


def compare_tokens(base: Tokenizer, expert: Tokenizer) -> Agreement | None:
    """None where one of them has none that can be read. Equal files agree without being parsed."""
    if base.digest is not None and base.digest == expert.digest:
        return Agreement(shared=0, other=0, renamed=0)
    if base.vocabulary is None or expert.vocabulary is None:
        return None
    return agreement(base.vocabulary, expert.vocabulary)


def vocabulary(files: Mapping[str, bytes]) -> Vocabulary | None:
    """From a model's files by name; None where there are none of a kind that is known, or none can be read."""
    added = dict(_added(files))
    for name, read in _READERS.items():
        if name in files:
            with suppress(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                found, apart = read(files[name])
                tokens = found | added
                apart |= added.keys() | {i for i, token in tokens.items() if _RESERVED.search(token)}
                return Vocabulary(tokens=tokens, apart=frozenset(apart)) if tokens else None
    return None


def agreement(base: Vocabulary, expert: Vocabulary) -> Agreement:
    """Compare id by id."""
    apart = base.apart | expert.apart
    both = base.tokens.keys() & expert.tokens.keys()
    differing = sorted(i for i in both if base.tokens[i] != expert.tokens[i])
    own = [i for i in differing if i not in apart]
    example = (own[0], base.tokens[own[0]], expert.tokens[own[0]]) if own else None
    return Agreement(shared=len(both - apart), other=len(own), renamed=len(differing) - len(own), example=example)


def _added(files: Mapping[str, bytes]) -> Iterator[tuple[int, str]]:
    """Tokens that stand beside the vocabulary, in each of the places that hold them."""
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        yield from ((int(i), str(token)) for token, i in json.loads(files.get("added_tokens.json", b"{}")).items())
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        for i, each in config.get("added_tokens_decoder", {}).items():
            yield int(i), str(each["content"] if isinstance(each, dict) else each)


Found = tuple[dict[int, str], set[int]]


def _tokenizer_json(content: bytes) -> Found:
    document = json.loads(content)
    model = document["model"]["vocab"]
    listed = enumerate(piece[0] for piece in model) if isinstance(model, list) else ((i, t) for t, i in model.items())
    tokens = {int(i): str(token) for i, token in listed}
    added = {int(each["id"]): str(each["content"]) for each in document.get("added_tokens") or ()}
    return tokens | added, set(added)


def _vocab_json(content: bytes) -> Found:
    return {int(i): str(token) for token, i in json.loads(content).items()}, set()


def _vocab_txt(content: bytes) -> Found:
    return dict(enumerate(content.decode().splitlines())), set()


def _sentencepiece(content: bytes) -> Found:
    """`pieces` of a ModelProto: field 1, repeated; of each the text is field 1, the kind field 3."""
    tokens: dict[int, str] = {}
    apart: set[int] = set()
    for number, piece in _fields(content):
        if number == 1 and isinstance(piece, bytes):
            values = dict(_fields(piece))
            text = values.get(1, b"")
            if values.get(3) in _PIECE_KINDS:
                apart.add(len(tokens))
            tokens[len(tokens)] = text.decode() if isinstance(text, bytes) else ""
    return tokens, apart


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of a protocol buffer's message; numbers wider than a varint are passed over."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        if key & 7 == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
        elif key & 7 == 2:
            size, at = _varint(content, at)
            yield key >> 3, content[at : at + size]
            at += size
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise ValueError("no protocol buffer")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80 or shift > 63:
            return value, at


_READERS: Final = {
    "tokenizer.json": _tokenizer_json,
    "tokenizer.model": _sentencepiece,
    "spiece.model": _sentencepiece,
    "sentencepiece.bpe.model": _sentencepiece,
    "vocab.json": _vocab_json,
    "vocab.txt": _vocab_txt,
}
"""In the order in which transformers prefers them."""
