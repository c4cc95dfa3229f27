"""What a method needs: stages, each a pass over all elements that asks for numbers which those behind it are given.

The engine, the plan and the workers look at this and at nothing else of a method to know what has to be done; a new
kind of number is a new ask of a stage. A method says it in short (`trim`, `asks_majority`, `statistics` in base.py) or
gives `needs` itself. The last stage merges; a method that asks for nothing is that one function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from ties_dist.methods.declared import misdeclared


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What a method says with words. Raises ValueError where one is misspelt."""

    def __post_init__(self) -> None:
        for wrong in misdeclared(self):
            raise ValueError(f"{type(self).__name__}: {wrong}")


@dataclass(frozen=True, kw_only=True)
class TrimRule(Declared):
    """Asks for an exact order statistic of every expert's |delta|, and says which entries it keeps."""

    scope: Literal["model", "tensor"]
    tie_policy: Literal["keep_all", "exact_k"]
    at_least: int = 0
    """mergekit keeps at least one entry of every tensor."""
    of_moved: tuple[bool, ...] = ()
    """By expert, whether its density is a share of the entries that are not zero; empty: of no expert."""

    @property
    def counts_zeros(self) -> bool:
        """Whether a rank follows from how many entries are zero."""
        return any(self.of_moved)

    def is_of_moved(self, expert: int) -> bool:
        return bool(self.of_moved) and self.of_moved[expert]

    def ranked(self, expert: int, numel: int, zeros: int) -> int:
        """Entries that an expert's density is a share of, where `zeros` of `numel` are zero."""
        return numel - zeros if self.is_of_moved(expert) else numel

    def kept(self, numel: int, density: float) -> int:
        """k: entries to keep of `numel`, int(numel * density) in float64 as the published codes compute it."""
        if density == 0:
            return 0
        return min(numel, max(self.at_least, int(numel * density)))

    def rank(self, numel: int, density: float) -> int | None:
        """1-based rank, from the largest, of the threshold among `numel` magnitudes.

        None: no threshold, everything is kept. 0: nothing is kept. keep_all takes the (d-k)-th smallest, which is
        the (k+1)-th largest: without ties k+1 entries survive, as in the published `kthvalue(d - k)`, `>=`. A density
        of 0 keeps none all the same.
        """
        k = self.kept(numel, density)
        if k >= numel:
            return None
        if density == 0:
            return 0
        return k + 1 if self.tie_policy == "keep_all" else k


@dataclass(frozen=True, kw_only=True)
class MajoritySign(Declared):
    """Asks for the sign of a sum over the whole model of what the merge itself counts.

    The engine merges with a guess of it, and again what depends on it where the guess was wrong. signs: the method's
    counter that is summed. dependent: its counter of entries that a wrong guess changes; without it all may be.
    """

    signs: str = "sign_sum"
    dependent: str = "cancellations"


@dataclass(frozen=True, kw_only=True)
class DataStatistics(Declared):
    """Asks for what was collected of each expert on its own data (`ties-dist collect`).

    Fisher diagonals come to `merge`, as extras; Gram matrices to `solve`, which merges such a tensor whole.
    """

    kind: Literal["fisher", "gram"]


@dataclass(frozen=True, kw_only=True)
class Sums(Declared):
    """Asks for sums over the elements of each tensor, equal to the last bit however the work was cut (kernels/sums.py).

    What is summed are the method's `products` of its `factors`; the driver makes its `scalars` of the sums, once for
    each tensor.
    """

    scope: Literal["tensor"] = "tensor"


Product = tuple[int, int]
"""The numbers of two factors."""
ONE = -1
"""For the second of them: a plain sum of the first."""


def gram(factors: int) -> tuple[Product, ...]:
    """The products of every factor with itself and those behind it: (0, 0), (0, 1), ..., (1, 1), ..."""
    return tuple((i, j) for i in range(factors) for j in range(i, factors))


Ask = TrimRule | MajoritySign | DataStatistics | Sums
A = TypeVar("A", bound=Ask)
_ASKED_OF: Mapping[type[Ask], str] = {TrimRule: "magnitudes", Sums: "factors"}


@dataclass(frozen=True, kw_only=True)
class Stage(Declared):
    """One elementwise function over all elements, and what is asked for it or of it.

    of: `magnitudes`, each expert's |delta| by itself, which a trim ranks; `factors`, the method's function of that
    name, of whose results products are summed; `merge`, its function that merges.
    """

    of: Literal["magnitudes", "factors", "merge"]
    asks: tuple[Ask, ...] = ()


@dataclass(frozen=True)
class Needs:
    """The stages of a method, in order. Raises ValueError where the last one does not merge, or two ask the same."""

    stages: tuple[Stage, ...] = (Stage(of="merge"),)

    def __post_init__(self) -> None:
        for wrong in misdeclared(self):
            raise ValueError(f"Needs: {wrong}")
        if [stage.of for stage in self.stages].count("merge") != 1 or self.stages[-1].of != "merge":
            raise ValueError("the last stage of a method merges, and no other")
        for stage in self.stages:
            if any(_ASKED_OF.get(type(ask), "merge") != stage.of for ask in stage.asks):
                raise ValueError("a TrimRule is asked of `magnitudes`, Sums of `factors`, everything else of `merge`")
        kinds = [type(ask) for stage in self.stages for ask in stage.asks]
        if twice := next((kind for kind in kinds if kinds.count(kind) > 1), None):
            raise ValueError(f"two of {twice.__name__} are asked for; there can be one")
        if self.trim is not None and self.sums is not None:
            raise ValueError("sums of what a trim keeps are not taken yet")

    @property
    def trim(self) -> TrimRule | None:
        return self._asked(TrimRule)

    @property
    def sums(self) -> Sums | None:
        return self._asked(Sums)

    @property
    def majority(self) -> MajoritySign | None:
        return self._asked(MajoritySign)

    @property
    def statistics(self) -> Literal["fisher", "gram"] | None:
        asked = self._asked(DataStatistics)
        return asked.kind if asked else None

    def _asked(self, kind: type[A]) -> A | None:
        return next((ask for stage in self.stages for ask in stage.asks if isinstance(ask, kind)), None)
