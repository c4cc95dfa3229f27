"""What names of tensors transformers gives to one parameter, from a committed table that `tests/families` writes.

alias_table.json has groups of names with the classes of models that store them. `*` in a name is any number, `{}` one
that all names of a parameter have. A model may be a part of another: whatever words stand before all names of a group.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

FILE = "alias_table.json"
_WORDS = r"(?P<words>(?:(?!\d+\.)[^.]+\.)*)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Names of one parameter, the best first. classes: of models that store it; none where only memory knows it."""

    names: tuple[str, ...]
    classes: frozenset[str]


@cache
def groups() -> tuple[Group, ...]:
    table = json.loads(files(__package__).joinpath(FILE).read_text())
    return tuple(Group(names=tuple(g["names"]), classes=frozenset(g["classes"])) for g in table["groups"])


def groups_of(classes: Iterable[str]) -> list[Group]:
    """What models of these classes have once, the largest group first; groups with numbers in their names left out."""
    wanted = frozenset(classes)
    plain = (g for g in groups() if g.classes & wanted and not any(re.search(r"[*{]", n) for n in g.names))
    return sorted(plain, key=lambda g: -len(g.names))


def linked(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Sets of two and more of the names that may be one parameter's, each with the best first."""
    found: dict[tuple[object, ...], list[tuple[int, str]]] = defaultdict(list)
    for name in names:
        for key, rank in _places(name):
            found[key].append((rank, name))
    return [tuple(name for _, name in sorted(group)) for group in found.values() if len(group) > 1]


def _places(name: str) -> Iterator[tuple[tuple[object, ...], int]]:
    """Which parameter of which group a name is of, and its rank in the group."""
    for number, rank, pattern in _patterns().get(_tail(name), ()):
        if match := pattern.fullmatch(name):
            yield (number, *match.groups()), rank


@cache
def _patterns() -> Mapping[str, Sequence[tuple[int, int, re.Pattern[str]]]]:
    """By the last two words of a name: hardly any of a model's names is looked at twice."""
    found: dict[str, list[tuple[int, int, re.Pattern[str]]]] = defaultdict(list)
    for number, group in enumerate(groups()):
        for rank, name in enumerate(group.names):
            pattern = re.escape(name).replace(r"\*", r"\d+").replace(r"\{\}", r"(\d+)")
            found[_tail(name)].append((number, rank, re.compile(_WORDS + pattern)))
    return found


def _tail(name: str) -> str:
    return ".".join(re.sub(r"\d+|\*|\{\}", "#", name).split(".")[-2:])
