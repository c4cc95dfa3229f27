"""From the name of an executor to one that is ready to start, for the length of a merge."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ties_dist.executors.base import Executor
from ties_dist.executors.local import LocalExecutor
from ties_dist.planning.options import Cluster, RunOptions

if TYPE_CHECKING:
    from ties_dist.compiler.cuda import Gpus


@dataclass(frozen=True, kw_only=True)
class Staff:
    """Who does a merge. threads, gpu_slots: of one worker process; gpus: of this one."""

    executor: Executor
    threads: int
    gpu_slots: int = 0
    gpus: Gpus | None = None


@contextmanager
def staff(options: RunOptions, stop: threading.Event) -> Iterator[Staff]:
    """This process and its GPUs, or the workers of a cluster."""
    if options.executor == "ray":
        from ties_dist.executors.fleet import FleetExecutor
        from ties_dist.executors.ray import RayFleet

        cluster = options.cluster or Cluster()
        with closing(RayFleet(cluster, threads=options.threads, gpu=options.device == "cuda")) as fleet:
            yield Staff(
                executor=FleetExecutor(fleet, stop, start_seconds=cluster.start_seconds),
                threads=fleet.threads,
                gpu_slots=fleet.gpu_slots,
            )
        return
    count = options.resources().thread_count
    if options.device != "cuda":
        yield Staff(executor=LocalExecutor(count, stop), threads=count)
        return
    from ties_dist.compiler import cuda

    with closing(cuda.Gpus(cuda.load_driver(), count)) as gpus:
        slots = len(gpus.slots)
        yield Staff(
            executor=LocalExecutor(count, stop, computing=slots or None), threads=count, gpu_slots=slots, gpus=gpus
        )
