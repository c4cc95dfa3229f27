"""What is declared as something is that: one check for options and for what methods from elsewhere say of themselves.

A type checker finds all this where one is used. Words are told the nearest that are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cache
from numbers import Real
from reprlib import repr as short
from types import NoneType, UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from ties_dist.messages import nearest

NOUNS: dict[object, str] = {
    int: "a whole number", float: "a number", bool: "True or False", str: "text", NoneType: "None"
}  # fmt: skip


def misdeclared(said: object, kind: type | None = None) -> Iterator[str]:
    """What of an object's fields is not as its class, or another, declares it."""
    for name, hint in _hints(kind or type(said)).items():
        if wrong := unfit(getattr(said, name), hint):
            yield f"{name}: {wrong}"


def unfit(value: object, hint: object) -> str | None:
    """What is wrong with a value that is declared as `hint`; None where nothing is. A list will do for a tuple."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is ClassVar:
        return unfit(value, parts[0])
    if origin in (Union, UnionType):
        answers = [unfit(value, part) for part in parts]
        nothing = None in answers
        return None if nothing else next(a for a, p in zip(answers, parts, strict=True) if p is not NoneType)
    if origin is Literal:
        fits = any(type(value) is type(word) and value == word for word in parts)
        return None if fits else f"no value {short(value)}; {nearest(str(value), [str(word) for word in parts])}"
    if origin is tuple or origin is frozenset:
        if not isinstance(value, (tuple, list) if origin is tuple else (frozenset, set)):
            return f"{short(value)} is no {origin.__name__}"
        return next((wrong for each in value if (wrong := unfit(each, parts[0]))), None)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return f"{short(value)} is no mapping"
        answers = [unfit(each, part) for pair in value.items() for each, part in zip(pair, parts, strict=True)]
        return next((wrong for wrong in answers if wrong), None)
    return None if _is(value, hint) else f"{short(value)} is not {NOUNS.get(hint, getattr(hint, '__name__', hint))}"


@cache
def _hints(kind: type) -> Mapping[str, object]:
    return get_type_hints(kind)


def _is(value: object, kind: object) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)  # JSON takes no integers of numpy
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    return not isinstance(kind, type) or isinstance(value, kind)
