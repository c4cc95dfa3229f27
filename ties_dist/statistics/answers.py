"""Answers that took a read of tensors to find, yes or no, kept from one run to the next: a small file each."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from ties_dist.errors import TiesDistError
from ties_dist.storage.local import write_durably

logger = logging.getLogger(__name__)

FOLDER = "answers"
"""In the cache."""


@dataclass(frozen=True)
class Answers:
    """A cache that cannot be read or written costs a read, never an error."""

    folder: Path

    def get(self, question: str) -> bool | None:
        """question: a digest of it, and of all that the answer follows from."""
        try:
            found = json.loads((self.folder / question).read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, bool) else None

    def keep(self, question: str, answer: bool) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_durably(self.folder / question, json.dumps(answer), shared=True)
        except (OSError, TiesDistError) as error:
            logger.warning("cannot keep what was found in %s (%s): it is looked up again", self.folder, error)
