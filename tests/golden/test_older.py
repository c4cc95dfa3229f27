"""What version 0.1.0 left in OUT (`make_older.py`) is verified, told, and gone on with."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

import ties_dist
from tests.loading import version_of
from ties_dist.engine.verify import verify
from ties_dist.output.status import status
from ties_dist.planning.options import RunOptions
from ties_dist.progress import Silent
from ties_dist.storage.local_place import LocalPlace

ARCHIVE = Path(__file__).with_name("older.zip")
DIGEST = "42aa666d3daac7352ce306d6833f02fe"
"""As that version printed it."""


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    record = json.loads(next(tmp_path.glob("half/.ties_dist/*/plan.json")).read_text())
    for name, (_, changed) in record["stamps"].items():
        os.utime(tmp_path / name, ns=(changed, changed))
    return tmp_path


def test_a_finished_output_is_verified_and_already_done(older: Path) -> None:
    found = verify(LocalPlace(older / "done"), RunOptions(), sample=1.0, progress=Silent())
    assert (found.blocks, found.remerged_units, found.units) == (4, 4, 4)
    assert status(LocalPlace(older / "done")).output_digest == DIGEST
    report = ties_dist.merge(older / "recipe.yml", older / "done")
    assert report.already_done and report.output_digest == DIGEST


@pytest.mark.parametrize(("out", "resumed"), [("half", 2), ("named", 4)])
def test_an_unfinished_merge_is_resumed_to_the_same_bytes(out: str, resumed: int, older: Path) -> None:
    told = status(LocalPlace(older / out))
    assert (told.state, told.durable_bytes, told.total_bytes) == ("interrupted", resumed * 5296, 4 * 5296)
    report = ties_dist.merge(older / "recipe.yml", older / out)
    assert (report.resumed_units, report.units, report.output_digest) == (resumed, 4, DIGEST)
    made, expected = version_of(older / out), version_of(older / "done")
    assert made == {**expected, "README.md": made["README.md"]}  # its words may change
    assert [p for p in (older / out / ".ties_dist").iterdir() if p.is_dir()] == []


def test_an_input_that_changed_since_is_told(older: Path) -> None:
    os.utime(older / "expert-1" / "model-00002-of-00004.safetensors", ns=(0, 0))
    with pytest.raises(ties_dist.CheckpointError, match=r"(?s)made before these inputs.*expert-1/model-00002"):
        ties_dist.merge(older / "recipe.yml", older / "done")
    with pytest.raises(ties_dist.CheckpointError, match=r"(?s)inputs changed since.*expert-1/model-00002"):
        ties_dist.merge(older / "recipe.yml", older / "half")
