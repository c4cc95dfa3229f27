"""What version 0.1.0 left in OUT (`make_older.py`) is known: checked where that can be, else named with a remedy."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest

import ties_dist
from tests.integration.command import run
from ties_dist.engine.verify import verify
from ties_dist.output.status import status
from ties_dist.planning.options import RunOptions
from ties_dist.progress import Silent
from ties_dist.storage.local_place import LocalPlace

ARCHIVE = Path(__file__).with_name("older.zip")
DIGEST = "42aa666d3daac7352ce306d6833f02fe"
"""As that version printed it; its models have no parameter with two names, so that their merge is the same today."""
VERSIONS = r"another version of ties_dist \(semantics 1, this one has 2\)"


@pytest.fixture
def older(tmp_path: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    record = json.loads(next(tmp_path.glob("half/.ties_dist/*/plan.json")).read_text())
    for name, (_, changed) in record["stamps"].items():
        os.utime(tmp_path / name, ns=(changed, changed))
    return tmp_path


def test_a_finished_output_is_verified_but_for_the_sample(older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(LocalPlace(older / "done")).output_digest == DIGEST
    assert verify(LocalPlace(older / "done"), RunOptions(), sample=0.0, progress=Silent()).blocks == 4
    ended = run(capsys, "verify", older / "done")
    assert ended.status == 0
    assert "no sample was merged again:" in ended.out
    assert "another version of ties_dist (semantics 1, this one has 2)" in ended.out
    assert "counted a parameter that is stored under several names" in ended.out
    assert "An adapter on the embedding" not in ended.out
    with pytest.raises(ties_dist.CheckpointError, match=f"merged by {VERSIONS}"):
        verify(LocalPlace(older / "done"), RunOptions(), sample=1.0, progress=Silent())


def test_what_may_be_wrong_is_told_by_what_was_merged(older: Path) -> None:
    record = older / "done" / ".ties_dist" / "manifest.json"
    content = json.loads(record.read_text())
    content["origin"] |= {"thresholds": [], "models": {"base": ["../base"], "x": ["../base", "../x"]}}
    record.write_text(json.dumps(content))
    (doubt,) = verify(LocalPlace(older / "done"), RunOptions(), sample=0.0, progress=Silent()).doubts
    assert doubt.startswith("An adapter on the embedding or head of a base that ties them moved both (x)")
    content["origin"]["models"] = {"base": ["../base"]}
    record.write_text(json.dumps(content))
    assert verify(LocalPlace(older / "done"), RunOptions(), sample=0.0, progress=Silent()).doubts == ()


def test_damage_of_a_finished_output_is_found(older: Path) -> None:
    shard = older / "done" / "model-00003-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ties_dist.errors.DamageError, match=r"model-00003-of-00004.safetensors: MiB 0 .* is damaged"):
        verify(LocalPlace(older / "done"), RunOptions(), sample=0.0, progress=Silent())


def test_merging_over_a_finished_output_names_the_version_and_what_to_do(older: Path) -> None:
    with pytest.raises(ties_dist.OutputError, match=rf"a finished model of {VERSIONS}\. .*replace it with --overwrite"):
        ties_dist.merge(older / "recipe.yml", older / "done")
    report = ties_dist.merge(older / "recipe.yml", older / "done", overwrite=True)
    assert report.output_digest == DIGEST
    found = verify(LocalPlace(older / "done"), RunOptions(), sample=1.0, progress=Silent())
    assert (found.remerged_units, found.units, found.doubts) == (4, 4, ())


@pytest.mark.parametrize(("out", "durable", "remedy"), [("half", 2, "--fresh"), ("named", 4, "--fresh --overwrite")])
def test_an_unfinished_merge_is_told_and_named_with_what_to_do(
    out: str, durable: int, remedy: str, older: Path
) -> None:
    told = status(LocalPlace(older / out))
    assert (told.state, told.durable_bytes, told.total_bytes) == ("interrupted", durable * 5296, 4 * 5296)
    finish = rf"an unfinished merge of {VERSIONS}\. Finish it with that version, .*discard it with {remedy}\."
    with pytest.raises(ties_dist.OutputError, match=finish):
        ties_dist.merge(older / "recipe.yml", older / out)
    report = ties_dist.merge(older / "recipe.yml", older / out, fresh=True, overwrite=out == "named")
    assert (report.resumed_units, report.units, report.output_digest) == (0, 4, DIGEST)
    assert [p for p in (older / out / ".ties_dist").iterdir() if p.is_dir()] == []
