"""From a method's plain torch function to the graph of its loop: the function is run once, on tiny tensors, watched.

torch's dispatcher is asked what it is told to do, operation by operation, so a method may be written in any way that
torch runs. An operation that is not known here raises `UntraceableError`, and the method runs eagerly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ties_dist.compiler.fuse import Fused
from ties_dist.compiler.loop import COMPARISONS, Loop, Node
from ties_dist.dtypes import LOOP_BYTES, DType, torch_dtype

SIZE = 7
"""Elements of the slice that is traced; no method may ask for it."""
NAMES: dict[torch.dtype, DType] = {torch_dtype(name): name for name in LOOP_BYTES}
BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div",
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "logical_and": "and", "logical_or": "or",
    "__rshift__": "shr", "bitwise_right_shift": "shr",
}  # fmt: skip
UNARY = {"abs": "abs", "neg": "neg", "sqrt": "sqrt", "bitwise_not": "not", "logical_not": "not"}
FILLED = {"zeros_like": 0, "ones_like": 1, "zeros": 0, "ones": 1}


class UntraceableError(Exception):
    """A method does something for which there is no loop."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records every operation as a node of its result. Tensors are kept: an address must not be given out twice."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: dict[int, Node] = {}
        self._kept: list[Tensor] = []

    def name(self, tensor: Tensor, node: Node) -> None:
        self.nodes[id(tensor)] = node
        self._kept.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        op = func._schema.name.partition("::")[2]
        if not isinstance(result, Tensor):
            raise UntraceableError(f"there is no loop for torch's `{op}`")
        self.name(result, self._node(op, args, kwargs or {}, result))
        return result

    def _node(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> Node:
        dtype, each = NAMES.get(result.dtype), result.ndim == 1
        if dtype is None:
            raise UntraceableError(f"{op} gives {result.dtype}")
        if op in ("detach", "alias", "clone", "lift_fresh"):
            return self.of(args[0])
        if op in FILLED:
            return Node("constant", (FILLED[op],), dtype, False)
        if op in ("scalar_tensor", "full", "full_like"):
            return Node("constant", (args[0] if op == "scalar_tensor" else args[1],), dtype, False)
        if op == "select":
            known, at = self.of(args[0]), int(args[2])
            if known.op != "state" or each:
                raise UntraceableError("only numbers of the state are picked out by index")
            return Node("state", (int(cast(int, known.args[0])) + at,), "float32", False)
        if op == "stack":
            return Node("stack", tuple(self.of(a) for a in args[0]), dtype, False)
        if op == "sum" and kwargs.get("dtype") == torch.int32 and self.of(args[0]).dtype == "bool":
            return Node("count", (self.of(args[0]),), "int32", False)
        if op == "cumsum" and (ones := self.of(args[0])).op == "constant" and ones.args == (1,):
            return Node("index", (), "int64", True)
        if op == "_to_copy":
            return Node("cast", (self.of(args[0]),), dtype, each)
        if op == "sign":
            value = self.of(args[0])
            zero, one, minus = (Node("constant", (v,), dtype, False) for v in (0, 1, -1))
            positive, negative = (Node(c, (value, zero), "bool", each) for c in ("gt", "lt"))
            return Node("where", (positive, one, Node("where", (negative, minus, zero), dtype, each)), dtype, each)
        if op in UNARY:
            return Node(UNARY[op], (self.of(args[0]),), dtype, each)
        if op == "where":
            mask, *values = (self.of(a, dtype) for a in args)
            return Node("where", (mask, *(self._as(v, dtype) for v in values)), dtype, each)
        if (op in BINARY or op in COMPARISONS) and kwargs.get("alpha", 1) == 1 and "rounding_mode" not in kwargs:
            given = [a.dtype for a in args[:2] if isinstance(a, Tensor)]
            common = NAMES[torch.promote_types(given[0], given[-1])] if op in COMPARISONS else dtype
            pair = tuple(self._as(self.of(a, common), common) for a in args[:2])
            return Node(BINARY.get(op, op), pair, dtype, each)
        raise UntraceableError(f"there is no loop for torch's `{op}`")

    def of(self, value: Any, dtype: DType = "float32") -> Node:
        """The node of a tensor or of a plain number."""
        if not isinstance(value, Tensor):
            return Node("constant", (value,), dtype, False)
        if id(value) not in self.nodes:
            raise UntraceableError("a tensor comes from outside of the function")
        return self.nodes[id(value)]

    @staticmethod
    def _as(node: Node, dtype: DType) -> Node:
        if node.dtype == dtype:
            return node
        if node.op == "constant":
            return Node("constant", node.args, dtype, False)
        return Node("cast", (node,), dtype, node.each)


def trace(function: Fused, types: Sequence[DType], state: Mapping[str, tuple[int, ...]]) -> Loop:
    """The loop of a fused function (`eager.fuse`).

    types: of the operands, as stored. state: shape by name, () or (experts,); its numbers lie behind each other in this
    order. Raises UntraceableError.
    """
    watch = _Watch()
    slices = [torch.zeros(SIZE, dtype=torch_dtype(name)) for name in types]
    for k, each in enumerate(slices):
        watch.name(each, Node("input", (k,), types[k], True))
    numbers, offset = {}, 0
    for name, shape in state.items():
        numbers[name] = torch.ones(shape)
        watch.name(numbers[name], Node("state", (offset,), "float32", False))
        offset += numbers[name].numel()
    position = torch.tensor(0)
    watch.name(position, Node("position", (), "int64", False))
    with watch:
        result, counters = (watch.of(output) for output in function(slices, numbers, position))
    if not result.each or counters.op != "stack":
        raise UntraceableError("the result must differ by element, and counters be counts of elements")
    return Loop(tuple(types), offset, result, cast("tuple[Node, ...]", counters.args))
