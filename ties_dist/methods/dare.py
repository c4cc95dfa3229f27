"""DARE (Yu et al., ICML 2024): drop entries of each delta at random, rescale what is left; then add up, or elect signs.

As mergekit's `dare_linear` and `dare_ties` do, but for the random numbers: ours follow from seed, expert, tensor and
element, so that the output does not depend on how the work was cut. What is left is divided by the density, as in the
paper, or, mergekit's way, brought to the L1 norm that the delta had in its tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ties_dist.methods.base import INT8_MASK, LAMBDA, WEIGHT, Cut, State, density, float32
from ties_dist.methods.needs import ONE, Product, Sums
from ties_dist.methods.parameter import Parameter
from ties_dist.methods.random import keys, limits, uniform
from ties_dist.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor


SMALLEST_NORM = 1e-7
"""L1 norms below it, before or after, leave a delta as it is: mergekit's."""


@dataclass(frozen=True, kw_only=True)
class DareLinear(TaskArithmetic):
    name: ClassVar[str] = "dare_linear"
    summary: ClassVar[str] = "drop entries of each delta at random, rescale the rest, then task arithmetic"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        density("share of each delta that is not dropped, [0, 1]"),
        WEIGHT,
        LAMBDA,
        Parameter(name="rescale", kind="bool", default=True, note="enlarge what is left as `rescale_by` says"),
        Parameter(name="normalize", kind="bool", default=False, note="true: divide by the sum of the weights"),
        Parameter(name="seed", kind="int", default=0, note="of the random numbers"),
        INT8_MASK,
    )

    options: ClassVar[frozenset[str]] = frozenset(("rescale_by",))

    rescale: bool = True
    rescale_by: Literal["density", "l1"] = "density"

    @classmethod
    def from_options(cls, options: Mapping[str, object], parameters: Mapping[str, float]) -> DareLinear:
        return cls(
            rescale=bool(parameters.get("rescale", True)),
            rescale_by="l1" if options["rescale_by"] == "l1" else "density",
            normalize=bool(parameters.get("normalize", False)),
        )

    @property
    def sums(self) -> Sums | None:
        return Sums() if self.rescale and self.rescale_by == "l1" else None

    def factors(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> list[Tensor]:
        """|delta| of every expert, and what is kept of each."""
        kept = self._masked(operands, state, position)
        return [*(delta.abs() for delta in operands), *(value.abs() for value in kept)]

    def products(self, experts: int) -> tuple[Product, ...]:
        return tuple((factor, ONE) for factor in range(2 * experts))

    def scalars(
        self, parameters: Mapping[str, float], experts: Sequence[Mapping[str, float]], sums: Sequence[float]
    ) -> Mapping[str, Sequence[float]]:
        before, after = sums[: len(experts)], sums[len(experts) :]
        return {
            "scale": [
                b / a if b >= SMALLEST_NORM and a >= SMALLEST_NORM else 1.0 for b, a in zip(before, after, strict=True)
            ]
        }

    @property
    def is_random(self) -> bool:
        return True

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        densities = [e["density"] for e in experts]
        shares = [density or 1.0 for density in densities]  # of density 0 nothing is left to be divided
        return {
            **super().state(parameters, experts, cuts, majority),
            "density": float32(shares),
            "limit": limits(densities),
            **keys(int(parameters["seed"]), int(parameters["tensor"]), len(experts)),
        }

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        return super().merge(base, self._kept(operands, state, position), extras, state, position)

    def _kept(self, operands: Sequence[Tensor], state: Mapping[str, Tensor], position: Tensor) -> list[Tensor]:
        """What is not dropped of each delta, rescaled, (n,) float32 each (the paper's section 3.2)."""
        masked = self._masked(operands, state, position)
        if not self.rescale:
            return masked
        if self.rescale_by == "l1":
            return [value * state["scale"][i] for i, value in enumerate(masked)]
        return [value / state["density"][i] for i, value in enumerate(masked)]

    def _masked(self, operands: Sequence[Tensor], state: Mapping[str, Tensor], position: Tensor) -> list[Tensor]:
        import torch

        kept = []
        for i, delta in enumerate(operands):
            drawn = uniform(delta, position, state["key_high"][i], state["key_low"][i])
            kept.append(torch.where(drawn < state["limit"][i], delta, 0.0))
        return kept


@dataclass(frozen=True, kw_only=True)
class DareTies(DareLinear):
    name: ClassVar[str] = "dare_ties"
    summary: ClassVar[str] = "drop entries of each delta at random, rescale the rest, elect signs, add up what agrees"

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        import torch

        kept = self._kept(operands, state, position)
        values = [value * state["weight"][i] for i, value in enumerate(kept)]
        mass = torch.zeros_like(base)
        for value in values:
            mass = mass + value
        sign = torch.where(mass < 0, -1.0, 1.0)  # mergekit's: a zero elects +
        merged = divisor = torch.zeros_like(base)
        for i, value in enumerate(values):
            agrees = value * sign > 0
            merged = merged + torch.where(agrees, value, 0.0)
            divisor = divisor + torch.where(agrees, state["weight"][i], 0.0)
        if self.normalize:
            merged = merged / torch.where(divisor == 0, 1.0, divisor)
        return base + merged * state["lambda"], []
