"""Merges as processes of their own, forked from a server that has the imports behind it, to be killed for real.

A fresh interpreter spends three seconds on importing torch, a fork milliseconds: a hundred merges can be killed several
times each. The server is a fresh process that computes nothing, so no thread is lost in a fork.

    with Forge() as forge:
        process = forge.start("merge", recipe, out, die=("os:replace", 3))
        assert process.wait() == -signal.SIGKILL
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Forked:
    """One merge, running or ended. log: its standard output and standard error."""

    pid: int
    log: Path
    forge: Forge = field(repr=False)

    def running(self) -> bool:
        """Whether it has not ended (it stays a zombie until `wait`)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Exit status; negative: the signal that ended it."""
        return int(self.forge.ask({"wait": self.pid}))


@dataclass
class Forge:
    """The server, from a test's or a drill's side. imports: modules that it has behind it, beside the product's."""

    imports: Sequence[str] = ()
    _server: subprocess.Popen[str] | None = None
    _started: list[int] = field(default_factory=list)

    def __enter__(self) -> Forge:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.drills.forked", *self.imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None and self._server.stdin is not None and self._server.stdout is not None
        for pid in self._started:  # not waited for: still ours, running or a zombie
            os.kill(pid, signal.SIGKILL)
        self._server.stdin.close()
        self._server.wait(timeout=60)
        self._server.stdout.close()

    def start(
        self,
        *arguments: object,
        log: Path,
        settings: Mapping[str, object] | None = None,
        die: tuple[str, int] | None = None,
        by: int = signal.SIGKILL,
        first: tuple[str, Mapping[str, object]] | None = None,
    ) -> Forked:
        """`ties-dist` with these arguments.

        settings: values of the product, as `module:name`, for this process. die: (`module:name`, n): the process sends
        itself the signal `by` where that function would be called for the n-th time; (`one > other`, n): for the n-th
        time after `one` was called. first: (`module:function`, keyword arguments) to be called before anything else.
        """
        order = {
            "arguments": [str(a) for a in arguments],
            "log": str(log),
            "set": settings or {},
            "die": [*die, by] if die else None,
            "first": first,
        }
        pid = int(self.ask(order))
        self._started.append(pid)
        return Forked(pid=pid, log=log, forge=self)

    def ask(self, order: Mapping[str, object]) -> str:
        assert self._server is not None and self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of forked merges has died"
        if "wait" in order:
            self._started.remove(int(str(order["wait"])))
        return answer


# -- the server's side -------------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork a merge for every order on standard input; or say how one ended."""
    import numpy as np
    import zarr  # noqa: F401

    from ties_dist.cli import tables  # noqa: F401
    from ties_dist.compiler import fuse, trace  # noqa: F401  # torch, which a merge imports only where it needs it

    for name in sys.argv[1:]:
        importlib.import_module(name)
    from ties_dist.kernels.histogram import count_equal, count_magnitudes, find_equal

    # Compiled functions are loaded here once, not by every child.
    empty, counters = np.zeros(0, np.uint16), np.zeros(1 << 15, np.int64)
    count_magnitudes(empty, empty, counters, counters, np.uint32(0))
    count_equal(empty, empty, np.uint32(0))
    find_equal(empty, empty, np.uint32(0), 0)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            assert threading.active_count() == 1, "a fork would lose a thread"
            answer = os.fork()
            if answer == 0:
                _become(order)
        print(answer, flush=True)


def _become(order: Mapping[str, Any]) -> None:
    """Turn this fork into the merge it was ordered to be."""
    status = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for target, source in enumerate((nothing, log, log)):
            os.dup2(source, target)
        for name, value in order["set"].items():
            owner, attribute = _find(name)
            setattr(owner, attribute, value)
        if order["first"] is not None:
            owner, attribute = _find(order["first"][0])
            getattr(owner, attribute)(**order["first"][1])
        if order["die"] is not None:
            _arm(*order["die"])
        from ties_dist.cli.commands import main

        main(order["arguments"])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _find(name: str) -> tuple[Any, str]:
    """`module:name` or `module:Class.name` -> (owner, attribute)."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


def _arm(call: str, number: int, by: int) -> None:
    """Make the `number`-th such call send the signal `by` to this process, before it does anything."""
    first, _, last = call.rpartition(" > ")
    calls, lock, armed = [0], threading.Lock(), [not first]

    def counted() -> None:
        with lock:
            calls[0] += armed[0]
            if armed[0] and calls[0] == number:
                os.kill(os.getpid(), by)

    _before(last, counted)
    if first:
        _before(first, lambda: armed.__setitem__(0, True))


def _before(call: str, act: Callable[[], None]) -> None:
    owner, attribute = _find(call)
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        act()
        return function(*arguments, **options)

    setattr(owner, attribute, called)


if __name__ == "__main__":
    serve()
