"""One driver per OUT: a lock that names its holder, and a lease that shows it alive.

A plain shared file system cannot enforce a fencing token, so the lock only keeps honest drivers apart; late writers are
made harmless elsewhere: each has a journal of its own, the token is checked before each range, commit and rename, and
what a replaced holder may still have on its way to the disk goes into files that are no longer used (`resume.adopt`).
A provably dead holder (`Holder.is_dead`) is replaced at once, another one after its lease stood still for a minute by
our own clock.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

from ties_dist.errors import LockedError, OutputError, StoppedError
from ties_dist.output.documents import parse
from ties_dist.output.holder import Holder
from ties_dist.storage.place import Place

logger = logging.getLogger(__name__)

STATE = ".ties_dist"
"""The folder in OUT for all that is not the model."""
HEARTBEAT_SECONDS = 5.0
LEASE_SECONDS = 60.0
LOCK = f"{STATE}/lock"


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What a holder says of itself every few seconds. began: of the phase, seconds since the epoch by its clock."""

    beats: int = 0
    phase: str | None = None
    done_bytes: int = 0
    total_bytes: int = 0
    began: float | None = None
    workers: int | None = None


@dataclass
class RunLock:
    """Held from `acquire` to `release`; `check` raises once another driver has taken over."""

    place: Place
    lease_seconds: float = field(default_factory=lambda: LEASE_SECONDS)
    me: Holder = field(default_factory=Holder.myself)
    news: Callable[[], Mapping[str, object]] = dict
    """How far the holder is: goes into the lease, for `status` to read from elsewhere."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _beating: threading.Thread | None = None

    @property
    def token(self) -> str:
        return self.me.token

    def doubt(self, token: str) -> None:
        """Note that writes of a holder may still be on their way: it may be alive, or others who wrote for it are, or
        it knew of such writes when it ended. Stands until the partial files were replaced."""
        self.place.put(f"{STATE}/doubt-{token}", b"", shared=True)  # several may find the same holder gone

    @property
    def doubts(self) -> list[str]:
        """One file for each such holder, so that who removes those it has seen to removes no later one."""
        return [f"{STATE}/{entry.name}" for entry in self.place.list(STATE) if entry.name.startswith("doubt-")]

    def settle(self, doubts: Sequence[str]) -> None:
        """The partial files were replaced, or are of no use any more."""
        for doubt in doubts:
            self.place.remove(doubt)

    @contextmanager
    def held(self, *, wait: bool = False, stop: threading.Event | None = None) -> Iterator[None]:
        """As `acquire`, to the end of the block."""
        self.acquire(wait=wait, stop=stop)
        try:
            yield
        finally:
            self.release()

    def acquire(self, *, wait: bool = False, stop: threading.Event | None = None) -> None:
        """Take the lock. Raises LockedError naming a living holder, unless told to wait for it; StoppedError."""
        self.place.make(STATE)
        self.place.put(lease_of(self.token), _beat_text(0, {}))
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beating.start()
        watched: dict[str, tuple[bytes, float]] = {}
        try:
            while not self._try(watched, wait=wait):
                time.sleep(min(1.0, self.lease_seconds / 10))
                if stop is not None and stop.is_set():
                    raise StoppedError("stopped while waiting for the other run; nothing was done.")
        except BaseException:
            self.release()
            raise

    def _try(self, watched: dict[str, tuple[bytes, float]], *, wait: bool) -> bool:
        """Whether the lock is ours now: taken by a swap, so of several who find the same holder gone one gets it."""
        found = self.place.read(LOCK)
        holder = _parse(found)
        if holder is not None and not holder.is_dead(self.me) and not self._expired(holder, watched, wait=wait):
            return False
        if holder is not None and (holder.elsewhere or not holder.is_dead(self.me)):
            self.doubt(holder.token)
        taken = self.place.swap(LOCK, found, json.dumps(asdict(self.me)).encode(), patience=self.lease_seconds)
        if taken and holder is not None:
            self.place.remove(lease_of(holder.token))
        return taken

    def _expired(self, holder: Holder, watched: dict[str, tuple[bytes, float]], *, wait: bool) -> bool:
        """Whether the lease stood still long enough; raises as soon as it is seen to move."""
        lease = read_lease(self.place, holder)
        local = holder.shares_processes(self.me)
        if holder.token not in watched:
            watched[holder.token] = (lease, time.monotonic())
            if wait or not local:
                logger.info("%s is locked by %s: watching whether that is alive", self.place, holder)
        before, since = watched[holder.token]
        if not wait and (local or lease != before):
            raise LockedError(
                f"another run is merging into {self.place}: {holder}. Wait for its end (`--wait` does), or "
                "choose another OUT."
            )
        if lease != before:
            watched[holder.token] = (lease, time.monotonic())
        return lease == before and time.monotonic() - since > self.lease_seconds

    def holder(self) -> Holder | None:
        return _parse(self.place.read(LOCK))

    def check(self) -> None:
        """Raises LockedError where another driver has taken OUT over; its results are the same, ours are not needed."""
        current = self.holder()
        if current is None or current.token != self.token:
            raise LockedError(
                f"this run lost {self.place} to {current or 'another run'}, which goes on with the same work."
            )

    def release(self) -> None:
        self._stop.set()
        if self._beating is not None:
            self._beating.join()
        with suppress(OutputError):  # OUT may be gone or read-only by now: that is not what the run ended for
            found = self.place.read(LOCK)
            current = _parse(found)
            if current is not None and current.token == self.token:
                self.place.swap(LOCK, found, None, patience=self.lease_seconds)
            self.place.remove(lease_of(self.token))

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(min(HEARTBEAT_SECONDS, self.lease_seconds / 4)):
            beats += 1
            with suppress(OutputError):  # a full disk stops the merge where it writes, with a message
                self.place.overwrite(lease_of(self.token), _beat_text(beats, self.news()))


def lease_of(token: str) -> str:
    return f"{STATE}/lease-{token}"


def read_lease(place: Place, holder: Holder) -> bytes:
    """What a holder said last of itself; empty where it cannot be read."""
    with suppress(OutputError):
        return place.read(lease_of(holder.token)) or b""
    return b""


def _beat_text(beats: int, news: Mapping[str, object]) -> bytes:
    return json.dumps({"beats": beats, **news}).encode()


def _parse(content: bytes | None) -> Holder | None:
    """Nobody where the lock is damaged: never torn by us, since it is put whole."""
    with suppress(OutputError):
        return parse(content, Holder, LOCK) if content is not None else None
    return None
