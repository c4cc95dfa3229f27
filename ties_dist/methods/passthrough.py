"""Passthrough: one model as it is, or scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ties_dist.methods.base import Cut, Method, Operand, State, float32
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Passthrough(Method):
    name: ClassVar[str] = "passthrough"
    summary: ClassVar[str] = "one model as it is, times a scale"
    operand: ClassVar[Operand] = "weight"
    most: ClassVar[int | None] = 1
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="scale", default=1.0, per_model=True, per_tensor=True, note="factor of the weights"),
    )

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        return {"scale": float32(experts[0]["scale"])}

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        return operands[0] * state["scale"], []
