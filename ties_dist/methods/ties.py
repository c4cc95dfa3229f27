"""TIES-Merging: trim, elect sign, disjoint merge (Yadav et al., NeurIPS 2023, Algorithm 1).

One class covers the paper and the two public variants: they differ in options, not in code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np

from ties_dist.methods.base import (
    INT8_MASK,
    LAMBDA,
    WEIGHT,
    Cut,
    Method,
    Operand,
    State,
    count,
    density,
    float32,
    total,
)
from ties_dist.methods.needs import TrimRule
from ties_dist.methods.parameter import Parameter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    name: ClassVar[str] = "ties"
    summary: ClassVar[str] = "trim each delta to its largest entries, elect a sign per parameter, average what agrees"
    operand: ClassVar[Operand] = "delta"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        density("share of each delta kept, [0, 1]; the paper's is 0.2"),
        WEIGHT,
        LAMBDA,
        Parameter(name="normalize", kind="bool", default=True, note="false: plain sum instead of the disjoint mean"),
        INT8_MASK,
    )
    options: ClassVar[frozenset[str]] = frozenset(
        (
            *("trim_scope", "tie_policy", "density_of", "elect", "elect_from", "zero_sign", "weight_before_elect"),
            "aggregate",
        )
    )

    trim_scope: Literal["model", "tensor"] = "model"
    tie_policy: Literal["keep_all", "exact_k"] = "keep_all"
    at_least: int = 0
    elect: Literal["mass", "count", "none"] = "mass"
    oracle: bool = False
    """Signs come from extras[0], the delta of the model named by `elect_from`."""
    zero_sign: Literal["majority", "positive", "drop"] = "majority"
    weight_before_elect: bool = True
    aggregate: Literal["mean", "sum", "max", "average"] = "mean"
    divide_by: Literal["weights", "count"] = "weights"
    of_moved: tuple[bool, ...] = ()
    """`density_of`, by expert; empty: none of what it moved."""

    @classmethod
    def from_options(cls, options: Mapping[str, object], parameters: Mapping[str, float]) -> Ties:
        chosen = {name: options[name] for name in cls.options if name not in ("elect_from", "density_of")}
        if not parameters.get("normalize", True):
            chosen["aggregate"] = "sum"
        moved = cast("tuple[bool, ...]", options["of_moved"])
        return cls(
            **cast("dict[str, str]", chosen),  # type: ignore[arg-type]
            of_moved=moved if any(moved) else (),
            oracle=options.get("elect_from") is not None,
            at_least=1 if options["semantics"] == "mergekit" else 0,
            divide_by="count" if options["semantics"] == "peft" else "weights",
        )

    @property
    def trim(self) -> TrimRule:
        return TrimRule(
            scope=self.trim_scope, tie_policy=self.tie_policy, at_least=self.at_least, of_moved=self.of_moved
        )

    @property
    def asks_majority(self) -> bool:
        return self.zero_sign == "majority" and (self.oracle or self.elect != "none")

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        weights = float32([e["weight"] for e in experts])
        counting = self.divide_by == "count"
        shares = total(np.ones_like(weights) if counting else weights)
        return {
            # Weight 0 drops an expert from vote and mean, but for peft's code, which weighs after the election: there
            # it votes and is counted.
            "keep": float32(
                [c.keep if e["weight"] != 0 or counting else np.inf for c, e in zip(cuts, experts, strict=True)]
            ),
            "weight": weights,
            "lambda": float32(parameters["lambda"]),
            "zero_sign": float32({"majority": float(majority), "positive": 1.0, "drop": 0.0}[self.zero_sign]),
            "total_weight": np.asarray(shares if shares != 0 else np.float32(1)),
        }

    def counters(self, experts: int) -> tuple[str, ...]:
        return ("conflicts", "cancellations", "sign_sum")

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        import torch

        weight, values, votes = state["weight"], [], []
        positive = negative = None

        # Trim (Algorithm 1, step 1).
        for i, delta in enumerate(operands):
            trimmed = torch.where(delta.abs() >= state["keep"][i], delta, 0.0)
            values.append(trimmed * weight[i])
            votes.append(values[i] if self.weight_before_elect else trimmed)
            positive = votes[i] > 0 if positive is None else positive | (votes[i] > 0)
            negative = votes[i] < 0 if negative is None else negative | (votes[i] < 0)
        assert positive is not None and negative is not None

        # Elect (step 2). `mass` is the sign of the sum; exact cancellations take the state's sign.
        if self.oracle:
            mass = extras[0]
        else:
            mass = torch.zeros_like(base)
            for vote in votes:
                mass = mass + (torch.sign(vote) if self.elect == "count" else vote)
        sign = torch.where(mass > 0, 1.0, torch.where(mass < 0, -1.0, state["zero_sign"]))
        counts = [
            count(positive & negative),
            count((mass == 0) & (positive | negative)),
            count(mass > 0) - count(mass < 0),
        ]

        # Disjoint merge (step 3): zeros never agree.
        merged = self._aggregate(values, [self._agrees(vote, sign) for vote in votes], state)
        return base + merged * state["lambda"], counts

    def _agrees(self, vote: Tensor, sign: Tensor) -> Tensor:
        if self.elect == "none" and not self.oracle:
            return vote != 0
        return vote * sign > 0  # exact: a sign is -1, 0 or +1

    def _aggregate(self, values: Sequence[Tensor], agrees: Sequence[Tensor], state: Mapping[str, Tensor]) -> Tensor:
        """values: weighted trimmed deltas (n,) float32; agrees: (n,) bool. Returns the merged delta (n,) float32."""
        import torch

        result = divisor = torch.zeros_like(values[0])
        for i, (value, agree) in enumerate(zip(values, agrees, strict=True)):
            chosen = torch.where(agree, value, 0.0)
            if self.aggregate == "max":  # agreeing values share a sign, so the largest is magnitude times sign
                result = torch.where(chosen.abs() > result.abs(), chosen, result)
            else:
                result = result + chosen
            if self.aggregate == "mean":
                share = state["weight"][i] if self.divide_by == "weights" else 1.0
                divisor = divisor + torch.where(agree, share, 0.0)
        if self.aggregate == "mean":
            return result / torch.where(divisor == 0, 1.0, divisor)
        if self.aggregate == "average":
            return result / state["total_weight"]
        return result
