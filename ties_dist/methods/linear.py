"""Linear merging (model soups; Wortsman et al., ICML 2022): the weighted mean of the models, no base needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ties_dist.methods.base import INT8_MASK, WEIGHT, Cut, Method, Operand, State, float32, total, weighted_sum
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Linear(Method):
    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "weighted mean of the models; equal weights are plain averaging"
    operand: ClassVar[Operand] = "weight"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        WEIGHT,
        Parameter(name="normalize", kind="bool", default=True, note="false: weighted sum"),
        INT8_MASK,
    )

    normalize: bool = True

    @classmethod
    def from_options(cls, options: Mapping[str, object], parameters: Mapping[str, float]) -> Linear:
        return cls(normalize=bool(parameters.get("normalize", True)))

    def check(self, experts: Sequence[Mapping[str, float]]) -> None:
        summed = float(total(float32([e["weight"] for e in experts])))
        if self.normalize and abs(summed) < 1e-8:
            raise ValueError(f"the weights sum to {summed:g}; a mean needs a sum away from 0 (or `normalize: false`)")

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        weights = float32([e["weight"] for e in experts])
        return {"weight": weights, "divisor": np.asarray(total(weights))}

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        merged = weighted_sum(operands, state["weight"])
        return (merged / state["divisor"] if self.normalize else merged), []
