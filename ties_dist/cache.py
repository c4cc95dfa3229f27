"""Where things are kept between runs: counts, analyses and compiled loops."""

from __future__ import annotations

import os
from pathlib import Path

from ties_dist.errors import PlanError

KERNELS = f"kernels-{os.geteuid()}"
"""Compiled loops, in a folder beside the statistics: of one user, since they are run as code."""


def cache_folder(asked: Path | None) -> Path:
    """`--cache-dir`, else TIES_DIST_CACHE, else the user's cache folder; absolute, as workers start elsewhere.

    Raises PlanError where the user has none.
    """
    if asked is not None:
        return asked.absolute()
    if folder := os.environ.get("TIES_DIST_CACHE"):
        return Path(folder).absolute()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).absolute() / "ties_dist"
    try:
        return Path.home() / ".cache" / "ties_dist"
    except RuntimeError:
        raise PlanError("there is no home directory to keep a cache in. Set HOME or TIES_DIST_CACHE.") from None
