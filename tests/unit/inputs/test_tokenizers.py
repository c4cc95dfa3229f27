"""Ids and their tokens, from every kind of file, and how far two tokenizers agree."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from ties_dist.inputs.tokenizers import Tokenizer, agreement, compare_tokens, vocabulary

WORDS = [f"w{i}" for i in range(2000)]


def bpe(words: Mapping[str, int], added: Mapping[str, int] | None = None) -> dict[str, bytes]:
    listed = [{"id": i, "content": token, "special": True} for token, i in (added or {}).items()]
    return {"tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": words}, "added_tokens": listed}).encode()}


def numbered(words: list[str]) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def test_every_kind_of_file_gives_the_same_ids() -> None:
    words = numbered(WORDS)
    unigram = json.dumps({"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in WORDS]}}).encode()
    files: list[Mapping[str, bytes]] = [
        bpe(words),
        {"tokenizer.json": unigram},
        {"vocab.json": json.dumps(words).encode()},
        {"vocab.txt": "\n".join(WORDS).encode()},
    ]
    found = [vocabulary(each) for each in files]
    assert all(each is not None and each.tokens == dict(enumerate(WORDS)) for each in found)


def test_sentencepiece_is_read_by_its_fields() -> None:
    """Bytes after sentencepiece_model.proto: pieces = 1 {piece = 1, score = 2, type = 3}, trainer_spec = 2."""

    def piece(text: bytes, kind: int | None = None) -> bytes:
        inner = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x80\xbf"  # the score, four bytes
        inner += b"" if kind is None else b"\x18" + bytes([kind])
        return b"\x0a" + bytes([len(inner)]) + inner

    content = (
        piece(b"<unk>", 2) + piece(b"<s>", 3) + piece("\u2581the".encode()) + piece(b"sep", 4) + b"\x12\x02\x18\x01"
    )
    found = vocabulary({"tokenizer.model": content})
    assert found is not None
    assert found.tokens == {0: "<unk>", 1: "<s>", 2: "\u2581the", 3: "sep"}
    assert found.apart == {0, 1, 3}


def test_the_same_ids_for_other_tokens_are_refused_beyond_one_in_a_thousand() -> None:
    base = vocabulary(bpe(numbered(WORDS)))
    assert base is not None
    for other, refused in ((0, False), (2, False), (3, True)):
        found = vocabulary(bpe(numbered([f"x{w}" if i < other else w for i, w in enumerate(WORDS)])))
        assert found is not None
        result = agreement(base, found)
        assert (result.shared, result.other, result.refused) == (2000, other, refused)
    assert result.example == (0, "w0", "xw0")


def test_added_special_and_reserved_tokens_may_be_renamed() -> None:
    words = numbered([*WORDS, "<unused0>", "[unused1]"])
    base = vocabulary(bpe(words, {"<|end|>": 2002}))
    tuned = vocabulary(bpe(numbered([*WORDS, "<|im_start|>", "<|im_end|>"]), {"</s>": 2002, "<new>": 2003}))
    assert base is not None and tuned is not None
    result = agreement(base, tuned)
    assert (result.shared, result.other, result.renamed, result.refused) == (2000, 0, 3, False)


def test_tokens_beside_the_vocabulary_are_read_wherever_they_stand() -> None:
    base = {"vocab.json": json.dumps(numbered(WORDS)).encode()}
    decoder = json.dumps({"added_tokens_decoder": {"2000": {"content": "<a>"}}}).encode()
    for files in ({"added_tokens.json": b'{"<a>": 2000}'}, {"tokenizer_config.json": decoder}):
        found = vocabulary({**base, **files})
        assert found is not None and found.tokens[2000] == "<a>" and 2000 in found.apart


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"model": "3x"}', b'{"model": {"vocab": {"a": "x"}}}', b"[" * 100_000, b"\xff" * 9]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "tokenizer.model", "added_tokens.json"])
def test_what_cannot_be_read_is_no_tokenizer(name: str, content: bytes) -> None:
    assert vocabulary({name: content}) is None


def test_equal_files_agree_unparsed_and_missing_ones_say_nothing() -> None:
    strange = {"tokenizer.json": b"not json"}
    found = compare_tokens(Tokenizer(strange), Tokenizer(strange))
    assert found is not None and not found.refused
    assert compare_tokens(Tokenizer(strange), Tokenizer(bpe(numbered(WORDS)))) is None
    assert compare_tokens(Tokenizer({}), Tokenizer({})) is None
