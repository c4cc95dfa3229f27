"""The compiled loop has eager's bits, at every size, type, alignment and oddity; counters too."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ties_dist.compiler.fuse import OVERFLOWS_FROM
from ties_dist.compiler.kernel import MergeKernel
from ties_dist.compiler.kinds import KernelKind
from ties_dist.compiler.native import KernelStore, processor
from ties_dist.compiler.slices import Slice
from ties_dist.dtypes import DType, torch_dtype
from ties_dist.methods import Cut, Found, Linear, Method, TaskArithmetic, Ties
from ties_dist.methods.base import State

DTYPES: list[DType] = ["float32", "bfloat16", "float16"]
TWO_CUTS = [Cut(threshold=0.3, keep=0.3)] * 2


def values(n: int, dtype: DType, seed: int) -> torch.Tensor:
    """Numbers of all magnitudes, with exact ties, zeros of both signs and subnormals among them."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(n, generator=draw) * 10.0 ** torch.randint(-3, 2, (n,), generator=draw)
    numbers[::7] = 0.5
    numbers[3::11] = 0.0
    numbers[5::13] = -0.0
    numbers[6::17] = 1e-40
    return numbers.to(torch_dtype(dtype))


def content(tensor: torch.Tensor, shift: int = 0) -> memoryview:
    """A tensor's bytes, `shift` bytes past an aligned address."""
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    room = np.zeros(len(raw) + 64 + shift, dtype=np.uint8)
    start = -room.ctypes.data % 64 + shift
    room[start : start + len(raw)] = np.frombuffer(raw, dtype=np.uint8)
    return memoryview(room)[start : start + len(raw)]


def slice_of(
    operands: list[memoryview], types: list[DType], state: State, position: int, out: memoryview, out_type: DType
) -> Slice:
    return Slice(operands=operands, types=tuple(types), state=state, position=position, out=out, out_type=out_type)


def run(
    kind: KernelKind, method: Method, operands: list[torch.Tensor], types: list[DType], state: State, out: DType,
    position: int = 0, shift: int = 0, store: KernelStore | None = None,
) -> tuple[list[int], bytes]:  # fmt: skip
    experts = len(operands) - (method.operand == "delta")
    kernel = MergeKernel(method, experts, kind, store or KernelStore(None))
    size = operands[0].numel() * torch_dtype(out).itemsize
    room = content(torch.full((size,), 7, dtype=torch.uint8), shift)
    (counts,) = kernel([slice_of([content(o, shift) for o in operands], types, state, position, room, out)])
    assert kernel.kind == ("eager" if kind == "eager" else "compiled")
    return [int(c) for c in counts], bytes(room)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_ties_equals_eager_bit_for_bit(dtype: DType, tmp_path: Path) -> None:
    method, lanes = Ties(), processor().lanes
    store = KernelStore(tmp_path)
    cuts = [Cut(threshold=0.25, keep=0.25), Cut(threshold=0.5, keep=0.5000001), Cut(threshold=0.0, keep=1e-45)]
    for n in (0, 1, 2, lanes - 1, lanes, lanes + 1, 4095, 100_003):
        operands = [values(n, dtype, i) for i in range(4)]
        for majority in (1, -1):
            state = method.numbers(
                {"lambda": 0.7}, [{"weight": w} for w in (1.0, 0.3, 0.0)], Found(cuts=cuts, majority=majority)
            )
            eager = run("eager", method, operands, [dtype] * 4, state, dtype)
            assert run("compiled", method, operands, [dtype] * 4, state, dtype, store=store) == eager


@pytest.mark.parametrize(
    "method",
    [
        TaskArithmetic(),
        TaskArithmetic(normalize=True),
        Linear(),
        Linear(normalize=False),
        Ties(elect="count", aggregate="max", zero_sign="drop"),
        Ties(elect="none", aggregate="average"),
        Ties(weight_before_elect=False, divide_by="count", zero_sign="positive"),
        Ties(aggregate="sum", elect="count"),
    ],
    ids=lambda m: f"{m.name}-{getattr(m, 'aggregate', '')}",
)
@pytest.mark.parametrize("out", DTYPES)
def test_compiled_methods_equal_eager_on_mixed_types(method: Method, out: DType) -> None:
    n = 3 * 4096 + 5
    types: list[DType] = ["float32", "bfloat16", "float16"][-2 if method.operand == "weight" else 0 :]  # type: ignore[assignment]
    operands = [values(n, kind, i) for i, kind in enumerate(types)]
    weights = [{"weight": 0.9}, {"weight": -1.7 if method.name != "linear" else 1.7}]
    state = method.numbers({"lambda": 1.3}, weights, Found(cuts=TWO_CUTS, majority=1))
    assert run("compiled", method, operands, types, state, out) == run("eager", method, operands, types, state, out)


def test_signs_taken_from_another_model_compile_too() -> None:
    method = Ties(oracle=True)
    operands = [values(5000, "bfloat16", i) for i in range(4)]  # base, two experts, the oracle
    state = method.numbers({"lambda": 1.0}, [{"weight": 1.0}] * 2, Found(cuts=TWO_CUTS, majority=-1))
    outs = []
    for kind in ("eager", "compiled"):
        kernel = MergeKernel(method, 2, kind)  # type: ignore[arg-type]
        room = memoryview(bytearray(10_000))
        (counts,) = kernel([slice_of([content(o) for o in operands], ["bfloat16"] * 4, state, 0, room, "bfloat16")])
        outs.append((counts.tolist(), bytes(room)))
    assert outs[0] == outs[1]


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_tensors_may_start_at_any_byte(shift: int) -> None:
    operands = [values(4099, "bfloat16", i) for i in range(3)]
    state = Ties().numbers({"lambda": 1.0}, [{"weight": 1.0}] * 2, Found(cuts=TWO_CUTS, majority=1))
    types: list[DType] = ["bfloat16"] * 3
    aligned = run("compiled", Ties(), operands, types, state, "bfloat16")
    assert run("compiled", Ties(), operands, types, state, "bfloat16", shift=shift) == aligned


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40), out=st.sampled_from(DTYPES[1:]))
def test_every_float_is_rounded_as_torch_rounds_it(bits: list[int], out: DType) -> None:
    numbers = np.array(bits, dtype=np.uint32).view(np.float32)
    numbers = numbers[np.isfinite(numbers)]
    state = Linear(normalize=False).numbers({}, [{"weight": 1.0}], Found(cuts=[], majority=1))
    _, ours = run("compiled", Linear(normalize=False), [torch.from_numpy(numbers)], ["float32"], state, out)
    expected = (torch.from_numpy(numbers) + 0.0).to(torch_dtype(out))
    assert ours == expected.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_inf_and_overflow_are_counted(kind: KernelKind, dtype: DType) -> None:
    n = 4096
    limit = OVERFLOWS_FROM[dtype]
    base, expert = torch.zeros(n), torch.zeros(n)
    base[0], expert[1], expert[2], expert[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    if dtype != "float32":
        below = torch.nextafter(torch.tensor(limit), torch.tensor(0.0))
        expert[4], expert[5] = limit, below
        assert torch.isinf(expert[4].to(torch_dtype(dtype)))
        assert torch.isfinite(below.to(torch_dtype(dtype)))
    method = TaskArithmetic()
    state = method.numbers({"lambda": 1.0}, [{"weight": 1.0}], Found(cuts=[], majority=1))
    counts, _ = run(kind, method, [base, expert], ["float32", "float32"], state, dtype)
    assert counts == [1, 3, 4 + (dtype != "float32")]


@pytest.mark.parametrize("kind", ["eager", "compiled"])
@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 300), cuts=st.lists(st.integers(0, 300), max_size=4), seed=st.integers(0, 2**16))
def test_results_and_counts_do_not_depend_on_how_a_slice_is_cut(
    kind: KernelKind, n: int, cuts: list[int], seed: int
) -> None:
    method = Ties()
    operands = [values(n, "bfloat16", seed + i) for i in range(3)]
    types: list[DType] = ["bfloat16"] * 3
    state = method.numbers(
        {"lambda": 1.0}, [{"weight": 1.0}] * 2, Found(cuts=[Cut(threshold=0.5, keep=0.5)] * 2, majority=1)
    )
    whole = run("eager", method, operands, types, state, "bfloat16")
    total, written = np.zeros(len(whole[0]), np.int64), b""
    for start, stop in itertools.pairwise(sorted({0, n, *(min(c, n) for c in cuts)})):
        counts, piece = run(kind, method, [o[start:stop] for o in operands], types, state, "bfloat16", start)
        total, written = total + np.array(counts), written + piece
    assert (total.tolist(), written) == whole or n == 0
