"""A method is one file beside the others: with it there, it is listed, planned, compiled and merged with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests import new_method
from tests.conftest import Checkpoints
from tests.integration.command import finish, start

PROGRAM = """
import ties_dist.methods
ties_dist.methods.__path__.append({folder!r})
"""


def test_a_method_is_one_file(merge_job: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "methods").mkdir()
    shutil.copy(new_method.__file__, tmp_path / "methods" / "largest.py")
    added = PROGRAM.format(folder=str(tmp_path / "methods"))
    models = [{"w": torch.tensor(v)} for v in ([0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [-3.0, 2.5, 2.0])]
    recipe = merge_job(models, method="largest", parameters={"lambda": 0.5})
    listed = finish(start("methods", "--json", code=added))
    assert "largest" in [each["name"] for each in json.loads(listed.out)]
    done = finish(start("merge", recipe, tmp_path / "out", "--json", code=added))
    assert done.status == 0, done.err
    assert json.loads(done.out)["kernel"] == "compiled"
    # Deltas (1, -1, 0) and (-3, 1.5, 0): the largest are -3, 1.5 and 0, and half of them is added.
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [-1.5, 1.75, 2.0]
    without = finish(start("plan", recipe))
    assert without.status == 2 and "largest" in without.err
