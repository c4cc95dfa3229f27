"""An executor over workers that come and go: the rules of handing out, retrying and giving up, for any kind of fleet.

The driver owns all retries. A worker that dies or is stuck is replaced and what it had goes out again; what fails on
worker after worker is named, with its last error; a node where everything fails is left alone. `ray` has the fleet of
a cluster; tests and the simulation have others, and run this very code.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ties_dist.errors import BugError, ClusterError, LockedError, PlanError, StoppedError, TiesDistError, UnitError
from ties_dist.executors.base import (
    AnyStep,
    Call,
    Computed,
    Fold,
    Item,
    Loaded,
    Piece,
    Result,
    Step,
    Sum,
    Task,
    Usage,
    Workplace,
    alike,
    check_stop,
)
from ties_dist.executors.board import Pass
from ties_dist.executors.orders import Add, Answer, Ask, Event, Joined, Kind, Lost, Merge, Order
from ties_dist.executors.together import Together, prove, seated
from ties_dist.messages import listing
from ties_dist.values.items import MergeTask, Portion

logger = logging.getLogger(__name__)

ORDER_SECONDS: dict[Kind, float] = {"merge": 1.0, "fold": 5.0, "call": 1.0}
"""How long one order should take: long against a message (1 ms), short against what a lost worker costs."""
ORDERS_AT_ONCE = 2
"""Of each worker: it begins the next while the last units of one are on their way to the disk."""
MESSAGE_SECONDS = 0.004
"""Of the driver per order, with room to spare: more workers get longer orders, or they would wait for it."""
FIRST_BYTES = 64 << 20
"""Of an order while nobody has answered yet."""
NEWCOMERS_SHARE = 0.3
"""Of the mean rate of the others is expected of a worker that has not answered yet: it may be a slow one."""
MAX_ATTEMPTS = 4
BUG_ATTEMPTS = 2
"""A broken machine raises anything at all, but what fails in the same way on two is not the machines' fault."""
MOST_LOSSES = 10
"""So often an item may be with a worker that is lost through no fault of its own, as far as anybody can tell."""
EXCLUDED_AFTER = 3
"""Failures in a row, with nothing done in between, after which a node gets no more work."""
STUCK_SECONDS = 600.0
"""Least time after which an order that was not answered is taken for stuck; or so many times what it should take."""
STUCK_TIMES = 20
USUAL_RATE = 5e8
"""Bytes per second of a worker that has not answered yet: one order may be an hour's work (a large matrix)."""
GATHER_SECONDS = 20.0
"""How long the others are waited for once the first worker is ready: more may join at any time."""
END_SECONDS = 1.5
"""How long orders under way are waited for where the run ends: Ray kills a stopped driver after 3 seconds."""
POLL_SECONDS = 0.2


class Fleet(Protocol):
    """Workers somewhere. It keeps up their number by itself; what happens is told by `wait`."""

    def open(self, workplace: Workplace[object]) -> None:
        """Begin to ask for workers. Raises PlanError, ClusterError."""
        ...

    @property
    def wanted(self) -> int:
        """How many workers are asked for, ready ones included."""
        ...

    def send(self, worker: str, order: Order) -> None: ...

    def drop(self, worker: str) -> None:
        """End a worker, whatever it does. It is not told of again, and another takes its place."""
        ...

    def exclude(self, node: str) -> None:
        """Ask for no more workers there."""
        ...

    def give_up(self) -> None:
        """Workers are not to begin anything of what they were sent before."""
        ...

    def wait(self, seconds: float) -> list[Event]:
        """What happened, after up to so many seconds where nothing has yet."""
        ...

    def now(self) -> float: ...

    def measure(self, numbers: dict[str, float]) -> None:
        """Current gauges, for whoever watches."""
        ...

    def shortage(self) -> str:
        """What was asked for and what there is: for the message where no worker came."""
        ...

    def close(self) -> None: ...


@dataclass
class Member:
    """A ready worker. rate: bytes per second from the sending of an order to its answer. busy: orders it has."""

    worker: str
    node: str
    busy: int = 0
    rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Sent:
    """An order under way. asked: the pass it is of; answers to one that has ended only free the worker."""

    number: int
    worker: str
    indices: tuple[int, ...]
    asked: Pass[Any]
    at: float
    until: float


@dataclass
class FleetExecutor:
    """stop: set by a signal. start_seconds: how long no worker at all is waited for, at first and after all were lost.

    stuck_seconds, gather_seconds: see the constants.
    """

    fleet: Fleet
    stop: threading.Event = field(default_factory=threading.Event)
    name: str = "ray"
    usage: Usage = field(default_factory=lambda: Usage(elsewhere=True))
    stuck_seconds: float = field(default_factory=lambda: STUCK_SECONDS)
    start_seconds: float = 300.0
    gather_seconds: float = field(default_factory=lambda: GATHER_SECONDS)
    members: dict[str, Member] = field(default_factory=dict)
    retries: int = 0
    done_bytes: int = 0
    _under_way: dict[int, Sent] = field(default_factory=dict)
    _node_failures: Counter[str] = field(default_factory=Counter)
    _excluded: set[str] = field(default_factory=set)
    _requested: Counter[str] = field(default_factory=Counter)
    orders: int = 0
    _alone_since: float = 0.0
    _looked: float = 0.0
    _last_loss: str = ""

    # Workers

    def start(self, workplace: Workplace[object]) -> None:
        self.fleet.open(workplace)
        began, first = self.fleet.now(), None
        problems: dict[str, tuple[str, ...]] = {}
        refused = 0  # and kept: another would only take its place
        while len(self.members) + refused < self.fleet.wanted:
            now = self.fleet.now()
            if first is not None and now - first > self.gather_seconds:
                logger.info("workers: %d of %d are ready", len(self.members), self.fleet.wanted)
                break
            check_stop(self.stop)
            self._check_anyone(began)
            for event in self.fleet.wait(POLL_SECONDS):
                if isinstance(event, Joined):
                    first = first if first is not None else now
                    if event.problems:
                        problems[event.node] = event.problems
                        refused += 1
                    else:
                        self._join(event)
                elif isinstance(event, Lost):
                    self._lose(event)
        if problems:
            told = [f"node {node}: {problem}" for node, found in sorted(problems.items()) for problem in found]
            raise PlanError(listing("some nodes cannot do this merge:", told, "Mend them, or keep them out of it."))
        self.usage.proven = prove({m.node: m for m in self.members.values()}, workplace, self._ask_together)
        self._alone_since = self.fleet.now()

    def _ask_together(self, members: Sequence[Member], function: Together) -> dict[int, str | None]:
        """All of them at the same time; who is lost, or fails, gives no answer."""
        asked = seated(function, len(members))
        for at, member in enumerate(members):
            self._send(member, asked, (at,))
        found: dict[int, str | None] = {}
        while any(sent.asked is asked for sent in self._under_way.values()):
            check_stop(self.stop)
            self._drop_stuck(asked)
            answers = (self._take(event, asked)[0] for event in self.fleet.wait(POLL_SECONDS))
            found |= {at: value for each in answers if each for at, value in zip(each[0], each[1].values, strict=True)}
        return found

    def _join(self, event: Joined) -> None:
        self.members[event.worker] = Member(event.worker, event.node)
        self.usage.nodes.add(event.node)
        logger.info("worker %s is ready on node %s: %s", event.worker, event.node, event.facts)

    def _check_anyone(self, since: float) -> None:
        if not self.members and self.fleet.now() - since > self.start_seconds:
            last = f" The last one was lost: {self._last_loss}." if self._last_loss else ""
            raise ClusterError(
                f"no worker was ready within {self.start_seconds:.0f} s: {self.fleet.shortage()}.{last} Everything "
                "finished is kept; run the same command again once there is room."
            )

    # The three things that are asked for

    def map_unordered(
        self, step: Step[Task, Loaded, Computed, Result], items: Iterable[Piece], describe: Callable[[Piece], Task]
    ) -> Iterator[Result]:
        for _, answer in self._run(Pass(Merge(), list(items), lambda item: item.portion, describe)):
            yield from answer.values

    def reduce(self, step: AnyStep, fold: Fold[AnyStep, Piece, Sum], items: Sequence[Piece]) -> Iterator[Sum]:
        for _, answer in self._run(Pass(Add(fold), items, lambda item: item.portion)):
            yield from answer.values

    def call(
        self,
        step: AnyStep,
        function: Call[AnyStep, Item, Result],
        items: Sequence[Item],
        weigh: Callable[[Item], Portion] = alike,
    ) -> Iterator[tuple[Item, Result]]:
        for indices, answer in self._run(Pass(Ask(function), items, weigh)):
            yield from zip((items[i] for i in indices), answer.values, strict=True)

    def _run(self, asked: Pass[Any]) -> Iterator[tuple[tuple[int, ...], Answer]]:
        """Answers with the items each is of, until all are done. What is done is told also where an error follows."""
        failure: Exception | None = None
        try:
            while asked.board.unfinished and failure is None:
                check_stop(self.stop)
                if self.members:
                    self._alone_since = self.fleet.now()
                self._check_anyone(self._alone_since)
                self._hand_out(asked)
                failure = self._drop_stuck(asked)
                for event in self.fleet.wait(POLL_SECONDS):
                    answered, error = self._take(event, asked)
                    failure = failure or error
                    if answered is not None:
                        yield answered
                self._measure(asked)
        except StoppedError as error:
            failure = error
        finally:
            if asked.board.unfinished:
                self.fleet.give_up()
        if failure is not None:
            until = self.fleet.now() + END_SECONDS
            while any(sent.asked is asked for sent in self._under_way.values()) and self.fleet.now() < until:
                for event in self.fleet.wait(POLL_SECONDS):
                    answered, _ = self._take(event, asked)
                    if answered is not None:
                        yield answered
            raise failure

    def _hand_out(self, asked: Pass[Any]) -> None:
        """Give every worker that has room an order, round after round: all begin before one has much."""
        nodes = {m.node for m in self.members.values()}
        orders = ORDERS_AT_ONCE * len(self.members)
        seconds = max(ORDER_SECONDS[asked.work.kind], MESSAGE_SECONDS * orders)
        known = [m.rate for m in self.members.values() if m.rate]
        usual = sum(known) / len(known) if known else 0.0
        hungry = [m for m in self.members.values() if m.busy < ORDERS_AT_ONCE]
        while hungry:
            served = []
            for member in hungry:
                want = member.rate * seconds if member.rate else NEWCOMERS_SHARE * usual * seconds or FIRST_BYTES
                # Small enough, too, for what is left to end at about the same time everywhere; but the driver has to
                # send one to every worker before any gets its next.
                share = min(1.0, member.rate / usual) if member.rate else 1.0
                least = member.rate * MESSAGE_SECONDS * orders / 4
                want = max(least, min(want, share * asked.board.waiting_bytes / (2 * orders)))
                indices = asked.board.take(
                    member.worker, member.node, idle=member.busy == 0, want_bytes=want, nodes=nodes
                )
                if indices:
                    self._send(member, asked, indices)
                    served.append(member)
            hungry = [m for m in served if m.busy < ORDERS_AT_ONCE]

    def _send(self, member: Member, asked: Pass[Any], indices: tuple[int, ...]) -> None:
        self.orders += 1
        order = Order(number=self.orders, work=asked.work, items=asked.describe(indices))
        size = sum(asked.board.weights[i] for i in indices)
        expected = size / (member.rate or USUAL_RATE)
        now = self.fleet.now()
        self._under_way[order.number] = Sent(
            number=order.number,
            worker=member.worker,
            indices=indices,
            asked=asked,
            at=now,
            until=now + max(self.stuck_seconds, STUCK_TIMES * expected),
        )
        if asked.work.kind == "merge":
            self.usage.unanswered[order.number] = tuple(task for task in order.items if isinstance(task, MergeTask))
        member.busy += 1
        self.fleet.send(member.worker, order)

    def _take(self, event: Event, asked: Pass[Any]) -> tuple[tuple[tuple[int, ...], Answer] | None, Exception | None]:
        """What an event means: items that are done, with their answer; and an error that ends the pass."""
        if isinstance(event, Joined):
            if event.problems:
                logger.warning("node %s is not used: %s", event.node, "; ".join(event.problems))
                self._leave_alone(event.node, asked)
                self.fleet.drop(event.worker)
            elif event.node in self._excluded:
                self.fleet.drop(event.worker)
            else:
                self._join(event)
            return None, None
        if isinstance(event, Lost):
            return None, self._lose(event, asked)
        sent, answer = self._under_way.pop(event.number, None), event.answer
        self.usage.unanswered.pop(event.number, None)
        self._requested[event.worker] = max(self._requested[event.worker], answer.requested_bytes)
        self.usage.requested_bytes = self._requested.total()
        self.usage.peak_rss_bytes = max(self.usage.peak_rss_bytes, answer.peak_rss_bytes)
        if sent is None:  # of a worker that was given up before it answered
            return None, None
        member = self.members.get(sent.worker)
        if member is not None:
            member.busy -= 1
        if sent.asked is not asked:
            return None, None
        done = tuple(sent.indices[place] for place in answer.done)
        finished = set(done)
        rest = [i for i in sent.indices if i not in finished]
        error = None
        if done and member is not None:
            self._node_failures[member.node] = 0
            rate = sum(asked.board.weights[i] for i in done) / max(self.fleet.now() - sent.at, 1e-6)
            member.rate = rate if not member.rate else 0.7 * member.rate + 0.3 * rate
        if answer.error is not None:
            node = member.node if member is not None else "?"
            logger.warning("%d units failed on node %s: %s", len(rest), node, answer.error)
            for index in rest:
                error = self._fail(asked, index, node, answer.error) or error
            if member is not None:
                self._blame(member.node, asked)
        else:
            asked.board.put_back(rest)
        asked.board.finish(done)
        self.done_bytes += sum(asked.board.weights[i] for i in done)
        return ((done, answer) if done else None), error

    # What goes wrong

    def _fail(self, asked: Pass[Any], index: int, node: str, error: Exception | str) -> Exception | None:
        """An item failed; it goes out again, or its last error is returned."""
        attempts = asked.board.fail(index, node)
        self.retries += 1
        if isinstance(error, LockedError):
            return error
        if attempts < (BUG_ATTEMPTS if isinstance(error, BugError) else MAX_ATTEMPTS):
            return None
        last = str(error) or type(error).__name__
        if isinstance(error, BugError):
            failure: TiesDistError = error
        elif isinstance(error, TiesDistError):
            failure = type(error)(f"node {node}: {error}")
        else:
            failure = UnitError(
                f"{asked.items[index]}: failed {attempts} times, last on node {node}: {last}. What is finished is "
                "kept. Where workers were killed for memory, give a smaller --memory-budget; then run the same command "
                "again."
            )
        failure.node, failure.item = node, asked.items[index]
        return failure

    def _lose(self, lost: Lost, asked: Pass[Any] | None = None) -> Exception | None:
        """What a lost worker had goes out again. asked: the pass at hand, if one is."""
        self._last_loss = lost.reason
        member = self.members.pop(lost.worker, None)
        if member is None:
            logger.warning("a worker was lost before it was ready: %s", lost.reason)
            return None
        logger.warning("worker %s on node %s was lost: %s", lost.worker, member.node, lost.reason)
        if asked is not None:
            asked.board.leave(lost.worker)  # also where it had nothing: it may have been kept free for something
        had = [sent for sent in self._under_way.values() if sent.worker == lost.worker]
        failure: Exception | None = None
        for sent in had:
            del self._under_way[sent.number]
            if sent.asked is not asked:
                continue
            asked.losses.update(sent.indices)
            blamed = [i for i in sent.indices if not lost.blameless or asked.losses[i] > MOST_LOSSES]
            asked.board.put_back([i for i in sent.indices if i not in set(blamed)])
            self.retries += len(sent.indices) - len(blamed)
            for index in blamed:
                failure = self._fail(sent.asked, index, member.node, lost.reason) or failure
        if not lost.blameless and asked is not None:
            self._blame(member.node, asked)
        return failure

    def _blame(self, node: str, asked: Pass[Any]) -> None:
        self._node_failures[node] += 1
        others = {m.node for m in self.members.values()} - self._excluded - {node}
        if self._node_failures[node] >= EXCLUDED_AFTER and others and node not in self._excluded:
            logger.warning("node %s is not used any more: %d failures in a row", node, self._node_failures[node])
            self._leave_alone(node, asked)

    def _leave_alone(self, node: str, asked: Pass[Any]) -> None:
        self._excluded.add(node)
        self.fleet.exclude(node)
        for member in [m for m in self.members.values() if m.node == node]:
            self.fleet.drop(member.worker)
            self._lose(Lost(worker=member.worker, reason="its node is not used any more", blameless=True), asked)

    def _drop_stuck(self, asked: Pass[Any]) -> Exception | None:
        now, failure = self.fleet.now(), None
        if now - self._looked > min(1.0, self.stuck_seconds / 4):
            self._looked = now
            for worker in {sent.worker for sent in self._under_way.values() if sent.until < now}:
                if worker in self.members:
                    self.fleet.drop(worker)
                    lost = Lost(worker=worker, reason=f"no answer for {self.stuck_seconds:.0f} s or more")
                    failure = self._lose(lost, asked) or failure
        return failure

    def _measure(self, asked: Pass[Any]) -> None:
        self.usage.workers = len(self.members)
        self.fleet.measure(
            {
                "workers": len(self.members),
                "orders_under_way": len(self._under_way),
                "units_left": len(asked.board.unfinished),
                "retries": self.retries,
                "done_bytes": self.done_bytes,
                "read_bytes": self.usage.requested_bytes,
            }
        )
