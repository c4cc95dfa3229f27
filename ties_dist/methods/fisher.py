"""Fisher merging (Matena and Raffel, NeurIPS 2022, equation 1): the mean of the models, each entry weighed by how much
its model depends on it, measured by the diagonal of the Fisher information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ties_dist.methods.base import INT8_MASK, WEIGHT, Cut, Method, Operand, State, count, float32, total, weighted_sum
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Fisher(Method):
    name: ClassVar[str] = "fisher"
    summary: ClassVar[str] = "mean of the models, each entry weighed by its Fisher information"
    operand: ClassVar[Operand] = "weight"
    statistics: ClassVar[Literal["fisher", "gram"] | None] = "fisher"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        WEIGHT,
        Parameter(name="epsilon", default=1e-20, minimum=0.0, note="where the weighed Fisher sum is below: plain mean"),
        INT8_MASK,
    )

    def check(self, experts: Sequence[Mapping[str, float]]) -> None:
        weights = [e["weight"] for e in experts]
        if min(weights) < 0 or sum(weights) < 1e-8:
            raise ValueError(f"weights {weights} must not be negative and must have a sum: they weigh information")

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        weights = float32([e["weight"] for e in experts])
        return {
            "weight": weights,
            "divisor": np.asarray(total(weights)),
            "epsilon": float32(parameters["epsilon"]),
        }

    def counters(self, experts: int) -> tuple[str, ...]:
        return ("plain_mean",)

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """extras: the experts' Fisher diagonals, (n,) each, not negative."""
        import torch

        weight = state["weight"]
        weighed = information = torch.zeros_like(operands[0])
        for i, (theta, diagonal) in enumerate(zip(operands, extras, strict=True)):
            share = diagonal * weight[i]
            weighed = weighed + share * theta
            information = information + share
        known = information > state["epsilon"]
        mean = weighted_sum(operands, weight) / state["divisor"]
        merged = torch.where(known, weighed / torch.where(known, information, 1.0), mean)
        return merged, [count(~known)]
