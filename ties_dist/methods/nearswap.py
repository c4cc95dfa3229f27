"""NearSwap: another model's weights where they are near the base's, and less of them the further they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ties_dist.methods.base import Cut, Method, Operand, State, float32
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NearSwap(Method):
    name: ClassVar[str] = "nearswap"
    summary: ClassVar[str] = (
        "take another model's weights where they differ from the base's by t or less, else t's part"
    )
    operand: ClassVar[Operand] = "both"
    most: ClassVar[int | None] = 1
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter(name="t", per_tensor=True, note="difference up to which the other model's weight is taken"),
    )

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        return {"t": float32(parameters["t"])}

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        import torch

        (other,) = operands
        difference = (base - other).abs()
        # As torch divides a number by a tensor, and so mergekit: by the reciprocal, which rounds once more.
        one = torch.ones_like(base)
        share = one / torch.where(difference < 1e-6, 1e-6, difference) * state["t"]
        share = torch.where(share < 0, 0.0, torch.where(share > 1, 1.0, share))
        return share * other + (one - share) * base, []
