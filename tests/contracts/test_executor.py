"""What every `Executor` promises, and the `Ledger` that makes lost, late and repeated partials harmless.

A new executor subclasses `ExecutorContract`. Steps and folds are stand-ins that count what is asked of them; the last
tests run whole merges over an executor that misbehaves.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.fleets import ThreadFleet
from tests.one_thread import OneThread
from ties_dist.engine import run as engine
from ties_dist.errors import BugError, StoppedError, UnitError
from ties_dist.executors.base import Executor, Usage, Workplace
from ties_dist.executors.fleet import MAX_ATTEMPTS, FleetExecutor
from ties_dist.executors.ledger import Ledger
from ties_dist.executors.local import LocalExecutor
from ties_dist.planning.options import Resources, RunOptions
from ties_dist.planning.prepare import prepare
from ties_dist.progress import LogProgress
from ties_dist.storage.local_place import LocalPlace
from ties_dist.thresholds import Histogram, Window
from ties_dist.values.items import UNITS_AROUND, MergeResult, MergeTask, Range, WorkItem
from ties_dist.values.observation import Observation
from ties_dist.worker.merging import Worker

PROMPT_SECONDS = 20.0
"""An error or a stop that takes longer has been waited for, not raised."""


def unit(number: int) -> WorkItem:
    return WorkItem((Range("model.safetensors", number << 20, (number + 1) << 20),))


MANY = 20_000
"""Units that take far longer than a test waits: only an error, a stop or a consumer that gives up ends such a merge."""


def units(count: int = MANY) -> list[WorkItem]:
    return [unit(i) for i in range(count)]


def described(asked: WorkItem) -> MergeTask:
    return MergeTask(item=asked, cuts={}, majority=1)


@dataclass
class CountingStep:
    """Stands in for `MergeStep`. fail: raises in that step of that unit, by number."""

    requested_bytes = 0

    fail: tuple[str, int] | None = None
    error: type[Exception] = OSError
    seconds: float = 0.0
    compute_seconds: float = 0.0
    done: Counter[str] = field(default_factory=Counter)
    stored: list[WorkItem] = field(default_factory=list)
    computing: int = 0
    most_computing: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def _enter(self, step: str, task: MergeTask) -> None:
        with self.lock:
            self.done[step] += 1
        if self.fail == (step, task.item.ranges[0].start >> 20):
            raise self.error(f"{step} of unit {task.item.ranges[0].start >> 20}")
        time.sleep(self.seconds)

    def load(self, task: MergeTask) -> str:
        self._enter("load", task)
        return f"loaded {task.item.ranges[0].start}"

    def compute(self, task: MergeTask, loaded: str) -> str:
        assert loaded == f"loaded {task.item.ranges[0].start}"
        with self.lock:
            self.computing += 1
            self.most_computing = max(self.most_computing, self.computing)
        self._enter("compute", task)
        time.sleep(self.compute_seconds)
        with self.lock:
            self.computing -= 1
        return f"computed {task.item.ranges[0].start}"

    def store(self, task: MergeTask, computed: str) -> MergeResult:
        assert computed == f"computed {task.item.ranges[0].start}"
        self._enter("store", task)
        with self.lock:
            self.stored.append(task.item)
        return MergeResult(item=task.item, state_digest="", majority=1, blocks=(), counts={}, dependent=0)

    def sync(self, results: Sequence[MergeResult]) -> None: ...

    def warm_up(self) -> None: ...


def observed(number: int) -> Histogram:
    """What a fold counts of one unit: a bucket of its own."""
    counted = Histogram(Window(0, 0))
    counted.coarse[number % 1000] = 1 + number
    return counted


@dataclass
class CountingFold:
    """Stands in for `Observe`. fail: the unit it raises at, by number."""

    fail: int | None = None
    error: type[Exception] = OSError
    seconds: float = 0.0
    folded: Counter[WorkItem] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def empty(self) -> Observation:
        return Observation()

    def __call__(self, step: object, unit: WorkItem, into: Observation) -> None:
        number = unit.ranges[0].start >> 20
        with self.lock:
            self.folded[unit] += 1
        if number == self.fail:
            raise self.error(f"unit {number} cannot be read")
        time.sleep(self.seconds)
        into.add(Observation(items={unit}, histograms={0: observed(number)}))


Sums = Ledger[WorkItem, Observation]
NO_STEP = CountingStep()


class Nowhere:
    """A workplace of those that have nothing to prove."""

    def rounds(self, nodes: int) -> tuple[()]:
        return ()


NOWHERE = cast(Workplace[object], Nowhere())


class ExecutorContract:
    """Subclasses give `executor`, whose `stop` event ends it, and `window`: how many units may be under way at once."""

    window: int
    failure: type[Exception] = OSError
    """What an error of a step, a fold or a call is raised as."""
    attempts = 1
    """Before that."""
    nodes = False
    """Whether work is done on nodes, which an error then names."""
    sums_come_once = True
    """Whether no partial is repeated: nobody may count on it."""

    @pytest.fixture
    def stop(self) -> threading.Event:
        return threading.Event()

    @pytest.fixture
    def executor(self, stop: threading.Event) -> Executor:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def no_thread_stays_behind(self) -> Iterator[None]:
        before = set(threading.enumerate())
        yield
        deadline = time.monotonic() + 5
        while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not left

    # map_unordered

    @pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 50])
    def test_every_unit_is_merged_once_and_written_before_its_result_comes(
        self, count: int, executor: Executor
    ) -> None:
        step, results = CountingStep(), []
        for result in executor.map_unordered(step, units(count), described):
            assert result.item in step.stored
            results.append(result.item)
        assert sorted(results) == [unit(i) for i in range(count)] == sorted(step.stored)

    def test_units_under_way_are_bounded(self, executor: Executor) -> None:
        drawn, yielded = [0], [0]

        def counted(asked: WorkItem) -> MergeTask:
            drawn[0] += 1
            assert drawn[0] - yielded[0] <= self.window
            return described(asked)

        for _ in executor.map_unordered(CountingStep(seconds=0.001), units(60), counted):
            yielded[0] += 1
        assert yielded == [60]

    def test_a_slow_consumer_is_waited_for(self, executor: Executor) -> None:
        step = CountingStep()
        results = executor.map_unordered(step, units(), described)
        next(results)
        time.sleep(0.1)
        assert step.done["load"] <= self.window + 1
        cast(Any, results).close()

    @pytest.mark.parametrize("failing", ["load", "compute", "store"])
    def test_an_error_is_raised_at_once_not_after_the_rest(self, failing: str, executor: Executor) -> None:
        step, began = CountingStep(fail=(failing, 10), seconds=0.001), time.monotonic()
        with pytest.raises(self.failure, match=f"{failing} of unit 10"):
            for _ in executor.map_unordered(step, units(), described):  # without end: only an error ends it
                pass
        assert time.monotonic() - began < PROMPT_SECONDS
        assert step.done["load"] <= 10 + 2 * self.attempts * self.window

    def test_an_error_in_the_tasks_themselves_is_raised(self, executor: Executor) -> None:
        def broken(asked: WorkItem) -> MergeTask:
            if asked == unit(5):
                raise ValueError("no cut for a tensor")
            return described(asked)

        with pytest.raises(ValueError, match="no cut for a tensor"):
            list(executor.map_unordered(CountingStep(), units(10), broken))

    def test_a_stop_raises_after_everything_written_was_reported(
        self, executor: Executor, stop: threading.Event
    ) -> None:
        step, results = CountingStep(seconds=0.001), []
        with pytest.raises(StoppedError, match="Run the same command again to resume"):
            for result in executor.map_unordered(step, units(), described):
                results.append(result.item)
                if len(results) == 5:
                    stop.set()
        assert sorted(results) == sorted(step.stored)
        assert len(results) <= 5 + self.window

    def test_a_stop_before_the_start_merges_nothing(self, executor: Executor, stop: threading.Event) -> None:
        stop.set()
        step = CountingStep()
        with pytest.raises(StoppedError, match="stopped"):
            list(executor.map_unordered(step, units(), described))
        assert step.stored == []

    def test_a_consumer_that_gives_up_ends_the_work(self, executor: Executor) -> None:
        step = CountingStep(seconds=0.001)
        results = executor.map_unordered(step, units(), described)
        next(results)
        cast(Any, results).close()
        time.sleep(0.05)  # the units at hand end
        stored = len(step.stored)
        time.sleep(0.1)
        assert len(step.stored) == stored < MANY

    @pytest.mark.parametrize("failing", ["load", "compute", "store"])
    def test_a_bug_in_a_step_is_told_as_one_with_its_place(self, failing: str, executor: Executor) -> None:
        step = CountingStep(fail=(failing, 10), error=KeyError)
        with pytest.raises(BugError, match=f"KeyError: '{failing} of unit 10'.*, bytes 10,485,760 to 11,5") as caught:
            for _ in executor.map_unordered(step, units(), described):
                pass
        self.check(caught.value, unit(10), "in _enter")

    def check(self, bug: BugError, item: object, frame: str) -> None:
        """Where it was, wherever that was; and where in the code, once."""
        assert bug.exit_status == 1
        assert bug.item == item
        assert (bug.node in ("a", "b")) if self.nodes else bug.node is None
        assert bug.trace.count("Traceback (most recent call last)") == bug.trace.count(frame) == 1
        assert "".join(traceback.format_exception(bug)).count(frame) == 1
        again = pickle.loads(pickle.dumps(bug))
        assert (str(again), again.trace, again.item) == (str(bug), bug.trace, item)

    # reduce

    @pytest.mark.parametrize("count", [0, 1, 2, 5, 300])
    def test_partials_cover_every_unit_exactly_once(self, count: int, executor: Executor) -> None:
        fold, ledger = CountingFold(), Ledger(units(count), Observation())
        for partial in executor.reduce(NO_STEP, fold, units(count)):
            accepted = ledger.accept(partial)
            assert accepted or not self.sums_come_once
        assert not ledger.missing
        assert fold.folded == Counter(units(count))
        if count:
            total = ledger.total.histograms[0].coarse
            expected = np.zeros(len(total), np.int64)
            expected[:count] = np.arange(1, count + 1)
            assert np.array_equal(total, expected)

    def test_an_error_in_a_fold_is_raised_at_once_not_after_the_rest(self, executor: Executor) -> None:
        fold, began = CountingFold(fail=10, seconds=0.001), time.monotonic()
        with pytest.raises(self.failure, match="unit 10 cannot be read"):
            for _ in executor.reduce(NO_STEP, fold, units(5_000)):
                pass
        assert time.monotonic() - began < PROMPT_SECONDS
        assert len(fold.folded) < 1000

    def test_a_bug_in_a_fold_is_told_as_one_with_its_place(self, executor: Executor) -> None:
        fold = CountingFold(fail=10, error=ZeroDivisionError)
        with pytest.raises(BugError, match="ZeroDivisionError: unit 10 cannot be read") as caught:
            for _ in executor.reduce(NO_STEP, fold, units(5_000)):
                pass
        self.check(caught.value, unit(10), "in __call__")
        assert fold.folded[unit(10)] == (2 if self.nodes else 1)

    def test_a_stop_ends_a_reduction_after_the_units_at_hand_are_reported(
        self, executor: Executor, stop: threading.Event
    ) -> None:
        class Stopping(CountingFold):
            def __call__(self, step: object, unit: WorkItem, into: Observation) -> None:
                super().__call__(step, unit, into)
                if len(self.folded) >= 20:  # two threads may add the 20th and the 21st before either looks
                    stop.set()

        fold, ledger = Stopping(seconds=0.001), Ledger(units(5_000), Observation())
        with pytest.raises(StoppedError, match="Run the same command again to resume"):
            for partial in executor.reduce(NO_STEP, fold, units(5_000)):
                ledger.accept(partial)
        assert Counter(ledger.total.items) == fold.folded
        assert 20 <= len(ledger.total.items) < 100

    def test_a_reduction_that_nobody_wants_any_more_ends(self, executor: Executor) -> None:
        fold = CountingFold(seconds=0.001)
        partials = executor.reduce(NO_STEP, fold, units(2_000))
        next(partials)
        cast(Any, partials).close()
        time.sleep(0.05)  # the units at hand end
        folded = len(fold.folded)
        time.sleep(0.1)
        assert len(fold.folded) == folded < 2_000

    # call

    def test_every_call_is_answered_once(self, executor: Executor) -> None:
        answers = list(executor.call(NO_STEP, lambda _, number: number * number, range(100)))
        assert sorted(answers) == [(i, i * i) for i in range(100)]
        assert list(executor.call(NO_STEP, lambda _, number: number, [])) == []

    def test_an_error_in_a_call_is_raised_at_once(self, executor: Executor) -> None:
        asked: list[int] = []

        def fail(_: object, number: int) -> int:
            asked.append(number)
            if number == 3:
                raise OSError("tensor 3 cannot be read")
            time.sleep(0.001)
            return number

        with pytest.raises(self.failure, match="tensor 3 cannot be read"):
            list(executor.call(NO_STEP, fail, range(100_000)))
        assert len(asked) < 100

    def test_a_bug_in_a_call_is_told_as_one_with_its_place(self, executor: Executor) -> None:
        asked: list[int] = []

        def stumble(_: object, number: int) -> int:
            asked.append(number)
            assert number != 3, "there is no third"
            return number

        with pytest.raises(BugError, match=r"(?s)AssertionError: there is no third.*, at 3\b") as caught:
            list(executor.call(NO_STEP, stumble, range(100_000)))
        self.check(caught.value, 3, "in stumble")
        assert asked.count(3) == (2 if self.nodes else 1)
        assert len(asked) < 100

    def test_a_stop_ends_the_calls(self, executor: Executor, stop: threading.Event) -> None:
        answered: list[int] = []

        def answer(_: object, number: int) -> int:
            answered.append(number)
            if number == 10:
                stop.set()
            return number

        with pytest.raises(StoppedError, match="stopped"):
            list(executor.call(NO_STEP, answer, range(100_000)))
        assert len(answered) < 100


class TestOneThread(ExecutorContract):
    window = 1
    sums_come_once = False

    @pytest.fixture
    def executor(self, stop: threading.Event) -> Executor:
        return OneThread(stop=stop)


class LocalExecutorContract(ExecutorContract):
    threads: int

    @property
    def window(self) -> int:  # type: ignore[override]
        return self.threads + UNITS_AROUND

    @pytest.fixture
    def executor(self, stop: threading.Event) -> Executor:
        return LocalExecutor(self.threads, stop, partial_seconds=0.005)

    def test_as_many_compute_at_once_as_there_are_threads(self, executor: Executor) -> None:
        step = CountingStep(seconds=0.01)
        list(executor.map_unordered(step, units(20), described))
        assert step.most_computing == self.threads

    def test_what_is_not_computed_yet_is_dropped_when_stopped(self, executor: Executor, stop: threading.Event) -> None:
        step = CountingStep(compute_seconds=0.2)
        results = []
        with pytest.raises(StoppedError, match="everything finished is kept"):
            for result in executor.map_unordered(step, units(), described):
                results.append(result.item)
                stop.set()
        assert sorted(results) == sorted(step.stored)  # what is written is told
        assert len(results) <= 2 * self.threads


class TestLocalExecutorWithOneThread(LocalExecutorContract):
    threads = 1


class TestLocalExecutorWithTwoThreads(LocalExecutorContract):
    threads = 2


@dataclass
class ThreadFleetExecutor(FleetExecutor):
    """Its workers do what the test's own step does."""

    def _with(self, step: Any) -> FleetExecutor:
        cast(ThreadFleet, self.fleet).step = step
        return super()

    def map_unordered(self, step: Any, *asked: Any) -> Iterator[Any]:
        return self._with(step).map_unordered(step, *asked)

    def reduce(self, step: Any, *asked: Any) -> Iterator[Any]:
        return self._with(step).reduce(step, *asked)

    def call(self, step: Any, *asked: Any) -> Iterator[Any]:
        return self._with(step).call(step, *asked)


class TestFleetExecutor(ExecutorContract):
    window = 6
    failure = UnitError
    attempts = MAX_ATTEMPTS
    nodes = True

    @pytest.fixture
    def executor(self, stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
        monkeypatch.setattr("ties_dist.executors.fleet.MESSAGE_SECONDS", 0.0)
        monkeypatch.setattr("ties_dist.executors.fleet.FIRST_BYTES", 0)
        monkeypatch.setattr("ties_dist.executors.fleet.ORDER_SECONDS", {"merge": 0.0, "fold": 0.01, "call": 0.0})
        fleet = ThreadFleet(workers=2)
        executor = ThreadFleetExecutor(fleet, stop)
        executor.start(NOWHERE)
        yield executor
        fleet.close()


# -- the ledger -------------------------------------------------------------------------------------------------------


def partial_of(*numbers: int) -> Observation:
    histogram = Histogram(Window(0, 0))
    for number in numbers:
        histogram.add(observed(number))
    return Observation(items={unit(i) for i in numbers}, histograms={0: histogram})


def counts(ledger: Sums) -> dict[int, int]:
    """number of a unit -> what was counted of it."""
    if 0 not in ledger.total.histograms:
        return {}
    coarse = ledger.total.histograms[0].coarse
    return {int(i): int(coarse[i]) for i in np.flatnonzero(coarse)}


class TestLedger:
    @pytest.fixture
    def ledger(self) -> Sums:
        return Ledger((unit(i) for i in range(5)), Observation())

    def test_disjoint_partials_add_up(self, ledger: Sums) -> None:
        assert ledger.accept(partial_of(0, 3))
        assert ledger.accept(partial_of(1))
        assert ledger.missing == {unit(2), unit(4)}
        assert counts(ledger) == {0: 1, 1: 2, 3: 4}

    def test_a_repeated_partial_is_dropped(self, ledger: Sums) -> None:
        assert ledger.accept(partial_of(0, 1))
        assert not ledger.accept(partial_of(0, 1))
        assert counts(ledger) == {0: 1, 1: 2}

    def test_a_partial_that_overlaps_is_dropped_whole_and_its_rest_stays_missing(self, ledger: Sums) -> None:
        assert ledger.accept(partial_of(0, 1))
        assert not ledger.accept(partial_of(1, 2))
        assert ledger.missing == {unit(2), unit(3), unit(4)}
        assert counts(ledger) == {0: 1, 1: 2}

    def test_a_partial_of_units_nobody_asked_for_is_dropped_whole(self, ledger: Sums) -> None:
        assert not ledger.accept(partial_of(4, 5))
        assert not ledger.accept(Observation(items={WorkItem((Range("model.safetensors", 0, 77),))}))
        assert counts(ledger) == {}
        assert len(ledger.missing) == 5

    def test_an_empty_partial_is_dropped(self, ledger: Sums) -> None:
        assert not ledger.accept(Observation())

    def test_a_late_partial_after_the_end_is_dropped(self, ledger: Sums) -> None:
        assert ledger.accept(partial_of(0, 1, 2, 3, 4))
        assert not ledger.missing
        assert not ledger.accept(partial_of(3))
        assert counts(ledger) == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}

    def test_whatever_the_order_and_the_repeats_the_total_is_the_same(self, ledger: Sums) -> None:
        parts = [(0, 2), (1,), (2, 3), (3, 4), (0,), (3,), (4,)]
        for order in itertools.permutations(parts):
            ledger = Ledger((unit(i) for i in range(5)), Observation())
            for part in order:
                ledger.accept(partial_of(*part))
            for left in sorted(ledger.missing):  # asked for again
                assert ledger.accept(partial_of(left.ranges[0].start >> 20))
            assert counts(ledger) == {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}


# -- whole merges over an executor that misbehaves ---------------------------------------------------------------------


@dataclass
class UnreliableExecutor:
    """Loses every other partial, repeats each of the others, and delivers partials of the round before late."""

    inner: LocalExecutor
    name: str = "local"
    rounds: int = 0
    late: list[Observation] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        return self.inner.usage

    def start(self, workplace: Workplace[object]) -> None:
        self.inner.start(workplace)

    def map_unordered(self, *asked: Any) -> Iterator[Any]:
        for result in self.inner.map_unordered(*asked):
            yield result
            yield result

    def reduce(self, *asked: Any) -> Iterator[Any]:
        self.rounds += 1
        late, self.late = self.late, []
        for i, found in enumerate(self.inner.reduce(*asked)):
            self.late.append(copy.deepcopy(found))
            if i % 2:
                yield copy.deepcopy(found)
                yield copy.deepcopy(found)
            yield from (copy.deepcopy(old) for old in late)

    def call(self, *asked: Any) -> Iterator[Any]:
        return self.inner.call(*asked)


@pytest.mark.parametrize("tie_policy", ["keep_all", "exact_k"])
def test_lost_late_and_repeated_partials_change_nothing(
    tie_policy: str, merge_job: Checkpoints, tmp_path: Path, one_unit_a_partial: None
) -> None:
    models = random_models({"a.weight": (1024, 640), "b.weight": (1024, 640)}, experts=2)
    recipe = merge_job(models, options={"tie_policy": tie_policy})
    expected = ties_dist.merge(recipe, tmp_path / "undisturbed", cache_dir=tmp_path / "one", unit_size=1 << 20)
    job = prepare(recipe, RunOptions(unit_size=1 << 20))
    executor = UnreliableExecutor(LocalExecutor(2, partial_seconds=0.0))
    report = engine.run(job, LocalPlace(tmp_path / "out"), executor=executor, progress=LogProgress())
    assert report.output_digest == expected.output_digest
    assert report.thresholds_from == "scan"
    assert executor.rounds > 1
    assert [(e.kept_fraction, e.tie_fraction, e.threshold) for e in report.experts] == [
        (e.kept_fraction, e.tie_fraction, e.threshold) for e in expected.experts
    ]


@pytest.mark.parametrize("options", [{}, {"tie_policy": "exact_k"}, {"trim_scope": "tensor"}], ids=str)
def test_an_executor_of_a_few_lines_carries_a_whole_merge(
    options: dict[str, str], merge_job: Checkpoints, tmp_path: Path
) -> None:
    models = random_models({"a.weight": (1024, 640), "b.weight": (1024, 640)}, experts=2)
    recipe = merge_job(models, options=options)
    expected = ties_dist.merge(recipe, tmp_path / "undisturbed", cache_dir=tmp_path / "one", unit_size=1 << 20)
    job = prepare(recipe, resources=Resources(unit_bytes=1 << 20))
    report = engine.run(job, LocalPlace(tmp_path / "out"), executor=OneThread(), progress=LogProgress())
    assert report.output_digest == expected.output_digest
    assert (report.executor, report.thresholds_from) == ("one thread", "scan")
    assert len(Path(inspect.getfile(OneThread)).read_text().splitlines()) <= 60


@pytest.fixture
def one_unit_a_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds take longer than the time after which a partial is sent."""
    observe: Callable[..., None] = Worker.observe

    def slow(*arguments: Any) -> None:
        observe(*arguments)
        time.sleep(0.001)

    monkeypatch.setattr(Worker, "observe", slow)
