"""Whose fault an exception is that comes out of the work on an item.

Ours say what is wrong and what to do. For what may be the machine's (a file system's hiccup, no memory) another attempt
may end well. All else is a bug: it is told with its traceback, from whichever process it comes.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ties_dist.errors import BugError, TiesDistError

MACHINES = (OSError, MemoryError)


@contextmanager
def working_on(item: object) -> Iterator[None]:
    """Raises BugError, which names the item, for what is neither ours nor the machine's."""
    try:
        yield
    except (TiesDistError, *MACHINES):
        raise
    except Exception as error:
        bug = as_bug(error)
        bug.item = item
        raise bug from None  # whose note has the traceback


def as_bug(error: BaseException) -> BugError:
    """Not told by its cause, which cannot travel: the traceback is text."""
    bug = BugError(_said(error))
    bug.trace = "".join(traceback.format_exception(error))
    bug.add_note(bug.trace)
    return bug


def as_told(error: Exception) -> Exception:
    """An error as it can travel: of another library's it is not known whether the driver can make it again."""
    if isinstance(error, TiesDistError):
        return error
    return OSError(_said(error)) if isinstance(error, MACHINES) else as_bug(error)


def _said(error: BaseException) -> str:
    text, kind = str(error), type(error).__name__
    return f"{kind}: {text}" if text else kind
