"""What is found out about a machine before it works: each trouble planted, each named with its path."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Checkpoints, random_models
from ties_dist.output.folder import OutFolder
from ties_dist.output.holder import Holder
from ties_dist.planning.prepare import prepare
from ties_dist.storage.local_place import LocalPlace
from ties_dist.worker.preflight import Expectation, versions
from ties_dist.worker.site import Site

TOKEN = "seen-here"


@pytest.fixture
def site(merge_job: Checkpoints, tmp_path: Path) -> Site:
    recipe = merge_job(random_models({"a.weight": (64, 64)}, experts=2))
    job = prepare(recipe)
    folder = OutFolder(place=LocalPlace(tmp_path / "out"), fingerprint=job.plan.fingerprint)
    folder.place.make(folder.run)
    folder.place.put(f"{folder.run}/{TOKEN}", b"")
    return Site(
        plan=job.plan,
        resources=job.resources,
        folder=folder,
        holder=Holder.myself(),
        expected=Expectation(token=TOKEN),
    )


def problems(site: Site, **expected: Any) -> str:
    return "\n".join(replace(site, expected=Expectation(token=TOKEN, **expected)).inspect().problems)


def test_nothing_speaks_against_the_machine_that_asks(site: Site) -> None:
    assert problems(site) == ""
    assert [e.name for e in site.folder.place.list(site.folder.run)] == [TOKEN]


def test_a_missing_input_is_named_with_its_path(site: Site, tmp_path: Path) -> None:
    (tmp_path / "expert-1" / "model.safetensors").unlink()
    assert f"{tmp_path}/expert-1: " in problems(site)


def test_an_input_with_other_numbers_is_another_model(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "expert-0" / "model.safetensors"
    save_file({"a.weight": torch.ones(64, 64)}, path, metadata={"format": "pt"})
    assert problems(site) == f"{tmp_path}/expert-0: 'expert-0' is not the model it is where the merge was started"


def test_an_out_that_another_machine_does_not_share_is_found(site: Site, tmp_path: Path) -> None:
    elsewhere = replace(site, folder=replace(site.folder, place=LocalPlace(tmp_path / "elsewhere")))
    assert "OUT must be on a shared file system" in problems(elsewhere)


@pytest.mark.parametrize(
    ("call", "step"),
    [("pwrite", "written at an offset"), ("fdatasync", "synced"), ("preadv", "read back")],
)
def test_what_a_file_system_cannot_do_is_named(
    call: str, step: str, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(95, "Operation not supported")

    found_before = problems(site)
    monkeypatch.setattr(os, call, refuse)
    found = [line for line in problems(site).splitlines() if str(site.folder.place) in line]
    assert found_before == ""
    [said] = found
    assert said.startswith(f"cannot write {site.folder.place}: a file there cannot be {step}: Operation not supported.")
    assert [e.name for e in site.folder.place.list(site.folder.run)] == [TOKEN]


def test_a_rename_that_fails_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    assert "a file there cannot be renamed: Operation not permitted" in problems(site)


def test_other_versions_are_told_beside_the_expected_ones(site: Site) -> None:
    other = {**versions(), "numpy": "1.0"}
    assert problems(site, versions=other) == (
        f"numpy {versions()['numpy']} is installed here, 1.0 where the merge was started"
    )


def test_a_memory_limit_below_the_projection_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_dist.worker.preflight.memory_limit", lambda: 100 << 20)
    assert "of memory, the limit here is 100MiB; give a smaller --memory-budget" in problems(site)


def test_files_that_cannot_be_mapped_are_told_unless_they_are_not_to_be(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("mmap.mmap", refuse)
    pread = replace(site, resources=replace(site.resources, backend="pread"))
    assert problems(pread) == ""
    identities = {m.path: m.identity for m in site.plan.models}
    monkeypatch.setattr("ties_dist.worker.preflight.open_input", lambda path, *_: (None, identities[str(path)]))
    assert (
        problems(site).count("files cannot be mapped here ([Errno 19] No such device); give --read-backend pread") == 3
    )


def test_the_kind_of_a_machine_is_its_architecture_or_its_gpu(site: Site) -> None:
    assert site.inspect().kind == os.uname().machine
    assert site.inspect(gpus=1).kind == "cuda"
    assert "float32 at once" in site.inspect().text


def test_a_site_that_travels_leaves_what_it_is_compared_by(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = replace(site, folder=replace(site.folder, place=LocalPlace(Path("out"))), expected=None)
    away: Site = pickle.loads(pickle.dumps(relative.away()))
    assert str(away.folder.place) == str(tmp_path / "out")
    assert away.expected is not None
    assert site.folder.place.size(f"{site.folder.run}/{away.expected.token}") == 0
    assert away.inspect().problems == ()
