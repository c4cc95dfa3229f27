"""Whether two parameters of one model are the same numbers: pages say no, only all bytes say yes.

64 pages spread over a parameter decide "different", which is what nearly all pairs are. Only where all of them agree is
everything read, 8 MiB at a time and up to the first difference; the answer is kept by what the model is.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.forms.plain import Plain
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.compiler.slices import decoded
from ties_dist.messages import readable, show
from ties_dist.statistics.answers import Answers
from ties_dist.storage.digests import digest
from ties_dist.values.views import Files, Operand, read_bytes

logger = logging.getLogger(__name__)

PAGES = 64
PAGE_BYTES = 4096
COMPARED_AT_ONCE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Unproven:
    """Two parameters of a model whose pages agree, and what reading all of both takes."""

    model: str
    left: str
    right: str
    nbytes: int


@dataclass
class Equality:
    """contents: names of what the files of each model hold, today, by which answers are kept.

    proves: whether everything is read where pages agree; else that goes to `unproven`, and the answer is yes.
    """

    kept: Answers | None = None
    contents: Sequence[str] = ()
    proves: bool = True
    unproven: list[Unproven] = field(default_factory=list)
    _known: dict[tuple[int, str, str], bool] = field(default_factory=dict)

    def __call__(self, i: int, model: Checkpoint, left: Parameter, right: Parameter) -> bool:
        """Of the i-th model. Raises CheckpointError where it cannot be read."""
        key = (id(model), left.name, right.name)
        if key not in self._known:
            self._known[key] = self._compared(i, model, left, right)
        return self._known[key]

    def _compared(self, i: int, model: Checkpoint, left: Parameter, right: Parameter) -> bool:
        if left.shape != right.shape or not _comparable(left, right):
            return False
        if left.view == right.view:
            return True
        files = model.opened
        if not all(same_slice(files, left, files, right, *page) for page in _pages(left)):
            return False
        if left.nbytes <= PAGES * PAGE_BYTES:
            return True
        question = self._question(i, left, right)
        if self.kept is not None and question and (answer := self.kept.get(question)) is not None:
            return answer
        size = sum(read_bytes(each.view, 0, each.numel) for each in (left, right))
        if not self.proves:
            self.unproven.append(Unproven(model=model.name, left=left.name, right=right.name, nbytes=size))
            return True
        logger.info("'%s': comparing %s with %s, %s", model.name, show(left.name), show(right.name), readable(size))
        same = same_numbers(files, left, files, right)
        if self.kept is not None and question:
            self.kept.keep(question, same)
        return same

    def _question(self, i: int, left: Parameter, right: Parameter) -> str | None:
        """None where answers are not kept."""
        return digest(repr([self.contents[i], left.view, right.view]).encode()) if self.kept is not None else None


def _comparable(left: Parameter, right: Parameter) -> bool:
    """Of one type, or numbers that an adapter's file or a computation gives: what these are is compared decoded."""
    stored = isinstance(left.view, Plain) and isinstance(right.view, Plain) and left.view.place == right.view.place
    return left.dtype == right.dtype or not stored


def _pages(parameter: Parameter) -> Iterator[tuple[int, int]]:
    """Elements of up to 64 pages, one in each 64th of the parameter at a place of its own; the same in every run."""
    size = max(1, PAGE_BYTES * parameter.numel // max(1, parameter.nbytes))
    pages = -(-parameter.numel // size)
    draw, wanted = random.Random(pages), min(PAGES, pages)
    for i in range(wanted):
        first, last = i * pages // wanted, (i + 1) * pages // wanted
        page = draw.randrange(first, last)
        yield page * size, min(parameter.numel, (page + 1) * size)


def same_numbers(left_files: Files, left: Parameter, right_files: Files, right: Parameter) -> bool:
    """All of two parameters of one shape; up to the first difference."""
    step = max(1, COMPARED_AT_ONCE * left.numel // max(1, left.nbytes, right.nbytes))
    ends = ((start, min(left.numel, start + step)) for start in range(0, left.numel, step))
    return all(same_slice(left_files, left, right_files, right, start, stop) for start, stop in ends)


def same_slice(left_files: Files, left: Parameter, right_files: Files, right: Parameter, start: int, stop: int) -> bool:
    """By bytes where both are stored in one type; else by value, in float32."""
    one = left.view.read(left_files, start, stop)
    try:
        other = right.view.read(right_files, start, stop)
        try:
            a, b = one.content, other.content
            if left.dtype == right.dtype and isinstance(a, memoryview) and isinstance(b, memoryview):
                return bytes(a) == bytes(b)  # memoryviews compare an element at a time
            return _decoded(one, stop - start) == _decoded(other, stop - start)
        finally:
            other.release()
    finally:
        one.release()


def _decoded(operand: Operand, elements: int) -> bytes:
    return decoded(operand, 0, elements).tobytes()
