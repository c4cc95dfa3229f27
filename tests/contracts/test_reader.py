"""What every `Reader` promises; a new back end subclasses `ReaderContract`."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ties_dist.errors import CheckpointError
from ties_dist.storage import readers
from ties_dist.storage.backends import cached_share, direct_works
from ties_dist.storage.base import Reader
from ties_dist.storage.memory import MemoryReader
from ties_dist.storage.readers import SMALL_READ, DirectReader, MappedReader, PreadReader, open_reader

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


Calls = list[tuple[bool, int]]
"""Of preadv, in order: whether past the page cache, and how many bytes were asked for."""


def watch(patch: pytest.MonkeyPatch, *, at_most: int | None = None, refusal: int | None = None) -> Calls:
    """Watches preadv, and refuses unaligned direct reads as the strictest file system would.

    at_most: bytes that a call gives. refusal: errno of every direct read.
    """
    made: Calls = []
    preadv = os.preadv

    def watched(descriptor: int, views: Sequence[memoryview], position: int) -> int:
        (view,) = views
        direct = bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)
        made.append((direct, len(view)))
        aligned = not any(n % 4096 for n in (position, len(view), np.frombuffer(view, np.uint8).ctypes.data))
        if direct and (refusal or not aligned):
            raise OSError(refusal or errno.EINVAL, os.strerror(refusal or errno.EINVAL))
        if at_most is None:
            return preadv(descriptor, views, position)
        return min(at_most, preadv(descriptor, [view[: -(-at_most // 4096) * 4096]], position))

    patch.setattr(os, "preadv", watched)
    return made


def on_disk(folder: Path, content: bytes) -> Path:
    """A file in `folder`, or a skipped test where files there cannot be read past the page cache."""
    (folder / "a").write_bytes(content)
    if not direct_works(folder / "a"):
        pytest.skip(f"no direct I/O in {folder}")
    return folder / "a"


class TestDirectReader(TestPreadReader):
    kind = staticmethod(DirectReader)

    def test_reads_go_past_the_page_cache(self, tmp_path: Path) -> None:
        file, size = on_disk(tmp_path, os.urandom(16 << 20)), 16 << 20
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_share({file: size}) != 0:
            pytest.skip(f"{tmp_path} is in memory")
        content = bytes(DirectReader(tmp_path).read("a", 0, size).view)
        cached = cached_share({file: size})
        assert cached is not None and cached < 0.2  # a look leaves a page behind
        assert content == bytes(PreadReader(tmp_path).read("a", 0, size).view)
        assert cached_share({file: size}) == 1

    @pytest.mark.parametrize(("size", "direct"), [(SMALL_READ - 1, False), (SMALL_READ, True)])
    def test_small_reads_come_through_the_page_cache(
        self, size: int, direct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_disk(tmp_path, CONTENT)
        reader, calls = DirectReader(tmp_path), watch(monkeypatch)
        assert bytes(reader.read("a", 4096, 4096 + size).view) == CONTENT[4096 : 4096 + size]
        assert calls == [(direct, 65536 if direct else size)]

    def test_every_range_is_read_in_whole_blocks(self, tmp_path: Path) -> None:
        content = CONTENT * 5
        on_disk(tmp_path, content)
        reader, end = DirectReader(tmp_path), len(content)

        @settings(max_examples=200, deadline=None)
        @example((0, end))
        @example((end - SMALL_READ, end))
        @example((4096, end // 4096 * 4096))
        @example((4095, 4095 + SMALL_READ))
        @example((1, end // 4096 * 4096 + 1))
        @given(st.tuples(st.integers(0, end), st.integers(0, end)).map(lambda pair: (min(pair), max(pair))))
        def check(bounds: tuple[int, int]) -> None:
            start, stop = bounds
            with pytest.MonkeyPatch.context() as patch:
                calls = watch(patch)
                span = reader.read("a", start, stop)
            assert bytes(span.view) == content[start:stop]
            span.release()
            if stop - start >= SMALL_READ:
                assert calls == [(True, -(-stop // 4096) * 4096 - start // 4096 * 4096)]

        check()

    @pytest.mark.parametrize("at_most", [4096, 40960, 999, 5000, 50001])
    def test_reads_that_give_less_than_asked_are_gone_on_with(
        self, at_most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_disk(tmp_path, CONTENT)
        reader, calls = DirectReader(tmp_path), watch(monkeypatch, at_most=at_most)
        for start, stop in [(0, len(CONTENT)), (4097, 4097 + SMALL_READ), (len(CONTENT) - SMALL_READ, len(CONTENT))]:
            calls.clear()
            assert bytes(reader.read("a", start, stop).view) == CONTENT[start:stop]
            assert calls[0][0] and len(calls) > 1

    def test_a_file_that_refuses_is_read_by_pread_and_that_is_said_once(
        self, opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        reader, calls = opened({"a": CONTENT, "b": CONTENT[::-1]}), watch(monkeypatch, refusal=errno.EINVAL)
        with caplog.at_level(logging.INFO, logger="ties_dist"), ThreadPoolExecutor(8) as pool:
            spans = list(pool.map(lambda i: reader.read("ab"[i % 2], i, len(CONTENT) - i), range(40)))
        for i, span in enumerate(spans):
            assert bytes(span.view) == (CONTENT, CONTENT[::-1])[i % 2][i : len(CONTENT) - i]
        assert [r.getMessage().split(" in ")[0] for r in caplog.records] == ["reads: no direct I/O"]
        calls.clear()
        reader.read("a", 0, len(CONTENT))
        assert calls == [(False, len(CONTENT))]

    def test_a_file_that_does_not_open_for_direct_reads_is_read_by_pread(
        self, opened: Opened, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(file: Path) -> int:
            raise OSError(errno.EINVAL, "Invalid argument", str(file))

        monkeypatch.setattr(readers, "open_direct", refuse)
        reader = opened({"a": CONTENT})
        with caplog.at_level(logging.INFO, logger="ties_dist"):
            for _ in range(2):
                assert bytes(reader.read("a", 5, len(CONTENT)).view) == CONTENT[5:]
        assert caplog.text.count("no direct I/O") == 1

    def test_a_failing_disk_is_not_taken_for_a_refusal(self, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
        reader, calls = opened({"a": CONTENT}), watch(monkeypatch, refusal=errno.EIO)
        with pytest.raises(OSError, match="Input/output error"):
            reader.read("a", 0, len(CONTENT))
        assert calls == [(True, 4096 * 49)]

    @pytest.mark.parametrize("end", [0, 4096, 70000, len(CONTENT) - 1])
    def test_a_large_read_of_a_file_truncated_since_is_a_checkpoint_error(
        self, end: int, tmp_path: Path, opened: Opened
    ) -> None:
        reader = opened({"a": CONTENT})
        reader.read("a", 0, len(CONTENT)).release()
        os.truncate(tmp_path / "a", end)
        with pytest.raises(CheckpointError, match=f"a has {end:,} bytes where at least {len(CONTENT):,} are expected"):
            reader.read("a", 100, len(CONTENT))

    def test_a_missing_file_is_not_found_by_large_reads_either(self, opened: Opened) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            opened({"a": CONTENT}).read("missing", 0, len(CONTENT))

    def test_no_descriptor_outlives_its_reader(self, tmp_path: Path) -> None:
        on_disk(tmp_path, CONTENT)
        before, reader = len(os.listdir("/proc/self/fd")), DirectReader(tmp_path)
        reader.read("a", 0, len(CONTENT)).release()
        reader.read("a", 0, 9).release()
        assert len(os.listdir("/proc/self/fd")) == before + 2
        del reader
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """On tmpfs, which opens files for direct I/O since Linux 6.6 and refused to before."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("backend", ["auto", "mmap", "pread", "direct"])
def test_files_in_memory_are_read_by_every_back_end(backend: readers.Backend, memory_folder: Path) -> None:
    (memory_folder / "a").write_bytes(CONTENT)
    reader = open_reader(memory_folder, backend)
    for start, stop in [*RANGES, (0, len(CONTENT)), (4097, len(CONTENT))]:
        span = reader.read("a", start, stop)
        assert bytes(span.view) == CONTENT[start:stop]
        span.release()


class TestMemoryReader(ReaderContract):
    @pytest.fixture
    def opened(self) -> Opened:
        return lambda files: MemoryReader({name: memoryview(content) for name, content in files.items()})


def test_a_small_local_folder_is_mapped_unless_told_otherwise(tmp_path: Path) -> None:
    assert isinstance(open_reader(tmp_path), MappedReader)
    assert isinstance(open_reader(tmp_path, "mmap"), MappedReader)
    assert type(open_reader(tmp_path, "pread")) is PreadReader
    assert type(open_reader(tmp_path, "direct")) is DirectReader
