"""Loops that numba compiles for this processor, kept on disk where there is a place for that.

numba gives up where the package, the home and NUMBA_CACHE_DIR are all read-only, and where a user has no home it keeps
them in a folder `~` of the working directory. There they are compiled again by each process, in a second or two.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from numba import njit

Given = ParamSpec("Given")
Result = TypeVar("Result")


def compiled(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Without the GIL."""
    keep = os.path.isabs(os.path.expanduser("~"))
    try:
        found: Callable[Given, Result] = njit(nogil=True, cache=keep)(function)
    except RuntimeError:  # no place to keep it
        found = njit(nogil=True)(function)
    return found
