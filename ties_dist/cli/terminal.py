"""How the command line talks: notes and logs on stderr, a progress bar where somebody looks, and what signals mean."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING

import click

from ties_dist.errors import BugError, StoppedError, TiesDistError, printable

if TYPE_CHECKING:
    from ties_dist.progress import Progress

logger = logging.getLogger(__name__)

SIGINT_STATUS = 130
SIGPIPE_STATUS = 141
SHOW_CURSOR = "\x1b[?25h"
CUT_SHORT = (
    "CheckpointError: a file became shorter while it was read: another process writes it. Put it back as it was and "
    "run the same command again: it resumes."
)


def open_streams() -> None:
    """Where the three streams were closed before we began, open them to nowhere.

    Else the next files that are opened get their numbers: what a library prints would go into a shard.
    """
    for number, mode in enumerate("rww"):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


@contextmanager
def done() -> Iterator[None]:
    """Around what is printed of work that was done: that it cannot be printed does not undo it."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        tell(logging.WARNING, f"the summary cannot be written ({error.strerror or error}); the work is done.")
        drop_output()


def drop_output() -> None:
    """What standard output still holds, and gets, goes nowhere from here on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pass_over(what: sys.UnraisableHookArgs) -> None:
    """What fails while an object is let go (an event loop, where too many files are open): nobody can act on it."""
    logger.debug("%s in %r", what.exc_value, what.object)


def say(quiet: bool, notes: Sequence[str]) -> None:
    for note in () if quiet else notes:
        tell(logging.INFO, f"note: {note}")


def tell(level: int, text: str) -> None:
    """On stderr, in the form of the log."""
    if _as_json():
        logger.log(level, "%s", text)
        return
    with suppress(OSError):  # nobody is there to be told: the work goes on
        click.echo(printable(text), err=True)


def tell_error(error: TiesDistError) -> None:
    """A message; of a bug its traceback, too, once."""
    message, trace = f"{type(error).__name__}: {error}", error.trace if isinstance(error, BugError) else ""
    if _as_json():
        facts = {"item": str(error.item)} if error.item is not None else {}
        facts |= {"node": error.node} if error.node is not None else {}
        logger.error("%s", message, extra={"numbers": facts | ({"exception": trace} if trace else {})})
        return
    tell(logging.ERROR, f"{trace}{message}")


def _as_json() -> bool:
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def log(verbose: int, quiet: bool) -> None:
    level = logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[OnStderr()])
    context = click.get_current_context(silent=True)
    if context is not None and context.find_root().params.get("log_format") == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())
    logging.getLogger("ties_dist").setLevel(level)


class OnStderr(logging.Handler):
    """Writes to what is standard error at that moment: while a bar is drawn, that is a stream which writes above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{printable(self.format(record))}\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


class JsonLines(logging.Formatter):
    """One object a line: time, level, where, message, and the numbers that a phase tells of itself."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "numbers", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def progress(quiet: bool) -> Progress:
    from ties_dist.progress import LogProgress

    if quiet or not sys.stderr.isatty():
        return LogProgress()
    from ties_dist.cli.bars import BarProgress

    logging.getLogger("ties_dist.progress").setLevel(logging.WARNING)
    return BarProgress()


@contextmanager
def signals() -> Iterator[threading.Event]:
    """SIGINT and SIGTERM end the merge after the unit at hand; a second one ends the process at once."""
    stop = threading.Event()
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if received:
            _show_cursor()
            os._exit(SIGINT_STATUS if number == signal.SIGINT else StoppedError.exit_status)
        received.append(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _end_where_maps_fail()
        yield stop
    except StoppedError as error:
        if received[:1] == [signal.SIGINT]:
            raise Interrupted(str(error)) from None
        raise
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def endable() -> Iterator[None]:
    """SIGTERM ends a command that only looks at once, with what a bar has hidden shown again."""

    def handle(number: int, frame: FrameType | None) -> None:
        _show_cursor()
        os._exit(StoppedError.exit_status)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        _end_where_maps_fail()
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_where_maps_fail() -> None:
    from ties_dist.compiler.fault import end_where_maps_fail

    end_where_maps_fail(f"{SHOW_CURSOR if sys.stderr.isatty() else ''}{CUT_SHORT}\n".encode(), StoppedError.exit_status)


def _show_cursor() -> None:
    """Of a bar that nobody will end, and the last word: its thread still draws, from here on into nothing.

    Past the stream, which the code that was interrupted may be writing to.
    """
    if sys.stderr.isatty():
        shown = sys.stderr.fileno()
        screen = os.dup(shown)
        os.dup2(os.open(os.devnull, os.O_WRONLY), shown)
        os.write(screen, f"{SHOW_CURSOR}\n".encode())


class Interrupted(StoppedError):
    """Stopped by Ctrl-C; resumable all the same."""

    exit_status = SIGINT_STATUS
