"""Two parameters of one model: pages say no, only all bytes say yes, and the answer is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import write_checkpoint
from ties_dist.checkpoints.catalogue import Checkpoint, open_checkpoint
from ties_dist.checkpoints.parameters import OpenFiles
from ties_dist.inputs.equality import Equality
from ties_dist.statistics.answers import Answers
from ties_dist.storage.readers import open_reader
from ties_dist.values.views import Piece

LARGE = 1 << 20  # elements, 4 MiB: more than 64 pages


class Counted(OpenFiles):
    """Counts the bytes that are read."""

    read_bytes = 0

    def read(self, piece: Piece):  # type: ignore[no-untyped-def]
        self.read_bytes += piece.stop - piece.start
        return super().read(piece)


def opened(folder: Path, **tensors: Tensor) -> tuple[Checkpoint, Counted]:
    write_checkpoint(folder, tensors)
    found = open_checkpoint(folder, name="x", reader=open_reader)
    files = Counted(found.opened.readers)
    object.__setattr__(found, "opened", files)
    return found, files


def ask(equality: Equality, model: Checkpoint, left: str = "a", right: str = "b") -> bool:
    return equality(0, model, model.parameters[left], model.parameters[right])


def large(seed: int = 0) -> Tensor:
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(seed)).reshape(1 << 10, 1 << 10)


def test_pages_decide_that_two_are_different(tmp_path: Path) -> None:
    model, files = opened(tmp_path, a=large(0), b=large(1))
    assert not ask(Equality(), model)
    assert files.read_bytes == 2 * 4096  # the first page of 64


def test_where_pages_agree_all_bytes_are_compared(tmp_path: Path) -> None:
    model, files = opened(tmp_path, a=large(), b=large())
    assert ask(Equality(), model)
    assert files.read_bytes == 2 * (64 * 4096 + 4 * LARGE)


@pytest.mark.parametrize("place", [0, LARGE // 2, LARGE - 1])
def test_one_element_makes_two_different(place: int, tmp_path: Path) -> None:
    other = large()
    other.view(-1)[place] += 1
    model, _ = opened(tmp_path, a=large(), b=other)
    assert not ask(Equality(), model)


def test_zeros_of_other_signs_are_other_bytes(tmp_path: Path) -> None:
    model, _ = opened(tmp_path, a=torch.zeros(4, 4), b=-torch.zeros(4, 4))
    assert not ask(Equality(), model)


@pytest.mark.parametrize("numel", [1, 2, 3, 1023, 1025, 64 * 1024, 64 * 1024 + 1])
def test_all_sizes_are_compared_to_the_last_element(numel: int, tmp_path: Path) -> None:
    a = torch.arange(float(numel))
    b = a.clone()
    b[-1] += 1
    model, _ = opened(tmp_path, a=a, b=a.clone(), c=b)
    assert ask(Equality(), model)
    assert not ask(Equality(), model, "a", "c")


def test_empty_parameters_are_equal(tmp_path: Path) -> None:
    model, _ = opened(tmp_path, a=torch.zeros(0, 3), b=torch.zeros(0, 3))
    assert ask(Equality(), model)


def test_other_shapes_and_types_are_not_even_read(tmp_path: Path) -> None:
    zeros = torch.zeros(4, 4)
    model, files = opened(tmp_path, a=zeros, b=torch.zeros(2, 8), c=zeros.to(torch.bfloat16))
    assert not ask(Equality(), model)
    assert not ask(Equality(), model, "a", "c")
    assert files.read_bytes == 0


def test_the_answer_is_kept_by_what_the_files_hold(tmp_path: Path) -> None:
    model, files = opened(tmp_path / "m", a=large(), b=large())
    kept = Answers(tmp_path / "cache")
    assert ask(Equality(kept=kept, contents=["today"]), model)
    before = files.read_bytes
    assert ask(Equality(kept=kept, contents=["today"]), model)
    assert files.read_bytes - before == 2 * 64 * 4096  # pages are always looked at
    assert ask(Equality(kept=kept, contents=["tomorrow"]), model)
    assert files.read_bytes - before > 2 * 4 * LARGE


def test_a_cache_that_cannot_be_used_is_no_error(tmp_path: Path) -> None:
    model, _ = opened(tmp_path / "m", a=large(), b=large())
    (tmp_path / "file").write_text("")
    assert ask(Equality(kept=Answers(tmp_path / "file" / "cache"), contents=["x"]), model)


def test_without_proof_agreeing_pages_are_taken_for_equality_and_told(tmp_path: Path) -> None:
    almost = large()
    almost.view(-1)[5] += 1
    model, _ = opened(tmp_path / "m", a=large(), b=almost)
    equality = Equality(proves=False)
    answer = ask(equality, model)
    assert [(u.left, u.right, u.nbytes) for u in equality.unproven] == ([("a", "b", 8 * LARGE)] if answer else [])
    known = Equality(proves=False, kept=Answers(tmp_path / "cache"), contents=["x"])
    ask(Equality(kept=Answers(tmp_path / "cache"), contents=["x"]), model)
    assert not ask(known, model)
    assert known.unproven == []
