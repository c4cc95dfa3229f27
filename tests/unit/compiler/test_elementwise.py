"""What a method's function may do, by operation: with a loop, eagerly, or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ties_dist import methods
from ties_dist.compiler.elementwise import NotElementwiseError
from ties_dist.compiler.kernel import MergeKernel
from ties_dist.compiler.slices import Slice
from ties_dist.compiler.trace import UntraceableError, trace
from ties_dist.methods.base import count

Numbers = dict[str, Tensor]
Method = Callable[[Tensor, Tensor, Numbers, Tensor], Tensor]
Counting = Callable[[Tensor, Numbers], Tensor]

OUTSIDE = torch.ones(())


def traced(merge: Method, *, counter: Counting | None = None, experts: int = 3) -> str:
    """How a function of base, delta, state and position is run: `loop`, or why eagerly. Raises NotElementwiseError."""

    def function(operands: object, state: Numbers, position: Tensor) -> tuple[Tensor, Tensor]:
        base, delta = operands  # type: ignore[misc]
        counts = [] if counter is None else [counter(delta, state)]
        return merge(base, delta, state, position).to(torch.float32), torch.stack([count(base > 0), *counts])

    try:
        trace(function, ["float32", "float32"], {"weight": (experts,), "lambda": ()})  # type: ignore[arg-type]
    except UntraceableError as error:
        return str(error)
    return "loop"


def place(like: Tensor, position: Tensor) -> Tensor:
    """Of each element in its tensor."""
    return torch.ones_like(like, dtype=torch.int64).cumsum(0) + (position - 1)


def in_place(delta: Tensor) -> Tensor:
    total = torch.zeros_like(delta)
    total += delta
    same = total  # a second name
    same.mul_(2)
    return total


def over_weights(base: Tensor, delta: Tensor, state: Numbers) -> Tensor:
    total = torch.zeros_like(base)
    for weight in state["weight"]:
        total = total + weight * delta
    return total


ELEMENTWISE: list[Method] = [
    lambda b, d, s, p: b + d * s["weight"][1] * s["lambda"],
    lambda b, d, s, p: torch.where(d.abs() >= s["weight"][-1], d, 0.0),
    lambda b, d, s, p: over_weights(b, d, s),
    lambda b, d, s, p: b + s["lambda"].expand_as(b),
    lambda b, d, s, p: b + torch.full((len(b),), 0.5) + torch.zeros(b.shape) + b.new_full(b.shape, 2.0),
    lambda b, d, s, p: b * torch.tensor(0.5),
    lambda b, d, s, p: b + (place(b, p) & 1),
    lambda b, d, s, p: b + ((2 * torch.ones_like(b, dtype=torch.int64).cumsum(0) + 2 * p) & 7),
    lambda b, d, s, p: in_place(d),
    lambda b, d, s, p: torch.where(torch.isfinite(d), d, b),
    lambda b, d, s, p: b * (d > 0).long(),
    lambda b, d, s, p: torch.where((d > 0) + (b > 0), b, d),
    lambda b, d, s, p: b.detach(),
]


@pytest.mark.parametrize("merge", ELEMENTWISE)
def test_what_needs_the_element_alone_becomes_a_loop(merge: Method) -> None:
    assert traced(merge) == "loop"


@dataclass(frozen=True, kw_only=True)
class Given(methods.Method):
    """A method that does as a function says."""

    name: ClassVar[str] = "given"
    summary: ClassVar[str] = ""
    operand: ClassVar[Literal["delta", "weight"]] = "delta"
    parameters: ClassVar[tuple[()]] = ()
    function: Method

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        return self.function(base, operands[0], dict(state), position), []


@pytest.mark.parametrize("merge", ELEMENTWISE)
def test_its_loop_gives_the_bits_that_torch_gives(merge: Method) -> None:
    draw = np.random.default_rng(0)
    numbers = draw.standard_normal((2, 1003)).astype(np.float32)
    numbers[:, ::7], numbers[1, ::5] = 0.0, numbers[0, ::5]
    state = {"weight": np.array([0.5, -1.5, 0.25], np.float32), "lambda": np.array(0.7, np.float32)}
    made = []
    for kind in ("compiled", "eager"):
        kernel = MergeKernel(Given(function=merge), 1, kind)  # type: ignore[arg-type]
        out = memoryview(bytearray(numbers[0].nbytes))
        (counts,) = kernel(
            [
                Slice(
                    operands=[row.data.cast("B") for row in numbers],
                    types=("float32", "float32"),
                    state=state,
                    position=12345,
                    out=out,
                    out_type="float32",
                )
            ]
        )
        assert kernel.kind == kind
        made.append((counts.tolist(), bytes(out)))
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("merge", "reason"),
    [
        (lambda b, d, s, p: d.clamp(-1, 1), "torch's `clamp`"),
        (lambda b, d, s, p: d.sigmoid(), "torch's `sigmoid`"),
        (lambda b, d, s, p: d // 0.3, "torch's `floor_divide`"),
        (lambda b, d, s, p: torch.frexp(d).mantissa, "torch's `frexp`"),
        (lambda b, d, s, p: d.clone().fill_(3.0), "torch's `fill`"),
        (lambda b, d, s, p: (b.double() + d).float(), "torch.float64"),
        (lambda b, d, s, p: (b.bfloat16() + d.bfloat16()).float(), "computes in bfloat16"),
        (lambda b, d, s, p: (b.half() > d.half()) * b, "torch's `gt`"),
        (lambda b, d, s, p: d.to(torch.int64) * b, "makes int64 of float32"),
        (lambda b, d, s, p: b * (s["weight"] * 2)[0], "of several numbers at once"),
        (lambda b, d, s, p: torch.zeros_like(b), "the same for every element"),
    ],
)
def test_what_is_elementwise_without_a_loop_runs_eagerly_and_says_why(merge: Method, reason: str) -> None:
    assert reason in traced(merge)


LOOKS = "looks at values"
MORE = "needs more than the element it is at"
PAST = "something follows, past torch, from a slice's length, place or values, or from when it is asked"
WRITES = "writes to what the function was given"
RANDOM = "draws random numbers that depend on the cut"
ALONE = "only their sum is the same for every cut"
COUNT = "is given a count; counters are sums of `count`"


def branch(test: Callable[[Tensor, Numbers], object]) -> Method:
    return lambda b, d, s, p: b + 1 if test(d, s) else d


def masked(delta: Tensor) -> Tensor:
    own = delta.clone()
    own[delta > 0] = 0
    return own


def unseen(delta: Tensor) -> np.ndarray:
    """Its memory, taken behind torch's back."""
    with torch._C.DisableTorchFunction():
        return delta.numpy()


def written_by_numpy(delta: Tensor) -> Tensor:
    unseen(delta)[:] = 1
    return delta + 0


def without_still(base: Tensor, delta: Tensor) -> Tensor:
    """Leaves out an expert that did not move."""
    return base + delta if delta.numpy().any() else base


@pytest.mark.parametrize(
    ("merge", "words"),
    [
        # sums and ranks of elements
        (lambda b, d, s, p: b + (d - d.mean()), f"torch's `mean` {MORE}"),
        (lambda b, d, s, p: d / d.sum(), f"torch's `sum` {MORE}"),
        (lambda b, d, s, p: d / d.norm(), MORE),
        (lambda b, d, s, p: d * d.softmax(0), MORE),
        (lambda b, d, s, p: b * (b @ d), MORE),
        (lambda b, d, s, p: torch.where((d > 0).any(), d, b), f"torch's `any` {MORE}"),
        (lambda b, d, s, p: d.sort().values, f"torch's `sort` {MORE}"),
        (lambda b, d, s, p: b + d.topk(1).values, f"torch's `topk` {MORE}"),
        (lambda b, d, s, p: torch.where(d > d.median(), d, b), f"torch's `median` {MORE}"),
        (lambda b, d, s, p: torch.where(d > d.quantile(0.5), d, b), MORE),
        (lambda b, d, s, p: d.cumsum(0), f"torch's `cumsum` {MORE}"),
        # other elements
        (lambda b, d, s, p: d.flip(0), f"torch's `flip` {MORE}"),
        (lambda b, d, s, p: d.roll(1), f"torch's `roll` {MORE}"),
        (lambda b, d, s, p: b + d[0], f"torch's `select` {MORE}"),
        (lambda b, d, s, p: d[1:], f"torch's `slice` {MORE}"),
        (lambda b, d, s, p: functional.pad(d[1:], (0, 1)), MORE),
        (lambda b, d, s, p: d.reshape(-1), f"torch's `view` {MORE}"),
        (lambda b, d, s, p: d.view(1, -1).sum(0), f"torch's `view` {MORE}"),
        (lambda b, d, s, p: torch.cat([b, d])[: len(b)], f"torch's `cat` {MORE}"),
        (lambda b, d, s, p: torch.stack([b, d]).sum(0), f"torch's `stack` {MORE}"),
        (lambda b, d, s, p: masked(d), f"torch's `index_put` {MORE}"),
        (lambda b, d, s, p: s["lambda"], "is not one value for every element"),
        (lambda b, d, s, p: b + torch.zeros(2)[0], "changes how many elements there are"),
        # chance
        (lambda b, d, s, p: b + torch.rand_like(d), f"torch's `rand_like` {RANDOM}"),
        (lambda b, d, s, p: b + torch.randn(d.shape), f"torch's `randn` {RANDOM}"),
        (lambda b, d, s, p: torch.bernoulli(d.sigmoid()), f"torch's `bernoulli` {RANDOM}"),
        (lambda b, d, s, p: functional.dropout(d, 0.5), "gives what happens to be in memory"),
        # what a slice is
        (lambda b, d, s, p: d / b.numel(), PAST),
        (lambda b, d, s, p: d * b.shape[0], PAST),
        (branch(lambda d, s: len(d) > 100), PAST),
        (branch(lambda d, s: len(d) % 2 == 0), PAST),
        (branch(lambda d, s: len(d) > 31000), PAST),
        (branch(lambda d, s: len(d) >= 1 << 15), PAST),
        (
            lambda b, d, s, p: d.clamp(-1, *([1] if len(d) > 100 else [])),
            "torch's `clamp` gets nothing with one slice and 1 with another",
        ),
        (lambda b, d, s, p: b + torch.arange(len(b)), f"torch's `arange` {MORE}"),
        (lambda b, d, s, p: b + torch.ones_like(b, dtype=torch.int64).cumsum(0), ALONE),
        (lambda b, d, s, p: b + p, ALONE),
        (lambda b, d, s, p: b + (torch.ones_like(b, dtype=torch.int64).cumsum(0) + 2 * p), ALONE),
        (lambda b, d, s, p: b + (place(b, p) - p), ALONE),
        (lambda b, d, s, p: torch.where(torch.ones_like(b, dtype=torch.int64).cumsum(0) > 1, d, b), ALONE),
        (lambda b, d, s, p: torch.ones_like(b, dtype=torch.int64).cumsum(0), ALONE),
        (lambda b, d, s, p: b + torch.ones_like(b).cumsum(0) + p, "give `dtype=torch.int64`"),
        # values
        (lambda b, d, s, p: d * s["lambda"].item(), LOOKS),
        (lambda b, d, s, p: d * float(s["lambda"]), LOOKS),
        (branch(lambda d, s: s["lambda"] > 2), LOOKS),
        (branch(lambda d, s: bool((d > 0)[0])), MORE),
        (branch(lambda d, s: d.numpy()[0] > 0), LOOKS),
        (branch(lambda d, s: unseen(d)[0] > -1.5), PAST),
        (branch(lambda d, s: np.abs(d).max() < 1e-6), LOOKS),
        (lambda b, d, s, p: b + (d - float(d.numpy().mean())), LOOKS),
        (lambda b, d, s, p: b + sum((d - b).tolist()), LOOKS),
        (lambda b, d, s, p: without_still(b, d - b), LOOKS),
        (lambda b, d, s, p: b + (d - b).apply_(lambda x: x / 2), LOOKS),
        (lambda b, d, s, p: d * float(unseen(d - b).mean()), PAST),
        (lambda b, d, s, p: d * s["weight"].tolist()[0], LOOKS),
        (lambda b, d, s, p: d * float(s["lambda"].numpy()), LOOKS),
        (lambda b, d, s, p: b + 1 if p.numpy() > 100_000 else d, LOOKS),
        (lambda b, d, s, p: b + 1 if unseen(p) > 100_000 else d, PAST),
        (lambda b, d, s, p: b * s["weight"].sum(), "let `state` do that"),
        # from elsewhere
        (lambda b, d, s, p: b * OUTSIDE, "a tensor from outside of the function"),
        (lambda b, d, s, p: torch.from_numpy(np.abs(unseen(d))), "a tensor from outside of the function"),
        (lambda b, d, s, p: torch.tensor(unseen(d)), "a tensor from outside of the function"),
        # written to
        (lambda b, d, s, p: b.add_(1), f"torch's `add_` {WRITES}"),
        (lambda b, d, s, p: b.detach().add_(1), f"torch's `add_` {WRITES}"),
        (lambda b, d, s, p: b.data.add_(1), f"torch's `add_` {WRITES}"),
        (lambda b, d, s, p: b * s["weight"][0].mul_(2), f"torch's `mul_` {WRITES}"),
        (lambda b, d, s, p: torch.add(b, d, out=b), WRITES),
        (lambda b, d, s, p: written_by_numpy(d), "writes to what it was given, past torch"),
        # counts
        (lambda b, d, s, p: b + (d > 0).sum(), f"torch's `add` {COUNT}"),
        (lambda b, d, s, p: b + count(d > 0), f"torch's `add` {COUNT}"),
        (lambda b, d, s, p: b * (count(d > 0) > 3), COUNT),
        (lambda b, d, s, p: b * count(d > 0).to(torch.float32), "makes something else of a count"),
    ],
)
def test_what_needs_more_than_the_element_is_refused(merge: Method, words: str) -> None:
    with pytest.raises(NotElementwiseError, match=re.escape(words)):
        traced(merge)


@pytest.mark.parametrize(
    "counter",
    [
        lambda d, s: count(d > 0) - count(d < 0),
        lambda d, s: (d > 0).sum(),
        lambda d, s: 2 * count(d > s["lambda"]),
        lambda d, s: -count(d > 0),
        lambda d, s: torch.zeros((), dtype=torch.int32),
    ],
)
def test_counters_are_sums_of_masks(counter: Counting) -> None:
    assert traced(lambda b, d, s, p: b + d, counter=counter) == "loop"


@pytest.mark.parametrize(
    "counter",
    [
        lambda d, s: count(d > 0) + 1,
        lambda d, s: 1 - count(d > 0),
        lambda d, s: count(d > 0) * count(d < 0),
        lambda d, s: count(d > 0).clamp(max=1),
        lambda d, s: count(s["weight"] > 0),
        lambda d, s: s["lambda"].to(torch.int32),
        lambda d, s: torch.count_nonzero(d),
        lambda d, s: d.sum().to(torch.int32),
    ],
)
def test_what_does_not_add_up_over_slices_is_no_counter(counter: Counting) -> None:
    with pytest.raises(NotElementwiseError, match=r"counters are sums|let `state` do that|needs more than the element"):
        traced(lambda b, d, s, p: b + d, counter=counter)


@pytest.mark.parametrize("experts", [2, 3, 7, 64, 32768])
def test_numbers_of_experts_are_never_taken_for_elements(experts: int) -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        traced(lambda b, d, s, p: b * s["weight"], experts=experts)


def test_the_code_that_names_a_kept_kernel_is_all_that_a_loop_follows_from() -> None:
    from tests.unit.test_architecture import imports, modules
    from ties_dist.compiler.kernel import CODE, PACKAGE

    covered = {file for pattern in CODE for file in PACKAGE.glob(pattern)}
    needed, waiting = set[Path](), {file for file in covered if file.parent.name in ("compiler", "methods")}
    while waiting:
        file = waiting.pop()
        needed.add(file)
        waiting |= {modules()[name] for name in imports(file) if name in modules()} - needed
    # Of views and spans there are protocols here, and who decodes, or keeps a loop, is no part of it; nor are messages.
    apart = {"errors.py", "messages.py", "storage/base.py", "storage/private.py", "values/views.py"}
    assert {str(file.relative_to(PACKAGE)) for file in needed - covered} == apart
