"""One driver per OUT: a lock that names its holder, and a lease that shows it alive.

A plain shared file system cannot enforce a fencing token, so the lock only keeps honest drivers apart; late writers are
made harmless elsewhere: each has a journal of its own, the token is checked before each range, commit and rename, and
what a replaced holder may still have on its way to the disk goes into files that are no longer used (`resume.adopt`).
A provably dead holder (same host, boot and process namespace, process gone) is replaced at once, another one after its
lease stood still for a minute by our own clock. Equal host names alone prove nothing: cloned machines share them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from ties_dist.errors import LockedError, StoppedError
from ties_dist.storage.local import output_error, sync_folder, write_durably

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0
GUARD_POLL_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock. boot and namespace make a process id comparable; started tells a recycled one.

    started: as `_started` gives it. elsewhere: whether others write for it, who may outlive it.
    """

    token: str
    host: str
    boot: str
    namespace: str
    pid: int
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
        return f"process {self.pid} on {self.host}, since {self.since}"

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


@dataclass
class RunLock:
    """Held from `acquire` to `release`; `check` raises once another driver has taken over."""

    folder: Path
    lease_seconds: float = field(default_factory=lambda: LEASE_SECONDS)
    me: Holder = field(default_factory=Holder.myself)
    news: Callable[[], Mapping[str, object]] = dict
    """How far the holder is: goes into the lease, for `status` to read from elsewhere."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _beating: threading.Thread | None = None

    @property
    def token(self) -> str:
        return self.me.token

    @property
    def path(self) -> Path:
        return self.folder / "lock"

    def doubt(self, token: str) -> None:
        """Note that writes of a holder may still be on their way: it may be alive, or others who wrote for it are, or
        it knew of such writes when it ended. Stands until the partial files were replaced."""
        (self.folder / f"doubt-{token}").touch()
        sync_folder(self.folder)

    @property
    def doubts(self) -> list[Path]:
        """One file for each such holder, so that who removes those it has seen to removes no later one."""
        return sorted(self.folder.glob("doubt-*"))

    def acquire(self, *, wait: bool = False, stop: threading.Event | None = None) -> None:
        """Take the lock. Raises LockedError naming a living holder, unless told to wait for it; StoppedError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(self.lease_of(self.token), _beat_text(0, {}))
        except OSError as error:
            raise output_error(error, self.folder) from error
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beating.start()
        watched: dict[str, tuple[str, float]] = {}
        try:
            while not self._try(watched, wait=wait):
                time.sleep(min(1.0, self.lease_seconds / 10))
                if stop is not None and stop.is_set():
                    raise StoppedError("stopped while waiting for the other run; nothing was done.")
        except BaseException:
            self.release()  # not under the guard: flock would wait for ourselves
            raise

    def _try(self, watched: dict[str, tuple[str, float]], *, wait: bool) -> bool:
        with self._guard():
            holder = self.holder()
            if holder is None or holder.is_dead(self.me) or self._expired(holder, watched, wait=wait):
                if holder is not None and (holder.elsewhere or not holder.is_dead(self.me)):
                    self.doubt(holder.token)
                claim = self.folder / f"claim-{self.token}"
                write_durably(claim, json.dumps(asdict(self.me)))
                claim.replace(self.path)
                if holder is not None:
                    self.lease_of(holder.token).unlink(missing_ok=True)
                # Where the file system has no flock, two takers may both get here: the later write wins.
                time.sleep(0 if self._guarded else 0.2)
                current = self.holder()
                return current is not None and current.token == self.token
        return False

    def _expired(self, holder: Holder, watched: dict[str, tuple[str, float]], *, wait: bool) -> bool:
        """Whether the lease stood still long enough; raises as soon as it is seen to move."""
        lease = ""
        with suppress(OSError):
            lease = self.lease_of(holder.token).read_text()
        local = holder.shares_processes(self.me)
        if holder.token not in watched:
            watched[holder.token] = (lease, time.monotonic())
            if wait or not local:
                logger.info("%s is locked by %s: watching whether that is alive", self.folder.parent, holder)
        before, since = watched[holder.token]
        if not wait and (local or lease != before):
            raise LockedError(
                f"another run is merging into {self.folder.parent}: {holder}. Wait for its end (`--wait` does), or "
                "choose another OUT."
            )
        if lease != before:
            watched[holder.token] = (lease, time.monotonic())
        return lease == before and time.monotonic() - since > self.lease_seconds

    def holder(self) -> Holder | None:
        try:
            return Holder(**json.loads(self.path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # never torn by us: written by rename

    def check(self) -> None:
        """Raises LockedError where another driver has taken OUT over; its results are the same, ours are not needed."""
        current = self.holder()
        if current is None or current.token != self.token:
            raise LockedError(
                f"this run lost {self.folder.parent} to {current or 'another run'}, which goes on with the same work."
            )

    def release(self) -> None:
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        with suppress(OSError):  # OUT may be gone or read-only by now: that is not what the run ended for
            with self._guard():
                current = self.holder()
                if current is not None and current.token == self.token:
                    self.path.unlink(missing_ok=True)
            self.lease_of(self.token).unlink(missing_ok=True)

    def lease_of(self, token: str) -> Path:
        return self.folder / f"lease-{token}"

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(min(HEARTBEAT_SECONDS, self.lease_seconds / 4)):
            beats += 1
            with suppress(OSError):  # a full disk stops the merge where it writes, with a message
                self.lease_of(self.token).write_text(_beat_text(beats, self.news()))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Serialises take-overs on this machine, and on network file systems with flock.

        One that is held for longer than a lease is of a process that was stopped inside: it is passed by.
        """
        self._guarded = False
        with open(self.folder / "lock.guard", "wb") as guard:
            until = time.monotonic() + self.lease_seconds
            while not self._guarded and time.monotonic() <= until:
                try:
                    fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._guarded = True
                except BlockingIOError:
                    time.sleep(GUARD_POLL_SECONDS)
                except OSError:  # no flock here
                    break
            yield


def _beat_text(beats: int, news: Mapping[str, object]) -> str:
    return json.dumps({"beats": beats, **news})


def _started(pid: int) -> float | None:
    """When a process began; -1 where it has ended and only waits to be reaped, None where that cannot be read.

    In clock ticks since the boot: psutil's `create_time` moves with the system clock, and an adjusted clock must not
    make a living process look like a recycled id.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
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
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
