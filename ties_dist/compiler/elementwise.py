"""Whether a method's function may be run slice by slice: each element of the result must follow from the same element
of what it is given, and from numbers that are the same for the whole tensor.

A tensor is cut wherever units and blocks end, so anything else (a mean, a sort, a neighbour, a random draw, the length
of a slice) would put the cut into the bytes. What is judged is every operation that torch is told to do (`trace`):
those that torch itself tags as pointwise may be done, and a few more; what is not known to be harmless is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

CREATED = frozenset(
    f"{new}{what}{like}" for what in ("zeros", "ones", "full") for new, like in (("", ""), ("new_", ""), ("", "_like"))
) | {"scalar_tensor"}
SAME = frozenset({"alias", "detach", "clone"})
"""Their result is their argument; of the first two it shares its memory."""
VIEWS = frozenset({"select", "unbind", "expand"})
"""Of numbers, never of elements: picking one out, or one for every element."""
UNTAGGED = frozenset({"floor_divide", "fill", "zero", "copy"})
"""Elementwise, though torch does not say so; all but the first are done in place."""


class NotElementwiseError(Exception):
    """A function needs more than the element it is at. The text says what it does."""


@dataclass(frozen=True)
class Kind:
    """What a tensor's values follow from.

    each: one for every element of the slice, else the same for all of it. counts: sums over its elements, of which
    counters are made. index, position: how often the element's number in the slice, and the slice's place in the
    tensor, are added up in it; equally often they make the element's place in the tensor, wherever that was cut.
    constant: what all of them are, if that is known.
    """

    each: bool = False
    counts: bool = False
    index: int = 0
    position: int = 0
    constant: float | int | None = None

    @property
    def is_cut(self) -> bool:
        """Whether it depends on where the slice begins."""
        return self.index != self.position


@dataclass(frozen=True)
class Call:
    """One operation as torch's dispatcher has it. name: without namespace, of an in-place one as if it were not.

    kinds: of its tensors, in order. result: what it gave. size: elements of the slice.
    """

    func: OpOverload
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    kinds: Sequence[Kind]
    result: Any
    size: int

    @property
    def results(self) -> list[Tensor]:
        several = self.result if isinstance(self.result, (list, tuple)) else [self.result]
        return [each for each in several if isinstance(each, Tensor)]

    @property
    def is_pointwise(self) -> bool:
        if self.name in UNTAGGED:
            return True
        overloads = getattr(torch.ops.aten, self.name, None)
        same = getattr(overloads, self.func._overloadname, self.func)  # in-place ones are not all tagged
        return torch.Tag.pointwise in {*self.func.tags, *same.tags}

    def refuse(self, why: str) -> NotElementwiseError:
        return NotElementwiseError(f"torch's `{self.name}` {why}")


def judge(call: Call) -> Kind:
    """What the result of an operation follows from. Raises NotElementwiseError."""
    if not call.results:
        raise call.refuse("(`item`, `bool`, `if`) looks at values, and what is done must not follow from any")
    kind = _judge(call)
    if kind.each and {tuple(each.shape) for each in call.results} != {(call.size,)}:
        raise call.refuse("changes how many elements there are, or their order")
    return kind


def _judge(call: Call) -> Kind:
    name, kinds = call.name, call.kinds
    first = kinds[0] if kinds else Kind()
    if torch.Tag.nondeterministic_seeded in call.func.tags:
        raise call.refuse("draws random numbers that depend on the cut; ties_dist.methods.random has others")
    if name in CREATED:
        return Kind(each=call.results[0].ndim > 0, constant=filled(call))
    if name in SAME:
        return first
    if name in VIEWS and not (first.each or first.counts or first.is_cut):
        return Kind(each=name == "expand")
    if name == "_to_copy":
        return _cast(call, first)
    if name == "stack" and all(_is_count(k) for k in kinds):
        return Kind(counts=True)
    if name == "sum" and first.each and call.args[0].dtype == torch.bool and not call.results[0].is_floating_point():
        return Kind(counts=True)
    if name == "cumsum" and first.each and first.constant == 1:
        if call.results[0].dtype != torch.int64:
            raise call.refuse("counts elements in a type that cannot hold their number: give `dtype=torch.int64`")
        return Kind(each=True, index=1)
    if call.is_pointwise:
        return _pointwise(call)
    if kinds and not any(k.each for k in kinds):
        raise call.refuse("is done to numbers of the state: let `state` do that")
    if name.startswith("empty"):
        raise call.refuse("gives what happens to be in memory")
    raise call.refuse("needs more than the element it is at")


def filled(call: Call) -> float | int | None:
    """What a created tensor is filled with."""
    if "zeros" in call.name or "ones" in call.name:
        return int("ones" in call.name)
    value = call.args[{"scalar_tensor": 0, "new_full": 2}.get(call.name, 1)]
    return value if isinstance(value, (int, float)) else None


def _is_count(kind: Kind) -> bool:
    return kind.counts or (kind.constant == 0 and not kind.each)


def _cast(call: Call, kind: Kind) -> Kind:
    dtype = call.results[0].dtype
    if kind.counts and dtype not in (torch.int32, torch.int64):
        raise call.refuse(
            "makes something else of a count; counters are sums of `count`, and nothing may follow from one"
        )
    if kind.is_cut and dtype != torch.int64:
        raise _cut(call)
    return kind


def _cut(call: Call) -> NotElementwiseError:
    return call.refuse(
        "is given where a slice begins, or an element's number in its slice: only their sum is the same for every cut "
        "(`torch.ones_like(base, dtype=torch.int64).cumsum(0) + (position - 1)` is an element's place in its tensor)"
    )


def _pointwise(call: Call) -> Kind:
    kinds = call.kinds
    each = any(k.each for k in kinds)
    if any(k.counts for k in kinds):
        if each or not _is_sum(call, [_is_count(k) for k in kinds]):
            raise call.refuse("is given a count; counters are sums of `count`, and nothing may follow from one")
        return Kind(counts=True)
    if call.name in ("add", "sub", "rsub", "neg", "mul") and any(k.index or k.position for k in kinds):
        factors = _factors(call)
        if factors is not None and call.results[0].dtype == torch.int64:
            index = sum(f * k.index for f, k in zip(factors, kinds, strict=True))
            position = sum(f * k.position for f, k in zip(factors, kinds, strict=True))
            return Kind(each=each, index=index, position=position)
    if any(k.is_cut for k in kinds):
        raise _cut(call)
    return Kind(each=each)


def _is_sum(call: Call, counted: Sequence[bool]) -> bool:
    """Whether counts are added up or multiplied by whole numbers, so that those of all slices can be, too."""
    numbers = [a for a in call.args if not isinstance(a, Tensor)]
    added = call.name in ("add", "sub", "rsub", "neg") and all(n == 0 for n in numbers)
    multiplied = call.name == "mul" and all(isinstance(n, int) for n in numbers) and len(counted) == 1
    return (added or multiplied) and all(counted) and not call.results[0].is_floating_point()


def _factors(call: Call) -> list[int] | None:
    """By what each tensor of a sum is multiplied; None where it is not known to be a whole number."""
    alpha = call.kwargs.get("alpha", 1)
    numbers = [a for a in call.args if not isinstance(a, Tensor)]
    if not isinstance(alpha, int) or not all(isinstance(n, int) for n in numbers):
        return None
    if call.name == "mul":
        return [int(numbers[0])] if len(call.kinds) == 1 and numbers else None
    if call.name == "neg":
        return [-1]
    first, second = (1, alpha if call.name == "add" else -alpha) if call.name != "rsub" else (-alpha, 1)
    if len(call.kinds) == 2:
        return [first, second]
    return [first if isinstance(call.args[0], Tensor) else second]
