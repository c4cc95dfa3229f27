"""How `auto` chooses: the rule, the facts it goes by, and what is said of it."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import Checkpoints, random_models
from ties_dist.inputs import opening as inputs
from ties_dist.inputs.opening import opener
from ties_dist.planning.options import RunOptions
from ties_dist.planning.prepare import Job, prepare
from ties_dist.storage import backends
from ties_dist.storage.backends import Facts, cached_share, choose, direct_works, look, memory_limit
from ties_dist.storage.base import Reader
from ties_dist.storage.readers import DirectReader, MappedReader, open_reader

GIB = 1 << 30
COLD = {
    "size": 10 * GIB, "network": False, "cached": 0.02, "direct": True, "mapped": 40 * GIB, "memory_limit": None
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "backend", "reason"),
    [
        ({}, "direct", "2 % of it is cached"),
        ({"cached": 0.0}, "direct", "0 % of it is cached"),
        ({"cached": 0.49}, "direct", "49 % of it is cached"),
        ({"cached": 0.5}, "mmap", "50 % of it is cached"),
        ({"cached": 1.0, "direct": False}, "mmap", "100 % of it is cached"),
        ({"direct": False}, "mmap", "2 % of it is cached, but direct I/O does not work here"),
        ({"cached": None}, "mmap", "what is cached cannot be told"),
        ({"network": True}, "pread", "on a network file system"),
        ({"network": True, "cached": 1.0, "memory_limit": GIB}, "pread", "on a network file system"),
        ({"size": 255 << 20}, "mmap", "it is small"),
        ({"size": 256 << 20}, "direct", "2 % of it is cached"),
        ({"reread": True}, "mmap", "it is read twice, the second time from the page cache"),
        ({"memory_limit": 39 * GIB}, "direct", "the memory limit is smaller than a map of all inputs"),
        ({"memory_limit": 39 * GIB, "cached": 1.0}, "direct", "the memory limit is smaller than a map of all inputs"),
        ({"memory_limit": 39 * GIB, "direct": False}, "pread", "the memory limit is smaller than a map of all inputs"),
        ({"memory_limit": 39 * GIB, "reread": True}, "pread", "the memory limit is smaller than a map of all inputs"),
        ({"memory_limit": 39 * GIB, "size": 9}, "direct", "the memory limit is smaller than a map of all inputs"),
        ({"memory_limit": 40 * GIB, "cached": 1.0}, "mmap", "100 % of it is cached"),
    ],
)
def test_auto_chooses_by_the_facts(changed: dict[str, object], backend: str, reason: str) -> None:
    assert tuple(choose(Facts(**{**COLD, **changed}))) == (backend, reason)  # type: ignore[arg-type]


def evict(file: Path) -> None:
    """Out of the page cache; skips the test where that does not work."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share({file: file.stat().st_size}) != 0:
        pytest.skip(f"{file.parent} is in memory")


def test_the_cached_share_is_that_of_all_files_by_their_size(tmp_path: Path) -> None:
    sizes = {tmp_path / "a": 48 << 20, tmp_path / "b": 16 << 20, tmp_path / "empty": 0}
    for file, size in sizes.items():
        file.write_bytes(os.urandom(size))
    assert cached_share(sizes) == 1
    evict(tmp_path / "b")
    share = cached_share(sizes)
    assert share is not None and 0.5 < share < 0.95  # 0.75, give or take four standard errors
    evict(tmp_path / "a")
    assert cached_share({tmp_path / "empty": 0}) is None


def test_what_is_cached_is_unknown_where_reads_cannot_refuse_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(9000))

    def unsupported(*_: object) -> int:
        raise OSError(95, "Operation not supported")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "preadv", unsupported)
    assert cached_share({tmp_path / "a": 9000}) is None
    assert not direct_works(tmp_path / "a")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_look_counts_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(5000))
    facts = look([tmp_path / "a", tmp_path / "gone"])
    assert (facts.size, facts.mapped, facts.cached, facts.reread) == (5000, 5000, None, False)
    assert look([tmp_path / "a"], mapped=7000, reread_bytes=1).mapped == 7000
    assert look([tmp_path / "a"], reread_bytes=1).reread
    assert not look([tmp_path / "a"], reread_bytes=1 << 60).reread
    gone = look([tmp_path / "gone"])
    assert (gone.size, gone.direct, choose(gone).backend) == (0, False, "mmap")


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/\n", {"memory.max": "1073741824\n"}, GIB),
        ("0::/\n", {"memory.max": "max\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": "500", "a/b/memory.max": "700"}, 500),
        ("0::/kubepods/pod7\n", {"memory.max": "600"}, 600),  # the host's path, as seen from a container
        ("0::/../other\n", {"memory.max": "600"}, 600),
        ("4:memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": "800"}, 800),
        ("4:cpu,memory:/x\n", {"memory/memory.limit_in_bytes": "900"}, 900),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("3:cpuset:/\n", {"memory/memory.limit_in_bytes": "900"}, None),
    ],
)
def test_the_memory_limit_is_the_lowest_of_the_control_groups(
    groups: str, files: dict[str, str], limit: int | None, tmp_path: Path
) -> None:
    (tmp_path / "self").write_text(groups)
    for name, content in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(content)
    assert memory_limit(tmp_path / "self", tmp_path / "mount") == limit


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "none", tmp_path) is None


# What a merge does with it

SHAPES = {f"w{i}": (1024, 2048) for i in range(8)}  # 32 MiB of bf16: 64 looks leave most of it uncached


@pytest.fixture
def job(merge_job: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A merge whose models count as large, all of them in the page cache: they were written just now."""
    monkeypatch.setattr(backends, "SMALL_MODEL", 0)
    monkeypatch.setattr(inputs, "SMALL_MODEL", 0)
    models = random_models(SHAPES, experts=2, dtype=torch.bfloat16)
    return prepare(merge_job(models))


def evict_models(job: Job, *names: str) -> None:
    for name in names:
        evict(job.base_path.parent / name / "model.safetensors")
    if not direct_works(job.base_path / "model.safetensors"):
        pytest.skip("no direct I/O in the temporary folder")


def reader_of_the_base(job: Job) -> type[Reader]:
    opened = opener(job.plan.models, job.resources.backend, reread_bytes=job.plan.reread_bytes)
    return type(opened(job.plan.base).readers[0])


def test_each_model_is_read_by_its_own_choice_and_that_is_said_once(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    evict_models(job, "base", "expert-1")
    with caplog.at_level(logging.INFO, logger="ties_dist"):
        open_input = opener(job.plan.models, job.resources.backend, reread_bytes=job.plan.reread_bytes)
        opened = [open_input(model) for model in (*job.plan.models, job.plan.base)]
    assert [type(files.readers[0]) for files in opened] == [DirectReader, MappedReader, DirectReader, DirectReader]
    said = [re.sub(r"\d %", "N %", record.getMessage()) for record in caplog.records]
    assert said == [
        "reads: 'base' by direct I/O (N % of it is cached)",
        "reads: 'expert-0' by memory map (10N % of it is cached)",
        "reads: 'expert-1' by direct I/O (N % of it is cached)",
    ]


def test_a_reader_opened_by_itself_chooses_too(job: Job) -> None:
    evict_models(job, "base")
    assert type(open_reader(job.base_path)) is DirectReader
    assert type(open_reader(job.base_path / "model.safetensors")) is DirectReader
    assert type(open_reader(job.base_path.parent / "expert-0")) is MappedReader


@pytest.mark.parametrize(
    ("semantics", "dtype", "expected"),
    [
        ("paper", torch.bfloat16, None),  # thresholds from a sample, proven by the one read
        ("paper", torch.float32, 3 * 4 * 64),  # a scan, then the merge
        ("mergekit", torch.bfloat16, 1 << 30),  # tensor by tensor, in groups of half the budget
    ],
)
def test_the_plan_knows_whether_its_inputs_are_read_twice(
    semantics: str, dtype: torch.dtype, expected: int | None, merge_job: Checkpoints
) -> None:
    models = random_models({"w": (8, 8)}, experts=2, dtype=dtype)
    recipe = merge_job(models, parameters={"density": 0.2, "weight": 1.0})
    assert prepare(recipe, RunOptions(semantics=semantics)).plan.reread_bytes == expected


def test_a_merge_that_reads_twice_in_short_order_is_mapped(
    merge_job: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "SMALL_MODEL", 0)
    monkeypatch.setattr(inputs, "SMALL_MODEL", 0)
    models = random_models({"w": (64, 64)}, experts=1)
    twice = prepare(merge_job(models, parameters={"density": 0.2, "weight": 1.0}), RunOptions(semantics="mergekit"))
    with caplog.at_level(logging.INFO, logger="ties_dist"):
        assert reader_of_the_base(twice) is MappedReader
    assert "reads: 'base' by memory map (it is read twice, the second time from the page cache)" in caplog.text


def test_of_small_models_nothing_is_said(merge_job: Checkpoints, caplog: pytest.LogCaptureFixture) -> None:
    small = prepare(merge_job(random_models({"w": (8, 8)}, experts=1)))
    with caplog.at_level(logging.INFO, logger="ties_dist"):
        assert reader_of_the_base(small) is MappedReader
    assert caplog.text == ""
