"""The analysis' kernels and sums by hand, on three to six numbers; names of layers; what is warned of."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from ties_dist.analysis.figures import Analysis, ExpertAnalysis, Interference, Magnitudes, Trim, advise
from ties_dist.analysis.loops import BUCKETS, compare, measure, multiply, widen
from ties_dist.analysis.summing import natural, place
from ties_dist.analysis.tally import Buckets, TensorTally, as_floats, exact
from ties_dist.recipe.values import find_layer


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("stored", [lambda v: v, bfloat16], ids=["float32", "bfloat16"])
def test_a_delta_is_counted_in_its_bucket_and_at_its_thresholds(stored) -> None:  # type: ignore[no-untyped-def]
    base = np.array([1, 1, 1, 1, 1, 1], np.float32)
    expert = np.array([1, 1.5, 0.5, 3, -1, 1.25], np.float32)  # deltas 0, .5, -.5, 2, -2, .25
    thresholds = np.array([0, bits(0.5), bits(2)], np.int32)
    buckets = Buckets(tuple(thresholds.tolist()))
    counts, significands = np.zeros((2, buckets.count), np.int64)
    deltas, levels = np.empty(6, np.float32), np.empty(6, np.int8)
    measure(stored(base), stored(expert), thresholds, counts, significands, deltas, levels)
    assert deltas.tolist() == [0, 0.5, -0.5, 2, -2, 0.25]
    assert levels.tolist() == [0, 2, -2, 3, -3, 1]
    starts, masses = buckets.starts, buckets.masses(significands)
    found = {int(starts[i]): (int(counts[i]), float(masses[i])) for i in np.flatnonzero(counts)}
    assert found == {0: (1, 0), bits(0.25): (1, 0.25), bits(0.5): (2, 1.0), bits(2): (2, 4.0)}
    assert counts.sum() == 6


def test_thresholds_that_share_their_upper_bits_are_told_apart() -> None:
    thresholds = np.array([0, bits(1.01), bits(1.01), bits(1.02)], np.int32)
    base, expert = np.zeros(5, np.float32), np.array([1, 1.01, 1.015, 1.02, 1.03], np.float32)
    buckets = Buckets(tuple(thresholds.tolist()))
    counts, significands = np.zeros((2, buckets.count), np.int64)
    levels = np.empty(5, np.int8)
    measure(base, expert, thresholds, counts, significands, np.empty(5, np.float32), levels)
    assert levels.tolist() == [1, 3, 3, 4, 4]
    starts = buckets.starts
    for value, at_least, above in [(1.01, 4, 3), (1.02, 2, 1)]:
        assert counts[np.searchsorted(starts, bits(value)) :].sum() == at_least
        assert counts[np.searchsorted(starts, bits(value) + 1) :].sum() == above


def test_the_smallest_and_the_largest_numbers_have_their_mass() -> None:
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    expert = np.array([tiny, 3 * tiny, -huge], np.float32)
    buckets = Buckets((0,))
    counts, significands = np.zeros((2, buckets.count), np.int64)
    thresholds = np.zeros(1, np.int32)
    measure(
        np.zeros(3, np.float32), expert, thresholds, counts, significands, np.empty(3, np.float32), np.empty(3, np.int8)
    )
    masses = buckets.masses(significands)
    assert masses[masses > 0].tolist() == [4 * float(tiny), float(huge)]


def test_signs_are_compared_after_trimming() -> None:
    # Levels: how many of the densities 1 and 0.5 keep the entry, with its sign.
    deltas = np.array([[4, 1, -3, 0], [-4, -1, 1, 2], [2, 3, -3, 0]], np.float32)
    levels = np.array([[2, 1, -2, 0], [-2, -1, 1, 2], [2, 2, -2, 0]], np.int8)
    conflicts, signs, sums = np.zeros((3, 3), np.int64), np.zeros((4, 4), np.int64), np.zeros((4, 4, 3))
    compare(deltas, levels, 1, conflicts, signs, sums)  # the figures are of what both densities keep
    # Of two experts: the first parameter conflicts at both densities, the second and third at density 1 alone.
    assert conflicts[1].tolist() == [1, 2, 1]
    assert conflicts[2].tolist() == [1, 2, 1]
    assert {(p, n): int(signs[p, n]) for p, n in np.argwhere(signs)} == {(2, 1): 1, (1, 0): 2, (0, 2): 1}
    # (4 - 4 + 2) / 3 of all; of the survivors the same; of those with the sign of their sum (4 + 2) / 2.
    assert sums[2, 1].tolist() == pytest.approx([2 / 3, 2 / 3, 3])
    # -3, 1 untrimmed, -3: (3 - 1 + 3) / 3, then 6 / 2.
    assert sums[0, 2].tolist() == pytest.approx([5 / 3, 3, 3])
    # Columns two and four have one survivor each, 3 and 2: plain means (1 - 1 + 3) / 3 and 2 / 3.
    assert sums[1, 0].tolist() == pytest.approx([1 + 2 / 3, 5, 5])


def test_an_exact_cancellation_is_taken_as_positive() -> None:
    signs, sums = np.zeros((3, 3), np.int64), np.zeros((3, 3, 3))
    deltas, levels = np.array([[2], [-2]], np.float32), np.array([[1], [-1]], np.int8)
    compare(deltas, levels, 0, np.zeros((2, 2), np.int64), signs, sums)
    assert sums[1, 1].tolist() == [0, 0, 2]


@pytest.mark.parametrize("size", [0, 1, 256, 1500])
def test_products_and_widening_are_those_of_numpy(size: int) -> None:
    rows = np.random.default_rng(size).standard_normal((3, size)).astype(np.float32)
    gram = np.zeros((3, 3))
    multiply(rows, gram)
    wide = rows.astype(np.float64)
    assert np.allclose(gram, np.triu(wide @ wide.T), rtol=1e-12, atol=1e-12)
    out = np.empty(size, np.float32)
    widen(bfloat16(rows[0].copy()), out)
    assert np.array_equal(out.view(np.uint32), rows[0].view(np.uint32) & 0xFFFF0000)


def test_sums_are_exact_in_any_order() -> None:
    values = np.array([1e300, 0.1, -1e300, 5e-324])
    assert sum(exact(values)) == Fraction(0.1) * 2**1074 + 1
    assert as_floats([sum(exact(values))]).tolist() == [0.1]
    assert exact(np.array([np.nan, np.inf])) == [0, 0]


def test_tallies_of_a_tensor_add_up_cell_by_cell() -> None:
    def tally(cells: list[int], counts: list[int]) -> TensorTally:
        return TensorTally(
            np.array(cells), np.array(counts), np.array(counts) * 10, np.ones((1, 2), np.int64), [1, 2, 3, 4]
        )

    total = tally([1, 5], [2, 3])
    total.add(tally([0, 5], [7, 1]))
    counts, significands = total.dense(1, BUCKETS)
    assert {int(i): (int(counts[0, i]), int(significands[0, i])) for i in np.flatnonzero(counts)} == {
        0: (7, 70),
        1: (2, 20),
        5: (4, 40),
    }
    assert total.gram == [2, 4, 6, 8] and total.conflicts.tolist() == [[2, 2]]


@pytest.mark.parametrize(
    ("tensor", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "layers.3", "self_attn.q_proj"),
        ("model.layers.3.self_attn.q_proj.bias", "layers.3", "self_attn.q_proj.bias"),
        ("model.layers.11.block_sparse_moe.experts.7.w1.weight", "layers.11", "block_sparse_moe.experts.*.w1"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0", "layer.*.DenseReluDense.wi"),
        ("model.embed_tokens.weight", "outside of layers", "embed_tokens"),
        ("lm_head.weight", "outside of layers", "lm_head"),
    ],
)
def test_layer_and_kind_are_read_off_a_name(tensor: str, layer: str, kind: str) -> None:
    assert place(tensor) == (layer, kind)
    assert ".".join(filter(None, find_layer(tensor))) == tensor


def test_layers_are_listed_in_their_order() -> None:
    assert sorted(["layers.10", "layers.9", "embed"], key=natural) == ["embed", "layers.9", "layers.10"]


def an_expert(name: str, **values: object) -> ExpertAnalysis:
    trim = Trim(
        density=0.2, asked_fraction=0.2, rank=20, threshold=0.1, exact=True, above=10, equal=10, kept=20,
        kept_fraction=0.2, tie_fraction=0.001, mass_fraction=0.5,
    )  # fmt: skip
    magnitudes = Magnitudes(starts=(), counts=(), top_entries=(), top_mass=())
    usual = ExpertAnalysis(
        name=name, norm=1.0, relative_norm=0.02, base_cosine=0.999, mass=1.0, zeros=0, zero_fraction=0.0,
        of_moved=False, trims=(trim,), magnitudes=magnitudes,
    )  # fmt: skip
    tied = values.pop("trim", {})
    assert isinstance(tied, dict)
    return replace(usual, trims=(replace(trim, **tied),), **values)  # type: ignore[arg-type]


def warned(*experts: ExpertAnalysis, cosine: float = 0.1, trims: bool = True) -> list[tuple[str, str]]:
    cosines = tuple(tuple(1.0 if i == j else cosine for j in range(len(experts))) for i in range(len(experts)))
    found = Analysis(
        base="base", method="ties", elements=100, density=0.2, densities=(0.2,), experts=experts, conflicts=(),
        cosines=cosines, interference=Interference(influence=(), agreement=()), layers=(), kinds=(), tensors=(),
    )  # fmt: skip
    return [(each.kind, each.subjects[0]) for each in advise(found, trims=trims)]


def test_ordinary_experts_are_not_warned_of() -> None:
    assert warned(an_expert("a"), an_expert("b", norm=3.0)) == []


def test_warnings_name_what_is_out_of_the_ordinary() -> None:
    a, b = an_expert("a"), an_expert("b")
    assert warned(a, an_expert("x", norm=5.0), b) == [("dominating", "x")]
    assert warned(a, an_expert("x", relative_norm=0.6, base_cosine=0.1)) == [("unrelated", "x")]
    assert warned(a, an_expert("x", norm=0.0)) == [("empty", "x")]
    assert warned(a, b, cosine=0.99995) == [("twin", "b")]
    tied = an_expert("x", trim={"kept_fraction": 0.39, "tie_fraction": 0.24})
    assert warned(a, tied) == [("ties", "x")]
    assert warned(a, tied, trims=False) == []
    untrimmed = an_expert("x", trim={"threshold": 0.0, "kept_fraction": 0.1})
    assert warned(a, untrimmed) == [("untrimmed", "x")]
    assert warned(a, untrimmed, trims=False) == []
    whole = an_expert("x", trim={"threshold": 0.0, "rank": 0, "kept_fraction": 0.1})  # density 1
    assert warned(a, whole) == []
    of_moved = an_expert("x", of_moved=True, trim={"asked_fraction": 0.02, "kept_fraction": 0.05, "tie_fraction": 0.03})
    assert warned(a, of_moved) == [("ties", "x")]
