"""What every `Writer` promises; a new back end subclasses `WriterContract`."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.places import DictPlace
from ties_dist.errors import LockedError, OutputError
from ties_dist.storage.base import BLOCK_BYTES, Writer
from ties_dist.storage.buffers import Buffers
from ties_dist.storage.local import LocalWriter
from ties_dist.storage.memory import MemoryWriter

SIZE = 3 * BLOCK_BYTES + 5001
"""Ends inside a block, and inside a page."""


def block(seed: int, size: int) -> memoryview:
    """Noise in a buffer as the engine has them: aligned, longer than what is written of it."""
    buffer = Buffers().take(size)
    view = buffer.data[:size]
    view[:] = random.Random(seed).randbytes(size)
    return view


class WriterContract:
    """Subclasses give `writer`, a fixture."""

    def test_a_new_file_is_all_zero(self, writer: Writer) -> None:
        writer.create("a", SIZE)
        assert bytes(writer.read("a", 0, SIZE)) == bytes(SIZE)

    def test_ranges_written_in_any_order_are_read_back(self, writer: Writer) -> None:
        writer.create("a", SIZE)
        bounds = [(start, min(SIZE, start + BLOCK_BYTES)) for start in range(0, SIZE, BLOCK_BYTES)]
        blocks = {start: block(start, stop - start) for start, stop in bounds}
        for start, _ in reversed(bounds):
            writer.write("a", start, blocks[start])
        assert bytes(writer.read("a", 0, SIZE)) == b"".join(bytes(blocks[start]) for start, _ in bounds)
        assert bytes(writer.read("a", BLOCK_BYTES - 3, BLOCK_BYTES + 3)) == (
            bytes(blocks[0][-3:]) + bytes(blocks[BLOCK_BYTES][:3])
        )

    @pytest.mark.parametrize("start", [0, 1, 4096, 4097, SIZE - 9000])
    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8999])
    def test_any_range_leaves_its_neighbours_alone(self, start: int, size: int, writer: Writer) -> None:
        writer.create("a", SIZE)
        before, after = block(1, SIZE), block(2, size)
        writer.write("a", 0, before)
        writer.write("a", start, after)
        expected = bytes(before[:start]) + bytes(after) + bytes(before[start + size :])
        assert bytes(writer.read("a", 0, SIZE)) == expected

    def test_a_range_can_be_written_again(self, writer: Writer) -> None:
        writer.create("a", SIZE)
        for seed in (1, 2, 3):
            writer.write("a", BLOCK_BYTES, block(seed, BLOCK_BYTES))
        assert writer.read("a", BLOCK_BYTES, 2 * BLOCK_BYTES) == block(3, BLOCK_BYTES)

    def test_creating_a_file_of_the_same_size_again_keeps_it(self, writer: Writer) -> None:
        writer.create("a", SIZE)
        writer.write("a", 100, block(1, 5000))
        writer.create("a", SIZE)
        assert writer.read("a", 100, 5100) == block(1, 5000)

    def test_files_do_not_mix(self, writer: Writer) -> None:
        for seed, name in enumerate("abc"):
            writer.create(name, BLOCK_BYTES)
            writer.write(name, 0, block(seed, BLOCK_BYTES))
        writer.sync(["a", "b", "c"])
        assert [writer.read(name, 0, BLOCK_BYTES) == block(i, BLOCK_BYTES) for i, name in enumerate("abc")] == [
            True
        ] * 3

    def test_threads_write_disjoint_ranges_at_once(self, writer: Writer) -> None:
        writer.create("a", 40 * 9000)
        writer.create("b", 40 * 9000)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: writer.write("ab"[i % 2], i // 2 * 9000, block(i, 9000)), range(80)))
        for i in range(80):
            assert writer.read("ab"[i % 2], i // 2 * 9000, (i // 2 + 1) * 9000) == block(i, 9000)

    def test_reading_past_the_end_is_an_output_error(self, writer: Writer) -> None:
        writer.create("a", SIZE)
        with pytest.raises(OutputError, match=f"a ends at {SIZE:,}, before {SIZE + 1:,}"):
            writer.read("a", SIZE - 10, SIZE + 1)

    def test_reading_a_file_that_was_never_created_is_an_output_error(self, writer: Writer) -> None:
        with pytest.raises(OutputError, match="missing"):
            writer.read("missing", 0, 1)


class LocalWriterContract(WriterContract):
    """What files on a disk add. direct_from: bytes of a file from which writes go past the page cache."""

    direct_from: int

    @pytest.fixture
    def writer(self, tmp_path: Path) -> LocalWriter:
        (tmp_path / "parts").mkdir()
        return self.open(tmp_path)

    def open(self, folder: Path, fence: Callable[[], None] = lambda: None) -> LocalWriter:
        return LocalWriter(folder / "parts", folder, direct_from=self.direct_from, fence=fence)

    def test_a_file_of_another_size_is_laid_out_anew(self, tmp_path: Path, writer: LocalWriter) -> None:
        (tmp_path / "parts" / "a.partial").write_bytes(b"half a header")
        writer.create("a", SIZE)
        assert bytes(writer.read("a", 0, SIZE)) == bytes(SIZE)

    def test_what_is_synced_is_in_the_file_for_everyone(self, tmp_path: Path, writer: LocalWriter) -> None:
        writer.create("a", SIZE)
        writer.write("a", 0, block(1, SIZE))
        writer.sync(["a"])
        assert (tmp_path / "parts" / "a.partial").read_bytes() == bytes(block(1, SIZE))
        writer.close()
        assert self.open(tmp_path).read("a", 0, SIZE) == block(1, SIZE)

    def test_a_renamed_file_is_read_and_mended_where_it_is(self, tmp_path: Path, writer: LocalWriter) -> None:
        writer.create("a", SIZE)
        writer.write("a", 0, block(1, SIZE))
        writer.close()
        (tmp_path / "parts" / "a.partial").rename(tmp_path / "a")
        again = self.open(tmp_path)
        assert again.read("a", 0, SIZE) == block(1, SIZE)
        again.write("a", BLOCK_BYTES, block(2, 4096))
        assert (tmp_path / "a").read_bytes()[BLOCK_BYTES : BLOCK_BYTES + 4096] == bytes(block(2, 4096))
        assert not (tmp_path / "parts" / "a.partial").exists()

    def test_nothing_is_written_once_the_fence_is_up(self, tmp_path: Path, writer: LocalWriter) -> None:
        def lost() -> None:
            raise LockedError("this run lost OUT")

        writer.create("a", SIZE)
        writer.write("a", 0, block(1, SIZE))
        with pytest.raises(LockedError, match="lost OUT"):
            self.open(tmp_path, lost).write("a", 0, block(2, SIZE))
        assert writer.read("a", 0, SIZE) == block(1, SIZE)

    def test_writing_or_syncing_what_is_not_there_is_an_output_error(self, writer: LocalWriter) -> None:
        with pytest.raises(OutputError, match=r"cannot write .*missing"):
            writer.write("missing", 0, block(1, 10))
        with pytest.raises(OutputError, match=r"cannot write .*missing"):
            writer.sync(["missing"])


class TestLocalWriter(LocalWriterContract):
    direct_from = 1 << 60


class TestDirectWriter(LocalWriterContract):
    direct_from = 0


class TestWriterOfAPlaceInADictionary(WriterContract):
    @pytest.fixture
    def writer(self) -> Writer:
        return DictPlace().writer("")


class TestMemoryWriter(WriterContract):
    @pytest.fixture
    def writer(self) -> Writer:
        return MemoryWriter()


def test_who_is_paused_behind_the_fence_cannot_reach_what_was_published_meanwhile(tmp_path: Path) -> None:
    """Its successor goes on with copies; a file opened only then was the model that had just got its name."""
    parts, final = tmp_path / "parts", tmp_path / "out"
    parts.mkdir(), final.mkdir()

    def replaced() -> None:
        shutil.copy(parts / "model.partial", final / "model")
        (parts / "model.partial").unlink()

    writer = LocalWriter(parts, final, fence=replaced)
    writer.create("model", 4)
    writer.write("model", 0, memoryview(b"late"))
    writer.close()
    assert (final / "model").read_bytes() == bytes(4)
