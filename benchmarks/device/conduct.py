"""Runs parts one after the other, each in a process group of its own that ends at its limit; and is that process.

The part's standard input is its lifeline: it stays open as long as the conductor lives, however that ends. What the
part tells comes back through its standard output; what it and its children print goes into the log.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from benchmarks.device.parts import Bench, Part, Skip, Teller
from benchmarks.device.report import Findings, Report
from benchmarks.measure import REPOSITORY

LEAST_SECONDS = 5.0
"""A part that would have less is not begun."""
LOG_LINES = 12

Command = Callable[[Part, Bench], Sequence[str]]


def command(part: Part, bench: Bench) -> list[str]:
    return [sys.executable, "-m", "benchmarks.device.conduct", part.name, bench.to_json()]


def conduct(
    report: Report,
    bench: Bench,
    *,
    environment: Mapping[str, str],
    command: Command = command,
) -> None:
    """Run the report's parts within the bench's limit, and write the report after everything they tell."""
    for part in report.parts:
        found = report.findings[part.name]
        left = bench.limit_seconds - (time.monotonic() - report.began)
        unmet = [need for need in part.needs if need in report.findings and report.findings[need].state != "done"]
        if unmet:
            found.state, found.reason = "skipped", f"it needs the part {', '.join(unmet)}"
        elif left < LEAST_SECONDS:
            found.state, found.reason = "skipped", f"the {bench.limit_seconds:.0f} s of the whole run were over"
        else:
            given = replace(bench, limit_seconds=min(part.limit_seconds, left), figures=report.figures)
            _run(report, found, command(part, given), given.limit_seconds, environment)
        report.write()


def _run(
    report: Report, found: Findings, command: Sequence[str], limit_seconds: float, environment: Mapping[str, str]
) -> None:
    log = report.out / "log.txt"
    began = time.monotonic()
    found.state = "running"
    report.write()
    with open(log, "a") as stream:
        stream.write(f"--- {found.part.name}\n")
        stream.flush()
        before = log.stat().st_size
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | dict(environment),
            start_new_session=True,
        )
    assert process.stdout is not None
    lines = _lines(process.stdout)
    try:
        while (line := _next(lines, began + limit_seconds - time.monotonic())) is not None:
            _take(found, line)
            found.seconds = time.monotonic() - began
            report.write()
        status = process.wait(max(0.1, began + limit_seconds - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        found.state, found.reason = "killed", f"at its limit of {limit_seconds:.0f} s. {_tail(log, before)}".strip()
    else:
        if status != 0:
            found.state, found.reason = "failed", f"exit status {status}. {_tail(log, before)}".strip()
        elif found.state == "running":
            found.state = "done"
    finally:
        _end(process)
        found.seconds = time.monotonic() - began
        if found.state == "running":
            found.state = "stopped"
        report.write()


def _take(found: Findings, line: str) -> None:
    told = json.loads(line)
    if told["kind"] == "stop":
        found.state, found.reason = "skipped", told["text"]
    else:
        found.take(told)


def _lines(stream: IO[str]) -> queue.SimpleQueue[str | None]:
    """Lines as they come, and None after the last: a pipe cannot be waited for with a limit."""
    found: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        with stream:
            for line in stream:
                found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    return found


def _next(lines: queue.SimpleQueue[str | None], seconds: float) -> str | None:
    try:
        return lines.get(timeout=max(0.0, seconds))
    except queue.Empty:
        raise TimeoutError from None


def _end(process: subprocess.Popen[str]) -> None:
    """The whole group: a part's commands may have outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _tail(log: Path, start: int) -> str:
    """What a part printed last."""
    with open(log, "rb") as stream:
        stream.seek(start)
        last = stream.read().decode(errors="replace").strip().splitlines()[-LOG_LINES:]
    return "\n\n```\n" + "\n".join(last) + "\n```" if last else ""


# -- in the part's process ---------------------------------------------------------------------------------------------


def main() -> None:
    """`python -m benchmarks.device.conduct NAME BENCH`."""
    name, text = sys.argv[1:]
    _hang_on()
    # What libraries and children print must not come between the lines that are told.
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    tell = Teller(lambda line: print(line, file=told, flush=True))
    try:
        importlib.import_module(f"benchmarks.device.{name}").run(Bench.from_json(text), tell)
    except Skip as why:
        tell.stop(str(why))


def _hang_on() -> None:
    """End the whole group of this process when the one at the other end of standard input is gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
