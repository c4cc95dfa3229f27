"""What every test needs: a statistics cache of its own, and one factory of tiny checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.turns import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_runtest_protocol,
    pytest_sessionfinish,
)
from ties_dist.cache import KERNELS

Checkpoints = Callable[..., Path]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled loops, for all tests of a run and all its workers: compiling one takes half a second of a core."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / KERNELS
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def statistics_cache(
    tmp_path_factory: pytest.TempPathFactory, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """No test sees statistics that another one, or the user, has cached."""
    folder = tmp_path_factory.mktemp("statistics")
    (folder / KERNELS).symlink_to(kernels)
    monkeypatch.setenv("TIES_DIST_CACHE", str(folder))
    yield folder


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """A checkpoint as Hugging Face lays it out: one file, or shards of consecutive names with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i * len(names) // shards : (i + 1) * len(names) // shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def random_models(
    shapes: Mapping[str, Sequence[int]], *, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[dict[str, Tensor]]:
    """A base and its fine-tunes; the scale of the deltas differs by tensor, so whole-model and per-tensor trims do."""
    draw = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(tuple(shape), generator=draw) * 0.02 for name, shape in shapes.items()}
    models = [{name: t.to(dtype) for name, t in base.items()}]
    for _ in range(experts):
        models.append(
            {
                name: (t.to(dtype).float() + torch.randn(t.shape, generator=draw) * 1e-3 * (1 + i % 3)).to(dtype)
                for i, (name, t) in enumerate(base.items())
            }
        )
    return models


def write_job(
    root: Path,
    models: Sequence[Mapping[str, Tensor]],
    *,
    shards: int = 1,
    method: str = "ties",
    parameters: Mapping[str, object] | None = None,
    expert_parameters: Sequence[Mapping[str, object]] | None = None,
    options: Mapping[str, object] | None = None,
    config: Mapping[str, object] | None = None,
    **top: object,
) -> Path:
    """Writes base, experts and a recipe; returns the recipe's path."""
    write_checkpoint(root / "base", models[0], shards=shards, config=config)
    given = expert_parameters or [{}] * (len(models) - 1)
    listed = []
    for i, (model, own) in enumerate(zip(models[1:], given, strict=True)):
        write_checkpoint(root / f"expert-{i}", model, shards=shards, config=config)
        listed.append({"model": f"expert-{i}", "parameters": dict(own)})
    recipe: dict[str, object] = {"merge_method": method, "base_model": "base", "models": listed, **top}
    recipe["parameters"] = dict(parameters or ({"density": 0.2} if method == "ties" else {}))
    if options:
        recipe["ties_dist"] = dict(options)
    path = root / "recipe.yml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


@pytest.fixture
def merge_job(tmp_path: Path) -> Checkpoints:
    """`write_job` into this test's folder, or another.

    Call: merge_job(models, shards=1, method="ties", parameters={...}, expert_parameters=[...], options={...}, **top).
    """

    def write(models: Sequence[Mapping[str, Tensor]], *, folder: Path | None = None, **options: Any) -> Path:
        return write_job(folder or tmp_path, models, **options)

    return write
