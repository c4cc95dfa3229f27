"""What a resumed merge takes over, what it does again, and what it is not fooled by."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ties_dist
from tests.drills.jobs import late_majority, write_job
from tests.loading import journals_of
from ties_dist.engine import run as engine
from ties_dist.errors import CheckpointError, ClusterError, LockedError, OutputError, PlanError, StoppedError
from ties_dist.executors.local import LocalExecutor
from ties_dist.output import resume
from ties_dist.output.journal import Journal
from ties_dist.output.lock import RunLock
from ties_dist.output.report import MergeReport
from ties_dist.planning.prepare import prepare
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.local import LocalWriter, copy_sparse
from ties_dist.thresholds import Histogram, Window
from ties_dist.values.items import MergeResult, MergeTask, WorkItem
from ties_dist.worker.merging import Worker
from ties_dist.worker.site import Site

MIB = 1 << 20
ELEMENTS = 9 * 64 * 4608
"""Of bfloat16: 5.1 MiB of output, a few units of 1 MiB."""


@pytest.fixture(scope="module")
def models() -> list[dict[str, torch.Tensor]]:
    return late_majority(ELEMENTS)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit is journalled as soon as it is written; a small sample is enough, and does not tell the majority.

    No write but those of units, which are counted here.
    """
    monkeypatch.setattr("ties_dist.output.resume.rehearse", lambda *_, **__: None)
    monkeypatch.setattr("ties_dist.engine.passes.SIGNS_FROM", 1e9)
    monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", -1.0)
    monkeypatch.setattr("ties_dist.planning.sample.SAMPLE_SLICES", 16)


@contextmanager
def calling(owner: Any, name: str, act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the number of the call, from 1, before a method of the product."""
    method, calls, lock = getattr(owner, name), [0], threading.Lock()

    def called(*arguments: Any, **options: Any) -> Any:
        with lock:
            calls[0] += 1
            number = calls[0]
        act(number)
        return method(*arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, name, called)
        yield


def merge(recipe: Path, out: Path, **options: Any) -> MergeReport:
    return ties_dist.merge(recipe, out, **{"unit_size": MIB, "threads": 2, "kernel": "eager", **options})


def interrupt(
    recipe: Path, out: Path, *, after: int, at: tuple[Any, str] = (LocalWriter, "write"), **options: Any
) -> int:
    """Stop a merge where a method is called for the `after`-th time. Returns how many units are in its journal."""
    stop = threading.Event()
    with (
        calling(*at, lambda number: stop.set() if number >= after else None),
        pytest.raises(StoppedError, match="Run the same command again to resume"),
    ):
        merge(recipe, out, stop=stop, **options)
    return sum(path.read_text().count('"merged"') for path in out.glob(".ties_dist/*/journal-*"))


def digest(recipe: Path) -> str:
    """Of an undisturbed merge."""
    return merge(recipe, recipe.parent / "undisturbed").output_digest


def part(out: Path) -> Path:
    return next(out.glob(".ties_dist/*/parts/*"))


def flip_byte(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


# -- what is taken over ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"trim_scope": "tensor"}, {"tie_policy": "exact_k"}], ids=str)
def test_every_journalled_unit_is_taken_over(
    options: dict[str, str], models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out = write_job(tmp_path, models, options=options), tmp_path / "out"
    journalled = interrupt(recipe, out, after=3)
    report = merge(recipe, out)
    assert report.resumed_units == journalled >= 2
    assert report.thresholds_from == ("scan" if "trim_scope" in options else "journal")
    assert report.output_digest == digest(recipe)


@pytest.mark.parametrize(
    "options",
    [
        {"unit_size": 2 * MIB},
        {"unit_size": 64 * MIB},
        {"threads": 1, "read_backend": "pread"},
        {"memory_budget": 80 * MIB, "unit_size": None},
        pytest.param({"kernel": "compiled"}, marks=pytest.mark.slow),
        {"trust_journal": True},
    ],
    ids=str,
)
def test_resuming_with_other_resources_gives_the_same_bytes(
    options: dict[str, Any], models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out = write_job(tmp_path, models, shards=2), tmp_path / "out"
    journalled = interrupt(recipe, out, after=4)
    report = merge(recipe, out, **options)
    assert report.resumed_units == journalled
    assert report.output_digest == digest(recipe)


def test_a_chain_of_interruptions_loses_nothing(tmp_path: Path) -> None:
    recipe, out = write_job(tmp_path, late_majority(6 * ELEMENTS)), tmp_path / "out"
    sizes = [MIB, 3 * MIB, MIB, 2 * MIB]
    journalled = [interrupt(recipe, out, after=1, unit_size=size) for size in sizes]
    assert journalled == sorted(journalled) and journalled[0] > 0
    report = merge(recipe, out, unit_size=5 * MIB)
    assert report.resumed_units == journalled[-1]
    assert report.output_digest == digest(recipe)
    assert merge(recipe, out).already_done


def test_an_interrupted_redo_is_resumed(models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    undisturbed = merge(recipe, tmp_path / "undisturbed")
    assert undisturbed.majority_sign == -1 and undisturbed.redone_units > 2  # what the data are made for
    journalled = interrupt(recipe, out, after=undisturbed.units + 2)
    assert journalled > undisturbed.units
    report = merge(recipe, out)
    assert report.output_digest == undisturbed.output_digest
    assert 0 < report.redone_units < undisturbed.redone_units


@pytest.mark.parametrize("unit_size", [MIB, 2 * MIB])
def test_an_interrupted_scan_is_resumed_unit_for_unit(
    unit_size: int, models: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    monkeypatch.setattr("ties_dist.storage.snapshot.SNAPSHOT_SECONDS", -1.0)
    interrupt(recipe, out, after=3, at=(Worker, "observe"), threshold_pass="scan")
    observed: list[int] = []
    with calling(Worker, "observe", observed.append):
        report = merge(recipe, out, unit_size=unit_size, threshold_pass="scan", cache_dir=tmp_path / "empty")
    assert report.thresholds_from == "scan"
    assert len(observed) < -(-report.bytes_written // unit_size)
    assert report.output_digest == digest(recipe)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_damaged_counts_of_a_scan_are_counted_again(
    damage: str,
    models: list[dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    monkeypatch.setattr("ties_dist.storage.snapshot.SNAPSHOT_SECONDS", -1.0)
    interrupt(recipe, out, after=3, at=(Worker, "observe"), threshold_pass="scan")
    counts = next(out.glob(".ties_dist/*/scan.npz"))
    size = counts.stat().st_size
    if damage == "flipped":
        flip_byte(counts, size // 2)
    else:
        os.truncate(counts, size // 2 if damage == "cut" else 0)
    report = merge(recipe, out, threshold_pass="scan", cache_dir=tmp_path / "empty")
    assert "what an interrupted run had counted is damaged" in caplog.text
    assert report.output_digest == digest(recipe)


def test_a_line_is_journalled_only_when_its_bytes_are_durable(
    models: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_job(tmp_path, models, shards=2), tmp_path / "out"
    monkeypatch.setattr("ties_dist.engine.passes.COMMIT_SECONDS", 0.05)
    written: set[tuple[str, int]] = set()
    durable: set[tuple[str, int]] = set()
    journalled: list[tuple[str, int]] = []
    write, sync, add = LocalWriter.write, LocalWriter.sync, Journal.merged

    def writing(self: LocalWriter, name: str, start: int, block: memoryview) -> None:
        durable.discard((name, start))
        write(self, name, start, block)
        written.add((name, start))

    def syncing(self: LocalWriter, names: list[str]) -> None:
        before = {unit for unit in written if unit[0] in names}
        sync(self, names)
        durable.update(before)

    def adding(self: Journal, result: MergeResult) -> None:
        assert (result.item.ranges[0].file, result.item.ranges[0].start) in durable
        journalled.append((result.item.ranges[0].file, result.item.ranges[0].start))
        add(self, result)

    monkeypatch.setattr(LocalWriter, "write", writing)
    monkeypatch.setattr(LocalWriter, "sync", syncing)
    monkeypatch.setattr(Journal, "merged", adding)
    report = merge(recipe, out)
    assert len(set(journalled)) == report.units == len(written)
    assert len(journalled) == report.units + report.redone_units


# -- what is not believed ----------------------------------------------------------------------------------------------


def test_a_damaged_block_is_merged_again_and_it_alone(models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    journalled = interrupt(recipe, out, after=4)
    unit = journals_of(part(out).parents[1]).merged[0].item  # two threads: which ones are done is a matter of luck
    flip_byte(part(out), unit.ranges[0].start + 17)
    report = merge(recipe, out)
    assert report.resumed_units == journalled - 1
    assert report.output_digest == digest(recipe)


def test_a_trusted_journal_is_not_read_again(models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    journalled = interrupt(recipe, out, after=4)
    reads: list[int] = []
    with calling(LocalWriter, "read", reads.append):
        report = merge(recipe, out, trust_journal=True)
    assert reads == []
    assert report.resumed_units == journalled
    assert report.output_digest == digest(recipe)


@pytest.mark.parametrize("damage", ["missing", "short"])
@pytest.mark.parametrize("trust", [False, True])
def test_a_part_that_is_gone_is_merged_again_even_where_the_journal_is_trusted(
    damage: str, trust: bool, models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    # As a `--fresh` that was killed while it removed the folder may leave it: laid out anew, the part is all zero.
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    interrupt(recipe, out, after=4)
    if damage == "missing":
        part(out).unlink()
    else:
        os.truncate(part(out), 2 * MIB)
    report = merge(recipe, out, trust_journal=trust)
    assert report.resumed_units == 0
    assert report.output_digest == digest(recipe)


def test_thresholds_of_a_stale_cache_do_not_outlive_the_run_that_took_them(
    models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out, cache = write_job(tmp_path, models), tmp_path / "out", tmp_path / "stale"
    store, plan = StatisticsStore(cache), prepare(recipe).plan
    for i in range(3):  # consistent in itself, but not of these models: every |delta| is 1.0
        wrong = Histogram(Window(0x3F80, 1))
        wrong.coarse[0x3F80] = wrong.fine[0] = plan.elements
        store.save(store.key(plan.base, plan.experts[i], plan.sizes), wrong)
    interrupt(recipe, out, after=4, cache_dir=cache)
    report = merge(recipe, out, cache_dir=cache)
    assert report.mispredicted
    assert report.thresholds_from == "scan"
    assert report.output_digest == digest(recipe)
    assert store.load(store.key(plan.base, plan.experts[0], plan.sizes), plan.elements) is not None  # mended, too
    assert np.count_nonzero(store.load(store.key(plan.base, plan.experts[0], plan.sizes), plan.elements).coarse) > 1  # type: ignore[union-attr]


@pytest.mark.parametrize("after", [2, 8, 12])
def test_a_wrong_prediction_is_repaired_after_an_interruption_in_merge_or_redo(after: int, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    base = {f"layers.{i}.weight": torch.randn(640, 512, generator=draw) for i in range(4)}
    experts = [{n: t + 0.01 * torch.randn(t.shape, generator=draw) for n, t in base.items()} for _ in range(2)]
    recipe, out = write_job(tmp_path, [base, *experts]), tmp_path / "out"  # float32: a prediction is always off
    undisturbed = merge(recipe, tmp_path / "undisturbed", threshold_pass="speculate")
    assert undisturbed.mispredicted and undisturbed.units == undisturbed.redone_units == 6
    interrupt(recipe, out, after=after, threshold_pass="speculate", cache_dir=tmp_path / "other")
    report = merge(recipe, out, threshold_pass="speculate", cache_dir=tmp_path / "other")
    assert report.output_digest == undisturbed.output_digest
    assert [e.threshold for e in report.experts] == [e.threshold for e in undisturbed.experts]


def test_inputs_that_change_while_a_run_waits_for_the_lock_are_not_published(
    models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, file = write_job(tmp_path, models), tmp_path / "expert-1" / "model.safetensors"
    other = file.read_bytes()[:-40_000] + bytes(40_000)
    with (
        calling(RunLock, "acquire", lambda _: file.write_bytes(other)),
        pytest.raises(CheckpointError, match=r"(?s)inputs were changed while they were merged:.*expert-1"),
    ):
        merge(recipe, tmp_path / "out", wait=True)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_inputs_that_are_touched_while_they_are_merged_are_read_again_and_published(
    models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, file = write_job(tmp_path, models), tmp_path / "expert-1" / "model.safetensors"
    undisturbed = merge(recipe, tmp_path / "undisturbed")
    with calling(RunLock, "acquire", lambda _: os.utime(file, ns=(0, 0))):
        assert merge(recipe, tmp_path / "out").output_digest == undisturbed.output_digest


def replaced(file: Path, content: bytes) -> None:
    """By another file, with the size and the time of the one before."""
    stamp = file.stat()
    assert len(content) == stamp.st_size
    beside = file.with_suffix(".new")
    beside.write_bytes(content)
    os.utime(beside, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    beside.replace(file)


@pytest.mark.parametrize("how", ["copied", "touched", "rewritten"])
def test_inputs_of_the_same_content_are_resumed_with_whatever_their_stamps_are(
    how: str, models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out, file = write_job(tmp_path, models), tmp_path / "out", tmp_path / "expert-1" / "model.safetensors"
    undisturbed = merge(recipe, tmp_path / "undisturbed")
    journalled = interrupt(recipe, out, after=4)
    match how:
        case "copied":
            replaced(file, file.read_bytes())
        case "touched":
            os.utime(file, ns=(0, 0))
        case "rewritten":
            file.write_bytes(file.read_bytes())
    report = merge(recipe, out)
    assert (report.resumed_units, report.output_digest) == (journalled, undisturbed.output_digest)


@pytest.mark.parametrize("finished", [False, True])
def test_inputs_replaced_by_others_of_equal_size_time_and_identity_are_no_mixture(
    finished: bool, models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out, file = write_job(tmp_path, models), tmp_path / "out", tmp_path / "expert-1" / "model.safetensors"
    if finished:
        merge(recipe, out)
    else:
        interrupt(recipe, out, after=4)
    before, content = prepare(recipe).plan.fingerprint, file.read_bytes()
    part = len(content) // 20  # of which the pages that name a model may hold none
    for start in range(part, len(content) - part, part):
        replaced(
            file,
            content[:start] + content[start + 1 : start + part] + content[start : start + 1] + content[start + part :],
        )
        if prepare(recipe).plan.fingerprint == before:
            break
    else:
        raise AssertionError("every place is sampled")
    words = "made before these inputs were written again" if finished else "inputs changed since the interrupted merge"
    with pytest.raises(CheckpointError, match=rf"(?s){words}.*expert-1/model.safetensors"):
        merge(recipe, out)
    assert merge(recipe, out, fresh=True, overwrite=True).resumed_units == 0


# -- stopping and losing OUT -------------------------------------------------------------------------------------------


def test_a_stop_while_journalled_blocks_are_read_again_is_obeyed(
    models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    journalled = interrupt(recipe, out, after=4)
    reads: list[int] = []
    with calling(LocalWriter, "read", reads.append):
        assert interrupt(recipe, out, after=2, at=(LocalWriter, "read")) == journalled
    assert 2 <= len(reads) <= journalled  # several threads read
    assert merge(recipe, out).output_digest == digest(recipe)


def test_a_run_that_lost_out_writes_nothing_more(models: list[dict[str, torch.Tensor]], tmp_path: Path) -> None:
    # It was paused; its successor published, or merges the same ranges with a better guess at the majority sign.
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    writes: list[int] = []
    lost = threading.Event()

    def lose(number: int) -> None:
        if number == 3:
            lock = out / ".ties_dist" / "lock"
            lock.write_text(lock.read_text().replace('"token": "', '"token": "another'))
            lost.set()
        elif number > 3:
            assert lost.wait(60)

    pwrite = os.pwrite

    def counted(*arguments: Any) -> int:
        writes.append(1)
        return pwrite(*arguments)

    with (
        calling(LocalWriter, "write", lose),
        pytest.MonkeyPatch.context() as patched,  # no commit before the end: none of its checks helps
        pytest.raises(LockedError, match=r"this run lost .* which goes on with the same work"),
    ):
        patched.setattr(os, "pwrite", counted)
        patched.setattr("ties_dist.engine.passes.COMMIT_SECONDS", 1e9)
        merge(recipe, out)
    assert len(writes) <= 2  # those that began before
    (out / ".ties_dist" / "lock").unlink()
    assert merge(recipe, out).output_digest == digest(recipe)


@pytest.mark.parametrize("error", [PlanError("some nodes cannot do this merge"), ClusterError("no worker was ready")])
def test_a_run_that_lost_out_says_so_whatever_it_finds_missing(
    models: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its workers are asked for while it is paused: they come to a folder that its successor has tidied away."""
    recipe, out = write_job(tmp_path, models), tmp_path / "out"

    def start(executor: LocalExecutor, site: Site) -> None:
        (out / ".ties_dist" / "lock").unlink()
        raise error

    monkeypatch.setattr(LocalExecutor, "start", start)
    with pytest.raises(LockedError, match=r"this run lost .* to another run, which goes on with the same work"):
        merge(recipe, out)


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_what_a_lost_worker_still_has_on_its_way_reaches_no_file_in_use(
    models: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Half of its write has arrived when the merge is done, half after the end; its guess has been corrected since."""
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    units: list[WorkItem] = []
    executors: list[LocalExecutor] = []
    late: list[int] = []

    def start(executor: LocalExecutor, site: Site) -> None:
        executors.append(executor)
        units.extend(site.plan.items())

    def arrive(*_: object) -> None:
        task = MergeTask(item=units[2], cuts={}, majority=1)
        executors[0].usage.unanswered[1] = (task,)
        late.append(os.open(part(out), os.O_WRONLY))
        os.pwrite(late[0], b"merged with a guess that was wrong", units[2].ranges[0].start)
        if ends == "badly":
            raise OutputError("the disk is full.")

    with monkeypatch.context() as patched:
        patched.setattr(LocalExecutor, "start", start)
        patched.setattr(engine, "_check_inputs", arrive)
        if ends == "well":
            merge(recipe, out)
        else:
            with pytest.raises(OutputError, match=r"the disk is full\."):
                merge(recipe, out)
    report = merge(recipe, out)
    os.pwrite(late[0], b"merged with a guess that was wrong", units[2].ranges[0].start)
    os.close(late[0])
    assert report.already_done == (ends == "well")
    assert report.output_digest == digest(recipe)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "undisturbed" / "model.safetensors").read_bytes()


def test_what_a_replaced_run_still_has_on_its_way_reaches_no_file_in_use(
    models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    journalled = interrupt(recipe, out, after=4)
    used = part(out).stat().st_blocks
    late = os.open(part(out), os.O_WRONLY)  # as the replaced run, paused, has it
    (out / ".ties_dist" / "doubt-somebody").touch()  # as the lock leaves it
    kept = interrupt(recipe, out, after=1)
    assert kept >= journalled  # the copy has all that was done
    assert part(out).stat().st_blocks < used + 3 * MIB // 512  # and its holes
    assert not list((out / ".ties_dist").glob("doubt-*"))
    report = merge(recipe, out)
    os.pwrite(late, b"merged with a guess that was wrong", 2 * MIB)
    os.close(late)
    assert report.resumed_units == kept
    assert report.output_digest == digest(recipe)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "undisturbed" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("holes", [[(0, 3)], [(2, 5)], [(1, 2), (3, 4)], [(0, 5)], []], ids=str)
def test_a_sparse_file_is_copied_hole_by_hole(holes: list[tuple[int, int]], tmp_path: Path) -> None:
    source, target, size = tmp_path / "source", tmp_path / "target", 5 * MIB - 77
    content = bytearray(np.random.default_rng(0).bytes(size))
    for start, stop in holes:
        content[start * MIB : min(size, stop * MIB)] = bytes(min(size, stop * MIB) - start * MIB)
    with open(source, "wb") as file:
        file.truncate(size)
        for mib in range(5):
            if not any(start <= mib < stop for start, stop in holes):
                file.seek(mib * MIB)
                file.write(content[mib * MIB : (mib + 1) * MIB])
    copy_sparse(source, target)
    assert target.read_bytes() == content
    assert target.stat().st_blocks == source.stat().st_blocks


# -- publishing resumed ------------------------------------------------------------------------------------------------


def half_published(recipe: Path, out: Path, *, renamed: int) -> None:
    """Leave an OUT whose first shards have their names and whose index is missing."""

    def refuse(number: int) -> None:
        if number > renamed:
            raise OutputError("cannot write OUT: it is full. Mend that and run the same command again: it resumes.")

    class Shards:
        """Only the renames of shards are counted."""

    replace = Path.replace

    def counted(self: Path, target: Path) -> Path:
        if self.parent.name == "parts":
            Shards.count = getattr(Shards, "count", 0) + 1  # type: ignore[attr-defined]
            refuse(Shards.count)  # type: ignore[attr-defined]
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(OutputError, match="run the same command again"):
        patched.setattr(Path, "replace", counted)
        merge(recipe, out)
    assert len(list(out.glob("*.safetensors"))) == renamed
    assert not (out / "model.safetensors.index.json").exists()


def test_a_half_published_model_is_finished_without_merging_anything(
    models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out = write_job(tmp_path, models, shards=3), tmp_path / "out"
    half_published(recipe, out, renamed=2)
    writes: list[int] = []
    with calling(LocalWriter, "write", writes.append):
        report = merge(recipe, out)
    assert writes == []
    assert report.resumed_units == report.units
    assert report.output_digest == digest(recipe)
    assert len(list(out.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("damage", ["missing", "short", "flipped"])
@pytest.mark.parametrize("shard", [1, 3], ids=["renamed", "not_yet"])
def test_a_shard_damaged_after_publishing_began_is_merged_again(
    damage: str, shard: int, models: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    recipe, out = write_job(tmp_path, models, shards=3), tmp_path / "out"
    half_published(recipe, out, renamed=2)
    name = f"model-{shard:05d}-of-00003.safetensors"
    file = out / name if shard == 1 else next(out.glob(f".ties_dist/*/parts/{name}.partial"))
    if damage == "missing":
        file.unlink()
    elif damage == "short":
        os.truncate(file, 5000)
    else:
        flip_byte(file, 5000)
    report = merge(recipe, out)
    assert 0 < report.resumed_units < report.units
    assert report.output_digest == digest(recipe)
    for each in sorted((tmp_path / "undisturbed").glob("model*")):
        assert (out / each.name).read_bytes() == each.read_bytes()


def test_what_was_renamed_already_needs_no_room(
    models: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_job(tmp_path, models, shards=3), tmp_path / "out"
    half_published(recipe, out, renamed=2)
    full = SimpleNamespace(total=0, used=0, free=resume.SPARE_BYTES + MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(PlanError, match="Free some space"):
        merge(recipe, tmp_path / "elsewhere")
    report = merge(recipe, out)
    assert report.resumed_units == report.units


def test_a_kill_between_the_commit_point_and_the_tidying_is_already_done(
    models: list[dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = write_job(tmp_path, models), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("ties_dist.storage.local_place.shutil.rmtree", lambda *a, **k: None)
        first = merge(recipe, out)
    assert len(list(out.glob(".ties_dist/*/journal-*"))) == 1
    again = merge(recipe, out)
    assert again.already_done
    assert again.output_digest == first.output_digest
    assert list(out.glob(".ties_dist/*/journal-*")) == []
