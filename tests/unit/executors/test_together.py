"""Nodes that write one file together: what a file system loses between them is found before any of them works."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.conftest import random_models, write_job
from tests.fleets import ThreadFleet
from ties_dist.engine.run import run
from ties_dist.errors import PlanError
from ties_dist.executors.base import Workplace
from ties_dist.executors.fleet import FleetExecutor
from ties_dist.executors.local import LocalExecutor
from ties_dist.executors.orders import AnyBench, Order
from ties_dist.planning.prepare import prepare
from ties_dist.progress import Silent
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.place import partial_name
from ties_dist.worker.together import SHARED, CloseFile, ReadBlocks, WriteBlocks, size_for


@dataclass
class WholeFile:
    """A mount that stores whole files, as s3fs does: what a node has opened is its own until it closes it."""

    root: Path
    mine: dict[str, bytearray] = field(default_factory=dict)

    def write(self, name: str, start: int, block: memoryview) -> None:
        path = self.root / partial_name(name)
        file = self.mine.setdefault(name, bytearray(path.read_bytes()))
        file[start : start + len(block)] = block

    def sync(self, names: Sequence[str]) -> None:
        for name in names:
            (self.root / partial_name(name)).write_bytes(self.mine[name])

    def close(self) -> None:
        self.mine.clear()


class Nodes(ThreadFleet):
    """One worker a node, each with a view of the files of its own."""

    def __init__(self, writers: Sequence[Any]) -> None:
        names = tuple(f"node-{i}" for i in range(len(writers)))
        super().__init__(workers=len(writers), nodes=names)
        self.benches = {
            name: SimpleNamespace(writer=writer, requested_bytes=0) for name, writer in zip(names, writers, strict=True)
        }

    def _work(self, name: str, orders: Any, local: LocalExecutor) -> None:
        bench = cast(AnyBench, self.benches[self.node_of[name]])
        view = SimpleNamespace(**{**self.__dict__, "step": bench})
        ThreadFleet._work(cast(ThreadFleet, view), name, orders, local)


@dataclass
class Meeting:
    """A workplace in a folder, with the rounds of the product."""

    root: Path
    asked: list[int] = field(default_factory=list)

    def rounds(self, nodes: int) -> Any:
        self.asked.append(nodes)
        (self.root / partial_name(SHARED)).write_bytes(bytes(size_for(nodes)))
        return WriteBlocks(), CloseFile(), ReadBlocks(LocalPlace(self.root), "")


def start(fleet: ThreadFleet, meeting: Meeting) -> FleetExecutor:
    executor = FleetExecutor(fleet)
    try:
        executor.start(cast("Workplace[object]", meeting))
    finally:
        fleet.close()
    return executor


@pytest.mark.parametrize("count", [2, 3, 5])
def test_nodes_that_keep_each_others_writes_are_proven(count: int, tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    executor = start(Nodes([place.writer("") for _ in range(count)]), Meeting(tmp_path))
    assert executor.usage.proven == {f"node-{i}" for i in range(count)}
    assert executor.usage.is_proven


@pytest.mark.parametrize("count", [2, 3])
def test_a_file_system_that_keeps_the_last_writers_file_is_refused(count: int, tmp_path: Path) -> None:
    fleet = Nodes([WholeFile(tmp_path) for _ in range(count)])
    lost = 2 * (count - 1)
    with pytest.raises(
        PlanError, match=rf"(?s)these nodes cannot merge together:.*node node-0: .*: {lost} of {2 * count} MiB that"
    ):
        start(fleet, Meeting(tmp_path))


def test_one_node_has_nobody_to_prove_it(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path)
    executor = start(Nodes([WholeFile(tmp_path)]), meeting)
    assert (executor.usage.proven, meeting.asked) == (frozenset(), [])


def test_where_a_worker_is_lost_meanwhile_nothing_is_proven_and_the_work_begins(tmp_path: Path) -> None:
    place = LocalPlace(tmp_path)
    fleet = Nodes([place.writer("") for _ in range(2)])

    def lose(worker: str, order: Order) -> None:
        if order.number == 2:
            fleet.lose(worker, blameless=True)

    fleet.before = lose
    executor = start(fleet, Meeting(tmp_path))
    assert not executor.usage.is_proven


def test_a_merge_over_two_nodes_is_proven_and_leaves_nothing_of_the_proof(tmp_path: Path) -> None:
    recipe = write_job(tmp_path, random_models({"a.weight": (300, 1000)}, experts=2))

    class Opening(ThreadFleet):
        def open(self, workplace: Workplace[Any]) -> None:
            self.step = workplace.open()
            super().open(workplace)

    executor = FleetExecutor(Opening(nodes=("a", "b")))
    run(prepare(recipe), LocalPlace(tmp_path / "out"), executor=executor, progress=Silent())
    executor.fleet.close()  # type: ignore[attr-defined]
    assert executor.usage.is_proven and executor.usage.nodes == {"a", "b"}
    assert [p.name for p in tmp_path.rglob("*") if SHARED in p.name] == []
