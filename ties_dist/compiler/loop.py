"""The loop of one merge kernel: a small typed graph, and its LLVM IR for a processor or a GPU.

Why not `torch.compile`: for one elementwise loop it costs 10 to 20 s of compiling, 3 s in every later process, a C++
compiler on the machine, and a wrapper that keeps the GIL. This IR compiles in a fraction of a second with the LLVM that
numba brings, is loaded from disk in milliseconds, without torch, and runs as fast (benchmarks/results).

Bits: every operation is IEEE-754 float32, rounded to nearest even, with no fast-math flag, so that nothing is
contracted, reassociated or approximated, whatever the vector width, instruction set or kind of device.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ties_dist.dtypes import LLVM_TYPES, LOOP_BYTES, DType

COMPARISONS = {"gt": "ogt", "ge": "oge", "lt": "olt", "le": "ole", "eq": "oeq", "ne": "une"}
INTEGER_COMPARISONS = {"gt": "sgt", "ge": "sge", "lt": "slt", "le": "sle", "eq": "eq", "ne": "ne"}
FLOAT_BINARY = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv"}
CASTS = {
    ("float16", "float32"): "fpext",
    ("float32", "float16"): "fptrunc",
    ("bool", "float32"): "uitofp",
    ("bool", "int32"): "zext",
    ("bool", "int64"): "zext",
    ("int32", "float32"): "sitofp",
    ("int32", "int64"): "sext",
    ("int64", "float32"): "sitofp",
    ("float32", "int64"): "fptosi",
}
"""One instruction each; between bfloat16 and float32 it takes several."""
INTEGER_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor", "shr": "ashr"}


@dataclass(frozen=True, eq=False)
class Node:
    """One operation. each: whether it has a value per element of the slice, or one for all of it.

    op: 'input' (k-th slice), 'state' (k-th float32 number), 'position' (of the slice's first element), 'index' (of each
    element in its slice, from 1), 'constant', 'cast', 'where', 'abs', 'neg', 'sqrt', 'not', 'count' (of true elements),
    a comparison or a binary operation.
    """

    op: str
    args: tuple[Node | float | int, ...]
    dtype: DType
    each: bool

    @property
    def counts(self) -> bool:
        """Whether it needs the whole slice: a count, or something computed from one."""
        return self.op == "count" or any(isinstance(a, Node) and a.counts for a in self.args)


@dataclass(frozen=True)
class Loop:
    """A whole kernel. inputs: types as stored; state: how many float32 numbers; counters: 0-d integers."""

    inputs: tuple[DType, ...]
    state: int
    result: Node
    counters: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Target:
    """lanes: elements at once. Loads are as aligned as stated, in bytes; 0: as their type."""

    triple: str
    layout: str
    lanes: int
    gpu: bool = False


class _Body:
    """Writes the instructions of some nodes at one vector width; values are named once."""

    def __init__(self, prefix: str, lanes: int, known: dict[Node, str], pointers: Sequence[str], aligned: bool) -> None:
        self.prefix, self.lanes, self.known, self.pointers, self.aligned = prefix, lanes, dict(known), pointers, aligned
        self.lines: list[str] = []
        self.index = "0"
        self._splats: dict[str, str] = {}

    def type(self, dtype: DType, each: bool = True) -> str:
        return f"<{self.lanes} x {LLVM_TYPES[dtype]}>" if each and self.lanes > 1 else LLVM_TYPES[dtype]

    def emit(self, instruction: str) -> str:
        name = f"%{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {instruction}")
        return name

    def value(self, node: Node, each: bool) -> str:
        """The name of a node's value; of one for the whole slice, where `each`, as a vector of it."""
        if node not in self.known:
            self.known[node] = self.constant(node) if node.op == "constant" else self._write(node)
        name = self.known[node]
        return self.splat(name, node.dtype) if each and not node.each and self.lanes > 1 else name

    def splat(self, name: str, dtype: DType) -> str:
        if name not in self._splats:
            scalar = LLVM_TYPES[dtype]
            vector = f"<{self.lanes} x {scalar}>"
            one = self.emit(f"insertelement {vector} poison, {scalar} {name}, i32 0")
            self._splats[name] = self.emit(
                f"shufflevector {vector} {one}, {vector} poison, <{self.lanes} x i32> zeroinitializer"
            )
        return self._splats[name]

    def constant(self, node: Node) -> str:
        return literal(node.args[0], node.dtype)

    def number(self, bits: int, each: bool) -> str:
        """An integer literal, for every lane where `each`."""
        return f"splat (i32 {bits})" if each and self.lanes > 1 else str(bits)

    def _write(self, node: Node) -> str:
        each, kind = node.each, self.type(node.dtype, node.each)
        if node.op == "input":
            return self._load(int(node.args[0]), node.dtype)  # type: ignore[arg-type]
        if node.op == "index":
            ones = [f"i64 {lane + 1}" for lane in range(self.lanes)]
            if self.lanes == 1:
                return self.emit(f"add i64 {self.index}, 1")
            first = self.emit(f"insertelement {kind} poison, i64 {self.index}, i32 0")
            spread = f"shufflevector {kind} {first}, {kind} poison, <{self.lanes} x i32> zeroinitializer"
            return self.emit(f"add {kind} {self.emit(spread)}, <{', '.join(ones)}>")
        operands = [a for a in node.args if isinstance(a, Node)]
        names = [self.value(a, each) for a in operands]
        taken = operands[0].dtype
        source = self.type(taken, each)
        if node.op == "cast":
            return self._cast(names[0], taken, node.dtype, each)
        if node.op == "where":
            mask, yes, no = names
            return self.emit(f"select {self.type('bool', each)} {mask}, {kind} {yes}, {kind} {no}")
        if node.op in COMPARISONS:
            word = f"fcmp {COMPARISONS[node.op]}" if taken == "float32" else f"icmp {INTEGER_COMPARISONS[node.op]}"
            return self.emit(f"{word} {source} {names[0]}, {names[1]}")
        if node.op in ("abs", "sqrt"):
            suffix = f"v{self.lanes}f32" if each and self.lanes > 1 else "f32"
            return self.emit(f"call {kind} @llvm.{'fabs' if node.op == 'abs' else 'sqrt'}.{suffix}({kind} {names[0]})")
        if node.op == "neg":
            return self.emit(f"fneg {kind} {names[0]}")
        if node.op == "not":
            return self.emit(f"xor {kind} {names[0]}, {'splat (i1 true)' if each and self.lanes > 1 else 'true'}")
        word = (FLOAT_BINARY if node.dtype == "float32" else INTEGER_BINARY)[node.op]
        return self.emit(f"{word} {kind} {names[0]}, {names[1]}")

    def _load(self, place: int, dtype: DType) -> str:
        address = self.emit(f"getelementptr {LLVM_TYPES[dtype]}, ptr {self.pointers[place]}, i64 {self.index}")
        # Tensors may start at any byte of a file; what is copied to a GPU is laid out by us.
        align = LOOP_BYTES[dtype] if self.aligned else 1
        return self.emit(f"load {self.type(dtype)}, ptr {address}, align {align}")

    def _cast(self, name: str, source: DType, target: DType, each: bool) -> str:
        words, halves, floats = (self.type(d, each) for d in ("int32", "bfloat16", "float32"))
        if (source, target) == ("bfloat16", "float32"):
            wide = self.emit(f"zext {halves} {name} to {words}")
            shifted = self.emit(f"shl {words} {wide}, {self.number(16, each)}")
            return self.emit(f"bitcast {words} {shifted} to {floats}")
        if (source, target) == ("float32", "bfloat16"):
            # Round to nearest even on the bits; the instruction of AVX512-BF16 would flush subnormal numbers.
            bits = self.emit(f"bitcast {floats} {name} to {words}")
            upper = self.emit(f"lshr {words} {bits}, {self.number(16, each)}")
            odd = self.emit(f"and {words} {upper}, {self.number(1, each)}")
            half = self.emit(f"add {words} {odd}, {self.number(0x7FFF, each)}")
            rounded = self.emit(f"add {words} {bits}, {half}")
            kept = self.emit(f"lshr {words} {rounded}, {self.number(16, each)}")
            nan = self.emit(f"fcmp uno {floats} {name}, {name}")
            masks = self.type("bool", each)
            safe = self.emit(f"select {masks} {nan}, {words} {self.number(0x7FC0, each)}, {words} {kept}")
            return self.emit(f"trunc {words} {safe} to {halves}")
        word = CASTS[source, target]
        return self.emit(f"{word} {self.type(source, each)} {name} to {self.type(target, each)}")


def literal(value: object, dtype: DType) -> str:
    """A number as LLVM IR writes it; float32 as the bits of the equal double."""
    if dtype == "float32":
        with np.errstate(over="ignore"):
            rounded = float(np.float32(float(value)))  # type: ignore[arg-type]
        return f"0x{struct.unpack('>Q', struct.pack('>d', rounded))[0]:016X}"
    return str(int(value))  # type: ignore[call-overload]


def emit(loop: Loop, target: Target) -> str:
    """LLVM IR of `void merge(ptr inputs, ptr out, ptr state, ptr counters, i64 position, i64 n)`.

    inputs: array of pointers, one per input. state: (state,) float32. counters: (counters,) int64, overwritten; on a
    GPU, where every thread has some of the elements, added to.
    """
    counts = [n for n in _in_order(loop) if n.op == "count"]
    masks: list[Node] = [n.args[0] for n in counts]  # type: ignore[misc]
    pointers = [f"%in{k}" for k in range(len(loop.inputs))]
    once, known = _once(loop)
    lines = ["entry:"]
    for k, name in enumerate(pointers):
        lines += [
            f"{name}.at = getelementptr ptr, ptr %inputs, i64 {k}",
            f"{name} = load ptr, ptr {name}.at, align 8",
        ]
    lines += once
    if target.gpu:
        lines += _gpu_loop(loop, known, pointers, masks, counts)
    else:
        lines += _cpu_loop(loop, known, pointers, masks, counts, target.lanes)
    kind = "define ptx_kernel void" if target.gpu else "define void"
    declared = "\n".join(_declarations(target))
    body = "\n".join(line if line.endswith(":") else f"  {line}" for line in lines)
    return (
        f'target triple = "{target.triple}"\ntarget datalayout = "{target.layout}"\n{declared}\n'
        f"{kind} @merge(ptr %inputs, ptr %out, ptr %state, ptr %counters, i64 %position, i64 %n) #0 {{\n{body}\n}}\n"
        'attributes #0 = { nounwind "prefer-vector-width"="512" }\n'
    )


def _in_order(loop: Loop) -> list[Node]:
    """Every node once, after what it needs."""
    seen: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in seen:
            for arg in node.args:
                if isinstance(arg, Node):
                    visit(arg)
            seen[node] = None

    for root in (loop.result, *loop.counters):
        visit(root)
    return list(seen)


def _once(loop: Loop) -> tuple[list[str], dict[Node, str]]:
    """What is computed before the loop: the numbers of the state, and what follows from them alone."""
    body = _Body("s", 1, {}, (), False)
    for node in _in_order(loop):
        if node.each or node.counts or node.op == "constant":
            continue
        if node.op == "position":
            body.known[node] = "%position"
        elif node.op == "state":
            address = body.emit(f"getelementptr float, ptr %state, i64 {node.args[0]}")
            body.known[node] = body.emit(f"load float, ptr {address}, align 4")
        else:
            body.value(node, False)
    return body.lines, body.known


def _step(
    body: _Body, loop: Loop, masks: Sequence[Node], sums: Sequence[str], index: str
) -> tuple[list[str], list[str]]:
    """One turn of a loop: the result stored, the masks added to the sums; returns lines and names of the new sums."""
    body.index = index
    value = body.value(loop.result, True)
    dtype = loop.result.dtype
    address = body.emit(f"getelementptr {LLVM_TYPES[dtype]}, ptr %out, i64 {index}")
    body.lines.append(f"store {body.type(dtype)} {value}, ptr {address}, align {LOOP_BYTES[dtype]}")
    added = []
    for mask, before in zip(masks, sums, strict=True):
        flags = body.emit(f"zext {body.type('bool')} {body.value(mask, True)} to {body.type('int32')}")
        added.append(body.emit(f"add {body.type('int32')} {before}, {flags}"))
    return body.lines, added


def _turn(
    loop: Loop, known: dict[Node, str], pointers: Sequence[str], masks: Sequence[Node], *, prefix: str, lanes: int,
    begin: Sequence[str], start: str, step: str, before: str, after: str, aligned: bool = False, bound: str = "%n",
) -> tuple[list[str], list[str]]:  # fmt: skip
    """A loop over elements from `start` while index < `bound`, in steps; returns lines and the sums' names after it."""
    body = _Body(f"{prefix}v", lanes, known, pointers, aligned)
    kind = body.type("int32")
    sums = [f"%{prefix}sum{k}" for k in range(len(masks))]
    written, added = _step(body, loop, masks, sums, f"%{prefix}i")
    # What is the same in every turn is written first: LLVM hoists the splats.
    lines = [
        f"br label %{prefix}head",
        f"{prefix}head:",
        f"%{prefix}i = phi i64 [ {start}, %{before} ], [ %{prefix}next, %{prefix}body ]",
        *(
            f"{s} = phi {kind} [ {b}, %{before} ], [ {a}, %{prefix}body ]"
            for s, b, a in zip(sums, begin, added, strict=True)
        ),
        f"%{prefix}more = icmp slt i64 %{prefix}i, {bound}",
        f"br i1 %{prefix}more, label %{prefix}body, label %{after}",
        f"{prefix}body:",
        *written,
        f"%{prefix}next = add i64 %{prefix}i, {step}",
        f"br label %{prefix}head",
        f"{after}:",
    ]
    return lines, sums


def _cpu_loop(
    loop: Loop,
    known: dict[Node, str],
    pointers: Sequence[str],
    masks: Sequence[Node],
    counts: Sequence[Node],
    lanes: int,
) -> list[str]:
    """Whole vectors, then what is left one by one, then the counters."""
    wide = [f"%wide = and i64 %n, {-lanes}"]
    main, sums = _turn(
        loop, known, pointers, masks, prefix="w", lanes=lanes, begin=["zeroinitializer"] * len(masks), start="0",
        step=str(lanes), before="entry", after="rest", bound="%wide",
    )  # fmt: skip
    reduced = [f"%r{k} = call i32 @llvm.vector.reduce.add.v{lanes}i32(<{lanes} x i32> {s})" for k, s in enumerate(sums)]
    rest, last = _turn(
        loop, known, pointers, masks, prefix="t", lanes=1, begin=[f"%r{k}" for k in range(len(masks))], start="%wide",
        step="1", before="rest", after="done",
    )  # fmt: skip
    return [*wide, *main, *reduced, *rest, *_finish(loop, known, dict(zip(counts, last, strict=True)), _overwrite)]


def _gpu_loop(
    loop: Loop, known: dict[Node, str], pointers: Sequence[str], masks: Sequence[Node], counts: Sequence[Node]
) -> list[str]:
    """Every thread takes elements a grid apart; counts are added up in the warp, then to memory."""
    lines = [
        "%tid = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()",
        "%bid = call i32 @llvm.nvvm.read.ptx.sreg.ctaid.x()",
        "%size = call i32 @llvm.nvvm.read.ptx.sreg.ntid.x()",
        "%grid = call i32 @llvm.nvvm.read.ptx.sreg.nctaid.x()",
        "%offset = mul i32 %bid, %size",
        "%first32 = add i32 %offset, %tid",
        "%first = zext i32 %first32 to i64",
        "%stride32 = mul i32 %size, %grid",
        "%stride = zext i32 %stride32 to i64",
        "%lane = and i32 %tid, 31",
        "%leads = icmp eq i32 %lane, 0",
    ]
    turns, sums = _turn(
        loop, known, pointers, masks, prefix="g", lanes=1, begin=["0"] * len(masks), start="%first", step="%stride",
        before="entry", after="done", aligned=True,
    )  # fmt: skip
    lines += turns
    names = []
    for k, name in enumerate(sums):
        for down in (16, 8, 4, 2, 1):
            shuffle = f"call i32 @llvm.nvvm.shfl.sync.down.i32(i32 -1, i32 {name}, i32 {down}, i32 31)"
            lines += [f"%r{k}.from{down} = {shuffle}", f"%r{k}.{down} = add i32 {name}, %r{k}.from{down}"]
            name = f"%r{k}.{down}"
        names.append(name)
    lines += ["br i1 %leads, label %lead, label %end", "lead:"]
    lines += _finish(loop, known, dict(zip(counts, names, strict=True)), _add_atomically)
    lines[-1] = "br label %end"
    return [*lines, "end:", "ret void"]


def _overwrite(address: str, value: str) -> str:
    return f"store i64 {value}, ptr {address}, align 8"


def _add_atomically(address: str, value: str) -> str:
    return f"{address}.old = atomicrmw add ptr {address}, i64 {value} monotonic"


def _finish(loop: Loop, known: dict[Node, str], sums: dict[Node, str], put: Callable[[str, str], str]) -> list[str]:
    """The counters, from the sums; each linear in them, so that threads may add theirs up."""
    body = _Body("f", 1, {**known, **sums}, (), False)
    for k, counter in enumerate(loop.counters):
        value = body.value(counter, False)
        wide = body.emit(f"sext i32 {value} to i64") if counter.dtype == "int32" else value
        address = body.emit(f"getelementptr i64, ptr %counters, i64 {k}")
        body.lines.append(put(address, wide))
    return [*body.lines, "ret void"]


def _declarations(target: Target) -> list[str]:
    widths = {1, target.lanes}
    lines = []
    for lanes in sorted(widths):
        kind, suffix = (f"<{lanes} x float>", f"v{lanes}f32") if lanes > 1 else ("float", "f32")
        lines += [f"declare {kind} @llvm.fabs.{suffix}({kind})", f"declare {kind} @llvm.sqrt.{suffix}({kind})"]
    if target.gpu:
        registers = ("tid", "ctaid", "ntid", "nctaid")
        lines += [f"declare i32 @llvm.nvvm.read.ptx.sreg.{r}.x()" for r in registers]
        return [*lines, "declare i32 @llvm.nvvm.shfl.sync.down.i32(i32, i32, i32, i32)"]
    return [*lines, f"declare i32 @llvm.vector.reduce.add.v{target.lanes}i32(<{target.lanes} x i32>)"]
