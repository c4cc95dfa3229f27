"""The switches that commands share, made from `RunOptions`, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import get_args, get_origin

import click

from ties_dist.planning.keywords import ReadKeywords, chosen
from ties_dist.planning.options import Cluster, Option, RunOptions, options_of

Command = Callable[..., None]
Decorator = Callable[[Command], Command]


def size(text: str) -> int:
    """Bytes, as `2GiB`, `500MB` or a plain number."""
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        found = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise click.BadParameter(f"'{text}' is not a size; write it like 2GiB or 500MiB.") from None
    if found <= 0:
        raise click.BadParameter(f"'{text}' is not a positive size.")
    return found


def label(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.BadParameter(f"'{text}' is not NAME=VALUE.")
    return name, value


def amount(text: str) -> tuple[str, float]:
    """NAME=NUMBER."""
    try:
        name, value = label(text)
        return name, float(value)
    except (click.BadParameter, ValueError):
        raise click.BadParameter(f"'{text}' is not NAME=NUMBER.") from None


def together(*options: Decorator) -> Decorator:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def takes(keywords: type[ReadKeywords]) -> Decorator:
    """Switches for these keywords; the command gets what they say as `options`."""
    options = chosen(keywords)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def gathering(**given: object) -> None:
            values = {each.name: _value(each, given) for each in options}
            command(options=values, **given)

        return together(*(_switch(part) for each in options for part in _parts(each)))(gathering)

    return decorate


def alone(name: str, help: str) -> Decorator:
    """One of the switches, for a command that takes no other and says in its own words what it is for."""
    (option,) = (each for each in options_of(RunOptions) if each.name == name)
    return _switch(option, help)


def _parts(option: Option) -> tuple[Option, ...]:
    return options_of(Cluster) if option.kind is Cluster else (option,)


def _value(option: Option, given: dict[str, object]) -> object:
    """Taken out of what click has read."""
    if option.kind is Cluster:
        whole: Callable[..., Cluster] = Cluster
        return whole(**{part.name: _value(part, given) for part in _parts(option)})
    return given.pop(option.name)


def _switch(option: Option, help: str | None = None) -> Decorator:
    said, declared = option.said, option.said.switch or f"--{option.name.replace('_', '-')}"
    help = help or said.help
    if option.kind is bool:
        return click.option(declared, option.name, is_flag=True, help=help)
    if get_origin(option.kind) is Mapping:
        read = amount if get_args(option.kind)[1] is float else label
        return click.option(
            declared, option.name, type=read, multiple=True, callback=_mapping, metavar=said.metavar, help=help
        )
    if get_origin(option.kind) is tuple:
        return click.option(declared, option.name, multiple=True, metavar=said.metavar, help=help)
    if option.default is None:
        help = f"{help}  [default: {option.default_text}]"
    return click.option(
        declared,
        option.name,
        type=_type(option),
        default=None if option.default is None else option.default_text,
        show_default=option.default is not None,
        metavar=said.metavar,
        help=help,
    )


def _mapping(_: click.Context, __: click.Parameter, pairs: tuple[tuple[str, object], ...]) -> dict[str, object]:
    return dict(pairs)


def _type(option: Option) -> click.ParamType[object] | Callable[[str], object]:
    if option.words:
        return click.Choice(option.words)
    if option.said.unit == "bytes":
        return size
    if option.kind is int:
        return click.IntRange(min=option.said.least)
    if option.kind is float:
        return click.FloatRange(min=1)
    return click.Path(path_type=Path) if option.kind is Path else click.STRING


TALK = together(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else."),
    click.option("-v", "--verbose", count=True, help="Say more; of merge and analyze also of every tensor."),
    click.option(
        "-q", "--quiet", is_flag=True, help="No notes and no progress; of merge, sweep and analyze no summary either."
    ),
)
