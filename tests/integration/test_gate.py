"""`plan RECIPE OUT` refuses what `merge RECIPE OUT` refuses before it works, in the same way, and leaves no trace."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from tests.conftest import Checkpoints, random_models
from tests.integration.command import Outcome, contents, run
from tests.integration.test_attacks import edit_between_sampled_pages
from ties_dist.storage.local_place import LocalPlace

SHAPES = {"a.weight": (300, 1000), "b.weight": (48, 64)}


def models() -> list[dict[str, Tensor]]:
    return random_models(SHAPES, experts=2)


@dataclass
class Scene:
    """A recipe, an OUT, and what a command says of them."""

    recipe: Path
    out: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, command: str, *options: object) -> Outcome:
        return run(self.capsys, command, self.recipe, self.out, *options)

    def change(self, old: str, new: str) -> None:
        text = self.recipe.read_text()
        assert old in text
        self.recipe.write_text(text.replace(old, new))


@pytest.fixture
def scene(merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Scene:
    return Scene(merge_job(models()), tmp_path / "out", capsys)


def foreign_finished(scene: Scene, _: pytest.MonkeyPatch) -> None:
    assert scene("merge").status == 0
    scene.change('"density": 0.2', '"density": 0.3')


def foreign_unfinished(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(scene, monkeypatch)
    scene.change('"density": 0.2', '"density": 0.3')


def begin(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr("ties_dist.engine.run.publish", fail)
        failed = scene("merge")
    assert failed.status == 2 and "Input/output error" in failed.err


def changed_inputs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(scene, monkeypatch)
    edit_between_sampled_pages(scene.recipe.parent / "expert-0", models()[1], 20_000)


def finished_with_changed_inputs(scene: Scene, _: pytest.MonkeyPatch) -> None:
    assert scene("merge").status == 0
    edit_between_sampled_pages(scene.recipe.parent / "expert-0", models()[1], 20_000)


def strangers_files(scene: Scene, _: pytest.MonkeyPatch) -> None:
    scene.out.mkdir()
    (scene.out / "notes.txt").write_text("mine")


def strangers_model(scene: Scene, _: pytest.MonkeyPatch) -> None:
    (scene.out / ".ties_dist").mkdir(parents=True)
    shutil.copy(scene.recipe.parent / "base" / "model.safetensors", scene.out)


def an_input(scene: Scene, _: pytest.MonkeyPatch) -> None:
    scene.out = scene.recipe.parent / "base"


def a_file(scene: Scene, _: pytest.MonkeyPatch) -> None:
    scene.out.write_text("a file")


def below_a_file(scene: Scene, _: pytest.MonkeyPatch) -> None:
    scene.out.write_text("a file")
    scene.out = scene.out / "below"


def no_room(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalPlace, "free", lambda self: (64 << 20) + 1)


def no_ranged_writes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "pwrite", refuse)


class Case(NamedTuple):
    arrange: Callable[[Scene, pytest.MonkeyPatch], None]
    words: str
    cure: tuple[str, ...] | None = None
    """Options with which both go on."""


CASES = [
    Case(foreign_finished, "holds the finished model of another merge", ("--overwrite",)),
    Case(foreign_unfinished, "holds an unfinished merge of another recipe", ("--fresh",)),
    Case(changed_inputs, "inputs changed since the interrupted merge", ("--fresh",)),
    Case(finished_with_changed_inputs, "before these inputs were written again", ("--fresh", "--overwrite")),
    Case(strangers_files, "is not empty and was not written by ties_dist"),
    Case(strangers_model, "holds model files that no finished merge left", ("--overwrite",)),
    Case(an_input, "lies inside the input"),
    Case(a_file, "is a file"),
    Case(below_a_file, "a file, is a part of that path"),
    Case(no_room, "and 64MiB to spare"),
    Case(no_ranged_writes, "Operation not supported"),
]


@pytest.mark.parametrize("case", CASES, ids=[case.arrange.__name__ for case in CASES])
def test_plan_refuses_what_merge_refuses(case: Case, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    case.arrange(scene, monkeypatch)
    before = contents(scene.recipe.parent)
    planned = scene("plan")
    assert contents(scene.recipe.parent) == before
    merged = scene("merge")
    assert (planned.status, merged.status) == (2, 2)
    assert case.words in planned.err and case.words in merged.err
    if case.cure is not None:
        assert (scene("plan", *case.cure).status, scene("merge", *case.cure).status) == (0, 0)


@pytest.mark.parametrize("arrange", [lambda *_: None, begin], ids=["nothing there", "interrupted"])
def test_what_plan_lets_through_merges(
    arrange: Callable[[Scene, pytest.MonkeyPatch], None], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange(scene, monkeypatch)
    assert (scene("plan").status, scene("merge").status) == (0, 0)
    assert (scene("plan").status, scene("merge").status) == (0, 0)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    folders: list[Path] = []

    def mount(*options: str) -> Path:
        folder = tmp_path / f"disk-{len(folders)}"
        folder.mkdir()
        try:
            subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("file systems cannot be mounted here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "--lazy", folder], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [(("-o", "ro"), "the file system is read-only"), (("-o", "nr_inodes=1"), "the disk is full")],
    ids=["read-only", "no inodes left"],
)
@pytest.mark.parametrize("below", ["", "new/out"], ids=["the mount", "below it"])
def test_a_file_system_that_takes_no_file_is_refused_by_both(
    options: tuple[str, ...], words: str, below: str, scene: Scene, mounted: Callable[..., Path]
) -> None:
    scene.out = mounted(*options) / below
    planned, merged = scene("plan"), scene("merge")
    assert (planned.status, merged.status) == (2, 2)
    assert words in planned.err and words in merged.err


def test_what_fresh_discards_counts_as_room(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_unfinished(scene, monkeypatch)
    partial = sum(p.stat().st_blocks * 512 for p in scene.out.rglob("*.partial"))
    assert partial > 0
    needed = int(run(scene.capsys, "plan", scene.recipe, "--json").document["disk_needed_bytes"])
    monkeypatch.setattr(LocalPlace, "free", lambda self: (64 << 20) + needed - partial)
    assert (scene("plan", "--fresh").status, scene("merge", "--fresh").status) == (0, 0)


def test_a_plan_tells_of_a_run_that_merges_there_and_goes_on(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(scene, monkeypatch)
    from ties_dist.output.lock import RunLock

    with RunLock(LocalPlace(scene.out)).held():
        planned = scene("plan")
        assert (planned.status, scene("merge").status) == (0, 2)
    assert f"another run is merging into {scene.out}: process {os.getpid()} on " in planned.err
