"""Fine-tunings and collections side by side: a process each, of one thread."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Result = TypeVar("Result")

AT_MOST = 8  # 1 GB each


def at_once(jobs: Iterable[Callable[[], Result]]) -> list[Result]:
    """What the jobs return, in their order; they are started in it, too, so the longest goes first.

    Batches of 32 short texts gain little by a second thread: on two cores ten steps took 11.5 s with two threads and
    15.9 s with one, for which two run at once.
    """
    # Pickled here: torch's own way shares the storages of tensors by file descriptors, which run out.
    futures = [_pool().submit(_run, pickle.dumps(job)) for job in jobs]
    return [pickle.loads(future.result()) for future in futures]


@cache
def _pool() -> ProcessPoolExecutor:
    """Of this process's lifetime: a worker takes seconds to import torch. Spawned, as forks of OpenMP hang."""
    count = min(AT_MOST, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def _run(job: bytes) -> bytes:
    return pickle.dumps(pickle.loads(job)())
