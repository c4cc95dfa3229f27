"""What travels between a driver and its workers, and what a worker does with it.

Only descriptions of units go out, and only small statistics come back; both are plain values that any transport can
carry. Each worker is a local executor of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ties_dist.errors import StoppedError, TiesDistError
from ties_dist.executors.local import LocalExecutor
from ties_dist.output.report import peak_rss_bytes
from ties_dist.values.items import output_files
from ties_dist.worker.counting import Observation
from ties_dist.worker.merging import MergeStep

Kind = Literal["merge", "fold", "call"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Items for one worker. operation: of a fold or a call, as `Executor` takes it."""

    number: int
    kind: Kind
    operation: Any
    items: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of an order. done: places of its items that are done. values: of each of them, or a fold's partial.

    error: of one of the others; without one they were not begun. requested_bytes, peak_rss_bytes: of the worker since
    its start.
    """

    done: tuple[int, ...]
    values: Any
    error: Exception | None = None
    requested_bytes: int = 0
    peak_rss_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A worker is ready. problems: why its node cannot do this work, if so."""

    worker: str
    node: str
    problems: tuple[str, ...] = ()
    facts: str = ""


@dataclass(frozen=True, kw_only=True)
class Answered:
    worker: str
    number: int
    answer: Answer


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A worker is gone. blameless: with its whole node, or taken away: not for what it was doing."""

    worker: str
    reason: str
    blameless: bool = False


Event = Joined | Answered | Lost


def perform(order: Order, step: MergeStep, local: LocalExecutor) -> Answer:
    """What a worker does with an order, as a local executor; bytes of merged units are durable when it answers.

    Where `local` is stopped, what is done by then is answered.
    """
    items, done = order.items, list[int]()
    values: list[Any] = []
    total, error = Observation(), None
    try:
        if order.kind == "merge":
            places = {task.item: place for place, task in enumerate(items)}
            for result in local.map_unordered(step, list(places), lambda unit: items[places[unit]]):
                done.append(places[result.item])
                values.append(result)
        elif order.kind == "fold":
            places = {unit: place for place, unit in enumerate(items)}
            for partial in local.reduce(step, order.operation, items):
                done += [places[unit] for unit in partial.units]
                total.add(partial)
        else:
            for place, value in local.call(step, lambda step, i: order.operation(step, items[i]), range(len(items))):
                done.append(place)
                values.append(value)
    except StoppedError:
        pass
    except Exception as raised:
        error = _told(raised)
    if values and order.kind == "merge":
        try:
            step.writer.sync(output_files(result.item for result in values))
        except Exception as raised:
            values, done, error = [], [], _told(raised)
    return Answer(
        done=tuple(done),
        values=total if order.kind == "fold" else values,
        error=error,
        requested_bytes=step.worker.requested_bytes,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _told(error: Exception) -> Exception:
    """An error as it can travel: of another library's it is not known whether the driver can make it again."""
    if isinstance(error, TiesDistError):
        return error
    text, kind = str(error), type(error).__name__
    return RuntimeError(f"{kind}: {text}" if text else kind)
