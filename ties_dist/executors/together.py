"""What all nodes do together before any of them works: rounds, each of which ends for all before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ties_dist.errors import PlanError
from ties_dist.executors.base import Call, Workplace, alike
from ties_dist.executors.board import Pass
from ties_dist.executors.orders import Ask
from ties_dist.messages import listing
from ties_dist.values.items import Seat

M = TypeVar("M")
Together = Call[Any, Seat, str | None]


def seated(function: Together, nodes: int) -> Pass[Seat]:
    """A round as a pass whose items are all given out, one to a node."""
    asked = Pass(Ask(function), [Seat(at, nodes) for at in range(nodes)], alike)
    asked.board.take("", "", idle=True, want_bytes=nodes)
    asked.board.leave("")
    return asked


def prove(
    members: Mapping[str, M],
    workplace: Workplace[object],
    ask: Callable[[Sequence[M], Together], Mapping[int, str | None]],
) -> frozenset[str]:
    """The nodes, where all came through all rounds; none where one was lost meanwhile, or there is nobody to meet.

    members: a worker of each node. ask: one round, with what each found wrong by its place; who was lost is missing.
    Raises PlanError where something was wrong.
    """
    nodes = list(members)
    rounds = workplace.rounds(len(nodes)) if len(nodes) > 1 else ()
    for function in rounds:
        found = ask(list(members.values()), function)
        if problems := [f"node {nodes[at]}: {problem}" for at, problem in sorted(found.items()) if problem]:
            raise PlanError(listing("these nodes cannot merge together:", problems))
        if len(found) < len(nodes):
            return frozenset()
    return frozenset(nodes if rounds else ())
