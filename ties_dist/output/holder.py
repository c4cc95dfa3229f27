"""Who holds an OUT, so told that a process on any machine can say whether that one certainly is gone.

Equal host names alone prove nothing: cloned machines share them. So a process id counts only beside the boot and the
namespace that it is of, and beside when its process began.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Annotated

import psutil
from pydantic import Field

from ties_dist.messages import show
from ties_dist.output.documents import Name


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock. boot and namespace make a process id comparable; started tells a recycled one.

    token: of the names of its files. started: as `_started` gives it. elsewhere: whether others write for it, who may
    outlive it.
    """

    token: Name
    host: str
    boot: str
    namespace: str
    pid: Annotated[int, Field(gt=0, lt=1 << 31)]
    started: float
    since: str
    elsewhere: bool = False

    @classmethod
    def myself(cls, *, elsewhere: bool = False) -> Holder:
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            boot=_first_line("/proc/sys/kernel/random/boot_id"),
            namespace=_link("/proc/self/ns/pid"),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0.0,
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            elsewhere=elsewhere,
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {show(self.host)}, since {show(self.since)}"

    def shares_processes(self, me: Holder) -> bool:
        """Whether the holder's process id means the same process here."""
        return (self.host, self.boot, self.namespace) == (me.host, me.boot, me.namespace)

    def is_dead(self, me: Holder) -> bool:
        """Whether it is certain from here that the holder is gone."""
        if not self.shares_processes(me):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's: it is there
            pass
        started = _started(self.pid)
        return started is not None and started != self.started


def _started(pid: int) -> float | None:
    """When a process began; -1 where it has ended and only waits to be reaped, None where that cannot be read.

    In clock ticks since the boot: psutil's `create_time` moves with the system clock, and an adjusted clock must not
    make a living process look like a recycled id.
    """
    try:
        with open(f"/proc/{pid}/stat") as stat:
            state, *fields = stat.read().rpartition(")")[2].split()
        return -1.0 if state in "ZX" and int(fields[16]) <= 1 else float(fields[18])  # the last thread, not the first
    except (OSError, ValueError):
        pass
    try:  # no /proc: not Linux
        process = psutil.Process(pid)
        return -1.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _first_line(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
