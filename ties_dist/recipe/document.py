"""A recipe's YAML as plain values: safe loading only, no key twice, every failure a RecipeError that says where."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import yaml

from ties_dist.errors import RecipeError
from ties_dist.messages import listing

_LARGEST_BYTES = 16 << 20
"""A recipe is a few KB; a checkpoint passed in its place must not be read into memory."""

_MOST_VALUES = 25_000
"""Each alias counted as what it stands for: nine anchors can stand for a billion. PyYAML reads as many in a second."""
_DEEPEST = 100
_LONGEST = 10_000
"""Characters of a value: YAML reads `1:59:59:...` as a number, by as many multiplications."""

RecipeSource = Path | str | Mapping[str, object]
"""A file, YAML text, or the document itself."""


def as_source(given: RecipeSource) -> RecipeSource:
    """As users give it: text of one line is a file's name, for no recipe has one line."""
    return Path(given) if isinstance(given, str) and "\n" not in given else given


def read_document(source: RecipeSource) -> tuple[Mapping[str, object], str, Path]:
    """The document, what to call it in messages, and the folder that relative paths start from."""
    title, folder = "the recipe", Path.cwd()
    document: object = source
    if isinstance(source, Path):
        title, folder = f"recipe '{source}'", source.absolute().parent
        document = _parse(_read_text(source, title), title, source.name)
    elif isinstance(source, str):
        document = _parse(source, title)
    if document is None:
        raise RecipeError(f"{title} is empty; it needs at least `merge_method` and `models`")
    if not isinstance(document, Mapping):
        hint = " (to read a file, pass a Path)" if isinstance(source, str) and isinstance(document, str) else ""
        raise RecipeError(f"{title} must be a mapping of keys to values, found {short(document)}{hint}")
    return document, title, folder


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML itself lets the last win, silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Checked while composing, before merge keys (`<<`) bring in keys that may rightly be overridden.
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


def _read_text(path: Path, title: str) -> str:
    try:
        size = path.stat().st_size
        if size > _LARGEST_BYTES:
            raise RecipeError(f"{title} is {size:,} bytes long: that is not a recipe")
        if path.suffix == ".safetensors":
            raise RecipeError(f"{title} is a checkpoint; the recipe is a YAML file that names it")
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{title} does not exist") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{title} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{title} cannot be read: {error.strerror}") from error


def _check_size(text: str, title: str) -> None:
    """Raises RecipeError for what would take minutes to read, from its events alone, before it is read."""
    try:
        problem = _excess(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    except (yaml.YAMLError, ValueError):
        return  # told, with its place, by who reads it
    if problem:
        raise RecipeError(f"{title} is not a recipe: {problem}")


def _excess(events: Iterable[yaml.Event]) -> str:
    """What there is too much of; empty for a document that can be read."""
    sizes: dict[str, int] = {}
    begun: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _ in begun):
                return f"`*{event.anchor}` stands for what it is itself in"
            total += sizes.get(event.anchor or "", 0)
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, total))
            total += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            sizes |= {anchor: total - before} if anchor else {}
        elif isinstance(event, yaml.ScalarEvent):
            total += 1
            sizes |= {event.anchor: 1} if event.anchor else {}
            if len(event.value) > _LONGEST:
                return f"a value has {len(event.value):,} characters"
        if total > _MOST_VALUES:
            return f"it has more than {_MOST_VALUES:,} values, each alias counted as what it stands for"
        if len(begun) > _DEEPEST:
            return "it is nested too deeply"
    return ""


def _one_of(documents: Sequence[object], text: str, file: str, title: str) -> object:
    """The document, where there is one. Raises RecipeError, which names several and says how to run them."""
    if sum(document is not None for document in documents) < 2:
        return next((document for document in documents if document is not None), None)
    events = yaml.parse(text, Loader=yaml.SafeLoader)
    marks = [event.start_mark for event in events if isinstance(event, yaml.DocumentStartEvent)]
    starts = [mark.line for mark in marks if mark is not None]
    ends = [*starts[1:], len(text.splitlines())]
    steps, taken = [], set[str]()
    for i, (document, start, end) in enumerate(zip(documents, starts, ends, strict=True)):
        if document is not None:
            name = _name(document) or f"recipe-{i + 1}"
            name = f"{name}-{i + 1}" if name in taken else name
            taken.add(name)
            steps.append(
                f"sed -n '{start + 1},{end}p' {shlex.quote(file)} > {name}.yml && ties-dist merge {name}.yml {name}"
            )
    title = (
        f"{title} holds {len(steps)} recipes, and one is merged at a time. One by one they are run by, in its folder:"
    )
    raise RecipeError(listing(title, steps))


def _name(document: object) -> str | None:
    """What mergekit's tools call one of several documents, and its output, too."""
    name = document.get("name") if isinstance(document, Mapping) else None
    return name if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) else None


def _parse(text: str, title: str, file: str = "RECIPE") -> object:
    _check_size(text, title)
    try:
        documents = list(yaml.load_all(text, Loader=_StrictLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part) or "cannot be parsed"
        if "for the tag" in problem:
            problem += "; a recipe holds plain values, tags are refused and never run"
        raise RecipeError(f"{title}{place}: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{title} is not valid YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{title} is not a recipe: it is nested too deeply") from None
    return _one_of(documents, text, file, title)
