"""A few hundred schedules in every run of the suite; `make simulate` does 100,000."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulation.run import MEMORY
from tests.simulation.world import Schedule, World

SCHEDULES = 250


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    folder = Path(tempfile.mkdtemp(prefix="ties-simulation-", dir=MEMORY if MEMORY.is_dir() else None))
    yield World.make(folder)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_every_schedule_ends_with_the_right_model(world: World) -> None:
    for seed in range(SCHEDULES):
        Schedule(world, seed).run()


def test_a_schedule_follows_from_its_seed(world: World) -> None:
    first, again = Schedule(world, 28), Schedule(world, 28)
    first.run()
    again.run()
    assert first.told == again.told
    assert len(first.told) > 2


def test_a_lost_write_is_noticed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can fail: without the sync before the journal line, power cuts lose what it says is there."""
    from ties_dist.storage.local import LocalWriter

    monkeypatch.setattr(LocalWriter, "sync", lambda writer, names: None)
    monkeypatch.setattr("ties_dist.worker.operations.StillThere.__call__", lambda check, step, result: True)
    with pytest.raises(AssertionError, match=r"seed \d+: .*(other bytes|did not finish)"):
        for seed in range(SCHEDULES):
            Schedule(world, seed).run()
