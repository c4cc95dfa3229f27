"""Words that messages share: lists of problems, names and sizes as a person reads them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from difflib import get_close_matches

SHORTAGES = {
    errno.EMFILE: "too many open files. Raise the limit (`ulimit -n`) and run again.",
    errno.ENFILE: "the machine has too many open files. Close some, or raise its limit, and run again.",
    errno.ENOMEM: "there is no memory left. Free some, or lower --memory-budget or --threads, and run again.",
}
"""What the machine, not a file, is to blame for."""


def reason(error: OSError | MemoryError) -> str:
    """Why the machine refused something, and what to do where that is known."""
    if isinstance(error, MemoryError):
        return SHORTAGES[errno.ENOMEM]
    if error.errno in SHORTAGES:
        return SHORTAGES[error.errno]
    if error.errno == errno.ENOENT and error.filename is None and not _has_working_folder():
        return "the working directory is gone. Change into one that is there and run again."
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}."


def _has_working_folder() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint for an error message: the nearest known word, or the whole (short) list."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return "known: " + ", ".join(known)


def listing(title: str, problems: Sequence[str], advice: str = "", *, limit: int = 20) -> str:
    """One message for all problems of a phase: a title, up to `limit` indented lines, and what to do."""
    lines = [f"  {p}" for p in problems[:limit]]
    if len(problems) > limit:
        lines.append(f"  ... and {len(problems) - limit} more")
    return "\n".join([title, *lines, *([advice] if advice else [])])


def show(name: str) -> str:
    """A tensor's name as messages print it: quoted where it could disturb a terminal or vanish."""
    return name if name.isprintable() and name.strip() else repr(name)


def brief(value: object, limit: int = 80) -> str:
    try:
        text = json.dumps(value)
    except RecursionError:
        text = "something deeply nested"
    return text if len(text) <= limit else f"{text[:limit]}..."


def readable(size: float) -> str:
    """A size as a person writes it on the command line: 1.5GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.4g}{unit}"
        size /= 1024
    raise AssertionError
