"""fusion-bench's utilities as the judge of whole-model TIES: the one other code at hand that trims over all parameters.

One file of it is loaded, without the package around it, whose imports are a training framework's; the file is the
authors' published code, but for its formatting.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import ties_dist
from tests import oracle
from tests.conformance.agreement import Allowance, compare, ties_allowance
from tests.oracle import Array

SHAPES = {"embedding.weight": (128, 48), "attention.weight": (24, 20), "bias": (33,), "norm": (7,), "scalar": (1,)}
SCALES = {"embedding.weight": 1e-3, "attention.weight": 4e-3, "bias": 2e-4, "norm": 1e-3, "scalar": 1e-2}
"""Of the updates: a threshold per tensor would be another one."""


def load_utilities() -> ModuleType:
    found = importlib.util.find_spec("fusion_bench")
    if found is None or not found.submodule_search_locations:
        pytest.skip("fusion-bench is not installed; it is a test-only dependency (`make test` installs it)")
    path = Path(found.submodule_search_locations[0]) / "method" / "ties_merging" / "ties_merging_utils.py"
    spec = importlib.util.spec_from_file_location("ties_merging_utils", path)
    assert spec is not None and spec.loader is not None
    types = ModuleType("fusion_bench.utils.type")
    types.StateDictType = dict  # type: ignore[attr-defined]
    stand_ins = {"fusion_bench": ModuleType("fusion_bench"), "fusion_bench.utils": ModuleType("fusion_bench.utils")}
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        for name, stand_in in (stand_ins | {"fusion_bench.utils.type": types}).items():
            patched.setitem(sys.modules, name, stand_in)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def utilities() -> ModuleType:
    return load_utilities()


@dataclass(frozen=True, kw_only=True)
class Case:
    experts: int
    density: float
    lam: float = 1.0
    aggregate: str = "mean"
    stored: str = "float32"

    def __str__(self) -> str:
        return f"{self.experts}-experts-{self.density}-lambda{self.lam}-{self.aggregate}-{self.stored}"


CASES = (
    Case(experts=1, density=0.2),
    Case(experts=2, density=0.2),
    Case(experts=2, density=0.0001),  # k = 0: the reference keeps one entry all the same
    Case(experts=3, density=0.1, lam=1.5),
    Case(experts=3, density=0.5, aggregate="sum", lam=0.3),
    Case(experts=4, density=0.2, aggregate="max"),
    Case(experts=4, density=0.9),
    Case(experts=3, density=0.2, stored="bfloat16"),  # ties at the threshold, exact cancellations
    Case(experts=4, density=0.45, stored="bfloat16", lam=0.4),
    Case(experts=6, density=0.2),
    Case(experts=8, density=0.3, stored="bfloat16"),
)


def make_models(case: Case) -> list[dict[str, Array]]:
    random = np.random.default_rng([case.experts, int(case.density * 1e4), len(case.stored)])
    dtype = oracle.DTYPES[case.stored]
    base = {n: oracle.narrow((random.standard_normal(s) * 0.02).astype(np.float32), dtype) for n, s in SHAPES.items()}
    models = [base]
    for _ in range(case.experts):
        drawn = {
            name: random.standard_normal(values.shape) * SCALES[name] * (random.random(values.shape) < 0.9)
            for name, values in base.items()
        }
        models.append({n: oracle.narrow(oracle.widen(base[n]) + u.astype(np.float32), dtype) for n, u in drawn.items()})
    return models


def merge_with_fusion_bench(utilities: ModuleType, case: Case, models: list[dict[str, Array]]) -> dict[str, Array]:
    wide = [{name: torch.from_numpy(oracle.widen(values)) for name, values in m.items()} for m in models]
    base, *experts = [utilities.state_dict_to_vector(m) for m in wide]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        delta = utilities.ties_merging(
            torch.stack([e - base for e in experts]), reset_thresh=case.density, merge_func=f"dis-{case.aggregate}"
        )
    merged = utilities.vector_to_state_dict(base + case.lam * delta, wide[0])
    return {name: merged[name].numpy() for name in models[0]}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_model_ties_equals_fusion_bench_except_in_the_order_of_stacked_sums(
    case: Case, utilities: ModuleType
) -> None:
    models = make_models(case)
    theirs = merge_with_fusion_bench(utilities, case, models)
    given: dict[str, Any] = {"parameters": {"density": case.density, "lambda": case.lam}, "aggregate": case.aggregate}
    tensors = [{name: oracle.to_torch(values) for name, values in m.items()} for m in models]
    merged = ties_dist.merge_state_dicts(tensors[0], tensors[1:], method="ties", out_dtype="float32", **given)
    ours = {name: oracle.from_torch(tensor) for name, tensor in merged.items()}

    statistics = oracle.ties(models[0], models[1:], density=case.density, lam=case.lam).statistics
    explained = ties_allowance(statistics, case.lam)
    comparison = compare(ours, theirs, Allowance(magnitude=explained.magnitude, mass=explained.mass, gain=case.lam))
    print(case, comparison.counts)
    assert comparison.unexplained == []
    if case.experts < 5:
        assert comparison.identical == comparison.elements
    assert comparison.rounded <= 0.5 * comparison.elements
    assert comparison.undecided <= 0.01 * comparison.elements


def test_a_threshold_per_tensor_would_not_agree(utilities: ModuleType) -> None:
    case = Case(experts=3, density=0.2)
    models = make_models(case)
    theirs = merge_with_fusion_bench(utilities, case, models)
    tensors = [{name: oracle.to_torch(values) for name, values in m.items()} for m in models]
    merged = ties_dist.merge_state_dicts(
        tensors[0], tensors[1:], method="ties", parameters={"density": 0.2}, trim_scope="tensor"
    )
    assert any((merged[name].numpy() != theirs[name]).mean() > 0.05 for name in SHAPES)
