"""What a merge method is: a frozen dataclass whose fields are its options, and one elementwise function.

The function is plain torch and loops over experts in recipe order: a stacked `sum` changes bits with the slice width.
Everything numeric enters through the state, so that one compiled kernel serves every tensor of a model. A method knows
nothing of files, units or recipes. Ours import torch where they merge, not before: a merge whose kernel is kept never
loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from ties_dist.methods.needs import Ask, DataStatistics, MajoritySign, Needs, Product, Stage, Sums, TrimRule, gram
from ties_dist.methods.parameter import Parameter
from ties_dist.methods.scalars import Scalars

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, np.ndarray]
"""The numbers one slice is merged with, by name: float32, 0-d or (experts,). `merge` gets its own as tensors."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How one expert is trimmed inside one slice.

    threshold: the exact order statistic of |delta|. keep: entries with |delta| >= keep survive; equal to the
    threshold where ties are kept, the next float above it where they are not, inf where nothing is.
    """

    threshold: float
    keep: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of one slice when it is merged. cuts: per expert, where the method trims; majority: +1 or -1.

    scalars: of its tensor, where the method asks for sums; empty while these are taken.
    """

    cuts: Sequence[Cut] = ()
    majority: int = 1
    scalars: Scalars = ()


Operand = Literal["delta", "weight", "both"]
THRESHOLDS = "thresholds of the engine"
"""Among the numbers of a slice: (experts,), what entries are counted above and at. No method's own name."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of every merge method; a frozen value, so that it can key a compiled kernel.

    operand: what `merge` gets of each expert: its delta to the base; its weights as they are, without a base; or both,
    the base's weights and its own. fewest, most: experts that it takes. statistics: what it has to know of each expert
    besides: 'fisher' diagonals come to `merge` as extras, 'gram' matrices to `solve`.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    operand: ClassVar[Operand]
    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    statistics: ClassVar[Literal["fisher", "gram"] | None] = None
    parameters: ClassVar[tuple[Parameter, ...]]
    options: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_options(cls, options: Mapping[str, object], parameters: Mapping[str, float]) -> Method:
        """The method a recipe describes. options: the `ties_dist:` block after presets; parameters: constant ones."""
        return cls()

    @property
    def trim(self) -> TrimRule | None:
        """The thresholds this method needs, if any."""
        return None

    @property
    def sums(self) -> Sums | None:
        """The sums over each tensor that this method needs, if any: `products` of `factors`, for its `scalars`."""
        return None

    @property
    def asks_majority(self) -> bool:
        """Whether exact cancellations take the sign of the whole model's election."""
        return False

    @property
    def needs(self) -> Needs:
        """What the engine finds before and during `merge`: here as stages what those above say in short."""
        trim = (Stage(of="magnitudes", asks=(self.trim,)),) if self.trim is not None else ()
        sums = (Stage(of="factors", asks=(self.sums,)),) if self.sums is not None else ()
        asks: list[Ask] = [MajoritySign()] if self.asks_majority else []
        asks += [DataStatistics(kind=self.statistics)] if self.statistics is not None else []
        return Needs((*trim, *sums, Stage(of="merge", asks=tuple(asks))))

    @property
    def is_random(self) -> bool:
        """Whether `state` is given, among the parameters, `tensor`: a number below 2^32 that stands for the tensor."""
        return False

    def check(self, experts: Sequence[Mapping[str, float]]) -> None:
        """Raises ValueError where the numbers of one tensor's experts cannot be merged with."""

    def state(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        cuts: Sequence[Cut],
        majority: int,
    ) -> State:
        """The numbers `merge` needs for one slice. cuts: empty for methods without a trim; majority: +1 or -1."""
        raise NotImplementedError

    def numbers(
        self, parameters: Mapping[str, float], experts: Sequence[Mapping[str, float]], found: Found
    ) -> State:  # fmt: skip
        """All numbers of one slice: the thresholds that the engine counts at, and the method's `state`."""
        numbers = {THRESHOLDS: float32([c.threshold for c in found.cuts])} if self.needs.trim is not None else {}
        for name, value in self.state(parameters, experts, found.cuts, found.majority).items():
            numbers[name] = float32(value)
        return numbers | {name: float32(value) for name, value in found.scalars}

    def factors(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> list[Tensor]:
        """What `Sums` are taken of, (n,) float32 each; by default the operands. Elementwise, and as `merge` besides,
        but that `state` has no scalars yet."""
        return list(operands)

    def products(self, experts: int) -> tuple[Product, ...]:
        """Which factors are multiplied and summed up; by default all with all."""
        return gram(experts)

    def scalars(
        self, parameters: Mapping[str, float], experts: Sequence[Mapping[str, float]], sums: Sequence[float]
    ) -> Mapping[str, float | Sequence[float]]:
        """What follows from the sums of a tensor, by name, for the state of `merge`: made once, by the driver.

        So a cosine or a root may be taken here: no machine's own last bit comes between two units. sums: of the
        products; NaN or Inf where a model has them, which the merge reports.
        """
        return {}

    def counters(self, experts: int) -> tuple[str, ...]:
        """Names of what `merge` counts, in its order; what a trim keeps is counted by the engine.

        The report has their sums over the model. Some names are looked for, all may be missing: `conflicts` becomes a
        share of the elements there, `sign_sum` and `cancellations` settle a majority sign (`MajoritySign`), and
        `plain_mean` is said of a Fisher merge.
        """
        return ()

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Merge one slice.

        base: (n,) float32. operands: per expert (n,) float32, deltas or weights. extras: side tensors (n,) float32.
        position: 0-d int64, flat index in its tensor of the slice's first element.
        Returns the merged (n,) float32 and 0-d int32 counters (`count`) named by `counters`.
        """
        raise NotImplementedError

    def solve(
        self,
        parameters: Mapping[str, float],
        experts: Sequence[Mapping[str, float]],
        grams: Sequence[Callable[[], np.ndarray]],
        weights: Sequence[Callable[[], np.ndarray]],
        rows: Sequence[int],
    ) -> np.ndarray | None:
        """Merge one matrix for which every expert has a Gram matrix, whole and in one fixed order.

        grams: read the (in, in) float32 of each expert, a sum over its `rows` inputs; weights: its (in, out) float32.
        Returns (in, out) float64; None where there is no solution, and `merge` is to merge it instead.
        """
        raise NotImplementedError


def count(mask: Tensor) -> Tensor:
    """How many of (n,) bool are true, 0-d int32: half the accumulators of int64, and a slice is far below 2^31."""
    import torch

    return mask.sum(dtype=torch.int32)


def float32(values: float | Sequence[float] | np.ndarray) -> np.ndarray:
    """Numbers of a recipe, each rounded once to float32."""
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)


def total(values: np.ndarray) -> np.float32:
    """Sum of a few float32 numbers in their order: the one order every sum here is taken in."""
    result = np.float32(0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        for value in values:
            result = np.float32(result + value)
    return result


def weighted_sum(operands: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Sum of operands times their weights, in recipe order, from +0.0. operands: (n,) each; weight: (experts,)."""
    import torch

    result = torch.zeros_like(operands[0])
    for i, operand in enumerate(operands):
        result = result + operand * weight[i]
    return result


def density(note: str) -> Parameter:
    return Parameter(
        name="density",
        per_model=True,
        per_tensor=True,
        minimum=0.0,
        maximum=1.0,
        note=note,
    )


WEIGHT = Parameter(name="weight", default=1.0, per_model=True, per_tensor=True, note="factor of this expert")
LAMBDA = Parameter(name="lambda", default=1.0, per_tensor=True, note="scale of the merged delta")
INT8_MASK = Parameter(name="int8_mask", kind="bool", default=False, ignored=True, note="masks are never stored here")
