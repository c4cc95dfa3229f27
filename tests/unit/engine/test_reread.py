"""What a file system lost is found before anything is published."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import ties_dist
from tests.conftest import write_job
from ties_dist.engine.reread import SAMPLED
from ties_dist.errors import OutputError
from ties_dist.executors.base import Usage
from ties_dist.storage import local_place
from ties_dist.storage.local import LocalWriter

MIB = 1 << 20


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    models = [{"a.weight": torch.randn(40 * MIB // 4, generator=draw)} for _ in range(3)]
    return write_job(tmp_path, models, method="linear", parameters={})


def lose(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    """As s3fs does it: the last one to close a file brings zeros where another wrote."""
    close = LocalWriter.sync

    def closing(self: LocalWriter, names: list[str]) -> None:
        close(self, names)
        for name in names:
            if name.startswith("model"):
                os.pwrite(self._open(name), bytes(MIB), mib * MIB)

    monkeypatch.setattr(LocalWriter, "sync", closing)


def mounted(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(local_place, "mount_kind", lambda _: kind)


def test_a_block_that_a_shared_file_system_lost_is_named_and_nothing_is_published(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, "fuse.s3fs")
    with monkeypatch.context() as patched:
        lose(patched, 7)
        with pytest.raises(OutputError, match=r"(?s)did not keep 1 MiB .*model\.safetensors: MiB 7.*Nothing was pub"):
            ties_dist.merge(recipe, tmp_path / "out", unit_size=MIB)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    again = ties_dist.merge(recipe, tmp_path / "out", unit_size=MIB)
    assert 0 < again.resumed_units < again.units
    assert again.output_digest == ties_dist.merge(recipe, tmp_path / "other").output_digest


@pytest.mark.parametrize(
    ("kind", "share"), [("ext4", SAMPLED / 41), ("fuse.s3fs", 1.0), ("nfs4", 1.0), ("", 1.0), ("unheard-of", 1.0)]
)
def test_how_much_is_read_again(
    kind: str, share: float, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    mounted(monkeypatch, kind)

    class Watching:
        def begin(self, phase: str, total_bytes: int) -> None:
            if phase == "reread":
                read.append(total_bytes)

        def advance(self, done_bytes: int) -> None: ...

        def end(self) -> None: ...

    ties_dist.merge(recipe, tmp_path / "out", progress=Watching())
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert sum(read) / size == pytest.approx(share, abs=0.03)


def test_only_writers_that_were_all_seen_together_are_proven() -> None:
    assert not Usage().is_proven
    assert Usage(nodes={"a", "b"}, proven=frozenset("ab")).is_proven
    assert not Usage(nodes={"a", "b", "c"}, proven=frozenset("ab")).is_proven


@pytest.mark.parametrize("function", [ties_dist.plan, ties_dist.merge])
def test_a_cache_that_writes_back_later_is_refused_unless_it_is_allowed(
    function: object, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, "fuse.rclone")
    assert callable(function)
    with pytest.raises(OutputError, match=r"acknowledges what is only in its cache.*--allow write-back"):
        function(recipe, tmp_path / "out")
    function(recipe, tmp_path / "out", allow=("write-back",))
    text = recipe.read_text().replace('"merge_method"', '"ties_dist": {"allow": ["write-back"]}, "merge_method"')
    recipe.write_text(text)
    function(recipe, tmp_path / "out")


@pytest.mark.parametrize("kind", ["fuse.glusterfs", "fuse.sshfs", "fuse.juicefs", "nfs4", "ext4"])
def test_file_systems_that_were_right_stay_accepted(
    kind: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted(monkeypatch, kind)
    assert not ties_dist.merge(recipe, tmp_path / "out").already_done
