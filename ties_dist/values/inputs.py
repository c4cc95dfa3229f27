"""The models of a merge as they travel: where each tensor lies, without anything opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where one tensor of one input lies: bytes [start, start + numel * item) of a file; dtype as in its header."""

    file: str
    start: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Input:
    """One model to read from: path is a folder or a single file, adapter the folder of what is applied to it; identity
    is path-free, for the fingerprint."""

    name: str
    path: str
    tensors: Mapping[str, Source]
    identity: str
    adapter: str | None = None
