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
    for number, rank, listed in _by_tail().get(_tail(name), ()):
        if match := _pattern(listed).fullmatch(name):
            yield (number, *match.groups()), rank


@cache
def _by_tail() -> Mapping[str, Sequence[tuple[int, int, str]]]:
    """The table's names by their last two words: hardly any of a model's names is looked at twice."""
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for number, group in enumerate(groups()):
        for rank, name in enumerate(group.names):
            found[_tail(name)].append((number, rank, name))
    return found


@cache
def _pattern(listed: str) -> re.Pattern[str]:
    """Of a name of the table. Made where it is asked for: all of them would take 25 ms of every start."""
    return re.compile(_WORDS + re.escape(listed).replace(r"\*", r"\d+").replace(r"\{\}", r"(\d+)"))


def _tail(name: str) -> str:
    return ".".join(re.sub(r"\d+|\*|\{\}", "#", name).split(".")[-2:])
