"""What a running merge tells: phases with bytes done, rate and time left."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from ties_dist.messages import readable

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Told of phases one after another; `advance` counts the phase's bytes. `end` comes also where a phase fails."""

    def begin(self, phase: str, total_bytes: int) -> None: ...

    def advance(self, done_bytes: int) -> None: ...

    def end(self) -> None: ...


@dataclass
class LogProgress:
    """One line a phase in the log, and one every `every_seconds` in between: for pipes and batch jobs."""

    every_seconds: float = 30.0
    _phase: str = ""
    _total: int = 0
    _done: int = 0
    _began: float = 0.0
    _last: float = field(default=0.0)

    def begin(self, phase: str, total_bytes: int) -> None:
        self._phase, self._total, self._done = phase, total_bytes, 0
        self._began = self._last = time.monotonic()

    def advance(self, done_bytes: int) -> None:
        self._done += done_bytes
        if time.monotonic() - self._last > self.every_seconds:
            self._last = time.monotonic()
            share = self._done / max(1, self._total)
            left = (self._last - self._began) * (1 - share) / max(share, 1e-9)
            said = ("%s: %.0f %%, %s, %.0f s left", self._phase, 100 * share, readable(self._done), left)
            logger.info(*said, extra=self._numbers(self._last - self._began))

    def end(self) -> None:
        elapsed = time.monotonic() - self._began
        rate = readable(self._done / max(elapsed, 1e-9))
        done = readable(self._done) + (f" of {readable(self._total)}" if self._done < self._total else "")
        logger.info("%s: %s, %s/s, %.1f s", self._phase, done, rate, elapsed, extra=self._numbers(elapsed))

    def _numbers(self, elapsed: float) -> dict[str, object]:
        """For structured logs."""
        facts = {"phase": self._phase, "done_bytes": self._done, "total_bytes": self._total}
        return {"numbers": {**facts, "elapsed_seconds": round(elapsed, 3)}}


@dataclass
class Noted:
    """Passes everything on, and knows how far it is: for the lease, and so for `status` on another machine."""

    inner: Progress
    now: dict[str, object] = field(default_factory=dict)
    _done: int = 0

    def begin(self, phase: str, total_bytes: int) -> None:
        self._done = 0
        self.now = {"phase": phase, "done_bytes": 0, "total_bytes": total_bytes, "began": time.time()}
        self.inner.begin(phase, total_bytes)

    def advance(self, done_bytes: int) -> None:
        self._done += done_bytes
        self.now = {**self.now, "done_bytes": self._done}
        self.inner.advance(done_bytes)

    def end(self) -> None:
        self.inner.end()


class Silent:
    """Of work inside another's phase."""

    def begin(self, phase: str, total_bytes: int) -> None: ...

    def advance(self, done_bytes: int) -> None: ...

    def end(self) -> None: ...


@contextmanager
def phase(progress: Progress, name: str, total_bytes: int) -> Iterator[None]:
    """Ended whatever happens in it: a bar that is left standing hides the cursor, and the message is glued to it."""
    progress.begin(name, total_bytes)
    try:
        yield
    finally:
        progress.end()
