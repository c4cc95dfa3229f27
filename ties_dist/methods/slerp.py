"""Spherical interpolation of two models (Shoemake, 1985; mergekit's `slerp`), each tensor by the angle between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ties_dist.methods.base import Cut, Method, Operand, State, float32
from ties_dist.methods.needs import Product, Sums, gram
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

COLLINEAR = 0.9995
"""Cosines beyond it, either way, are interpolated linearly: mergekit's."""
SMALLEST_NORM = 1e-8
"""A norm that is not above it counts as 1."""


@dataclass(frozen=True, kw_only=True)
class Slerp(Method):
    name: ClassVar[str] = "slerp"
    summary: ClassVar[str] = "from the base to one other model along the arc between them, tensor by tensor"
    operand: ClassVar[Operand] = "both"
    most: ClassVar[int | None] = 1
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="t", per_tensor=True, note="share of the way: 0 is the base, 1 the other model"),
    )

    @property
    def sums(self) -> Sums:
        return Sums()

    def products(self, experts: int) -> tuple[Product, ...]:
        return gram(2)

    def factors(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> list[Tensor]:
        return [base, operands[0]]

    def scalars(
        self, parameters: Mapping[str, float], experts: Sequence[Mapping[str, float]], sums: Sequence[float]
    ) -> Mapping[str, float]:
        base_square, product, other_square = sums
        norms = [math.sqrt(square) for square in (base_square, other_square)]
        first, second = (norm if norm > SMALLEST_NORM else 1.0 for norm in norms)
        cosine = min(1.0, max(-1.0, product / (first * second)))
        t = float32(parameters["t"])
        if abs(cosine) > COLLINEAR:
            return {"of_base": float(1 - t), "of_other": float(t)}
        angle = math.acos(cosine)
        share = float(t)
        return {
            "of_base": math.sin((1 - share) * angle) / math.sin(angle),
            "of_other": math.sin(share * angle) / math.sin(angle),
        }

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        return {}

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        return base * state["of_base"] + operands[0] * state["of_other"], []
