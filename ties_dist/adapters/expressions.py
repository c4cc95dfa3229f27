"""Expressions that an adapter's config gives, matched as peft does, but not for longer than anybody waits.

They come with a download, and Python's `re` cannot be stopped: `(a+)+$` takes years on a name of forty letters. The
`regex` package reads the same expressions and takes a time limit.
"""

from __future__ import annotations

from functools import lru_cache
from reprlib import repr as short
from time import perf_counter
from typing import Any

from ties_dist.errors import CheckpointError

PATIENCE_SECONDS = 1.0
"""For all names together that one expression is matched with; peft's own take microseconds."""
_spent: dict[str, float] = {}


@lru_cache(maxsize=1 << 12)
def _compiled(expression: str) -> Any:
    import regex

    return regex.compile(expression)


def matches(expression: str, name: str) -> bool:
    """Whether an expression fits a whole name; False where it is none. Raises CheckpointError where that takes long."""
    import regex  # here: few merges have adapters

    began = perf_counter()
    try:
        found = _compiled(expression).fullmatch(name, timeout=2 * PATIENCE_SECONDS) is not None
    except (regex.error, TimeoutError):
        found = False
    _spent[expression] = _spent.get(expression, 0.0) + perf_counter() - began
    if _spent[expression] > PATIENCE_SECONDS:
        raise CheckpointError(
            f"adapter_config.json: the expression {short(expression)} takes too long to match. Name modules."
        )
    return found
