"""The same bytes from whatever instructions a processor has: loops compiled for less than it can do, and numpy with
less."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest
import torch

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.integration.command import finish, start
from ties_dist.cache import KERNELS
from ties_dist.compiler.native import processor

LOWERED = {"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}


def code(cache: Path) -> set[bytes]:
    """Of the kept kernels: what follows their first line, a checksum."""
    kept = {path.read_bytes().partition(b"\n")[2] for path in (cache / KERNELS).glob("*.o")}
    assert kept
    return kept


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or processor().lanes == 4, reason="nothing to lower here")
def test_the_digest_is_the_same_with_fewer_instructions(merge_job: Checkpoints, tmp_path: Path) -> None:
    from numpy._core import _multiarray_umath as core

    dispatched = [f for f in core.__cpu_dispatch__ if core.__cpu_features__.get(f)]
    models = random_models({"a.weight": (300, 70), "b.bias": (33,)}, experts=3, dtype=torch.bfloat16)
    recipe = merge_job(models, options={"tie_policy": "exact_k"})
    reports, kept = [], []
    for name, lowered in (("full", {}), ("low", LOWERED | {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched)})):
        cache = tmp_path / name
        arguments = ("merge", recipe, tmp_path / f"{name}-out", "--json", "--cache-dir", cache)
        told = finish(start(*arguments, env=os.environ | lowered))
        assert told.status == 0, told.err
        reports.append(json.loads(told.out))
        kept.append(code(cache))
    assert reports[0]["output_digest"] == reports[1]["output_digest"]
    assert not kept[0] & kept[1]  # the object code differs, down to the last kernel
    assert reports[0]["processor"] == str(processor())
    assert reports[1]["processor"] == "x86-64-v2, 4 float32 at once"
    assert ties_dist.merge(recipe, tmp_path / "full-out").already_done
