"""Where things are kept between runs: counts, analyses and compiled loops."""

from __future__ import annotations

import os
from pathlib import Path

KERNELS = f"kernels-{os.geteuid()}"
"""Compiled loops, in a folder beside the statistics: of one user, since they are run as code."""


def cache_folder(asked: Path | None) -> Path:
    """`--cache-dir`, else TIES_DIST_CACHE, else the user's cache folder; absolute, as workers start elsewhere."""
    if asked is not None:
        return asked.absolute()
    if folder := os.environ.get("TIES_DIST_CACHE"):
        return Path(folder).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ties_dist"
