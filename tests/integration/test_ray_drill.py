"""Some runs of the Ray drill, with faults of every family: `make drill-ray` has the others."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drills.ray_drill import Drill, OneRun, drilling
from tests.drills.ray_faults import ON_ITS_WAY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own files, when a node is removed
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    with drilling(tmp_path_factory.mktemp("drill") / "runs", seed=0, elements=4_000_000) as opened:
        yield opened


@pytest.mark.parametrize("number", [7, 8, 11, 17])
def test_a_merge_ends_with_the_same_bytes_whatever_befalls_it(number: int, drill: Drill) -> None:
    run = drill.run(number)
    assert not run.problems, run


@pytest.mark.parametrize("dies", ["driver", "worker"])
def test_a_write_that_arrives_after_all_is_done_reaches_no_file_in_use(drill: Drill, dies: str) -> None:
    """Its bytes are of a wrong guess at the majority sign, which has been settled when they arrive."""
    merge = OneRun(drill, drill.reference(3, "paper"), 100, random.Random(0))
    merge.faults, merge.orders, merge.answers = [], {"1": ON_ITS_WAY}, {}
    merge.arguments = ("--threshold-pass", "speculate", "--workers", "2")
    driver = merge.start()
    await_file(merge.folder / "on-its-way")
    if dies == "driver":
        time.sleep(0.5)  # the other worker goes on
        driver.kill()
        driver.wait()
        driver = merge.start()
    else:
        os.kill(int((merge.folder / "on-its-way").read_text()), signal.SIGKILL)
    merge.finish(driver)
    (merge.folder / "arrive").touch()
    await_file(merge.folder / "arrived")
    merge.look()
    assert not merge.run.problems, merge.run


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)
