"""Documents made wrong: by the byte, and by the value, so that they still parse and mean something else."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = "@deep@"
"""Stands for a list in a list in a list, which only the text can hold."""
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, -(2**63),
    10**40, float("inf"), float("nan"), "", " ", ".", "..", "/", "../victim", "../../victim", "/etc/passwd",
    "a/../../victim", "C:\\victim", "~", "\0", "\n", "\x1b[2J\x1b]0;owned\x07", "\u202e", "\ud800", "x" * 300,
    "%s%n", "{0}", "1e999", "0x10", "NaN", "null", "true", "(a+)+$", "(((a*)*)*)*b", "[", "*", "**", "F32", "U64",
    "model.safetensors", DEEP, [], {}, [[]], [{}], [None], [0, 0], [1, 0], [0, 2**64], [-1], ["../victim"], {"": ""},
    {"a": None}, {"../victim": 1},
)  # fmt: skip
"""Values that a careless reader would follow, multiply, or print."""
SCRAPS = (b"\0", b'"', b"{", b"}", b"[", b",", b"\\", b"\xff", b"-", b"9", b"e9", b"*a", b"&a ")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with a key of it, the whole document's parts."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def by_value(document: Any, draw: random.Random) -> Any:
    """The document with one to three of its values, keys or places changed."""
    changed = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not (found := list(places(changed))):
            return draw.choice(NASTY)
        holder, key = draw.choice(found)
        match draw.randrange(8):
            case 0 | 1 | 2:
                holder[key] = copy.deepcopy(draw.choice(NASTY))
            case 3:
                del holder[key]
            case 4:
                other, at = draw.choice(found)
                holder[key] = copy.deepcopy(other[at])
            case 5 if isinstance(holder, dict):
                holder[str(draw.choice(NASTY))] = holder.pop(key)
            case 6 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
                holder[key] += draw.choice((-1, 1, 8, 4096, -(2**20), 2**33))
            case 6 if isinstance(holder[key], str):
                before, behind = draw.choice(("../", "/", "", "a")), draw.choice(("\0", "/..", "", "\x1b[1m"))
                holder[key] = before + holder[key] + behind
            case _:
                holder[key] = [holder[key]]
    return changed


def by_byte(raw: bytes, draw: random.Random) -> bytes:
    """The text with some of its bytes flipped, cut, doubled or replaced."""
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(changed) + 1)
        match draw.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                del changed[at : at + draw.choice((1, 1, 2, 17))]
            case 2:
                changed[at:at] = changed[at : at + draw.choice((1, 8, 64))]
            case 3:
                changed[at:at] = draw.choice(SCRAPS)
            case _:
                changed[at:] = b"" if draw.random() < 0.3 else changed[at:]
    return bytes(changed)


def as_json(document: Any, draw: random.Random) -> bytes:
    """A document as bytes: mutated by value, by byte, or both."""
    kind = draw.random()
    text = as_text(document if kind < 0.25 else by_value(document, draw))
    return by_byte(text, draw) if kind < 0.35 else text


def as_text(document: Any) -> bytes:
    return json.dumps(document).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000).encode()
