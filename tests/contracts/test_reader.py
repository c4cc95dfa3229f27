"""What every `Reader` promises; a new back end subclasses `ReaderContract`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ties_dist.errors import CheckpointError
from ties_dist.storage.base import Reader
from ties_dist.storage.local import MappedReader, PreadReader, open_reader
from ties_dist.storage.memory import MemoryReader

Opened = Callable[[Mapping[str, bytes]], Reader]

CONTENT = bytes((i * i + i // 251) % 256 for i in range(3 * 65536 + 777))
"""Longer than a few pages, no page like another, ending inside one."""
RANGES = [(0, 1), (0, 4096), (1, 4097), (4095, 4097), (65535, 65537), (70000, 140000), (len(CONTENT) - 1, len(CONTENT))]


class ReaderContract:
    """Subclasses give `opened`: a fixture that returns a reader of some files."""

    @pytest.mark.parametrize(("start", "stop"), [*RANGES, (0, len(CONTENT))])
    def test_a_range_is_exactly_the_bytes_asked_for(self, start: int, stop: int, opened: Opened) -> None:
        span = opened({"a": b"other", "b": CONTENT}).read("b", start, stop)
        assert bytes(span.view) == CONTENT[start:stop]
        span.release()

    def test_an_empty_range_has_no_bytes(self, opened: Opened) -> None:
        reader = opened({"a": CONTENT})
        for position in (0, 5, len(CONTENT)):
            span = reader.read("a", position, position)
            assert bytes(span.view) == b""
            span.release()

    def test_names_are_sorted_and_sizes_are_those_of_the_files(self, opened: Opened) -> None:
        reader = opened({"b": b"12", "a": b"", "c.safetensors": CONTENT})
        assert list(reader.names()) == ["a", "b", "c.safetensors"]
        assert [reader.size(name) for name in reader.names()] == [0, 2, len(CONTENT)]

    def test_spans_held_at_once_do_not_disturb_each_other(self, opened: Opened) -> None:
        reader = opened({"a": CONTENT})
        spans = [reader.read("a", start, stop) for start, stop in RANGES]
        assert [bytes(span.view) for span in spans] == [CONTENT[start:stop] for start, stop in RANGES]
        for span in spans[::2]:
            span.release()
        again = reader.read("a", 10, 90000)
        assert [bytes(span.view) for span in spans[1::2]] == [CONTENT[start:stop] for start, stop in RANGES[1::2]]
        assert bytes(again.view) == CONTENT[10:90000]

    def test_what_is_read_after_a_release_is_right(self, opened: Opened) -> None:
        reader = opened({"a": CONTENT, "b": CONTENT[::-1]})
        for start, stop in RANGES * 3:
            for name, content in (("a", CONTENT), ("b", CONTENT[::-1])):
                span = reader.read(name, start, stop)
                assert bytes(span.view) == content[start:stop]
                span.release()

    def test_threads_read_at_once_and_each_gets_its_own_range(self, opened: Opened) -> None:
        reader = opened({"a": CONTENT, "b": CONTENT[::-1]})

        def read(task: int) -> bool:
            name, content = (("a", CONTENT), ("b", CONTENT[::-1]))[task % 2]
            start, stop = RANGES[task % len(RANGES)]
            span = reader.read(name, start, stop)
            same = bytes(span.view) == content[start:stop]
            span.release()
            return same

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(400)))

    @pytest.mark.parametrize("stop", [len(CONTENT) + 1, 10 * len(CONTENT)])
    @pytest.mark.parametrize("start", [0, 70000, len(CONTENT)])
    def test_a_file_that_ends_too_early_is_a_checkpoint_error(self, start: int, stop: int, opened: Opened) -> None:
        reader = opened({"a": CONTENT})
        with pytest.raises(CheckpointError, match=f"a has {len(CONTENT):,} bytes where at least {stop:,} are expected"):
            reader.read("a", start, stop)
        span = reader.read("a", 0, 9)  # the reader is none the worse
        assert bytes(span.view) == CONTENT[:9]

    def test_an_empty_file_is_a_checkpoint_error_too(self, opened: Opened) -> None:
        with pytest.raises(CheckpointError, match="a has 0 bytes where at least"):
            opened({"a": b""}).read("a", 0, 1)

    def test_a_file_that_is_not_there_is_not_found(self, opened: Opened) -> None:
        reader = opened({"a": CONTENT})
        with pytest.raises(FileNotFoundError, match="missing"):
            reader.size("missing")
        with pytest.raises(FileNotFoundError, match="missing"):
            reader.read("missing", 0, 1)


class LocalReaderContract(ReaderContract):
    """What files on a disk add. kind: the reader under test."""

    kind: Callable[[Path], Reader]

    @pytest.fixture
    def opened(self, tmp_path: Path) -> Opened:
        def write(files: Mapping[str, bytes]) -> Reader:
            for name, content in files.items():
                (tmp_path / name).write_bytes(content)
            return type(self).kind(tmp_path)

        return write

    def test_a_path_to_a_file_is_a_folder_with_that_file_alone(self, tmp_path: Path, opened: Opened) -> None:
        opened({"a": b"other", "model.safetensors": CONTENT})
        reader = type(self).kind(tmp_path / "model.safetensors")
        assert list(reader.names()) == ["model.safetensors"]
        assert bytes(reader.read("model.safetensors", 3, 70000).view) == CONTENT[3:70000]

    def test_folders_are_not_among_the_names(self, tmp_path: Path, opened: Opened) -> None:
        (tmp_path / "original").mkdir()
        assert list(opened({"a": b""}).names()) == ["a"]

    def test_a_file_truncated_before_its_first_read_is_a_checkpoint_error(self, tmp_path: Path, opened: Opened) -> None:
        reader = opened({"a": CONTENT})
        os.truncate(tmp_path / "a", 70000)
        with pytest.raises(CheckpointError, match="truncated, or was replaced while it was read"):
            reader.read("a", 60000, 80000)

    def test_readers_of_many_files_do_not_run_out_of_descriptors(self, tmp_path: Path, opened: Opened) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for i in range(20):
            opened({f"{i}": CONTENT}).read(f"{i}", 0, 9)
        assert len(os.listdir("/proc/self/fd")) <= before + 1


class TestMappedReader(LocalReaderContract):
    kind = staticmethod(MappedReader)

    def test_released_slices_leave_no_pages_behind(self, tmp_path: Path) -> None:
        """A fault may map a whole folio of the page cache, far more than the slice (Linux 6.18)."""
        with open(tmp_path / "a", "wb") as file:
            file.write(bytes(64 << 20))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        (tmp_path / "a").read_bytes()  # reading ahead makes large folios, writing small ones
        reader, before = MappedReader(tmp_path), resident_file_bytes()
        for start in range(0, 64 << 20, 300_000):
            span = reader.read("a", start, start + 1)
            assert span.view[0] == 0
            span.release()
        assert resident_file_bytes() - before < 4 << 20


def resident_file_bytes() -> int:
    """Of this process, in mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


class TestPreadReader(LocalReaderContract):
    kind = staticmethod(PreadReader)

    def test_a_file_truncated_between_two_reads_is_a_checkpoint_error(self, tmp_path: Path, opened: Opened) -> None:
        reader = opened({"a": CONTENT})
        reader.read("a", 0, 80000).release()
        os.truncate(tmp_path / "a", 70000)
        with pytest.raises(CheckpointError, match="truncated, or was replaced while it was read"):
            reader.read("a", 60000, 80000)


class TestMemoryReader(ReaderContract):
    @pytest.fixture
    def opened(self) -> Opened:
        return lambda files: MemoryReader({name: memoryview(content) for name, content in files.items()})


def test_a_local_folder_is_mapped_unless_told_otherwise(tmp_path: Path) -> None:
    assert isinstance(open_reader(tmp_path), MappedReader)
    assert isinstance(open_reader(tmp_path, "mmap"), MappedReader)
    assert isinstance(open_reader(tmp_path, "pread"), PreadReader)
