"""An encoding is one file under `forms/`: with it there, models in it are merged like any other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ties_dist
from tests import made_up_form, oracle
from tests.conftest import write_checkpoint
from ties_dist.checkpoints import forms
from ties_dist.checkpoints.catalogue import open_checkpoint
from ties_dist.errors import CheckpointError
from ties_dist.storage.readers import open_reader
from ties_dist.values import views

SHAPE = (700, 300)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`made_up.py` in the folder of forms, as far as anybody can tell."""
    (tmp_path / "forms").mkdir()
    shutil.copy(made_up_form.__file__, tmp_path / "forms" / "made_up.py")
    monkeypatch.setattr(forms, "__path__", [*forms.__path__, str(tmp_path / "forms")])
    yield
    sys.modules.pop(f"{forms.__name__}.made_up", None)


def models() -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """A base, two experts in codes, and what these decode to."""
    draw = torch.Generator().manual_seed(3)
    base = {"w": (torch.randn(SHAPE, generator=draw) * 8).round() / 64, "norm": torch.ones(9)}
    coded, plain = [], []
    for i in range(2):
        codes = (base["w"] * 64 + torch.randint(-3, 4, SHAPE, generator=draw) * (i + 1)).clamp(-127, 127)
        step = torch.tensor([1 / 64])
        coded.append({"w.codes": codes.to(torch.int8), "w.step": step, "norm": base["norm"] + i})
        plain.append({"w": codes.to(torch.int8).float() * step, "norm": base["norm"] + i})
    return base, coded, plain


def write_job(root: Path, base: dict[str, Tensor], experts: list[dict[str, Tensor]]) -> Path:
    write_checkpoint(root / "base", base)
    for i, expert in enumerate(experts):
        write_checkpoint(root / f"e{i}", expert)
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": f"e{i}"} for i in range(len(experts))],
        "parameters": {"density": 0.3},
    }
    (root / "recipe.yml").write_text(json.dumps(recipe))
    return root / "recipe.yml"


@pytest.mark.parametrize("kernel", ["compiled", "eager"])
@pytest.mark.parametrize("semantics", ["paper", "mergekit"])
def test_models_in_codes_are_merged_as_what_they_decode_to(
    semantics: str, kernel: str, added: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "DECODED_AT_ONCE", 1000)
    base, coded, plain = models()
    given = {"w": 1.0} if semantics == "mergekit" else {}
    for root, experts in ((tmp_path / "coded", coded), (tmp_path / "plain", plain)):
        recipe = write_job(root, base, experts)
        document = json.loads(recipe.read_text())
        document["parameters"] |= {"weight": 1.0} if given else {}
        recipe.write_text(json.dumps(document))
    reports = [
        ties_dist.merge(
            tmp_path / root / "recipe.yml", tmp_path / root / "out", semantics=semantics, kernel=kernel,
            unit_size=1 << 20, cache_dir=tmp_path / root / "cache",
        )
        for root in ("coded", "plain")
    ]  # fmt: skip
    merged = [load_file(tmp_path / root / "out" / "model.safetensors") for root in ("coded", "plain")]
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in base)
    assert [e.threshold for e in reports[0].experts] == [e.threshold for e in reports[1].experts]
    if semantics == "paper":
        expected = oracle.ties(
            *({n: t.numpy() for n, t in base.items()}, [{n: t.numpy() for n, t in e.items()} for e in plain]),
            density=0.3,
        )
        assert oracle.same_bytes({n: t.numpy() for n, t in merged[0].items()}, expected.tensors) == []
    # One byte an element is read of what lies in one byte.
    elements = base["w"].numel()
    assert reports[1].bytes_read - reports[0].bytes_read > 2 * 2 * elements


def test_without_the_file_codes_are_refused(tmp_path: Path) -> None:
    base, coded, _ = models()
    with pytest.raises(CheckpointError, match=r"missing in expert 'e0'"):
        ties_dist.plan(write_job(tmp_path, base, coded))


def test_a_tensor_that_is_part_of_two_parameters_is_refused(added: None, tmp_path: Path) -> None:
    base, coded, _ = models()
    write_checkpoint(tmp_path / "both", coded[0] | {"w": base["w"]})
    with pytest.raises(CheckpointError, match=r"w: stored as it is, and in codes"):
        open_checkpoint(tmp_path / "both", name="both", reader=open_reader)
    catalogue = open_checkpoint(_written(tmp_path / "one", coded[0]), name="one", reader=open_reader)
    assert sorted(catalogue.parameters) == ["norm", "w"]
    assert sorted(catalogue.tensors) == ["norm", "w.codes", "w.step"]
    assert catalogue.parameters["w"].shape == SHAPE and catalogue.parameters["w"].numel == np.prod(SHAPE)


def _written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return write_checkpoint(folder, tensors)
