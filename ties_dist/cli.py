"""The command line. Imports nothing heavy before a command runs: `--help` answers in a fraction of a second.

click, because it is small, fast to import, and its exit status and help text can be given exactly.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from ties_dist.errors import StoppedError, TiesDistError

if TYPE_CHECKING:
    from ties_dist.progress import Progress

SIGINT_STATUS = 130


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


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


RESOURCES = _options(
    click.option("--semantics", metavar="S", help="Preset of the ties_dist: block: paper, mergekit or peft."),
    click.option("--threads", type=click.IntRange(min=1), help="Compute threads.  [default: all cores]"),
    click.option(
        "--memory-budget",
        type=SIZE,
        default="2GiB",
        show_default=True,
        help="For buffers, per worker process; Python and torch need about 0.5GiB more.",
    ),
    click.option("--unit-size", type=SIZE, help="Output bytes of a unit of work.  [default: 8MiB, or what fits]"),
    click.option(
        "--read-backend", type=click.Choice(["auto", "mmap", "pread"]), default="auto", help="How inputs are read."
    ),
    click.option(
        "--max-shard-size", type=SIZE, help="Largest output shard; no tensor is split.  [default: as the base]"
    ),
)
TALK = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, nothing else."),
    click.option("-v", "--verbose", count=True, help="Say more: kept shares of every tensor."),
    click.option("-q", "--quiet", is_flag=True, help="No notes and no progress; of merge no summary either."),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ties-dist", message="%(version)s")
def cli() -> None:
    """Merge fine-tuned checkpoints that do not fit in memory: exact, bounded, resumable."""


@cli.command("merge")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@RESOURCES
@click.option("--executor", type=click.Choice(["auto", "local", "ray"]), default="auto", help="ray: not supported yet.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="cuda: not supported yet.")
@click.option("--kernel", type=click.Choice(["auto", "compiled", "eager"]), default="auto", help="Same bytes.")
@click.option(
    "--threshold-pass",
    type=click.Choice(["auto", "speculate", "scan"]),
    default="auto",
    help="Scan for thresholds, or predict and prove them; same bytes.",
)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Statistics store.  [default: the user's cache]")
@click.option("--fresh", is_flag=True, help="Discard an unfinished merge in OUT.")
@click.option("--overwrite", is_flag=True, help="Replace the finished model of another merge in OUT.")
@click.option("--wait", is_flag=True, help="Wait for another run that is merging into OUT.")
@click.option("--trust-journal", is_flag=True, help="Resume without reading finished ranges again.")
@TALK
def merge_command(recipe: Path, out: Path, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Merge the models of RECIPE into the folder OUT; resumes an interrupted merge by itself."""
    _log(verbose, quiet)
    with _signals() as stop:
        from ties_dist.api import merge
        from ties_dist.tables import merge_table

        report = merge(recipe, out, stop=stop, progress=_progress(quiet), told=partial(_say, quiet), **options)
    if as_json:
        click.echo(report.to_json())
    elif not quiet:
        merge_table(report, out, tensors=bool(verbose))


@cli.command("plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@RESOURCES
@click.option("--sample", is_flag=True, help="Read some pages; predict thresholds, kept shares and time.")
@TALK
def plan_command(recipe: Path, out: Path | None, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """What merging RECIPE will read, write and need, from the checkpoints' headers."""
    _log(verbose, quiet)
    from ties_dist.api import plan
    from ties_dist.tables import plan_table

    report = plan(recipe, out, **options)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        _say(quiet, report.notes)
        plan_table(report)


@cli.command("verify")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--sample", type=click.FloatRange(0, 1), help="Share of units to merge again.  [default: 0.02]")
@click.option("--sha256", is_flag=True, help="Print sha256 sums of the shards.")
@click.option("--memory-budget", type=SIZE, default="2GiB", show_default=True)
@TALK
def verify_command(
    out: Path, sample: float | None, sha256: bool, memory_budget: int, as_json: bool, verbose: int, quiet: bool
) -> None:
    """Read OUT again and compare it with its manifest; merge a random sample again and compare."""
    _log(verbose, quiet)
    from ties_dist.prepare import Resources
    from ties_dist.verify import summary, verify

    resources = Resources(memory_budget=memory_budget)
    report = verify(out, sample=sample, sha256=sha256, progress=_progress(quiet), resources=resources)
    if as_json:
        click.echo(json.dumps(asdict(report), indent=2))
    else:
        for name, value in report.sha256.items():
            click.echo(f"{value}  {name}")
        click.echo(summary(report))


@cli.command("inspect")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@TALK
def inspect_command(checkpoint: Path, as_json: bool, verbose: int, quiet: bool) -> None:
    """What a checkpoint holds, from its headers."""
    _log(verbose, quiet)
    from ties_dist.checkpoint import open_checkpoint
    from ties_dist.storage.local import open_reader
    from ties_dist.tables import inspect_document, inspect_table

    found = open_checkpoint(checkpoint, name=checkpoint.name or str(checkpoint), reader=open_reader)
    if as_json:
        click.echo(json.dumps(inspect_document(found), indent=2))
    else:
        inspect_table(found)


def _say(quiet: bool, notes: Sequence[str]) -> None:
    for note in () if quiet else notes:
        click.echo(f"note: {note}", err=True)


def _log(verbose: int, quiet: bool) -> None:
    level = logging.WARNING if quiet else logging.DEBUG if verbose > 1 else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ties_dist").setLevel(level)


def _progress(quiet: bool) -> Progress:
    from ties_dist.progress import LogProgress

    if quiet or not sys.stderr.isatty():
        return LogProgress()
    from ties_dist.tables import BarProgress

    logging.getLogger("ties_dist.progress").setLevel(logging.WARNING)
    return BarProgress()


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM end the merge after the unit at hand; a second one ends the process at once."""
    stop = threading.Event()
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            os._exit(SIGINT_STATUS if number == signal.SIGINT else StoppedError.exit_status)
        received.append(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except StoppedError as error:
        if received[:1] == [signal.SIGINT]:
            raise Interrupted(str(error)) from None
        raise
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Interrupted(StoppedError):
    """Stopped by Ctrl-C; resumable all the same."""

    exit_status = SIGINT_STATUS


def main(arguments: list[str] | None = None) -> None:
    """Entry point: maps the package's errors to exit statuses, without a traceback."""
    # Before torch loads: OpenMP threads that spin between kernels take the cores from those that read and write.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Importing and compiling allocate millions of objects that stay: collecting them costs a second of a merge.
    gc.set_threshold(200_000, 50, 50)
    try:
        status = cli.main(arguments, prog_name="ties-dist", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(SIGINT_STATUS)
    except KeyboardInterrupt:
        sys.exit(SIGINT_STATUS)
    except TiesDistError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_status)


def console() -> None:
    """`main` for a process of its own: ends it at once, whatever the compiler's threads are still doing."""
    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)
