"""The models of a merge as they travel: where each tensor lies, without anything opened."""

from __future__ import annotations

from collections.abc import Mapping
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
