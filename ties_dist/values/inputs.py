"""The models of a merge as they travel, without anything opened: where each tensor lies, how their files looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ties_dist.values.views import View


@dataclass(frozen=True, kw_only=True)
class Input:
    """One model to read from.

    path: a folder or a single file; adapter: the folder of what is applied to it. views: by parameter. identity:
    path-free, for the fingerprint.
    """

    name: str
    path: str
    views: Mapping[str, View]
    identity: str
    adapter: str | None = None


Stamp = tuple[int, int, int, int]
"""Size, modification and change time in nanoseconds, inode. All -1: it is gone."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What the files of the inputs looked like, in the order of the plan: folders may be called otherwise next time.

    samples: digests of pages that the secret chose.
    """

    secret: str
    stamps: Sequence[Stamp]
    samples: Sequence[str]
