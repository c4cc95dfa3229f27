"""Which function takes which options, as keywords that type checkers know (PEP 692).

The one place that repeats names and types of `RunOptions`: a checker cannot make them from it. A test holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from textwrap import fill
from typing import ParamSpec, TypedDict, TypeVar

from ties_dist.compiler.kinds import KernelKind
from ties_dist.messages import nearest
from ties_dist.planning.options import (
    Cluster,
    Device,
    ExecutorName,
    Option,
    RunOptions,
    ThresholdPass,
    options_of,
)
from ties_dist.storage.base import Backend

P = ParamSpec("P")
R = TypeVar("R")


class ReadKeywords(TypedDict, total=False):
    """Of all functions."""

    semantics: str | None
    threads: int | None
    memory_budget: int
    unit_size: int | None
    read_backend: Backend
    allow: tuple[str, ...]
    strict: bool
    allow_external_methods: bool
    max_shard_size: int | None


class PlanKeywords(ReadKeywords, total=False):
    """Of `plan`: what decides on whether a merge may begin."""

    random_seed: int | None
    fresh: bool
    overwrite: bool


class AnalyzeKeywords(ReadKeywords, total=False):
    """Of `analyze`."""

    cache_dir: Path | str | None


class SweepKeywords(PlanKeywords, AnalyzeKeywords, total=False):
    """Of `sweep`."""

    kernel: KernelKind
    wait: bool
    trust_journal: bool


class MergeKeywords(SweepKeywords, total=False):
    """Of `merge`: all there are."""

    executor: ExecutorName
    cluster: Cluster | None
    device: Device
    threshold_pass: ThresholdPass


def chosen(keywords: type[ReadKeywords]) -> list[Option]:
    """The options that these are, in the order in which they are told."""
    return [each for each in options_of(RunOptions) if each.name in keywords.__annotations__]


def takes(keywords: type[ReadKeywords]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function with `**options: Unpack[keywords]`: `help` tells of each, and a wrong name is a TypeError."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own, options = signature(function), chosen(keywords)
        parameters = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        first = sum(p.kind is not Parameter.KEYWORD_ONLY for p in parameters)
        parameters[first:first] = [
            Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.hint) for each in options
        ]
        known = [p.name for p in parameters]

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument '{name}'; {nearest(name, known)}"
                    )
            return function(*args, **kwargs)

        checked.__dict__["__signature__"] = own.replace(parameters=parameters)  # what `inspect` and `help` go by
        checked.__doc__ = "\n".join([cleandoc(function.__doc__ or ""), "", "Options:", *map(_line, options)])
        return checked

    return decorate


def _line(option: Option) -> str:
    unit = f" In {option.said.unit}." if option.said.unit else ""
    default = f" [default: {option.default_text}]" if option.default_text else ""
    said = f"{option.name}: {option.said.help}{unit}{default}"
    return fill(said, 110, initial_indent="    ", subsequent_indent="        ")
