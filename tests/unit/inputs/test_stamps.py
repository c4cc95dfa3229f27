"""Files are the same when what they hold is, and only then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ties_dist.inputs import stamps
from ties_dist.inputs.stamps import changed_meanwhile, changed_since, see
from ties_dist.values.inputs import Input

PAGE = 4096


def model(file: Path) -> Input:
    return Input(name="m", path=str(file), views={}, identity="")


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE + 1, 64 * PAGE - 1, 64 * PAGE])
def test_a_file_of_at_most_64_pages_is_read_whole(size: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    content = os.urandom(size)
    file.write_bytes(content)
    before = see([model(file)])
    assert changed_since(before, [model(file)]) == []
    for at in range(0, size, 997):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert changed_since(before, [model(file)]) == ["m/x.safetensors"]


@pytest.mark.parametrize("pages", [100, 1000])
def test_two_adjoining_sixty_fourths_are_never_missed_nor_is_the_end(pages: int, tmp_path: Path) -> None:
    file, content, part = tmp_path / "x.safetensors", os.urandom(pages * PAGE), pages * PAGE // 64 + 1
    file.write_bytes(content)
    before = see([model(file)])
    for start in range(0, len(content) - 2 * part, 3 * part):
        file.write_bytes(content[:start] + bytes(2 * part) + content[start + 2 * part :])
        assert changed_since(before, [model(file)]) == ["m/x.safetensors"]
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert changed_since(before, [model(file)]) == ["m/x.safetensors"]


def test_places_follow_from_the_secret_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(os.urandom(300 * PAGE))
    one, other = see([model(file)]), see([model(file)])
    assert one.secret != other.secret and one.samples != other.samples
    assert see([model(file)], one.secret) == one


def test_a_file_that_is_gone_or_shorter_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(300 * PAGE))
    before = see([model(file)])
    os.truncate(file, 299 * PAGE)
    assert changed_since(before, [model(file)]) == changed_meanwhile(before, [model(file)]) == ["m/x.safetensors"]
    file.unlink()
    assert changed_since(before, [model(file)]) == ["a file that is gone"]


def test_a_folder_of_another_name_is_compared_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(300 * PAGE))
    before, other = see([model(file)]), file.rename(tmp_path / "y.safetensors")
    assert changed_since(before, [model(other)]) == []
    other.write_bytes(bytes([1]) * (300 * PAGE))
    assert changed_since(before, [model(other)]) == ["m/y.safetensors"]


def test_within_a_run_pages_are_read_again_only_where_a_stamp_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(10))
    before = see([model(file)])
    looks: list[object] = []
    monkeypatch.setattr(stamps, "changed_since", lambda *given: looks.append(given) or [])
    assert changed_meanwhile(before, [model(file)]) == [] and looks == []
    os.chmod(file, 0o600)  # nothing but the time of change
    assert changed_meanwhile(before, [model(file)]) == [] and len(looks) == 1
