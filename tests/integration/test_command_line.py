"""The command line as a contract: names, exit statuses, what goes to which stream, and what the other commands say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

import ties_dist
from tests import oracle
from tests.conftest import Checkpoints, random_models, write_checkpoint
from tests.integration.command import SHAPES, Outcome, contents, finish, readable_files, run, start
from ties_dist.output.lock import RunLock
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.local import LocalWriter
from ties_dist.storage.local_place import LocalPlace

Model = dict[str, Tensor]
Run = Callable[..., Outcome]
NUMEL = 40 * 16 + 2 * 32 * 32 + 16

REPORTED = {
    *("method", "semantics", "experts", "conflict_fraction", "elements", "bytes_read", "bytes_written", "kernel"),
    *("elapsed_seconds", "peak_rss_bytes", "projected_bytes", "units", "resumed_units", "executor", "output_digest"),
}
REPORTED_OF_AN_EXPERT = {"name", "density", "kept_fraction", "tie_fraction", "threshold"}
"""What users may rely on in the output of `--json`."""


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *arguments: run(capsys, *arguments)


def small_models() -> list[Model]:
    return random_models(SHAPES, experts=2)


def large_models() -> list[Model]:
    """2.5 MiB and a header: four blocks of 1 MiB each have something to be found in."""
    return random_models({"a.weight": (512, 640), "b.weight": (512, 640)}, experts=2)


# -- help and versions ------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_help_answers_within_a_second_and_without_torch() -> None:
    took = []
    for _ in range(3):  # the best of three: the machine may be busy
        began = time.monotonic()
        shown = subprocess.run(
            [sys.executable, "-m", "ties_dist", "--help"], capture_output=True, text=True, check=True
        )
        took.append(time.monotonic() - began)
        assert all(command in shown.stdout for command in ("merge", "plan", "verify", "inspect"))
        if took[-1] < 1:
            break
    assert min(took) < 1

    code = (
        "import sys\nfrom ties_dist.cli.commands import main\n"
        "for words in (['--help'], ['merge', '--help'], ['plan', '--help'], ['--version']):\n"
        "    try: main(words)\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "heavy = {'torch', 'numpy', 'zarr', 'pydantic', 'ray', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    checked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "merge",
            "--semantics --executor --threads --memory-budget --unit-size --device --read-backend --max-shard-size "
            "--cache-dir --fresh --overwrite --wait --json -v -q",
        ),
        ("plan", "--semantics --sample --json"),
        ("verify", "--sample"),
        ("analyze", "--out --density --cache-dir --json -v -q"),
        ("inspect", "--json"),
    ],
)
def test_every_option_of_the_contract_is_in_the_help(command: str, options: str, cli: Run) -> None:
    shown = cli(command, "--help")
    assert shown.status == 0
    for option in options.split():
        assert re.search(rf"(^|[\s,]){option}\b", shown.out), option


@pytest.mark.parametrize("words", [("merg",), ("merge",), ("merge", "recipe.yml"), ("inspect",)], ids=" ".join)
def test_a_wrong_call_exits_2_with_a_hint(words: tuple[str, ...], cli: Run) -> None:
    ended = cli(*words)
    assert (ended.status, ended.out) == (2, "")
    assert "Usage: ties-dist" in ended.err and "--help" in ended.err and "Error:" in ended.err


# -- merge ------------------------------------------------------------------------------------------------------------


def test_json_is_one_document_with_every_promised_field(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = small_models()
    ended = cli("merge", merge_job(models), tmp_path / "out", "--json", "-v")
    assert ended.status == 0
    report = ended.document
    assert report.keys() >= REPORTED
    assert all(expert.keys() >= REPORTED_OF_AN_EXPERT for expert in report["experts"])
    assert json.loads((tmp_path / "out" / ".ties_dist" / "report.json").read_text()) == report

    arrays = [{name: oracle.from_torch(t) for name, t in model.items()} for model in models]
    expected = oracle.ties(arrays[0], arrays[1:], density=0.2).statistics
    assert (report["method"], report["semantics"], report["executor"]) == ("ties", "paper", "local")
    assert report["elements"] == NUMEL == expected.elements
    assert report["conflict_fraction"] == expected.conflicts / NUMEL
    for said, counted, name in zip(report["experts"], expected.experts, ("expert-0", "expert-1"), strict=True):
        assert (said["name"], said["density"], said["threshold"]) == (name, 0.2, counted.threshold)
        assert said["kept_fraction"] == counted.kept_nonzero / NUMEL
        assert said["tie_fraction"] == counted.ties / NUMEL
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert report["bytes_written"] == sum(file.stat().st_size for file in files)
    assert report["bytes_read"] >= 2 * 3 * 4 * NUMEL  # a scan and a merge, of three models
    assert report["peak_rss_bytes"] > 50 << 20 and report["projected_bytes"] > 50 << 20
    assert (report["units"], report["resumed_units"], report["kernel"]) == (1, 0, "compiled")


def test_notes_and_progress_go_to_standard_error(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    ended = cli("merge", merge_job(small_models()), tmp_path / "out")
    assert "No semantics named, so `paper`" in ended.err and "--semantics mergekit" in ended.err
    assert "note:" not in ended.out
    assert ended.out.index("density asked") < ended.out.index("digest")


def test_quiet_says_nothing(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    ended = cli("merge", merge_job(small_models()), tmp_path / "out", "-q")
    assert (ended.status, ended.out, ended.err) == (0, "", "")


def test_the_summary_leads_with_density_asked_against_share_kept(
    merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    base = {"w": torch.zeros(10)}
    expert = {"w": torch.tensor([3.0, 2, 2, 2, 2, 1, 1, 0, 0, 0])}  # k = 2: the third largest is 2, and ties with 4
    ended = cli("merge", merge_job([base, expert], parameters={"density": 0.2}), tmp_path / "out")
    row = next(line for line in ended.out.splitlines() if "expert-0" in line)
    assert [cell.strip() for cell in row.strip("│┃ ").split("│")] == [
        *("expert-0", "1", "20.0%", "50.00%", "40.00%", "2"),
    ]
    assert "density 0.2 asked, 50.0% kept, because 40.0% of its entries equal the threshold" in ended.out
    assert "`tie_policy: exact_k` would keep 20.0%" in ended.out


def test_ties_within_a_point_of_the_density_are_no_matter(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    values = torch.arange(1000, dtype=torch.float32)
    values[795:804] = 799.0  # k = 200: 196 are larger; nine ties keep 205, half a point too many
    recipe = merge_job([{"w": torch.zeros(1000)}, {"w": values}], parameters={"density": 0.2})
    merged = cli("merge", recipe, tmp_path / "out")
    assert "20.50%" in merged.out and "exact_k" not in merged.out
    assert "exact_k" not in cli("analyze", recipe).out


def test_the_status_of_what_does_not_exist_is_an_error(tmp_path: Path, cli: Run) -> None:
    ended = cli("status", tmp_path / "nowhere")
    assert (ended.status, ended.err) == (
        2,
        f"OutputError: {tmp_path}/nowhere does not exist: nothing was merged there.\n",
    )


def test_units_redone_for_cancellations_are_told_to_who_asks(
    merge_job: Checkpoints, tmp_path: Path, cli: Run, caplog: pytest.LogCaptureFixture
) -> None:
    base = {"w": torch.zeros(8)}
    experts = [
        {"w": torch.tensor([1.0, -2, -3, -4, -5, -6, -7, -8])},
        {"w": torch.tensor([-1.0, -2, -3, -4, -5, -6, -7, -8])},
    ]
    recipe = merge_job([base, *experts], parameters={"density": 1.0})
    options = ("--threshold-pass", "scan", "--kernel", "eager")
    for verbose, told in ((), False), (("-v",), True):
        caplog.clear()
        assert cli("merge", recipe, tmp_path / f"out{told}", *options, *verbose).status == 0
        assert ("exact cancellations" in caplog.text) == told


def test_names_with_brackets_are_printed_as_they_are(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe = merge_job(small_models())
    (tmp_path / "expert-0").rename(tmp_path / "[bold]run[")
    recipe.write_text(recipe.read_text().replace("expert-0", "[bold]run["))
    ended = cli("merge", recipe, tmp_path / "[green]out:smile:")
    assert ended.status == 0
    assert "[bold]run[" in ended.out and "[green]out:smile:" in ended.out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_a_signal_stops_the_merge_and_the_same_command_resumes(
    number: signal.Signals, merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Run
) -> None:
    shapes = {"a.weight": (2048, 1280), "b.weight": (2048, 1280)}  # 20 MiB: more units than are under way at once
    recipe, out = merge_job(random_models(shapes, experts=2)), tmp_path / "out"
    expected = cli("merge", recipe, tmp_path / "undisturbed", "--json").document["output_digest"]
    write = LocalWriter.write

    def signalled(self: LocalWriter, name: str, start: int, block: memoryview) -> None:
        write(self, name, start, block)
        if start == 0:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(LocalWriter, "write", signalled)
        stopped = cli("merge", recipe, out, "--unit-size", "1MiB", "--json")
    assert stopped.status == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    assert stopped.out == ""
    assert "Run the same command again to resume" in stopped.err and "Traceback" not in stopped.err
    assert readable_files(out) == []

    resumed = cli("merge", recipe, out, "--unit-size", "1MiB", "--json").document
    assert resumed["output_digest"] == expected
    assert 1 <= resumed["resumed_units"] < resumed["units"]


CTRL_C = """
import os, signal
from ties_dist.storage.local import LocalWriter
write = LocalWriter.write
def stop(self, name, start, block):
    write(self, name, start, block)
    if start == 0:
        os.kill(os.getpid(), signal.SIGINT)
LocalWriter.write = stop
"""
"""Ctrl-C after the first range."""


@pytest.mark.slow
def test_a_process_stopped_by_ctrl_c_exits_130(merge_job: Checkpoints, tmp_path: Path) -> None:
    ended = finish(start("merge", merge_job(large_models()), tmp_path / "out", "--unit-size", "1MiB", code=CTRL_C))
    assert (ended.status, ended.out) == (130, "")
    assert "resume" in ended.err and "Traceback" not in ended.err


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_says_what_merge_will_do_and_touches_nothing(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = small_models()
    for model in models:
        model["position_ids"] = torch.arange(7)
    recipe = merge_job(models, shards=2)
    before = contents(tmp_path)
    report = cli("plan", recipe, tmp_path / "new" / "out", "--json").document
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()

    assert (report["method"], report["semantics"]) == ("ties", "paper")
    assert (report["tensors"], report["merged_tensors"], report["elements"]) == (5, 4, NUMEL)
    assert report["experts"] == ["expert-0", "expert-1"]
    assert (report["shards"], report["units"]) == (2, 2)
    once = 3 * 4 * NUMEL + 7 * 8  # three models of float32, the base's position ids
    best, worst = report["passes"]
    assert best == 1 and worst >= 4  # two scans, the merge, and all units again for the majority sign
    assert report["read_bytes"][0] == once
    assert worst * once < report["read_bytes"][1] <= (worst + 1) * once  # and a sample
    assert 4 * NUMEL + 7 * 8 < report["write_bytes"] < 4 * NUMEL + 7 * 8 + 3 * 4096
    assert report["disk_needed_bytes"] == report["write_bytes"]
    assert 0 < report["disk_free_bytes"] <= shutil.disk_usage(tmp_path).total
    assert report["projected_bytes"] > 50 << 20
    assert report["memory_budget"] == 2 << 30
    assert report["sample"] is None

    assert cli("plan", recipe, "--json").document["disk_free_bytes"] is None


def test_plan_and_merge_agree(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe = merge_job(large_models())
    planned = cli("plan", recipe, "--unit-size", "1MiB", "--json").document
    merged = cli("merge", recipe, tmp_path / "out", "--unit-size", "1MiB", "--json").document
    for name in ("fingerprint", "units", "elements", "projected_bytes", "unit_bytes"):
        assert merged[name] == planned[name], name
    assert planned["read_bytes"][0] <= merged["bytes_read"] <= planned["read_bytes"][1]
    assert merged["bytes_written"] == planned["write_bytes"]


def test_plan_says_what_out_holds(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    recipe, out = merge_job(small_models()), tmp_path / "out"

    def held() -> str:
        return str(cli("plan", recipe, out, "--json").document["out_holds"])

    assert held() == "nothing"
    cli("merge", recipe, out)
    assert held() == "this merge, finished"
    recipe.write_text(recipe.read_text().replace('"density": 0.2', '"density": 0.3'))
    assert cli("plan", recipe, out, "--overwrite", "--json").document["out_holds"] == "another merge, finished"
    (tmp_path / "notes.txt").touch()
    refused = cli("plan", recipe, tmp_path)
    assert (refused.status, "lies in" in refused.err or "not written by" in refused.err) == (2, True)


def test_plan_is_readable(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    ended = cli("plan", merge_job(small_models()), tmp_path / "out", "--sample")
    assert ended.status == 0
    for words in ("ties (paper)", "expert-0, expert-1", f"{NUMEL:,}", "budget 2GiB", "needed", "free", "predicted"):
        assert words in ended.out
    assert "No semantics named, so `paper`" in ended.err


def test_a_sample_predicts_thresholds_and_kept_shares(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = large_models()
    report = cli("plan", merge_job(models, parameters={"density": 0.3}), "--sample", "--json").document
    arrays = [{name: oracle.from_torch(t) for name, t in model.items()} for model in models]
    exact = oracle.ties(arrays[0], arrays[1:], density=0.3).statistics
    for predicted, expert in zip(report["sample"]["thresholds"], exact.experts, strict=True):
        assert predicted == pytest.approx(expert.threshold, rel=0.02)
    assert report["sample"]["kept_fractions"] == [pytest.approx(0.3, abs=0.01)] * 2
    assert report["sample"]["zero_fractions"] == [pytest.approx(0.0, abs=0.01)] * 2
    assert report["sample"]["seconds"] > 0


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_method_without_a_trim_is_planned_in_one_read(method: str, merge_job: Checkpoints, cli: Run) -> None:
    recipe = merge_job(small_models(), method=method)
    report = cli("plan", recipe, "--sample", "--json").document
    assert (report["passes"], report["semantics"]) == ([1, 1], "paper")
    assert cli("plan", recipe, "--sample").status == 0


def test_plan_refuses_what_merge_refuses(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    models = small_models()
    models[1]["norm.weight"] = torch.zeros(4)
    ended = cli("plan", merge_job(models), tmp_path / "out", "--json")
    assert (ended.status, ended.out) == (2, "")
    assert "norm.weight" in ended.err


# -- verify -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> Path:
    recipe = merge_job(large_models())
    assert cli("merge", recipe, tmp_path / "out", "--unit-size", "1MiB", "-q").status == 0
    return tmp_path / "out"


def flip(file: Path, position: int) -> None:
    with open(file, "r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1]))


def test_verify_reads_every_block_and_merges_a_sample_again(merged: Path, cli: Run) -> None:
    report = cli("verify", merged, "--sample", "1", "--json").document
    size = (merged / "model.safetensors").stat().st_size
    assert size == 4096 + 2 * 512 * 640 * 4
    assert (report["blocks"], report["bytes_read"]) == (3, size)
    assert report["remerged_units"] == report["units"] == 1
    assert report["skipped"] is None
    shown = cli("verify", merged)
    assert shown.status == 0 and "3 blocks" in shown.out and "the same bytes" in shown.out


def test_verify_finds_models_that_the_recipe_named_relative_to_itself(
    merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Run
) -> None:
    job, elsewhere = tmp_path / "job", tmp_path / "elsewhere"
    elsewhere.mkdir()
    recipe = merge_job([*small_models()], folder=job, options={"elect_from": "expert-1"})
    assert cli("merge", recipe, tmp_path / "out").status == 0
    monkeypatch.chdir(elsewhere)
    assert cli("verify", tmp_path / "out", "--sample", "1", "--json").document["remerged_units"] == 1


@pytest.mark.parametrize("block", [0, 1, 2])
def test_verify_names_the_damaged_megabyte(block: int, merged: Path, cli: Run) -> None:
    flip(merged / "model.safetensors", block * BLOCK_BYTES + 5000)
    ended = cli("verify", merged, "--json")
    assert (ended.status, ended.out) == (2, "")
    assert f"model.safetensors: MiB {block} (bytes from {block * BLOCK_BYTES:,}) is damaged" in ended.err
    assert ended.err.count("is damaged") == 1


def test_verify_says_what_is_missing_or_cut_short(merge_job: Checkpoints, tmp_path: Path, cli: Run) -> None:
    assert cli("merge", merge_job(small_models(), shards=2), tmp_path / "out").status == 0
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))
    os.truncate(first, 5000)
    second.unlink()
    ended = cli("verify", tmp_path / "out")
    assert ended.status == 2
    assert f"{first.name}: 5,000 bytes, expected" in ended.err and f"{second.name}: missing" in ended.err


def test_a_sample_finds_bytes_that_the_recipe_does_not_give(merged: Path, cli: Run) -> None:
    """The manifest is made to agree with the damage: only merging again can tell."""
    file, manifest = merged / "model.safetensors", merged / ".ties_dist" / "manifest.json"
    flip(file, BLOCK_BYTES + 7)
    document = json.loads(manifest.read_text())
    content = file.read_bytes()
    document["shards"]["model.safetensors"]["blocks"] = [
        xxh3_128_hexdigest(content[start : start + BLOCK_BYTES]) for start in range(0, len(content), BLOCK_BYTES)
    ]
    manifest.write_text(json.dumps(document))
    assert cli("verify", merged, "--sample", "0").status == 0
    ended = cli("verify", merged, "--sample", "1")
    assert ended.status == 2
    assert "model.safetensors, bytes 0 to" in ended.err and "differ from a new merge" in ended.err


def test_verify_without_the_inputs_says_that_no_sample_was_merged(merged: Path, tmp_path: Path, cli: Run) -> None:
    shutil.rmtree(tmp_path / "expert-1")
    ended = cli("verify", merged)
    assert ended.status == 0
    assert "3 blocks" in ended.out and "no sample was merged again" in ended.out and "expert-1" in ended.out
    insisting = cli("verify", merged, "--sample", "1")
    assert insisting.status == 2 and "expert-1' is not there" in insisting.err


def test_verify_tells_changed_inputs_from_a_damaged_output(merged: Path, tmp_path: Path, cli: Run) -> None:
    write_checkpoint(
        tmp_path / "expert-1", random_models({"a.weight": (512, 640), "b.weight": (512, 640)}, experts=0)[0]
    )
    ended = cli("verify", merged)
    assert ended.status == 0
    assert "no sample was merged again: the inputs" in ended.out
    assert "are not what they were" in cli("verify", merged, "--sample", "1").err


def test_sha256_sums_are_those_of_the_files(merged: Path, cli: Run) -> None:
    expected = hashlib.sha256((merged / "model.safetensors").read_bytes()).hexdigest()
    assert f"{expected}  model.safetensors" in cli("verify", merged, "--sha256").out
    assert cli("verify", merged, "--sha256", "--json").document["sha256"] == {"model.safetensors": expected}


@pytest.mark.parametrize("manifest", [None, "{", "[]", "{}"], ids=["absent", "torn", "a_list", "empty"])
def test_verify_refuses_what_is_not_a_finished_output(
    manifest: str | None, merge_job: Checkpoints, tmp_path: Path, cli: Run
) -> None:
    folder = merge_job(small_models()).parent / "base"
    if manifest is not None:
        (folder / ".ties_dist").mkdir()
        (folder / ".ties_dist" / "manifest.json").write_text(manifest)
    ended = cli("verify", folder, "--json")
    assert (ended.status, ended.out) == (2, "")
    assert "is not a finished output of ties_dist" in ended.err


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_says_what_is_in_a_checkpoint(tmp_path: Path, cli: Run) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(3, 5, dtype=torch.bfloat16),
        "position_ids": torch.arange(7),
        "scale": torch.tensor(1.0),
    }
    folder = write_checkpoint(tmp_path / "model", tensors, shards=2)
    found = cli("inspect", folder, "--json").document
    assert found["name"] == "model"
    assert found["elements"] == {"BF16": 15, "I64": 7, "F32": 1}
    assert found["bytes"] == 15 * 2 + 7 * 8 + 4
    assert found["tensors"]["model.embed_tokens.weight"] == {
        "dtype": "BF16",
        "shape": [3, 5],
        "file": "model-00001-of-00002.safetensors",
    }
    assert found["shards"] == {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}

    shown = cli("inspect", folder).out
    for words in ("model.embed_tokens.weight", "3 x 5", "scalar", "BF16", "3 tensors in 2 shards"):
        assert words in shown
    one = cli("inspect", folder / "model-00002-of-00002.safetensors", "--json").document
    assert sorted(one["tensors"]) == ["position_ids", "scale"]


def test_inspect_does_not_cut_long_names(tmp_path: Path, cli: Run) -> None:
    name = "model.layers.31.block_sparse_moe.experts.7.feed_forward.down_projection.weight_of_the_last_expert"
    folder = write_checkpoint(tmp_path / "model", {name: torch.zeros(2)})
    assert name in cli("inspect", folder).out


@pytest.mark.parametrize("what", ["nothing", "empty", "text"])
def test_inspect_refuses_what_is_no_checkpoint(what: str, tmp_path: Path, cli: Run) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    ended = cli("inspect", tmp_path / what, "--json")
    assert (ended.status, ended.out) == (2, "")
    assert "CheckpointError" in ended.err and what in ended.err


def test_progress_lines_reach_a_pipe(merge_job: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Plain lines where there is no terminal: one a phase, with bytes, rate and seconds."""
    with caplog.at_level("INFO", logger="ties_dist"):
        ties_dist.merge(merge_job(small_models()), tmp_path / "out")
    assert any(re.match(r"merge: \S+iB, \S+iB/s, \S+ s$", record.getMessage()) for record in caplog.records)


def test_a_waiting_merge_ends_on_ctrl_c(
    merge_job: Checkpoints, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = merge_job(small_models()), tmp_path / "out"
    lock = RunLock(LocalPlace(out))
    lock.acquire()
    try:
        waking = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        waking.start()
        ended = cli("merge", recipe, out, "--wait")
        waking.join()
    finally:
        lock.release()
    assert ended.status == 130
    assert "stopped while waiting" in ended.err


def test_notes_and_errors_are_lines_of_the_log_where_that_is_structured(merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models(SHAPES, experts=2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    told = finish(start("--log-format", "json", "merge", recipe, tmp_path / "out"))
    assert told.status == 2
    lines = [json.loads(line) for line in told.err.splitlines()]
    assert "note: No semantics named" in lines[0]["message"]
    assert lines[-1]["level"] == "error"
    assert lines[-1]["message"].startswith("OutputError: OUT")


STUMBLING = """
from ties_dist.worker.merging import MergeStep

def stumble(step, task, loaded):
    return {}["no such number"]

MergeStep.compute = stumble
"""


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_bug_ends_with_status_1_its_traceback_and_where_it_was(
    log_format: str, merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job(small_models())
    told = finish(start("--log-format", log_format, "merge", recipe, tmp_path / "out", "-q", code=STUMBLING))
    assert (told.status, told.out) == (1, "")
    message = "BugError: KeyError: 'no such number', at model.safetensors, bytes 0 to "
    if log_format == "text":
        assert told.err.count("Traceback") == told.err.count("in stumble") == 1
        assert told.err.splitlines()[-1].startswith(message)
        return
    (line,) = map(json.loads, told.err.splitlines())
    assert line["message"].startswith(message)
    assert line["exception"].count("in stumble") == 1
    assert line["item"].startswith("model.safetensors, bytes 0 to ")
