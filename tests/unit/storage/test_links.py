"""Links that somebody planted in OUT: nothing is written or removed through one, and what they lead to is not read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ties_dist.errors import CheckpointError, OutputError
from ties_dist.storage.links import followed, open_anew
from ties_dist.storage.local import LocalWriter
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.place import partial_name

SECRET = b"precious"


@pytest.fixture
def place(tmp_path: Path) -> LocalPlace:
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "victim").write_bytes(SECRET)
    return LocalPlace(tmp_path / "out")


def written(place: LocalPlace, size: int = len(SECRET)) -> LocalWriter:
    writer = place.writer("run")
    assert isinstance(writer, LocalWriter)
    writer.create("a", size)
    return writer


def write_part(place: LocalPlace) -> None:
    writer = written(place)
    writer.write("a", 0, memoryview(b"replaced"))
    writer.sync(["a"])
    writer.close()


WRITES: dict[str, tuple[str, Callable[[LocalPlace], object]]] = {
    "put": ("x", lambda place: place.put("x", b"new")),
    "put's temporary": ("x.tmp", lambda place: place.put("x", b"new")),
    "overwrite": ("x", lambda place: place.overwrite("x", b"new")),
    "append": ("x", lambda place: place.append("x", b"new")),
    "swap": ("x", lambda place: place.swap("x", None, b"new", patience=0.1)),
    "its guard": ("x.guard", lambda place: place.swap("x", None, b"new", patience=0.1)),
    "copy": ("x", lambda place: (place.put("y", b"new"), place.copy("y", "x"))),
    "copy of it": ("x", lambda place: place.copy("x", "y")),
    "copy's temporary": ("x.copy", lambda place: (place.put("y", b"new"), place.copy("y", "x"))),
    "publish": ("x", lambda place: (place.put("y", b"new"), place.publish("y", "x"))),
    "remove": ("x", lambda place: place.remove("x")),
    "retire": ("x", lambda place: place.retire(["x"], "run/retired", lambda: None)),
    "clear": ("x", lambda place: place.clear("x")),
    "a part": (f"run/{partial_name('a')}", write_part),
}


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_nothing_is_written_or_removed_through_a_planted_link(what: str, kind: str, place: LocalPlace) -> None:
    """It is replaced, or the step is refused; what it leads to stays as it was."""
    name, step = WRITES[what]
    outside = place.root.parent / "outside"
    outside.mkdir()
    target = {"file": place.root.parent / "victim", "folder": outside, "nothing": outside / "made"}[kind]
    (place.root / name).symlink_to(target)
    try:
        step(place)
    except OutputError as error:
        assert "Traceback" not in str(error)
    assert (place.root.parent / "victim").read_bytes() == SECRET
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("what", [w for w in WRITES if w not in ("put's temporary", "its guard", "copy's temporary")])
def test_a_folder_of_out_that_is_a_link_is_not_entered(what: str, place: LocalPlace) -> None:
    away = place.root.parent / "away"
    away.mkdir()
    for name in ("x", "y", partial_name("a")):
        (away / name).write_bytes(SECRET)
    (place.root / "run").rmdir()
    (place.root / "run").symlink_to(away)
    with pytest.raises(OutputError, match=r"run is a link, and none in OUT is followed"):
        WRITES["a part" if what == "a part" else what][1](_below(place))
    assert {p.name: p.read_bytes() for p in away.iterdir()} == dict.fromkeys(("x", "y", partial_name("a")), SECRET)


def _below(place: LocalPlace) -> LocalPlace:
    """The same steps, with names that begin with the linked folder."""

    class Below(LocalPlace):
        def _path(self, name: str) -> Path:
            return super()._path(name if name.startswith("run") else f"run/{name}")

    return Below(place.root)


def test_a_partial_file_with_another_name_is_made_anew(place: LocalPlace) -> None:
    os.link(place.root.parent / "victim", place.root / "run" / partial_name("a"))
    write_part(place)
    assert (place.root.parent / "victim").read_bytes() == SECRET


def test_what_a_link_out_of_out_leads_to_is_not_read(place: LocalPlace) -> None:
    (place.root / "x").symlink_to("../victim")
    (place.root / "own").write_bytes(b"own")
    (place.root / "y").symlink_to("own")
    with pytest.raises(OutputError, match=r"x is a link to .*victim, outside of its folder"):
        place.read("x")
    with pytest.raises(CheckpointError, match=r"x is a link to .*victim, outside of its folder"):
        place.reader().read("x", 0, 1)
    assert (place.size("x"), place.size("y"), place.read("y")) == (None, 3, b"own")


def test_a_pipe_in_a_files_place_holds_nobody_up(place: LocalPlace) -> None:
    os.mkfifo(place.root / "x")
    assert place.size("x") is None
    assert place.read("x") == b""
    place.put("x", b"new")
    assert place.read("x") == b"new"


def test_a_temporary_file_of_a_killed_write_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"left over")
    os.close(open_anew(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == b""


@pytest.mark.parametrize("name", ["a" * 39, "A" * 40, "config.json"])
def test_only_digests_in_the_hubs_blobs_are_its_files(name: str, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "main"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / name).touch()
    (snapshot / "x").symlink_to(blobs / name)
    with pytest.raises(CheckpointError, match="outside of its folder"):
        followed(snapshot, "x")
