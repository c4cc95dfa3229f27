"""Output = f(recipe, tensors, shard sizes): not of unit size, threads, read back end, kernel or order of completion.

Pairs of settings on a model of many units; every digest must be the same, and equal to the NumPy oracle's tensors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ties_dist
from tests import oracle
from tests.conftest import Checkpoints, random_models
from ties_dist.output.report import MergeReport

SHAPES = {f"model.layers.{i}.mlp.weight": (600 + 37 * i, 901) for i in range(5)} | {
    "model.embed_tokens.weight": (1501, 701),
    "model.norm.weight": (701,),
    "model.scale": (),
    "model.empty": (0, 7),
}
DEFAULT = {"unit_size": None, "threads": 1, "read_backend": "mmap", "kernel": "eager"}
SETTINGS: list[dict[str, object]] = [
    {"unit_size": 1 << 20, "threads": 2},
    {"unit_size": 3 << 20, "read_backend": "pread"},
    {"unit_size": 1 << 20, "read_backend": "direct"},
    {"unit_size": 1 << 20, "kernel": "compiled"},
    {"read_backend": "pread", "kernel": "compiled"},
    {"threads": 2, "kernel": "compiled"},
    {"threads": 2, "read_backend": "pread", "memory_budget": 128 << 20},
]
RECIPES: dict[str, dict[str, object]] = {
    "paper": {},
    "exact_k": {"options": {"tie_policy": "exact_k"}},
    "mergekit": {"options": {"semantics": "mergekit"}, "expert_parameters": [{"weight": 0.4}] * 3},
    "task_arithmetic": {"method": "task_arithmetic", "expert_parameters": [{"weight": w} for w in (1.0, -0.5, 0.3)]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_digest_does_not_depend_on_how_the_work_is_done(name: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=3, dtype=torch.bfloat16)
    recipe = merge_job(models, shards=2, **RECIPES[name])

    def merged(i: int, settings: dict[str, object]) -> MergeReport:
        cache = tmp_path / f"cache-{i % 2}"  # some scan, some find the statistics of an earlier one
        return ties_dist.merge(recipe, tmp_path / f"out-{i}", cache_dir=cache, **(DEFAULT | settings))  # type: ignore[arg-type]

    reports = [merged(i, s) for i, s in enumerate([{}, *SETTINGS])]
    assert len({r.output_digest for r in reports}) == 1
    assert len({r.units for r in reports}) > 2
    assert {r.kernel for r in reports} == {"eager", "compiled"}
    files = [sorted((tmp_path / f"out-{i}").glob("*.safetensors")) for i in range(len(reports))]
    assert all([p.read_bytes() for p in each] == [p.read_bytes() for p in files[0]] for each in files)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_of_many_units_equals_the_numpy_restatement(
    dtype: torch.dtype, merge_job: Checkpoints, tmp_path: Path
) -> None:
    models = random_models(SHAPES, experts=5, dtype=dtype, seed=1)
    recipe = merge_job(models, shards=2, parameters={"density": 0.3, "lambda": 1.1})
    report = ties_dist.merge(recipe, tmp_path / "out", unit_size=1 << 20)
    base, *experts = [{n: oracle.from_torch(t) for n, t in model.items()} for model in models]
    expected = oracle.ties(base, experts, density=0.3, lam=1.1)
    written = {n: t for p in sorted((tmp_path / "out").glob("*.safetensors")) for n, t in load_file(p).items()}
    assert oracle.same_bytes({n: oracle.from_torch(t) for n, t in written.items()}, expected.tensors) == []
    statistics = expected.statistics
    assert [e.threshold for e in report.experts] == [float(np.float32(s.threshold)) for s in statistics.experts]
    assert [e.kept_fraction for e in report.experts] == [s.kept_nonzero / report.elements for s in statistics.experts]
    assert report.majority_sign == statistics.majority_sign
