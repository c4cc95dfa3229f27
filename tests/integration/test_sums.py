"""Methods that take sums over a tensor: the same bytes however the blocks are taken, each block once."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.fleets import ThreadFleet
from ties_dist.engine import run as engine
from ties_dist.engine.run import DurableKeeper
from ties_dist.engine.verify import verify
from ties_dist.errors import NumericError, StoppedError
from ties_dist.executors.fleet import FleetExecutor
from ties_dist.executors.local import LocalExecutor
from ties_dist.inputs.opening import opener
from ties_dist.planning.options import RunOptions
from ties_dist.planning.prepare import prepare
from ties_dist.progress import Silent
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.memory import MemoryWriter
from ties_dist.values.stretches import BLOCK_ELEMENTS, Stretch
from ties_dist.worker.merging import MergeStep, Worker
from ties_dist.worker.summing import SumStretch

SHAPES = {"a.weight": (1200, 901), "b.weight": (512, 512), "c.bias": (701,), "d.scale": (), "e.empty": (0, 7)}
BLOCKS = 5 + 1 + 1 + 1
RECIPES: dict[str, dict[str, object]] = {
    "slerp": {"method": "slerp", "parameters": {"t": [{"filter": "a.", "value": 0.3}, {"value": 0.6}]}},
    "model_stock": {"method": "model_stock"},
}
SETTINGS: list[dict[str, object]] = [
    {"kernel": "eager"},
    {"unit_size": 1 << 20, "threads": 2},
    {"unit_size": 3 << 20, "read_backend": "pread"},
    {"unit_size": 1 << 20, "read_backend": "direct", "threads": 3, "memory_budget": 128 << 20},
]


def recipe_of(name: str, merge_job: Checkpoints, dtype: torch.dtype = torch.bfloat16) -> Path:
    models = random_models(SHAPES, experts=1 if name == "slerp" else 3, dtype=dtype)
    return merge_job(models, shards=2, **RECIPES[name])


def on_a_fleet(recipe: Path, out: Path) -> str:
    """Workers that are threads, whose orders are one item each."""
    job = prepare(recipe, RunOptions(threads=1, unit_size=1 << 20))
    fleet = ThreadFleet(workers=3)
    executor = FleetExecutor(fleet)
    opened = fleet.open

    def opening(workplace: Any) -> None:
        fleet.step = workplace.open()
        opened(workplace)

    fleet.open = opening  # type: ignore[method-assign]
    try:
        return engine.run(job, LocalPlace(out), executor=executor, progress=Silent()).output_digest
    finally:
        fleet.close()


@pytest.mark.parametrize("name", RECIPES)
def test_the_digest_does_not_depend_on_how_sums_are_taken(
    name: str, merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(name, merge_job)
    expected = ties_dist.merge(recipe, tmp_path / "out").output_digest
    for i, settings in enumerate(SETTINGS):
        monkeypatch.setattr("ties_dist.values.stretches.BLOCKS_AT_ONCE", 1 + i)
        monkeypatch.setattr("ties_dist.worker.summing.AT_ONCE", 1 << (16 - i))
        assert ties_dist.merge(recipe, tmp_path / str(i), **settings).output_digest == expected  # type: ignore[arg-type]
    assert on_a_fleet(recipe, tmp_path / "fleet") == expected
    found = verify(LocalPlace(tmp_path / "out"), RunOptions(), sample=1.0, progress=Silent())
    assert found.remerged_units == found.units


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_run_takes_no_block_again(
    name: str, merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(name, merge_job)
    expected = ties_dist.merge(recipe, tmp_path / "whole").output_digest
    monkeypatch.setattr("ties_dist.values.stretches.BLOCKS_AT_ONCE", 1)
    monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(LocalExecutor, "window", 1)
    stop, taken, kept = threading.Event(), list[Stretch](), list[Stretch]()
    take, keep = SumStretch.__call__, DurableKeeper.sums

    def counted(self: SumStretch, step: Any, stretch: Stretch) -> Any:
        taken.append(stretch)
        return take(self, step, stretch)

    def stopping(self: DurableKeeper, found: Any) -> None:
        keep(self, found)
        kept.extend(found)
        if len(kept) >= 3:
            stop.set()

    monkeypatch.setattr(SumStretch, "__call__", counted)
    monkeypatch.setattr(DurableKeeper, "sums", stopping)
    with pytest.raises(StoppedError, match="everything finished is kept"):
        ties_dist.merge(recipe, tmp_path / "out", threads=1, stop=stop)
    before = list(kept)
    assert 3 <= len(before) < BLOCKS
    report = ties_dist.merge(recipe, tmp_path / "out", threads=2)
    assert report.output_digest == expected
    assert len(kept) == len(set(kept)) == BLOCKS
    assert [taken.count(stretch) for stretch in before] == [1] * len(before)
    assert report.phases["sum"] > 0


def test_sums_are_right(merge_job: Checkpoints) -> None:
    """Against sums that are rounded once."""
    plan = prepare(recipe_of("model_stock", merge_job, torch.float32), RunOptions()).plan
    models = random_models(SHAPES, experts=3)
    deltas = [(m["a.weight"] - models[0]["a.weight"]).reshape(-1).double().numpy() for m in models[1:]]
    step = MergeStep(Worker(plan, opener(plan.models, "mmap", reread_bytes=None)), MemoryWriter())
    (found,) = SumStretch()(step, Stretch("a.weight", 4, 5))
    last = slice(4 * BLOCK_ELEMENTS, None)
    exact = [math.fsum((deltas[i][last] * deltas[j][last]).tolist()) for i in range(3) for j in range(i, 3)]
    assert np.allclose(found, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", RECIPES)
def test_nan_is_named_with_its_model(name: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    models = random_models(SHAPES, experts=1 if name == "slerp" else 3)
    models[1]["b.weight"][7, 7] = math.nan
    recipe = merge_job(models, **RECIPES[name])
    with pytest.raises(NumericError, match=r"b\.weight: 1 NaN or Inf in 'expert-0'"):
        ties_dist.merge(recipe, tmp_path / "out")
