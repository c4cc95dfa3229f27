"""Task arithmetic (Ilharco et al., ICLR 2023): base + lambda * weighted sum of deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ties_dist.methods.base import INT8_MASK, LAMBDA, WEIGHT, Cut, Method, Operand, State, float32, total, weighted_sum
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Method):
    name: ClassVar[str] = "task_arithmetic"
    summary: ClassVar[str] = "base + lambda * weighted sum of deltas; negative weights welcome"
    operand: ClassVar[Operand] = "delta"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        WEIGHT,
        LAMBDA,
        Parameter(name="normalize", kind="bool", default=False, note="true: divide by the sum of the weights"),
        INT8_MASK,
    )

    normalize: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, object], parameters: Mapping[str, float]) -> TaskArithmetic:
        return cls(normalize=bool(parameters.get("normalize", False)))

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        weights = float32([e["weight"] for e in experts])
        summed = total(weights)
        # mergekit's guard: weights that cancel are not divided by.
        divisor = summed if self.normalize and abs(float(summed)) >= 1e-8 else np.float32(1)
        return {
            "weight": weights,
            "lambda": float32(parameters["lambda"]),
            "divisor": np.asarray(divisor),
        }

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        merged = weighted_sum(operands, state["weight"])
        if self.normalize:
            merged = merged / state["divisor"]
        return base + merged * state["lambda"], []
