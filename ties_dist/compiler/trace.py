"""From a method's plain torch function to the graph of its loop: the function is run on tiny tensors, watched.

torch's dispatcher is asked what it is told to do, operation by operation, so a method may be written in any way that
torch runs. What is not elementwise raises `NotElementwiseError`. What is, but has no loop here, raises
`UntraceableError`, and the method runs eagerly. It is run several times, on other lengths, places and values, and must
do the same every time: what went past the dispatcher (a shape, the time) shows itself by that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ties_dist.compiler.elementwise import CREATED, SAME, VIEWS, Call, Kind, NotElementwiseError, filled, judge
from ties_dist.compiler.fuse import BLOCK, Fused
from ties_dist.compiler.loop import CASTS, COMPARISONS, Loop, Node
from ties_dist.dtypes import LOOP_BYTES, DType, torch_dtype

RUNS = (((7, 11, 13), 0), ((64, 192, 320), 4095), ((BLOCK, 2 * BLOCK, 4 * BLOCK), (1 << 40) + 12345))
"""Elements of the slices that are traced, and their places: an odd length, an even one, and the largest that ever runs
eagerly. Of each the first that is no other length, too."""
TAKES_OUT = frozenset(
    ("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage")
) | {"apply_", "map_", "map2_", "__reduce_ex__"}
"""What of a tensor gives its values to others than torch, whose dispatcher does not see it."""
NAMES: dict[torch.dtype, DType] = {torch_dtype(name): name for name in LOOP_BYTES}
FLOATS, INTEGERS, BOOLS = {"float32"}, {"int32", "int64"}, {"bool"}
BINARY = {
    **{op: (op, FLOATS | INTEGERS) for op in ("add", "sub", "mul")},
    "div": ("div", FLOATS),
    "bitwise_and": ("and", INTEGERS | BOOLS), "bitwise_or": ("or", INTEGERS | BOOLS),
    "bitwise_xor": ("xor", INTEGERS | BOOLS), "logical_and": ("and", BOOLS), "logical_or": ("or", BOOLS),
    "__rshift__": ("shr", INTEGERS), "bitwise_right_shift": ("shr", INTEGERS),
    **{op: (op, FLOATS | INTEGERS) for op in COMPARISONS},
}  # fmt: skip
"""The loop's operation, and the types in which it means the same."""
LOGICAL = {"mul": ("and", BOOLS), "add": ("or", BOOLS)}
"""What these are of masks."""
UNARY = {
    **{op: (op, FLOATS) for op in ("abs", "neg", "sqrt")},
    "bitwise_not": ("not", BOOLS), "logical_not": ("not", BOOLS),
}  # fmt: skip


class UntraceableError(Exception):
    """A function does something for which there is no loop."""


@dataclass(eq=False)
class Known:
    """A tensor that was met. number: of its like; node: None where no loop has it. given: not the function's own."""

    number: int
    kind: Kind
    node: Node | None
    given: bool = False


class _Within(TorchFunctionMode):
    """Nothing takes values out of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in TAKES_OUT:
            raise NotElementwiseError(f"torch's `{name}` looks at values, and what is done must not follow from any")
        return func(*args, **(kwargs or {}))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation: what its result follows from, and its node. `did` says what was done, for comparison.

    Tensors are kept: an address must not be given out twice.
    """

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.size = size
        self.did: list[tuple[str, ...]] = []
        self.lacking: str | None = None
        self._known: dict[int, Known] = {}
        self._kept: list[Tensor] = []

    def meet(self, tensor: Tensor, kind: Kind, node: Node | None, *, given: bool = False) -> None:
        self._known[id(tensor)] = Known(len(self._kept), kind, node, given)
        self._kept.append(tensor)

    def of(self, tensor: Tensor) -> Known:
        if id(tensor) not in self._known:
            raise NotElementwiseError("it uses a tensor from outside of the function: numbers come from `state`")
        return self._known[id(tensor)]

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "lift_fresh" and id(args[0]) not in self._known and args[0].ndim == 0:
            return self._constant(args[0])
        name = "alias" if name == "lift_fresh" else name
        known = [self.of(tensor) for tensor in _tensors((*args, *kwargs.values()))]
        if func._schema.is_mutable:
            name = self._written(name, args)
        # Judged by its result, so done first; but not to what was given.
        result = func(*args, **kwargs)
        call = Call(func, name, args, kwargs, [k.kind for k in known], result, self.size)
        kind = judge(call)
        self.did.append((name, str(kind), *map(self._described, (*args, *kwargs.items()))))
        if name in ("alias", "detach"):
            self._known[id(result)] = known[0]
            self._kept.append(result)
        elif func._schema.is_mutable:
            known[0].kind, known[0].node = kind, self._node(call, kind, result, known)
        else:
            for each in call.results:
                node = self._node(call, kind, each, known)
                self.meet(each, kind, node, given=name in VIEWS)
        return result

    def _constant(self, tensor: Tensor) -> Tensor:
        """`torch.tensor(0.5)`, written in the function."""
        value, dtype = tensor.item(), NAMES.get(tensor.dtype)
        self.did.append(("tensor", repr(value)))
        self.meet(tensor, Kind(constant=value), Node("constant", (value,), dtype, False) if dtype else None)
        return tensor

    def _written(self, name: str, args: Sequence[Any]) -> str:
        """The name of an in-place operation as if it were none. Raises NotElementwiseError unless it is on its own."""
        if not (name.endswith("_") and isinstance(args[0], Tensor)) or self.of(args[0]).given:
            raise NotElementwiseError(f"torch's `{name}` writes to what the function was given")
        return name.rstrip("_")

    def _described(self, value: Any) -> str:
        """What an operation was given, comparable between two runs."""
        if isinstance(value, Tensor):
            return f"tensor {self.of(value).number}"
        if isinstance(value, (list, tuple)):
            shape = len(value) == 1 and isinstance(value[0], int) and value[0] == self.size
            return "a slice's length" if shape else f"[{', '.join(map(self._described, value))}]"
        return repr(value)

    def _node(self, call: Call, kind: Kind, result: Tensor, known: Sequence[Known]) -> Node | None:
        """The loop's operation for a result, if there is one."""
        nodes = [k.node for k in known]
        try:
            if result.ndim == 1 and not kind.each and call.name != "stack":
                raise UntraceableError(f"there is no loop for torch's `{call.name}` of several numbers at once")
            whole = [node for node in nodes if node is not None]
            return _translate(call, result, whole) if len(whole) == len(nodes) else None
        except UntraceableError as error:
            self.lacking = self.lacking or str(error)
            return None


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors among the arguments of an operation, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _translate(call: Call, result: Tensor, nodes: Sequence[Node]) -> Node:
    """The loop's operation for torch's. nodes: of its tensors, in order. Raises UntraceableError."""
    op, dtype, each = call.name, NAMES.get(result.dtype), result.ndim == 1
    if dtype is None:
        raise UntraceableError(f"there is no loop for {result.dtype}")
    if op in SAME or (op == "expand" and call.args[0].ndim == 0):
        return nodes[0]
    if op == "_to_copy":
        return _as(nodes[0], dtype)
    if dtype not in FLOATS | INTEGERS | BOOLS:
        raise UntraceableError(f"there is no loop that computes in {dtype}")
    if op in CREATED:
        return _constant(filled(call), dtype)
    if op in ("select", "unbind") and nodes[0].op == "state":
        at = int(call.args[2]) if op == "select" else [id(r) for r in call.results].index(id(result))
        length = call.args[0].shape[0]
        return Node("state", (int(cast(int, nodes[0].args[0])) + at % length,), "float32", False)
    if op == "stack":
        return Node("stack", tuple(nodes), dtype, False)
    if op == "sum":
        return _as(Node("count", (nodes[0],), "int32", False), dtype)
    if op == "cumsum":
        return Node("index", (), "int64", True)
    return _computed(call, dtype, each, nodes)


def _computed(call: Call, dtype: DType, each: bool, nodes: Sequence[Node]) -> Node:
    """Of an operation of arithmetic or logic. Numbers among its arguments become constants."""
    op, lacking = call.name, UntraceableError(f"there is no loop for torch's `{call.name}`")
    following = iter(nodes)
    values = [next(following) if isinstance(a, Tensor) else a for a in call.args]
    if op == "where":
        mask, *chosen = (v if isinstance(v, Node) else _constant(v, dtype) for v in values)
        return Node("where", (mask, *(_as(v, dtype) for v in chosen)), dtype, each)
    if op == "sign" and dtype not in BOOLS:
        zero, one, minus = (_constant(v, dtype) for v in (0, 1, -1))
        positive, negative = (Node(c, (nodes[0], zero), "bool", each) for c in ("gt", "lt"))
        return Node("where", (positive, one, Node("where", (negative, minus, zero), dtype, each)), dtype, each)
    if op == "neg" and dtype in INTEGERS:
        return Node("sub", (_constant(0, dtype), nodes[0]), dtype, each)
    if op in UNARY and nodes[0].dtype == dtype and dtype in UNARY[op][1]:
        return Node(UNARY[op][0], (nodes[0],), dtype, each)
    if op in BINARY and len(values) == 2 and call.kwargs.get("alpha", 1) == 1 and "rounding_mode" not in call.kwargs:
        word, types = LOGICAL[op] if dtype in BOOLS and op in LOGICAL else BINARY[op]
        taken = NAMES.get(torch.result_type(*call.args)) if op in COMPARISONS else dtype
        if taken in types:
            pair = (_as(v if isinstance(v, Node) else _constant(v, taken), taken) for v in values)
            return Node(word, tuple(pair), dtype, each)
    raise lacking


def _constant(value: object, dtype: DType) -> Node:
    if not isinstance(value, (int, float)):
        raise UntraceableError(f"there is no loop for the number {value!r}")
    return Node("constant", (value,), dtype, False)


def _as(node: Node, dtype: DType) -> Node:
    if node.dtype == dtype:
        return node
    if node.op == "constant":
        return Node("constant", node.args, dtype, False)
    known = (node.dtype, dtype) in CASTS or {node.dtype, dtype} == {"bfloat16", "float32"}
    # What an integer is made of an element may be too large for it: undefined in LLVM.
    if not known or ((node.dtype, dtype) == ("float32", "int64") and node.each):
        raise UntraceableError(f"there is no loop that makes {dtype} of {node.dtype}")
    return Node("cast", (node,), dtype, node.each)


@dataclass(frozen=True)
class Watched:
    """One run of a function. did: its operations. loop: None where there is none, for the reason `lacking`."""

    did: Sequence[tuple[str, ...]]
    loop: Loop | None
    lacking: str | None


def _watched(function: Fused, types: Sequence[DType], state: Mapping[str, tuple[int, ...]], run: int) -> Watched:
    """Run a function on a slice of its own length, numbers and place. run: of `RUNS`. Raises NotElementwiseError."""
    taken = {torch.Size(shape).numel() for shape in state.values()} | {len(types)}
    size = next(size for size in RUNS[run][0] if size not in taken)
    watch = _Watch(size)
    slices = [
        torch.linspace(run - 1.0 - k, 2.0 * run + 2.0, size).to(torch_dtype(name)) for k, name in enumerate(types)
    ]
    for k, each in enumerate(slices):
        watch.meet(each, Kind(each=True), Node("input", (k,), types[k], True), given=True)
    numbers, offset = {}, 0
    for name, shape in state.items():
        numbers[name] = torch.arange(1.0 + run, 1.0 + run + torch.Size(shape).numel()).reshape(shape)
        watch.meet(numbers[name], Kind(), Node("state", (offset,), "float32", False), given=True)
        offset += numbers[name].numel()
    position = torch.tensor(RUNS[run][1])
    watch.meet(position, Kind(position=1), Node("position", (), "int64", False), given=True)
    given = [each.clone() for each in (*slices, *numbers.values(), position)]
    with watch, _Within():
        outputs = function(slices, dict(numbers), position)
    if not all(map(torch.equal, given, (*slices, *numbers.values(), position))):
        raise NotElementwiseError("it writes to what it was given, past torch")
    result, counters = (watch.of(output) for output in outputs)
    watch.did.append(("return", f"tensor {result.number}"))
    if not result.kind.each or result.kind.is_cut:
        raise NotElementwiseError("its result is not one value for every element, wherever a slice begins")
    loop, lacking = None, watch.lacking
    if result.node is not None and counters.node is not None:
        if result.node.each:
            loop = Loop(tuple(types), offset, result.node, cast("tuple[Node, ...]", counters.node.args))
        else:
            lacking = "its result is the same for every element"
    return Watched(watch.did, loop, lacking)


def trace(function: Fused, types: Sequence[DType], state: Mapping[str, tuple[int, ...]]) -> Loop:
    """The loop of a fused function (`fuse`).

    types: of the operands, as stored. state: shape by name, () or (experts,); its numbers lie behind each other in this
    order. Raises NotElementwiseError, UntraceableError.
    """
    first, *others = (_watched(function, types, state, run) for run in range(len(RUNS)))
    for other in others:
        _compare(first.did, other.did)
    if first.loop is None:
        raise UntraceableError(first.lacking)
    return first.loop


def _compare(one: Sequence[tuple[str, ...]], other: Sequence[tuple[str, ...]]) -> None:
    """Raises NotElementwiseError where two runs of a function did not do the same."""
    past = "something follows, past torch, from a slice's length, place or values, or from when it is asked"
    for (op, *given), (instead, *others) in zip_longest(one, other, fillvalue=("nothing",)):
        if op != instead:
            raise NotElementwiseError(f"it does `{op}` with one slice and `{instead}` with another: {past}")
        for a, b in zip_longest(given, others, fillvalue="nothing"):
            if a != b:
                raise NotElementwiseError(f"torch's `{op}` gets {a} with one slice and {b} with another: {past}")
