"""The one hash of everything here: XXH3 of 128 bits, fast enough to be taken of every byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import xxhash

from ties_dist.storage.base import BLOCK_BYTES


def digest(content: bytes | memoryview) -> str:
    """The fast hash used for all digests here: XXH3, 128 bits, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(content)


def block_digests(content: memoryview) -> tuple[str, ...]:
    """Digest of each 1 MiB block; `content` starts at a block."""
    return tuple(digest(content[i : i + BLOCK_BYTES]) for i in range(0, len(content), BLOCK_BYTES))


def output_digest(shards: Iterable[tuple[str, int, Sequence[str]]]) -> str:
    """One digest of a whole output: names, sizes and block digests of its shards, in file order."""
    return digest(repr([(name, size, list(blocks)) for name, size, blocks in shards]).encode())
