"""Code from outside of the package: all of it is run under one guard, which says what failed and in which line.

Whatever it raises is a mistake of whoever wrote it, found while planning: one line for its user, and no traceback.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from ties_dist.errors import RecipeError, TiesDistError

PACKAGE = os.path.dirname(os.path.dirname(__file__))


def is_ours(method: type) -> bool:
    """Whether a method's code is of this package, and covered by its tests."""
    return method.__module__.startswith(f"{__name__.rpartition('.')[0]}.")


@contextmanager
def asking(method: type, part: str, where: str = "") -> Iterator[None]:
    """A part of a method is run in it. Raises RecipeError for whatever the code of a method from outside raises.

    where: it fails, in words; by default in the part.
    """
    try:
        yield
    except TiesDistError:
        raise
    except Exception as error:
        if is_ours(method):
            raise
        name, where, place = getattr(method, "name", ""), where or f"in `{part}`", place_of(error, method, part)
        raise RecipeError(f"merge_method `{name}` fails {where}: {type(error).__name__}: {error}{place}.") from error


def place_of(error: BaseException, method: type, part: str) -> str:
    """The line of a method's code that an error comes from, in brackets; where it is in none, that of the part."""
    files = {getattr(sys.modules.get(each.__module__), "__file__", None) for each in _classes(method)}
    inner = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return _brackets(inner[-1].filename, inner[-1].lineno) if inner else defined(method, part)


def defined(method: type, part: str) -> str:
    """Where a part of a method is, in brackets; empty where that is not known."""
    found = next((vars(each)[part] for each in _classes(method) if part in vars(each)), None)
    found = getattr(found, "fget", None) or getattr(found, "__func__", None) or found
    code = getattr(inspect.unwrap(found) if callable(found) else found, "__code__", None)
    return _brackets(code.co_filename, code.co_firstlineno) if code is not None else ""


def last_line(error: BaseException) -> str:
    """Where an error was raised, in brackets, unless Python or we did; a syntax error says that itself."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "" if frame.filename.startswith(("<frozen", PACKAGE)) else _brackets(frame.filename, frame.lineno)


def code_of(method: type) -> str:
    """A digest of the modules that a method's classes are in: with another text it is another method."""
    modules = dict.fromkeys(each.__module__ for each in _classes(method))
    return hashlib.sha256(b"\0".join(_content(sys.modules[name]) for name in modules)).hexdigest()


def _content(module: ModuleType) -> bytes:
    """A module's text, or the bytes of a compiled one; nothing of one that was typed in."""
    try:
        return inspect.getsource(module).encode()
    except (OSError, TypeError):
        read = getattr(module.__loader__, "get_data", None)
        return read(module.__file__) if read and getattr(module, "__file__", None) else b""


def _classes(method: type) -> list[type]:
    """A method's class and those it follows from, but for Python's, and for ours where it is none of ours."""
    return [each for each in method.__mro__[:-1] if is_ours(method) or not is_ours(each)]


def _brackets(file: str, line: int | None) -> str:
    return f" ({os.path.basename(file)}, line {line})"
