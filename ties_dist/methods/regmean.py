"""RegMean (Jin et al., ICLR 2023, equation 2): linear layers that give, on average, the experts' outputs on their data.

W = (sum_t G_t)^-1 sum_t G_t W_t, with G_t = X_t^T X_t of the layer's inputs, off-diagonals scaled by alpha; W is (in,
out). The plain mean everywhere else. The authors' code divides each G_t by its rows, so that an expert does not count
more because its texts were longer: on eight tasks two of them held 59 % of the weight. `gram: sum` is the equation as
printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ties_dist.methods.base import INT8_MASK, WEIGHT, float32
from ties_dist.methods.linear import Linear
from ties_dist.methods.parameter import Parameter


@dataclass(frozen=True, kw_only=True)
class RegMean(Linear):
    name: ClassVar[str] = "regmean"
    summary: ClassVar[str] = "linear layers that reproduce the experts' outputs on their data; plain mean elsewhere"
    statistics: ClassVar[Literal["fisher", "gram"] | None] = "gram"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        WEIGHT,
        Parameter(
            name="alpha",
            default=0.9,
            per_tensor=True,
            minimum=0.0,
            maximum=1.0,
            note="scales the Grams' off-diagonals (0.1 for T5)",
        ),
        INT8_MASK,
    )

    options: ClassVar[frozenset[str]] = frozenset(("gram",))

    gram: Literal["mean", "sum"] = "mean"

    @classmethod
    def from_options(cls, options: Mapping[str, object], parameters: Mapping[str, float]) -> RegMean:
        return cls(gram="sum" if options["gram"] == "sum" else "mean")

    def check(self, experts: Sequence[Mapping[str, float]]) -> None:
        super().check(experts)
        if min(e["weight"] for e in experts) < 0:
            raise ValueError("a negative weight leaves no matrix to invert; use weights from 0 on")

    def solve(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        grams: Sequence[Callable[[], np.ndarray]],
        weights: Sequence[Callable[[], np.ndarray]],
        rows: Sequence[int],
    ) -> np.ndarray | None:
        from ties_dist.kernels.solve import add_gram, add_product, factorise, substitute

        alpha, shares = float(np.float32(parameters["alpha"])), float32([e["weight"] for e in experts])
        total = right = np.zeros((0, 0))
        for share, gram, weight, summed in zip(shares, grams, weights, rows, strict=True):
            inputs, columns = gram(), weight()
            factor = float(share) / (max(1, summed) if self.gram == "mean" else 1)  # a layer that saw nothing: zeros
            if not total.size:
                total, right = np.zeros(inputs.shape), np.zeros(columns.shape)
            add_gram(total, inputs, factor, alpha)
            add_product(right, inputs, columns, factor, alpha)
        # Inputs that were always zero say nothing of their row; it stands apart from the others.
        dead = np.flatnonzero(np.diagonal(total) == 0)
        total[dead, dead] = 1.0
        smallest = total.diagonal().max() * len(total) * np.finfo(np.float64).eps
        if not factorise(total, smallest):
            return None
        substitute(total, right)
        if dead.size:
            mean = np.zeros((dead.size, right.shape[1]))
            for share, weight in zip(shares, weights, strict=True):
                mean += float(share) * weight()[dead].astype(np.float64)
            right[dead] = mean / float(shares.astype(np.float64).sum())
        return right
