"""Every method of ours has a loop, with whatever options: none is refused, or left to run eagerly."""

from __future__ import annotations

from itertools import product

import pytest

from ties_dist.compiler.kernel import eager_reason
from ties_dist.methods import METHODS, Cut, Found, Method
from ties_dist.methods.base import float32
from ties_dist.methods.dare import DareLinear, DareTies
from ties_dist.methods.linear import Linear
from ties_dist.methods.needs import ONE
from ties_dist.methods.task_arithmetic import TaskArithmetic
from ties_dist.methods.ties import Ties

TIES = [
    Ties(elect=elect, oracle=oracle, weight_before_elect=before, aggregate=aggregate, divide_by=by)  # type: ignore[arg-type]
    for elect, oracle, before, aggregate, by in product(
        ("mass", "count", "none"), (True, False), (True, False), ("mean", "sum", "max", "average"), ("weights", "count")
    )
]
MOST = 3
"""Experts."""
CHOSEN = [
    *TIES,
    *(kind(normalize=normalize) for kind in (Linear, TaskArithmetic) for normalize in (True, False)),
    *(kind(rescale=r, normalize=n) for kind in (DareLinear, DareTies) for r in (True, False) for n in (True, False)),
    *(kind(rescale_by="l1") for kind in (DareLinear, DareTies)),
    *(METHODS[name]() for name in sorted(METHODS)),
]


@pytest.mark.parametrize("least", [1, MOST])
def test_every_method_of_ours_has_a_loop(least: int) -> None:
    numbers = {
        "t": 0.5,
        "scale": 2.0,
        "lambda": 1.0,
        "epsilon": 0.0,
        "seed": 0,
        "tensor": 1.0,
        "weight": 1.0,
        "density": 0.5,
    }
    found: dict[Method, str | None] = {}
    for method in CHOSEN:
        experts = min(max(least, method.fewest), method.most or MOST)
        given = [numbers] * experts
        cuts = [Cut(threshold=0.5, keep=0.5)] * (experts if method.needs.trim else 0)
        state = method.numbers(numbers, given, Found(cuts=cuts))
        extras = experts if method.needs.statistics == "fisher" else int(getattr(method, "oracle", False))
        operands = (method.operand != "weight") + experts + extras
        products = method.products(experts) if method.needs.sums is not None else ()
        for factor in {each for pair in products for each in pair} - {ONE}:
            assert eager_reason(method, operands, experts, state, factor) is None
        scalars = method.scalars(numbers, given, [1.0] * len(products))
        state |= {name: float32(value) for name, value in scalars.items()}  # type: ignore[arg-type]
        found[method] = eager_reason(method, operands, experts, state)
    assert len(found) >= len(TIES) + 12
    assert {method: reason for method, reason in found.items() if reason is not None} == {}
