"""Files that are run as code come from a folder that nobody else can have written to."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ties_dist.storage.private import NotPrivateError, PrivateFolder

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def folder(tmp_path: Path) -> PrivateFolder:
    found = PrivateFolder(tmp_path / "a" / "kept")
    found.write("name", b"content")
    return found


def test_a_folder_is_made_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        PrivateFolder(tmp_path / "kept").write("name", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "kept" / "name").stat().st_mode) == 0o600
    assert PrivateFolder(tmp_path / "kept").read("name") == b"content"


def test_writing_again_replaces_and_leaves_nothing_beside(folder: PrivateFolder) -> None:
    folder.write("name", b"other")
    assert folder.read("name") == b"other"
    assert os.listdir(folder.path) == ["name"]


def test_what_is_not_there_is_not_found(folder: PrivateFolder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"):
        folder.read("other")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        PrivateFolder(tmp_path / "nowhere").read("name")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_may_write_to_is_neither_read_nor_written(folder: PrivateFolder, mode: int) -> None:
    folder.path.chmod(mode)
    with pytest.raises(NotPrivateError, match=r"others may write to .*kept: chmod go-w"):
        folder.read("name")
    with pytest.raises(NotPrivateError, match=r"others may write to .*kept"):
        folder.write("name", b"other")


def another_users_folder(folder: PrivateFolder) -> None:
    os.chown(folder.path, 12345, -1)


def another_users_file(folder: PrivateFolder) -> None:
    os.chown(folder.path / "name", 12345, -1)


@needs_root
@pytest.mark.parametrize("given", [another_users_folder, another_users_file])
def test_what_another_user_owns_is_not_read(folder: PrivateFolder, given: Callable[[PrivateFolder], None]) -> None:
    given(folder)
    with pytest.raises(NotPrivateError, match="belongs to user 12345, not to 0"):
        folder.read("name")


def test_this_users_own_link_to_such_a_folder_is_followed(folder: PrivateFolder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder.path)
    assert PrivateFolder(tmp_path / "link").read("name") == b"content"
    folder.path.chmod(0o777)
    with pytest.raises(NotPrivateError, match="others may write to"):
        PrivateFolder(tmp_path / "link").read("name")


@needs_root
def test_a_link_that_another_user_planted_is_not_followed(folder: PrivateFolder, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder.path)
    os.chown(tmp_path / "link", 12345, -1, follow_symlinks=False)
    for step in (lambda f: f.read("name"), lambda f: f.write("name", b"")):
        with pytest.raises(NotPrivateError, match="belongs to user 12345, not to 0"):
            step(PrivateFolder(tmp_path / "link"))
    assert folder.read("name") == b"content"


def test_a_link_in_a_files_place_is_replaced_and_never_followed(folder: PrivateFolder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"planted")
    (folder.path / "name").unlink()
    (folder.path / "name").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic link|name"):
        folder.read("name")
    folder.write("name", b"content")
    assert folder.read("name") == b"content"
    assert (tmp_path / "elsewhere").read_bytes() == b"planted"


def test_a_pipe_in_a_files_place_is_refused_and_nobody_waits(folder: PrivateFolder) -> None:
    os.mkfifo(folder.path / "pipe", 0o600)
    with pytest.raises(NotPrivateError, match="is no file"):
        folder.read("pipe")
