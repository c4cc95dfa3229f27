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
from typing import Any

import numpy as np
from xxhash import xxh3_128_digest

from ties_dist.errors import OutputError
from ties_dist.storage.place import Place

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16

SNAPSHOT_SECONDS = 20.0
"""Between two; as many times longer as the last one took seconds (of very many tensors), so 5 % of the time at most."""


@dataclass
class Snapshot:
    """One file, replaced as a whole. shared: whether it lies in a cache: other processes may write the same one, and
    that it cannot be written is said once and stops nobody; else that raises OutputError."""

    place: Place
    name: str
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
                self.place.make(self._folder)
            self.place.put(self.name, buffer.getbuffer(), shared=self.shared)
        except OutputError as error:
            if not self.shared:
                raise
            reason = getattr(error.__cause__, "strerror", None) or error
            logger.warning("cannot keep counts in %s (%s): a run that is killed starts again", self.place, reason)
            self._due = math.inf

    def load(self) -> tuple[Any, dict[str, np.ndarray]] | None:
        """None where nothing was kept, or where it cannot be read or is damaged, which is logged."""
        try:
            content = self.place.read(self.name)
        except OutputError as error:
            logger.warning("what an interrupted run had counted is lost (%s): counting again", error)
            return None
        if content is None:
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
        with suppress(OutputError):
            for entry in self.place.list(self._folder):
                written = f"{self._folder}/{entry.name}".removeprefix("/")
                if written == self.name or (written.startswith(f"{self.name}.") and written.endswith(".tmp")):
                    self.place.remove(written)

    @property
    def _folder(self) -> str:
        return self.name.rpartition("/")[0]
