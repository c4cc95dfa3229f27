"""The small JSON files of OUT, parsed in one step: each is of the kind asked for, or an error says why it is not.

Names in them become parts of paths, of files that are read, replaced and removed: they are checked as names.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, TypeAdapter, ValidationError

from ties_dist.errors import OutputError
from ties_dist.messages import show
from ties_dist.storage.place import Place, is_inside, is_plain

Kind = TypeVar("Kind")


def _plain(name: str) -> str:
    if not is_plain(name):
        raise ValueError(f"{name!r} is no plain name")
    return name


def _inside(name: str) -> str:
    if not is_inside(name):
        raise ValueError(f"{name!r} is no name inside this folder")
    return name


Name = Annotated[str, AfterValidator(_plain)]
"""A part of a file's name."""
FileName = Annotated[str, AfterValidator(_inside)]
"""Of a file in OUT or in a folder of it."""


def load_document(place: Place, name: str, kind: type[Kind]) -> Kind | None:
    """None where there is none. Raises OutputError where it cannot be read, or is no such document."""
    content = place.read(name)
    return None if content is None else parse(content, kind, f"{place}/{name}")


def parse(content: bytes, kind: type[Kind], where: str) -> Kind:
    """kind: a dataclass or a pydantic model; fields that it does not know are passed over. Raises OutputError."""
    try:
        found: Kind = _adapter(kind).validate_json(content)  # type: ignore[arg-type]  # types are hashable
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(show(str(part)) for part in first["loc"])
        raise OutputError(f"{where} is damaged: {field + ': ' if field else ''}{first['msg']}.") from error
    return found


@cache
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
