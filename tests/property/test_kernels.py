"""The compiled loop has eager's bits, at every size, type and oddity; counters too."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ties_dist.kernels.merge import OVERFLOWS_FROM, SMALL_SLICE, MergeKernel, has_compiler
from ties_dist.methods import Cut, Linear, Method, TaskArithmetic, Ties

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernels(method: Method) -> tuple[MergeKernel, MergeKernel]:
    return (MergeKernel(method, "eager", operand_elements=0), MergeKernel(method, "compiled", operand_elements=0))


@pytest.fixture(scope="module")
def compiler() -> None:
    if not has_compiler():
        pytest.skip("no C++ compiler here")


def values(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of all magnitudes, with exact ties, zeros of both signs and subnormals among them."""
    draw = torch.Generator().manual_seed(seed)
    numbers = torch.randn(n, generator=draw) * 10.0 ** torch.randint(-3, 2, (n,), generator=draw)
    numbers[::7] = 0.5
    numbers[3::11] = 0.0
    numbers[5::13] = -0.0
    numbers[6::17] = 1e-40
    return numbers.to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_ties_equals_eager_bit_for_bit(compiler: None, dtype: torch.dtype) -> None:
    method = Ties()
    eager, compiled = kernels(method)
    for n in (0, 1, 2, SMALL_SLICE - 1, SMALL_SLICE, SMALL_SLICE + 17, 100_003):
        base = values(n, dtype, 0)
        experts = [values(n, dtype, i) for i in (1, 2, 3)]
        cuts = [Cut(threshold=0.25, keep=0.25), Cut(threshold=0.5, keep=0.5000001), Cut(threshold=0.0, keep=1e-45)]
        for majority in (1, -1):
            state = method.state({"lambda": 0.7}, [{"weight": w} for w in (1.0, 0.3, 0.0)], cuts, majority)
            results = []
            for kernel in (eager, compiled):
                out = torch.full((n,), 7.0).to(dtype)
                results.append((kernel(base, experts, [], state, 0, out).tolist(), out))
            assert results[0][0] == results[1][0]
            assert results[0][1].view(torch.uint8).equal(results[1][1].view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        TaskArithmetic(),
        Linear(),
        Ties(elect="count", aggregate="max", zero_sign="drop"),
        Ties(elect="none", aggregate="average"),
        Ties(weight_before_elect=False, divide_by="count", zero_sign="positive"),
    ],
    ids=lambda m: f"{m.name}-{getattr(m, 'aggregate', '')}",
)
def test_compiled_methods_equal_eager_on_mixed_types(compiler: None, method: Method) -> None:
    n = 3 * SMALL_SLICE + 5
    base, experts = values(n, torch.float32, 0), [values(n, torch.bfloat16, 1), values(n, torch.float16, 2)]
    cuts = [Cut(threshold=0.3, keep=0.3)] * 2
    weights = [{"weight": 0.9}, {"weight": -1.7 if method.name != "linear" else 1.7}]
    state = method.state({"lambda": 1.3}, weights, cuts, 1)
    outs, counts = [], []
    for kernel in kernels(method):
        out = torch.empty(n, dtype=torch.bfloat16)
        counts.append(kernel(base, experts, [], state, 0, out).tolist())
        outs.append(out)
    assert counts[0] == counts[1]
    assert outs[0].view(torch.int16).equal(outs[1].view(torch.int16))


@pytest.mark.parametrize("kind", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_inf_and_overflow_are_counted(compiler: None, kind: str, dtype: torch.dtype) -> None:
    n = SMALL_SLICE
    limit = OVERFLOWS_FROM[dtype]
    base, expert = torch.zeros(n), torch.zeros(n)
    base[0], expert[1], expert[2], expert[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    if dtype != torch.float32:
        below = torch.nextafter(torch.tensor(limit), torch.tensor(0.0))
        expert[4], expert[5] = limit, below
        assert torch.isinf(expert[4].to(dtype))
        assert torch.isfinite(below.to(dtype))
    kernel = MergeKernel(Linear(), kind, operand_elements=0)  # type: ignore[arg-type]
    state = Linear().state({}, [{"weight": 1.0}], [], 1)
    counts = kernel(base, [expert], [], state, 0, torch.empty(n, dtype=dtype)).tolist()
    assert counts == [1, 3, 3 + (dtype != torch.float32)]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 300), cuts=st.lists(st.integers(0, 300), max_size=4), seed=st.integers(0, 2**16))
def test_results_and_counts_do_not_depend_on_how_a_slice_is_cut(n: int, cuts: list[int], seed: int) -> None:
    method = Ties()
    kernel = MergeKernel(method, "eager", operand_elements=0)
    base, experts = values(n, torch.bfloat16, seed), [values(n, torch.bfloat16, seed + i) for i in (1, 2)]
    state = method.state({"lambda": 1.0}, [{"weight": 1.0}] * 2, [Cut(threshold=0.5, keep=0.5)] * 2, 1)
    whole = torch.empty(n, dtype=torch.bfloat16)
    expected = kernel(base, experts, [], state, 0, whole)
    pieces, total = torch.empty(n, dtype=torch.bfloat16), torch.zeros_like(expected)
    bounds = sorted({0, n, *(min(c, n) for c in cuts)})
    for start, stop in itertools.pairwise(bounds):
        total += kernel(base[start:stop], [e[start:stop] for e in experts], [], state, start, pieces[start:stop])
    assert total.equal(expected) or n == 0
    assert pieces.view(torch.int16).equal(whole.view(torch.int16))
