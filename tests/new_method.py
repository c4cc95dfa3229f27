"""The largest of all deltas, halfway: a method as a file beside the others would have it, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ties_dist.methods.base import LAMBDA, Cut, Method, State, float32
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Largest(Method):
    name: ClassVar[str] = "largest"
    summary: ClassVar[str] = "of all deltas the one of the largest magnitude"
    operand: ClassVar[Literal["delta", "weight"]] = "delta"
    parameters: ClassVar[tuple[Parameter, ...]] = (LAMBDA,)

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        return {"lambda": float32(parameters["lambda"])}

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        import torch

        best = torch.zeros_like(base)
        for delta in operands:
            best = torch.where(delta.abs() > best.abs(), delta, best)
        return base + best * state["lambda"], []
