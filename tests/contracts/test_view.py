"""What every view of a parameter keeps to, so that any unit of work reads it in any cut. Subclass it for a new form."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests import made_up_form
from ties_dist.adapters.low_rank import Constant, Factor, LowRank, Multiple, Scaled
from ties_dist.checkpoints.catalogue import open_checkpoint
from ties_dist.checkpoints.forms import plain
from ties_dist.checkpoints.parameters import OpenFiles
from ties_dist.compiler.slices import decoded, numbers
from ties_dist.storage.base import Reader
from ties_dist.storage.readers import open_reader
from ties_dist.values.views import DECODED_AT_ONCE, Piece, View, blocks, read_bytes

ROWS, COLUMNS = 40, 24


class CountingReader:
    """A reader that knows which spans are still held, and what was asked for."""

    def __init__(self, inner: Reader) -> None:
        self.inner, self.held, self.asked = inner, 0, list[tuple[str, int, int]]()

    def names(self) -> object:
        return self.inner.names()

    def size(self, name: str) -> int:
        return self.inner.size(name)

    def read(self, name: str, start: int, stop: int) -> object:
        self.asked.append((name, start, stop))
        self.held += 1
        return _Counted(self, self.inner.read(name, start, stop))


class _Counted:
    def __init__(self, reader: CountingReader, span: object) -> None:
        self.reader, self.span = reader, span

    @property
    def view(self) -> memoryview:
        return self.span.view  # type: ignore[attr-defined,no-any-return]

    def release(self) -> None:
        self.reader.held -= 1
        self.span.release()  # type: ignore[attr-defined]


class ViewContract:
    """`tensors`: of the model's file; `beside`: of the adapter's. `make`: a view of them, and the float32 it reads."""

    def tensors(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        return {"w": torch.randn(ROWS, COLUMNS, generator=draw)}

    def beside(self) -> dict[str, Tensor]:
        return {"unused": torch.zeros(1)}

    def make(self, root: Path) -> tuple[View, np.ndarray]:
        raise NotImplementedError

    def plain(self, root: Path, name: str, place: int) -> View:
        catalogue = open_checkpoint(root / ("beside" if place else "own"), name="x", reader=open_reader)
        return plain.parameter(catalogue.tensors[name], place).view

    @pytest.fixture
    def readers(self, tmp_path: Path) -> tuple[CountingReader, CountingReader]:
        for folder, tensors in (("own", self.tensors()), ("beside", self.beside())):
            (tmp_path / folder).mkdir()
            save_file(tensors, tmp_path / folder / "model.safetensors")
        return CountingReader(open_reader(tmp_path / "own")), CountingReader(open_reader(tmp_path / "beside"))

    @pytest.fixture
    def files(self, readers: tuple[CountingReader, CountingReader]) -> OpenFiles:
        return OpenFiles(readers)  # type: ignore[arg-type]

    def read(self, view: View, files: OpenFiles, start: int, stop: int) -> np.ndarray:
        operand = view.read(files, start, stop)
        try:
            return decoded(operand, 0, stop - start)
        finally:
            operand.release()

    def test_it_reads_what_is_stored(self, tmp_path: Path, files: OpenFiles) -> None:
        view, expected = self.make(tmp_path)
        np.testing.assert_array_equal(self.read(view, files, 0, expected.size), expected)

    def test_any_cut_reads_the_same_elements(self, tmp_path: Path, files: OpenFiles) -> None:
        view, expected = self.make(tmp_path)
        size, grain = expected.size, view.grain

        @settings(max_examples=40, deadline=None)
        @given(st.lists(st.integers(0, size // grain), max_size=5))
        def check(cuts: list[int]) -> None:
            bounds = [0, *sorted(cut * grain for cut in cuts), size]
            read = np.concatenate([self.read(view, files, a, b) for a, b in pairwise(bounds)])
            assert read.tobytes() == expected.tobytes()

        check()

    def test_what_was_read_is_decoded_in_any_pieces(self, tmp_path: Path, files: OpenFiles) -> None:
        view, expected = self.make(tmp_path)
        operand = view.read(files, 0, expected.size)
        for low, high in ((0, 1), (7, 7), (5, 300), (expected.size - 1, expected.size)):
            found = numbers(operand.content, operand.type, low, high)
            assert decoded(operand, low, high).tobytes() == expected[low:high].tobytes()
            assert found.size == high - low
        operand.release()

    def test_a_decoded_piece_belongs_to_who_asked(self, tmp_path: Path, files: OpenFiles) -> None:
        view, expected = self.make(tmp_path)
        operand = view.read(files, 0, expected.size)
        decoded(operand, 0, expected.size)[:] = 0
        assert decoded(operand, 0, expected.size).tobytes() == expected.tobytes()
        operand.release()

    def test_its_pieces_are_all_that_is_read_and_are_given_back(
        self, tmp_path: Path, files: OpenFiles, readers: tuple[CountingReader, CountingReader]
    ) -> None:
        view, expected = self.make(tmp_path)
        self.read(view, files, 0, expected.size)  # what is kept is kept now
        for reader in readers:
            reader.asked.clear()
        self.read(view, files, 3 * COLUMNS, 9 * COLUMNS)
        assert [reader.held for reader in readers] == [0, 0]
        told = view.pieces(3 * COLUMNS, 9 * COLUMNS)
        for place, reader in enumerate(readers):
            for file, start, stop in reader.asked:
                assert any(p.place == place and p.file == file and p.start <= start and stop <= p.stop for p in told)
        assert sum(stop - start for r in readers for _, start, stop in r.asked) <= read_bytes(
            view, 3 * COLUMNS, 9 * COLUMNS
        )

    def test_it_travels(self, tmp_path: Path, files: OpenFiles) -> None:
        view, _ = self.make(tmp_path)
        assert pickle.loads(pickle.dumps(view)) == view
        assert view.dtype in ("F32", "F16", "BF16")


class TestPlainFloat32(ViewContract):
    def make(self, root: Path) -> tuple[View, np.ndarray]:
        return self.plain(root, "w", 0), self.tensors()["w"].numpy().reshape(-1)


class TestPlainBfloat16(ViewContract):
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.bfloat16() for name, tensor in super().tensors().items()}

    def make(self, root: Path) -> tuple[View, np.ndarray]:
        return self.plain(root, "w", 0), self.tensors()["w"].float().numpy().reshape(-1)


class TestLowRank(ViewContract):
    turned = False

    def beside(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(1)
        outputs, inputs = (COLUMNS, ROWS) if self.turned else (ROWS, COLUMNS)
        return {"a": torch.randint(-4, 5, (2, inputs), generator=draw).float(), "b": torch.randint(
            -4, 5, (outputs, 2), generator=draw
        ).float(), "m": torch.arange(1.0, outputs + 1)}  # fmt: skip

    def make(self, root: Path) -> tuple[View, np.ndarray]:
        beside = self.beside()
        factors = {name: Factor(view=self.plain(root, name, 1), shape=tuple(t.shape)) for name, t in beside.items()}
        view = LowRank(
            target=self.plain(root, "w", 0), shape=(ROWS, COLUMNS), a=factors["a"], b=factors["b"],
            turned=self.turned, scaling=0.5,
        )  # fmt: skip
        product = beside["b"] @ beside["a"]  # of small whole numbers: exact in any order
        added = (product.T if self.turned else product) * 0.5
        return view, (self.tensors()["w"] + added).numpy().reshape(-1)


class TestTurnedLowRank(TestLowRank):
    turned = True


class TestScaled(ViewContract):
    def beside(self) -> dict[str, Tensor]:
        return {"l": torch.arange(1.0, ROWS + 1).reshape(ROWS, 1)}

    def make(self, root: Path) -> tuple[View, np.ndarray]:
        factors = Factor(view=self.plain(root, "l", 1), shape=(ROWS, 1))
        view = Scaled(target=self.plain(root, "w", 0), columns=COLUMNS, factors=factors, by_row=True, by_output=True)
        return view, (self.tensors()["w"] * self.beside()["l"]).numpy().reshape(-1)


class TestMultiple(ViewContract):
    def make(self, root: Path) -> tuple[View, np.ndarray]:
        view = Multiple(target=self.plain(root, "w", 0), factor=3.0)
        return view, (self.tensors()["w"] * 3).numpy().reshape(-1)


class TestConstant(ViewContract):
    def make(self, root: Path) -> tuple[View, np.ndarray]:
        return Constant(value=1.0, dtype="BF16"), np.ones(ROWS * COLUMNS, np.float32)


class TestMadeUpCodes(ViewContract):
    def tensors(self) -> dict[str, Tensor]:
        codes = (torch.arange(ROWS * COLUMNS) % 251 - 125).to(torch.int8).reshape(ROWS, COLUMNS)
        return {"w.codes": codes, "w.step": torch.tensor([0.25])}

    def make(self, root: Path) -> tuple[View, np.ndarray]:
        catalogue = open_checkpoint(root / "own", name="x", reader=open_reader)
        ((parameter, names),) = made_up_form.parameters(catalogue.tensors)
        assert sorted(names) == ["w.codes", "w.step"]
        return parameter.view, self.tensors()["w.codes"].float().numpy().reshape(-1) * np.float32(0.25)


def test_only_what_has_to_be_decoded_is_taken_in_pieces() -> None:
    class Anything:
        def decode(self, low: int, high: int) -> np.ndarray:
            raise AssertionError

    n = 2 * DECODED_AT_ONCE + 5
    assert list(blocks((memoryview(b""), memoryview(b"")), n)) == [(0, n)]
    pieces = list(blocks((memoryview(b""), Anything()), n))
    assert pieces == [(0, DECODED_AT_ONCE), (DECODED_AT_ONCE, 2 * DECODED_AT_ONCE), (2 * DECODED_AT_ONCE, n)]
    assert Piece(0, "f", 1, 2).place == 0
