"""What a driver does when workers die, hang, fail and come back: with threads for workers, killed at chosen moments."""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.contracts.test_executor import NO_STEP, NOWHERE, CountingFold, CountingStep, described, units
from tests.fleets import ThreadFleet
from ties_dist.errors import BugError, ClusterError, LockedError, OutputError, PlanError, UnitError
from ties_dist.executors.board import Pass
from ties_dist.executors.fleet import FleetExecutor
from ties_dist.executors.ledger import Ledger
from ties_dist.executors.local import LocalExecutor
from ties_dist.executors.orders import Ask, Joined, Lost, Merge, Order, perform
from ties_dist.values.items import WorkItem
from ties_dist.values.observation import Observation


@pytest.fixture
def step() -> CountingStep:
    return CountingStep()


@pytest.fixture
def fleet(step: CountingStep) -> Iterator[ThreadFleet]:
    fleet = ThreadFleet(workers=4, nodes=("a", "b"))
    fleet.step = step
    yield fleet
    fleet.close()


def started(fleet: ThreadFleet, **options: Any) -> FleetExecutor:
    executor = FleetExecutor(fleet, **options)
    executor.start(NOWHERE)
    return executor


def merged(executor: FleetExecutor, count: int) -> Counter[WorkItem]:
    return Counter(r.item for r in executor.map_unordered(NO_STEP, units(count), described))


def test_what_a_killed_worker_had_is_done_by_others(fleet: ThreadFleet, step: CountingStep) -> None:
    step.seconds = 0.001
    killed = threading.Semaphore(3)

    def kill(worker: str, order: Order) -> None:
        if order.number % 17 == 5 and killed.acquire(blocking=False):
            fleet.lose(worker)

    fleet.before = kill
    executor = started(fleet)
    assert merged(executor, 200) == Counter(units(200))
    assert executor.retries >= 3
    assert len(executor.members) == 4  # each was replaced


def test_a_unit_that_kills_every_worker_is_named_and_all_others_are_done(
    fleet: ThreadFleet, step: CountingStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ties_dist.executors.fleet.ORDER_SECONDS", {"merge": 0.0})
    poison = units(60)[7]
    deaths: list[str] = []

    def kill(worker: str, order: Order) -> None:
        if any(task.item == poison for task in order.items):
            deaths.append(worker)
            fleet.lose(worker)

    fleet.before = kill
    results = []
    with pytest.raises(
        UnitError, match=r"model.safetensors, bytes 7,340,032 to 8,388,608: failed 4 times, last on node"
    ):
        for result in started(fleet).map_unordered(NO_STEP, units(60), described):
            results.append(result.item)
    assert len(deaths) == 4
    assert poison not in results
    assert len(results) == len(set(results))


def test_the_neighbours_of_a_poisonous_unit_are_not_blamed(fleet: ThreadFleet, step: CountingStep) -> None:
    """Two that kill their worker now and then: what was beside them goes out alone and is done."""
    fatal = Counter({units(40)[3]: 2, units(40)[20]: 3})

    def kill(worker: str, order: Order) -> None:
        for task in order.items:
            if fatal[task.item] > 0:
                fatal[task.item] -= 1
                fleet.lose(worker)
                return

    fleet.before = kill
    assert merged(started(fleet), 40) == Counter(units(40))


def test_a_node_where_everything_fails_gets_no_more_work(fleet: ThreadFleet, caplog: pytest.LogCaptureFixture) -> None:
    def broken(worker: str, order: Order) -> None:
        if fleet.node_of[worker] == "a":
            fleet.lose(worker)

    fleet.before = broken
    executor = started(fleet)
    assert merged(executor, 100) == Counter(units(100))
    assert fleet.excluded == {"a"}
    assert {m.node for m in executor.members.values()} == {"b"}
    assert "node a is not used any more: 3 failures in a row" in caplog.text


def test_a_worker_that_hangs_is_replaced(fleet: ThreadFleet) -> None:
    hang, hung = threading.Event(), threading.Semaphore(1)

    def wait(worker: str, order: Order) -> None:
        if order.number > 5 and hung.acquire(blocking=False):
            hang.wait(30)

    fleet.before = wait
    began = time.monotonic()
    executor = started(fleet, stuck_seconds=0.3)
    assert merged(executor, 30) == Counter(units(30))
    assert time.monotonic() - began < 10
    hang.set()


def test_a_late_answer_of_a_worker_that_was_given_up_counts_for_nothing(fleet: ThreadFleet) -> None:
    """The worker is not dead: what it did after all must not be added a second time."""
    late = threading.Semaphore(1)

    def dawdle(worker: str, order: Order) -> None:
        if late.acquire(blocking=False):
            time.sleep(0.6)

    fleet.before = dawdle
    executor, ledger = started(fleet, stuck_seconds=0.2), Ledger(units(30), Observation())
    fold = CountingFold(seconds=0.01)
    for partial in executor.reduce(NO_STEP, fold, units(30)):
        assert ledger.accept(partial)
    assert not ledger.missing
    assert ledger.total.histograms[0].total == sum(range(1, 31))


def test_an_error_of_ours_keeps_its_kind_and_names_the_node(fleet: ThreadFleet) -> None:
    def full(_: object, item: int) -> int:
        if item == 3:
            raise OutputError("the disk is full.")
        return item

    with pytest.raises(OutputError, match=r"^node [ab]: the disk is full\.$"):
        list(started(fleet).call(NO_STEP, full, range(10)))


def test_an_error_that_says_nothing_is_told_by_its_kind(fleet: ThreadFleet) -> None:
    def exhausted(_: object, item: int) -> int:
        raise MemoryError

    with pytest.raises(UnitError, match=r"failed 4 times, last on node [ab]: MemoryError"):
        list(started(fleet).call(NO_STEP, exhausted, range(3)))


def test_a_bug_is_tried_once_more_and_on_another_node(fleet: ThreadFleet) -> None:
    """A machine that is broken raises anything at all. What fails on two in the same way is not the machines' fault."""
    nodes: list[str] = []

    def watch(worker: str, order: Order) -> None:
        if 3 in order.items:
            nodes.append(fleet.node_of[worker])

    def stumble(_: object, item: int) -> int:
        return item // (item - 3)

    fleet.before = watch
    with pytest.raises(BugError, match=r"^ZeroDivisionError: .*, at 3 on node [ab]\. This is a bug") as caught:
        list(started(fleet).call(NO_STEP, stumble, range(10)))
    assert sorted(nodes) == ["a", "b"]
    assert caught.value.node == nodes[1]


def test_what_only_one_node_cannot_do_is_done_by_another(fleet: ThreadFleet) -> None:
    failures = Counter({3: 1, 5: 1})

    def flaky(_: object, item: int) -> int:
        if failures[item] > 0:
            failures[item] -= 1
            raise ValueError("no such instruction")
        return item

    assert sorted(started(fleet).call(NO_STEP, flaky, range(10))) == [(i, i) for i in range(10)]


@pytest.mark.parametrize("error", [OSError("a hiccup"), OutputError("the disk is full.")])
def test_an_error_names_its_node_and_item(fleet: ThreadFleet, error: Exception) -> None:
    def fail(_: object, item: str) -> int:
        raise error

    with pytest.raises((UnitError, OutputError), match=r"node [ab]: ") as caught:
        list(started(fleet).call(NO_STEP, fail, ["lm_head.weight"]))
    assert caught.value.node in ("a", "b")
    assert caught.value.item == "lm_head.weight"


def test_an_error_that_passes_is_tried_again(fleet: ThreadFleet) -> None:
    failures = Counter({3: 2, 5: 3})

    def flaky(_: object, item: int) -> int:
        if failures[item] > 0:
            failures[item] -= 1
            raise OSError("a hiccup of the file system")
        return item

    answers = list(started(fleet).call(NO_STEP, flaky, range(10)))
    assert sorted(answers) == [(i, i) for i in range(10)]


def test_a_driver_that_lost_out_stops_at_once(fleet: ThreadFleet) -> None:
    asked: list[int] = []

    def lost(_: object, item: int) -> int:
        asked.append(item)
        raise LockedError("this run lost OUT to another")

    with pytest.raises(LockedError, match="this run lost OUT to another"):
        list(started(fleet).call(NO_STEP, lost, range(1000)))
    assert len(asked) <= 50


def test_a_fold_that_fails_tells_nothing_of_its_order(fleet: ThreadFleet) -> None:
    """The failing unit may be half counted: the others of its order are counted again, and once."""
    failures = Counter({unit: 1 for unit in units(60)[::7]})
    lock = threading.Lock()

    class Failing(CountingFold):
        def __call__(self, step: object, unit: WorkItem, into: Observation) -> None:
            super().__call__(step, unit, into)
            with lock:
                failures[unit] -= 1
                if failures[unit] == 0:
                    raise OSError("half counted")

    ledger = Ledger(units(60), Observation())
    for partial in started(fleet).reduce(NO_STEP, Failing(), units(60)):
        assert ledger.accept(partial)
    assert not ledger.missing
    assert ledger.total.histograms[0].total == sum(range(1, 61))


def test_problems_of_all_nodes_come_in_one_message(fleet: ThreadFleet) -> None:
    for node, problem in (("a", "/models/base: missing"), ("b", "/out: cannot be written")):
        fleet.events.put(Joined(worker=f"w-{node}", node=node, problems=(problem,)))
    fleet.wanted = 2
    with pytest.raises(
        PlanError, match=r"(?s)some nodes cannot.*node a: /models/base: missing\n.*node b: /out: cannot"
    ):
        fleet.open = lambda site: None  # type: ignore[method-assign]
        fleet._fill = lambda: None  # type: ignore[method-assign]
        started(fleet)


def test_problems_of_a_node_with_several_workers_are_told_at_once(fleet: ThreadFleet) -> None:
    """Found in review: others took the place of those that were refused, until the wait was over."""
    fleet.open = lambda site: [  # type: ignore[method-assign]
        fleet.events.put(Joined(worker=f"w-{i}", node="a", problems=("/out: cannot be written",))) for i in range(2)
    ]
    fleet._fill = lambda: None  # type: ignore[method-assign]
    fleet.wanted = 2
    began = time.monotonic()
    with pytest.raises(PlanError, match=r"some nodes cannot do this merge:\n  node a: /out: cannot be written"):
        started(fleet)
    assert time.monotonic() - began < 5


def test_a_late_node_that_cannot_work_is_left_out(fleet: ThreadFleet, caplog: pytest.LogCaptureFixture) -> None:
    executor = started(fleet)
    fleet.events.put(Joined(worker="late", node="c", problems=("/models/base: missing",)))
    assert merged(executor, 20) == Counter(units(20))
    assert fleet.excluded == {"c"}
    assert "node c is not used: /models/base: missing" in caplog.text


def test_without_any_worker_the_wait_ends_with_what_was_asked_for(fleet: ThreadFleet) -> None:
    fleet._fill = lambda: None  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="no worker was ready within 0 s: nobody is here"):
        started(fleet, start_seconds=0.3)


def test_why_no_worker_comes_is_told(fleet: ThreadFleet) -> None:
    """Not only what there is no room for: often there is, and they die."""
    fleet._fill = lambda: None  # type: ignore[method-assign]
    fleet.events.put(Lost(worker="worker-0", reason="it could not start: no module named 'ties_dist'"))
    with pytest.raises(ClusterError, match=r"nobody is here\. The last one was lost: it could not start: no module"):
        started(fleet, start_seconds=0.3)


def test_a_cluster_that_loses_all_workers_for_good_is_given_up(fleet: ThreadFleet) -> None:
    executor = started(fleet, start_seconds=0.5)

    def end(worker: str, order: Order) -> None:
        fleet.wanted = 0
        for each in list(fleet.alive):
            fleet.lose(each, blameless=True)

    fleet.before = end
    with pytest.raises(ClusterError, match="run the same command again"):
        merged(executor, 20)


def test_a_cluster_that_loses_all_workers_and_gets_others_goes_on(fleet: ThreadFleet) -> None:
    once = threading.Semaphore(1)

    def end(worker: str, order: Order) -> None:
        if order.number > 6 and once.acquire(blocking=False):
            for each in list(fleet.alive):
                fleet.lose(each, blameless=True)

    fleet.before = end
    assert merged(started(fleet), 50) == Counter(units(50))


def test_merges_of_lost_workers_stay_unanswered_and_those_of_others_do_not(
    fleet: ThreadFleet, step: CountingStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written of them may reach the disk at any time."""
    monkeypatch.setattr("ties_dist.executors.fleet.ORDER_SECONDS", {"merge": 0.0})
    lost: list[WorkItem] = []

    def kill(worker: str, order: Order) -> None:
        if order.number in (5, 9):
            lost.extend(task.item for task in order.items)
            fleet.lose(worker)

    fleet.before = kill
    executor = started(fleet)
    assert merged(executor, 60) == Counter(units(60))
    unanswered = {task.item for tasks in executor.usage.unanswered.values() for task in tasks}
    assert set(lost) <= unanswered
    assert len(executor.usage.unanswered) <= 4  # each of the two workers had two orders at most


@pytest.mark.parametrize("blameless", [False, True])
def test_what_a_worker_was_kept_free_for_goes_to_another_where_it_is_lost(fleet: ThreadFleet, blameless: bool) -> None:
    executor = started(fleet)
    kept, other, *_ = executor.members.values()
    asked = Pass(Merge(), units(1), lambda unit: unit.portion, described)
    for _ in range(2):
        assert asked.board.take(kept.worker, kept.node, idle=True, want_bytes=0) == (0,)
        asked.board.fail(0, "gone")
    assert asked.board.take(kept.worker, kept.node, idle=False, want_bytes=0) == ()
    # It has no order of this pass any more when it is lost.
    executor._lose(Lost(worker=kept.worker, reason="its node is not used any more", blameless=blameless), asked)
    assert asked.board.take(other.worker, other.node, idle=True, want_bytes=0) == (0,)


class Homesick(Exception):
    """Can be pickled, but not be made again from what was."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def test_an_error_of_any_kind_can_travel_to_the_driver(step: CountingStep) -> None:
    def fail(_: object, item: int) -> int:
        raise Homesick("no", "way")

    order = Order(number=1, work=Ask(fail), items=(1,))
    answer = pickle.loads(pickle.dumps(perform(order, step, LocalExecutor(1))))
    assert isinstance(answer.error, BugError)
    assert str(answer.error).startswith("Homesick: no way")
    assert "in fail" in answer.error.trace


def test_a_unit_that_takes_every_worker_along_is_named_though_nobody_blames_it(fleet: ThreadFleet) -> None:
    """A node that dies with its work looks like a node that dies."""
    poison = units(5)[2]

    def take_along(worker: str, order: Order) -> None:
        if any(task.item == poison for task in order.items):
            fleet.lose(worker, blameless=True)

    fleet.before = take_along
    with pytest.raises(UnitError, match="bytes 2,097,152 to 3,145,728: failed 4 times"):
        merged(started(fleet), 5)
