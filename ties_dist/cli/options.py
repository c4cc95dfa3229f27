"""The options that commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


class Size(click.ParamType[int]):
    """Bytes, as `2GiB`, `500MB` or a plain number."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from pydantic import ByteSize, TypeAdapter, ValidationError

        try:
            size = int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError:
            self.fail(f"'{value}' is not a size; write it like 2GiB or 500MiB.", param, ctx)
        if size <= 0:
            self.fail(f"'{value}' is not a positive size.", param, ctx)
        return size


SIZE = Size()


class Pair(click.ParamType[tuple[str, Any]]):
    """NAME=VALUE."""

    name = "pair"

    def __init__(self, kind: type[str] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, equals, text = str(value).partition("=")
        try:
            if not (name and equals and text):
                raise ValueError(value)
            return name, self.kind(text)
        except ValueError:
            self.fail(f"'{value}' is not NAME={'VALUE' if self.kind is str else 'NUMBER'}.", param, ctx)


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


RESOURCES = together(
    click.option(
        "--semantics",
        metavar="S",
        help="Whose TIES: paper, mergekit or peft.  [default: as the recipe says, else paper]",
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Compute threads.  [default: all cores; of a worker of Ray 8 at most]",
    ),
    click.option(
        "--memory-budget",
        type=SIZE,
        default="2GiB",
        show_default=True,
        help="For buffers, per worker process; Python and torch need about 0.5GiB more.",
    ),
    click.option("--unit-size", type=SIZE, help="Output bytes of a unit of work.  [default: 8MiB, or what fits]"),
    click.option(
        "--read-backend",
        type=click.Choice(["auto", "mmap", "pread", "direct"]),
        default="auto",
        help="How inputs are read; direct: past the page cache; auto: by what of them it holds.  [default: auto]",
    ),
    click.option(
        "--allow-external-methods", is_flag=True, help="Run `merge_method: package.module:Class` from other packages."
    ),
    click.option(
        "--max-shard-size", type=SIZE, help="Largest output shard; no tensor is split.  [default: as the base]"
    ),
)
CACHE = click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    help="Where counts and compiled loops are kept.  [default: $TIES_DIST_CACHE, else ~/.cache/ties_dist]",
)
RUN = together(
    click.option(
        "--kernel",
        type=click.Choice(["auto", "compiled", "eager"]),
        default="auto",
        help="Merge loops; auto: compiled, else eager by torch; same bytes.  [default: auto]",
    ),
    CACHE,
    click.option("--fresh", is_flag=True, help="Discard an unfinished merge in OUT."),
    click.option("--overwrite", is_flag=True, help="Replace the finished model of another merge in OUT."),
    click.option("--wait", is_flag=True, help="Wait for another run that is merging into OUT."),
    click.option("--trust-journal", is_flag=True, help="Resume without reading finished ranges again."),
)
CLUSTER = together(
    click.option(
        "--executor",
        type=click.Choice(["auto", "local", "ray"]),
        default="auto",
        help="auto, local: this machine; ray: the workers of a cluster; same bytes.  [default: auto]",
    ),
    click.option(
        "--address",
        metavar="A",
        default="auto",
        help="Of the Ray cluster: HOST:PORT of its head; local: one of this machine's own; "
        "auto: $RAY_ADDRESS or one that runs here, else local.  [default: auto]",
    ),
    click.option(
        "--workers", type=click.IntRange(min=1), help="Worker processes of the cluster.  [default: as many as fit]"
    ),
    click.option(
        "--worker-timeout",
        type=click.FloatRange(min=1),
        default=300,
        show_default=True,
        metavar="SECONDS",
        help="How long a first worker is waited for.",
    ),
    click.option(
        "--worker-resource",
        type=Pair(float),
        multiple=True,
        metavar="NAME=AMOUNT",
        help="A custom resource of Ray that every worker takes; repeatable.",
    ),
    click.option(
        "--node-label",
        type=Pair(str),
        multiple=True,
        metavar="NAME=VALUE",
        help="Only nodes with this label of Ray work; repeatable.",
    ),
)
TALK = together(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else."),
    click.option("-v", "--verbose", count=True, help="Say more; of merge and analyze also of every tensor."),
    click.option(
        "-q", "--quiet", is_flag=True, help="No notes and no progress; of merge, sweep and analyze no summary either."
    ),
)
