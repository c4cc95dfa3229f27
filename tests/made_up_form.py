"""A made-up encoding, as a file under `ties_dist/checkpoints/forms/` would be: `w.codes` (I8) times `w.step` (F32).

Tests copy this file there, and into nothing else of the package.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.checkpoints.header import TensorEntry
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.dtypes import DType
from ties_dist.storage.base import Span
from ties_dist.values.views import Files, Piece


@dataclass(frozen=True, slots=True)
class Codes:
    """One step for the whole parameter."""

    codes: Piece
    step: Piece
    dtype: str = "F32"
    grain: int = 1

    def pieces(self, start: int, stop: int) -> Sequence[Piece]:
        return (self.codes._replace(start=self.codes.start + start, stop=self.codes.start + stop), self.step)

    def read(self, files: Files, start: int, stop: int) -> Coded:
        codes, step = (files.read(piece) for piece in self.pieces(start, stop))
        return Coded((codes, step))


@dataclass(frozen=True, slots=True)
class Coded:
    spans: tuple[Span, Span]
    type: DType = "float32"

    @property
    def content(self) -> Coded:
        return self

    def decode(self, low: int, high: int) -> np.ndarray:
        codes, step = (span.view for span in self.spans)
        return np.frombuffer(codes[low:high], np.int8).astype(np.float32) * np.frombuffer(step, np.float32)

    def release(self) -> None:
        for span in self.spans:
            span.release()


def parameters(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[Parameter, Collection[str]]]:
    for name, entry in tensors.items():
        module = name.removesuffix(".codes")
        step = tensors.get(f"{module}.step")
        if module != name and entry.dtype == "I8" and step is not None:
            codes, steps = (Piece(0, each.file, each.start, each.stop) for each in (entry, step))
            view = Codes(codes, steps)
            parameter = Parameter(name=module, dtype="F32", shape=entry.shape, view=view, file=entry.file)
            yield parameter, (name, step.name)
