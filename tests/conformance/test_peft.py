"""peft's merge utilities, in process, as the judge of `semantics: peft` and of task arithmetic.

peft merges stacks of task tensors one parameter at a time; the harness forms the float32 deltas, lets peft merge them,
and adds lambda times the result to the base. The same inputs go through the NumPy oracle (which proves the preset's
definition) and through `ties_dist.merge_state_dicts` (which proves the engine).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracle
from tests.conformance.agreement import Allowance, compare, ties_allowance
from tests.oracle import Array

pytest.importorskip("peft", reason="peft is not installed; it is a test-only dependency (pip install peft)")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # peft's own imports warn about packages it would like to have
    from peft.utils import merge_utils

SHAPES = {"embedding.weight": (128, 48), "attention.weight": (24, 20), "bias": (33,), "norm": (7,), "scalar": (1,)}
SUBJECTS = ("oracle", "engine")


@dataclass(frozen=True, kw_only=True)
class Case:
    experts: int
    density: float
    weights: tuple[float, ...] | None = None
    lam: float = 1.0
    elect: str = "mass"
    stored: str = "float32"  # bfloat16 inputs take few distinct values, so trims cut tie groups

    @property
    def given_weights(self) -> list[float]:
        return [1.0] * self.experts if self.weights is None else list(self.weights)

    def __str__(self) -> str:
        weights = "" if self.weights is None else "-w" + "_".join(map(str, self.weights))
        return f"{self.experts}-experts-{self.density}{weights}-lambda{self.lam}-{self.elect}-{self.stored}"


TIES_CASES = (
    Case(experts=1, density=0.4),
    Case(experts=2, density=0.2),
    Case(experts=2, density=0.001),  # k = 0 in every tensor: the base
    Case(experts=2, density=1.0),
    Case(experts=3, density=0.5, weights=(0.5, 1.0, 0.3)),
    Case(experts=3, density=0.2, lam=0.7, elect="count"),
    Case(experts=4, density=0.8, weights=(1.0, 2.0, 0.1, 0.7), lam=1.8),
    Case(experts=4, density=0.3, elect="count", weights=(0.3, 0.3, 0.2, 0.2)),
    Case(experts=5, density=0.35, weights=(0.9, 0.2, 0.4, 1.1, 0.6)),
    Case(experts=6, density=1.0, lam=0.4),
    Case(experts=2, density=1.0, stored="bfloat16"),  # no trim; deltas that cancel exactly
    Case(experts=4, density=1.0, stored="bfloat16", elect="count"),
    Case(experts=3, density=0.3, stored="bfloat16"),
    Case(experts=4, density=0.55, stored="bfloat16", weights=(0.2, 0.4, 0.6, 0.8)),
)
ARITHMETIC_CASES = (
    Case(experts=1, density=1.0, weights=(-1.0,)),
    Case(experts=3, density=1.0, weights=(0.5, -1.0, 0.3), lam=0.4),
    Case(experts=4, density=1.0, lam=0.4),
    Case(experts=4, density=1.0, stored="bfloat16", lam=0.4),
    Case(experts=6, density=1.0, weights=(0.9, 0.2, -0.4, 1.1, 0.6, 0.3)),
)


def make_models(case: Case) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """A base and its experts: sigma 0.02 and updates of 1e-3, a tenth of them exactly zero, drawn by case."""
    random = np.random.default_rng([case.experts, int(case.density * 1000), len(case.stored)])
    dtype = oracle.DTYPES[case.stored]
    base = {name: (random.standard_normal(shape) * 0.02).astype(np.float32) for name, shape in SHAPES.items()}
    base = {name: oracle.narrow(values, dtype) for name, values in base.items()}
    experts = []
    for _ in range(case.experts):
        expert = {}
        for name, values in base.items():
            update = random.standard_normal(values.shape) * 1e-3 * (random.random(values.shape) < 0.9)
            expert[name] = oracle.narrow(oracle.widen(values) + update.astype(np.float32), dtype)
        experts.append(expert)
    return base, experts


def merge_with_peft(
    method: str, case: Case, base: Mapping[str, Array], experts: list[dict[str, Array]]
) -> dict[str, Any]:
    """peft's merged delta per tensor, times lambda, plus the base, in float32."""
    weights = torch.tensor(case.given_weights, dtype=torch.float32)
    merged = {}
    for name in base:
        origin = torch.from_numpy(oracle.widen(base[name]))
        deltas = [torch.from_numpy(oracle.widen(expert[name])) - origin for expert in experts]
        if method == "task_arithmetic":
            delta = merge_utils.task_arithmetic(deltas, weights)
        else:
            vote = {"mass": "total", "count": "frequency"}[case.elect]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "density 1.0 ... no pruning will be performed"
                delta = merge_utils.ties(deltas, weights, case.density, majority_sign_method=vote)
        merged[name] = (origin + case.lam * delta).numpy()
    return merged


def run_ties(subject: str, case: Case, base: dict[str, Array], experts: list[dict[str, Array]]) -> dict[str, Array]:
    if subject == "oracle":
        return expected_statistics(case, base, experts).tensors
    return run_engine(
        "ties", case, base, experts, parameters={"lambda": case.lam, "density": case.density}, elect=case.elect
    )


def run_engine(
    method: str, case: Case, base: dict[str, Array], experts: list[dict[str, Array]], **keywords: Any
) -> dict[str, Array]:
    ties_dist = pytest.importorskip("ties_dist", exc_type=ImportError)
    merged = ties_dist.merge_state_dicts(
        {name: oracle.to_torch(array) for name, array in base.items()},
        [{name: oracle.to_torch(array) for name, array in expert.items()} for expert in experts],
        method=method,
        semantics="peft",
        out_dtype="float32",
        expert_parameters=[{"weight": weight} for weight in case.given_weights],
        **keywords,
    )
    return {name: oracle.from_torch(tensor) for name, tensor in merged.items()}


def expected_statistics(case: Case, base: dict[str, Array], experts: list[dict[str, Array]]) -> oracle.Merged:
    return oracle.ties(
        base,
        experts,
        semantics="peft",
        density=case.density,
        weights=case.given_weights,
        lam=case.lam,
        elect=case.elect,  # type: ignore[arg-type]
        out_dtype="float32",
    )


@pytest.mark.parametrize("case", TIES_CASES, ids=str)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_ties_equals_peft_except_at_cut_ties_and_stacked_sums(subject: str, case: Case) -> None:
    base, experts = make_models(case)
    theirs = merge_with_peft("ties", case, base, experts)
    statistics = expected_statistics(case, base, experts).statistics
    comparison = compare(run_ties(subject, case, base, experts), theirs, ties_allowance(statistics, case.lam))
    print(case, comparison.counts)

    assert comparison.unexplained == []
    if case.experts < 5 and (case.stored == "float32" or case.density == 1.0):
        assert comparison.identical == comparison.elements
    # At most one cut tie group per tensor and expert, and few sums near zero.
    assert comparison.tied <= 0.25 * comparison.elements
    assert comparison.rounded <= 0.5 * comparison.elements
    assert comparison.undecided <= 0.01 * comparison.elements


@pytest.mark.parametrize("case", ARITHMETIC_CASES, ids=str)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_task_arithmetic_equals_peft(subject: str, case: Case) -> None:
    base, experts = make_models(case)
    theirs = merge_with_peft("task_arithmetic", case, base, experts)
    if subject == "oracle":
        ours = oracle.task_arithmetic(base, experts, weights=case.given_weights, lam=case.lam, out_dtype="float32")
    else:
        ours = run_engine("task_arithmetic", case, base, experts, parameters={"lambda": case.lam})
    every_delta = oracle.ties(base, experts, density=1.0, weights=case.given_weights).statistics
    allowance = Allowance(magnitude=every_delta.magnitude if case.experts >= 5 else None, gain=case.lam)
    comparison = compare(ours, theirs, allowance)
    print(case, comparison.counts)

    assert comparison.unexplained == []
    assert comparison.rounded <= 0.5 * comparison.elements


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_expert_of_weight_zero_still_votes_in_peft(subject: str) -> None:
    # peft weighs after the election. First element: -3 outvotes +1, its weighted value is 0, so the base stays.
    # Second: 3 and 1 agree and both are counted: (0 * 3 + 1 * 1) / 2.
    case = Case(experts=2, density=1.0, weights=(0.0, 1.0))
    base = {"w": np.zeros(2, dtype=np.float32)}
    experts = [{"w": np.float32([-3, 3])}, {"w": np.float32([1, 1])}]
    theirs = merge_with_peft("ties", case, base, experts)
    assert theirs["w"].tolist() == [0.0, 0.5]
    assert run_ties(subject, case, base, experts)["w"].tolist() == [0.0, 0.5]


def test_the_bfloat16_cases_cut_tie_groups_or_cancel() -> None:
    # Otherwise the cases above would not show what either does.
    for case in TIES_CASES:
        if case.stored == "bfloat16":
            base, experts = make_models(case)
            counted = expected_statistics(case, base, experts).statistics
            if case.density == 1.0:
                assert counted.cancellations > 10
            else:
                assert all(expert.ambiguous > 0 for expert in counted.experts)
