"""Model Stock (Jang et al., ECCV 2024): towards the mean of the models, the further the more their deltas agree.

t = T cos / (1 + (T - 1) cos), with T models and the mean cosine of their deltas to the base, tensor by tensor; as
mergekit's `model_stock`. The paper has two models, and one cosine for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ties_dist.methods.base import Cut, Method, Operand, State, float32
from ties_dist.methods.needs import Sums
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST = 1e-6
"""Of a product of norms, and of the denominator: mergekit's guards."""


@dataclass(frozen=True, kw_only=True)
class ModelStock(Method):
    name: ClassVar[str] = "model_stock"
    summary: ClassVar[str] = "between base and mean of the models, by how much their deltas point the same way"
    operand: ClassVar[Operand] = "both"
    fewest: ClassVar[int] = 2
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(
            name="filter_wise", kind="bool", default=False, only_default=True, note="true: a cosine for each row"
        ),
    )

    @property
    def sums(self) -> Sums:
        return Sums()

    def factors(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> list[Tensor]:
        return [operand - base for operand in operands]

    def scalars(
        self, parameters: Mapping[str, float], experts: Sequence[Mapping[str, float]], sums: Sequence[float]
    ) -> Mapping[str, float]:
        count = len(experts)
        of = dict(zip(self.products(count), sums, strict=True))
        norms = [math.sqrt(of[i, i]) for i in range(count)]
        cosines = [
            min(1.0, max(-1.0, of[i, j] / max(norms[i] * norms[j], SMALLEST)))
            for i in range(count)
            for j in range(i + 1, count)
        ]
        cosine = sum(cosines) / len(cosines)
        denominator = 1 + (count - 1) * cosine
        t = float32(0 if abs(denominator) < SMALLEST else count * cosine / denominator)
        return {"of_mean": float(t), "of_base": float(1 - t)}

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        return {"count": float32(len(experts))}

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        import torch

        mean = torch.zeros_like(base)
        for operand in operands:
            mean = mean + operand
        mean = mean / state["count"]
        return mean * state["of_mean"] + base * state["of_base"], []
