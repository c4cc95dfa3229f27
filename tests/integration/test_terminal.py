"""What is left of a terminal when a command ends inside a phase: a visible cursor, and the message on its own line."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ties_dist
from tests.conftest import random_models, write_checkpoint, write_job
from tests.integration import test_statistics_methods as statistics
from tests.integration.command import SHAPES
from ties_dist.cli.bars import BarProgress
from ties_dist.cli.commands import main
from ties_dist.errors import OutputError

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
SUBJECT = """
import torch

def make(checkpoint):
    module = torch.nn.Sequential(torch.nn.Linear(3, 1))
    return module, lambda module, example: torch.nn.functional.logsigmoid(module(torch.tensor(example["x"]))[0])
"""


class Screen:
    """A pseudo terminal, and all that was written to it. `slave` is the end to write to."""

    def __init__(self) -> None:
        self._master, self.slave = os.openpty()
        self._read = bytearray()
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def _follow(self) -> None:
        try:
            while chunk := os.read(self._master, 1 << 16):
                self._read += chunk
        except OSError:  # EIO: nobody has the other end open
            pass

    def text(self) -> str:
        """Everything, once the other end is closed."""
        self._reader.join(timeout=20)
        assert not self._reader.is_alive()
        os.close(self._master)
        return self._read.decode()


def plain(written: str) -> str:
    """Lines without control sequences, and without what was erased."""
    kept = re.sub(r"[^\n]*\x1b\[2K", "", written.replace("\r\n", "\n"))
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", kept)


def assert_left_in_order(written: str) -> None:
    assert HIDE in written, "a bar was drawn"
    assert written.rindex(SHOW) > written.rindex(HIDE)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Arguments of a command that has a phase; its inputs are made."""

    def recipe() -> Path:
        return write_job(tmp_path, random_models(SHAPES, experts=2))

    def merged() -> list[str]:
        ties_dist.merge(recipe(), tmp_path / "out")
        return [str(tmp_path / "out")]

    def collect() -> list[str]:
        write_checkpoint(tmp_path / "model", {"0.weight": torch.zeros(1, 3), "0.bias": torch.zeros(1)})
        (tmp_path / "data.jsonl").write_text(f"{json.dumps({'x': [1.0, 2.0, 3.0]})}\n" * 2)
        (tmp_path / f"made_{tmp_path.name}.py").write_text(SUBJECT)
        monkeypatch.syspath_prepend(tmp_path)
        options = {"--data": "data.jsonl", "--out": "store", "--model": f"made_{tmp_path.name}:make"}
        return ["fisher", "model", *(word for option in options.items() for word in option)]

    made: dict[str, Callable[[], list[str]]] = {
        "merge": lambda: [str(recipe()), "out"],
        "sweep": lambda: [str(recipe()), "out", "--lambda", "1,2"],
        "analyze": lambda: [str(recipe())],
        "verify": merged,
        "collect": collect,
    }
    monkeypatch.chdir(tmp_path)
    return lambda name: [name, *made[name]()]


COMMANDS = ("merge", "sweep", "analyze", "verify", "collect")


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], tuple[int, str]]]:
    """Runs a command in this process, with a terminal as standard error. Returns its status and what was written."""
    monkeypatch.setenv("TERM", "xterm")
    level = logging.getLogger("ties_dist.progress").level

    def go(arguments: list[str]) -> tuple[int, str]:
        screen = Screen()
        with os.fdopen(screen.slave, "w") as terminal, monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", terminal)
            patched.setattr(logging.root, "handlers", [])  # pytest's: with them the command makes none of its own
            with pytest.raises(SystemExit, match=r"^\d+$") as ended:
                main(arguments)
        return int(str(ended.value)), screen.text()

    yield go
    logging.getLogger("ties_dist.progress").setLevel(level)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_in_a_phase_leaves_a_cursor_and_stands_on_its_own_line(
    name: str,
    command: Callable[[str], list[str]],
    on_a_terminal: Callable[[list[str]], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = command(name)

    def advance(self: BarProgress, done_bytes: int) -> None:
        raise OutputError("the disk is gone")

    monkeypatch.setattr(BarProgress, "advance", advance)
    status, written = on_a_terminal(arguments)
    assert status == 2
    assert_left_in_order(written)
    assert re.search(r"^OutputError: .*the disk is gone$", plain(written), re.MULTILINE), plain(written)


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_in_a_phase_leaves_a_cursor(
    name: str,
    command: Callable[[str], list[str]],
    on_a_terminal: Callable[[list[str]], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, advance, pressed = command(name), BarProgress.advance, []

    def pressing(self: BarProgress, done_bytes: int) -> None:
        if not pressed:
            pressed.append(os.kill(os.getpid(), signal.SIGINT))
        advance(self, done_bytes)

    monkeypatch.setattr(BarProgress, "advance", pressing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started us with `&`
    try:
        status, written = on_a_terminal(arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 130, plain(written)
    assert_left_in_order(written)
    if name != "verify":  # which keeps nothing: there is nothing to say
        assert re.search(r"^Interrupted: stopped", plain(written), re.MULTILINE), plain(written)


def test_phases_in_a_phase_draw_one_bar(tmp_path: Path, on_a_terminal: Callable[[list[str]], tuple[int, str]]) -> None:
    """`verify` solves the matrices of the units that it merges again."""
    models = random_models(statistics.SHAPES, experts=2)[1:]
    ties_dist.merge(statistics.write_recipe(tmp_path, "regmean", models, statistics.grams(2)), tmp_path / "out")
    status, written = on_a_terminal(["verify", str(tmp_path / "out"), "--sample", "1"])
    assert status == 0
    assert_left_in_order(written)
    assert "sample" in plain(written) and "solve" not in plain(written)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_warning_in_a_phase_stands_on_its_own_line(
    name: str,
    command: Callable[[str], list[str]],
    on_a_terminal: Callable[[list[str]], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, advance = command(name), BarProgress.advance

    def warning(self: BarProgress, done_bytes: int) -> None:
        logging.getLogger("ties_dist.storage").warning("a disk is slow")
        advance(self, done_bytes)

    monkeypatch.setattr(BarProgress, "advance", warning)
    status, written = on_a_terminal(arguments)
    assert status == 0
    before = re.findall(r"^(.*)a disk is slow$", plain(written), re.MULTILINE)
    assert before and not any(before), plain(written)


def test_a_second_ctrl_c_leaves_a_cursor(command: Callable[[str], list[str]]) -> None:
    code = (
        "import os, signal, time\n"
        "from ties_dist.cli.commands import main\n"
        "from ties_dist.cli.bars import BarProgress\n"
        "def advance(self, done_bytes):\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "BarProgress.advance = advance\n"
        "leave = os._exit\n"
        "os._exit = lambda status: (time.sleep(0.3), leave(status))\n"  # the bar's thread draws ten times a second
        "main()"
    )
    arguments, screen = command("merge"), Screen()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=screen.slave, env={**os.environ, "TERM": "xterm"}
    )
    os.close(screen.slave)
    assert process.wait(timeout=60) == 130
    written = screen.text()
    assert_left_in_order(written)
    assert plain(written).endswith("\n")


def test_sigterm_in_verify_leaves_a_cursor(command: Callable[[str], list[str]]) -> None:
    code = (
        "import os, signal\n"
        "from ties_dist.cli.commands import main\n"
        "from ties_dist.cli.bars import BarProgress\n"
        "BarProgress.advance = lambda self, done_bytes: os.kill(os.getpid(), signal.SIGTERM)\n"
        "main()"
    )
    arguments, screen = command("verify"), Screen()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=screen.slave, env={**os.environ, "TERM": "xterm"}
    )
    os.close(screen.slave)
    assert process.wait(timeout=60) == 75
    assert_left_in_order(screen.text())


@pytest.mark.parametrize(
    "moment", ["click", "ties_dist.cli.commands", "ties_dist.cli.tables", "ties_dist.planning.keywords"]
)
def test_sigterm_in_the_first_moments_ends_as_told(moment: str, command: Callable[[str], list[str]]) -> None:
    code = (
        "import os, runpy, signal, sys\n"
        "class Moment:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {moment!r}: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Moment())\n"
        "runpy.run_module('ties_dist', run_name='__main__')"
    )
    ended = subprocess.run([sys.executable, "-c", code, *command("merge")], capture_output=True, text=True, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (75, False)
