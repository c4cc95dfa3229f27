"""The order of the tests, and their turns: workers run beside each other, what measures memory or time runs alone.

Hooks of pytest, taken up by `conftest.py`. One run and one summary, however many workers there are.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections import Counter
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path

import pytest

GATE, ROOM = 0, 1
"""Bytes of a file that the workers have in common, as locks: where all queue, and where they are while they run."""


def is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that the workers end at the same time; files that are all alone last."""
    slow, beside = Counter[Path](), Counter[Path]()
    for item in items:
        slow[item.path] += item.get_closest_marker("slow") is not None
        beside[item.path] += not is_alone(item)
    items.sort(key=lambda item: (not beside[item.path], -slow[item.path]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    """A test that is alone waits until the others' tests have ended, and holds back their next ones.

    The locks are this process's (fcntl's, not flock's): what a test forks does not hold them.
    """
    if (file := _common_file()) is None:
        return (yield)
    fcntl.lockf(file, fcntl.LOCK_EX, 1, GATE)
    fcntl.lockf(file, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH, 1, ROOM)
    if not is_alone(item):
        fcntl.lockf(file, fcntl.LOCK_UN, 1, GATE)
    try:
        return (yield)
    finally:
        if not (is_alone(item) and is_alone(nextitem)):
            fcntl.lockf(file, fcntl.LOCK_UN, 2, GATE)


def pytest_sessionfinish() -> None:
    if _common_file() is not None:
        _path().unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _common_file() -> int | None:
    """Descriptor of the file; None without pytest-xdist, where every test is alone."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return None
    return os.open(_path(), os.O_RDWR | os.O_CREAT, 0o600)


def _path() -> Path:
    return Path(tempfile.gettempdir()) / f"ties-dist-tests-{os.environ['PYTEST_XDIST_TESTRUNUID']}"
