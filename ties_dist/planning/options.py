"""What a run may use, and how it is to go about it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ties_dist.compiler.kernel import KernelKind
from ties_dist.storage.backends import Backend


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a worker process may use."""

    threads: int | None = None
    memory_budget: int = 2 << 30
    unit_bytes: int | None = None
    kernel: KernelKind = "auto"
    kernel_cache: Path | None = None
    outputs: int = 1
    """Merges of the same inputs that are done together, each with its own result of every unit."""
    gpu_slots: int = 0
    """Units that GPUs hold at once; 0: the processor merges."""
    backend: Backend = "auto"

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))
