"""What a long pass has counted so far, on disk, so that a kill loses seconds: facts as JSON and arrays, in one file."""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_digest

from ties_dist.storage.local import write_durably

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16

SNAPSHOT_SECONDS = 20.0
"""Between two; as many times longer as the last one took seconds (of very many tensors), so 5 % of the time at most."""


@dataclass
class Snapshot:
    """One file, replaced as a whole. shared: whether it lies in a cache: other processes may write the same one, and
    that it cannot be written is said once and stops nobody; else that raises OutputError."""

    path: Path
    shared: bool = False
    _due: float = field(default_factory=lambda: time.monotonic() + SNAPSHOT_SECONDS)

    def keep_now_and_then(self, content: Callable[[], tuple[Any, Mapping[str, np.ndarray]]]) -> None:
        """Write what `content` gives, if that was long ago."""
        if (began := time.monotonic()) > self._due:
            self.keep(*content())
            ended = time.monotonic()
            self._due = max(self._due, ended + SNAPSHOT_SECONDS * max(1.0, ended - began))

    def keep(self, facts: Any, arrays: Mapping[str, np.ndarray]) -> None:
        """facts: anything that JSON holds."""
        buffer = io.BytesIO()
        text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        np.savez(buffer, **{**arrays, "facts": text})  # type: ignore[arg-type]  # its own options come first
        buffer.write(xxh3_128_digest(buffer.getbuffer()))  # zip's own check leaves headers out
        try:
            if self.shared:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, buffer.getbuffer(), shared=self.shared)
        except OSError as error:
            if not self.shared:
                raise
            reason = getattr(error.__cause__ or error, "strerror", None) or error
            logger.warning("cannot keep counts in %s (%s): a run that is killed starts again", self.path.parent, reason)
            self._due = math.inf

    def load(self) -> tuple[Any, dict[str, np.ndarray]] | None:
        """None where nothing was kept, or where it cannot be read or is damaged, which is logged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.warning("what an interrupted run had counted cannot be read (%s): counting again", error.strerror)
            return None
        whole, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
        if xxh3_128_digest(whole) != digest:
            logger.warning("what an interrupted run had counted is damaged: counting again")
            return None
        with np.load(io.BytesIO(whole)) as kept:
            arrays = {name: kept[name] for name in kept.files}
        return json.loads(arrays.pop("facts").tobytes()), arrays

    def drop(self) -> None:
        """Once it has served, with what a killed write left of it; what cannot be removed does no harm."""
        with suppress(OSError):
            for path in (self.path, *self.path.parent.glob(f"{self.path.name}.*.tmp")):
                path.unlink(missing_ok=True)
