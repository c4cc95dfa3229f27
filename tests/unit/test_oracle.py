"""The oracle's own judges: hand calculations of a few numbers, torch's casts, and the published algorithm in torch.

Hand calculations follow Yadav et al. 2023, Algorithm 1, on deltas for which every float32 operation is exact, unless
the test is about rounding. Bases are zero unless said, so an expert is its delta.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests import oracle
from tests.oracle import Array


def model(**tensors: Sequence[float]) -> dict[str, Array]:
    return {name: np.asarray(values, dtype=np.float32) for name, values in tensors.items()}


def merge_vectors(*deltas: Sequence[float], base: Sequence[float] | None = None, **options: object) -> list[float]:
    """Merge one-tensor models given as lists; the merged values. Everything is kept unless a density is given."""
    origin = model(w=[0.0] * len(deltas[0]) if base is None else base)
    options.setdefault("density", 1.0)
    merged = oracle.ties(origin, [model(w=delta) for delta in deltas], **options)  # type: ignore[arg-type]
    values: list[float] = merged.tensors["w"].tolist()
    return values


# --- trim ---


def test_keep_all_without_ties_keeps_one_more_than_k() -> None:
    # d = 5, k = int(5 * 0.4) = 2, T = the (5 - 2) = 3rd smallest of {1, 2, 3, 4, 5} = 3; kept: 3, 4, 5.
    trim = oracle.trim(np.float32([-3, 1, 5, -2, 4]), 0.4, "keep_all")
    assert trim.threshold == 3
    assert trim.keep.tolist() == [True, False, True, False, True]
    assert trim.ties == 1


def test_exact_k_without_ties_keeps_k() -> None:
    # k = 2: T = the 2nd largest = 4.
    trim = oracle.trim(np.float32([-3, 1, 5, -2, 4]), 0.4, "exact_k")
    assert trim.threshold == 4
    assert trim.keep.tolist() == [False, False, True, False, True]


def test_keep_all_keeps_every_entry_equal_to_the_threshold() -> None:
    # d = 6, k = int(6 * 0.2) = 1, T = 5th smallest of {0, 1, 2, 2, 2, 7} = 2.
    trim = oracle.trim(np.float32([2, 0, -2, 7, 2, 1]), 0.2, "keep_all")
    assert trim.keep.tolist() == [True, False, True, True, True, False]
    assert (trim.threshold, trim.ties) == (2, 3)


def test_exact_k_cuts_ties_in_canonical_order() -> None:
    # d = 6, k = int(6 * 0.5) = 3, T = 3rd largest = 2; 7 passes, and the first two of the three entries equal to 2 fit.
    trim = oracle.trim(np.float32([2, 0, -2, 7, 2, 1]), 0.5, "exact_k")
    assert trim.keep.tolist() == [True, False, True, True, False, False]
    assert trim.ties == 3
    assert trim.ambiguous.tolist() == [True, False, True, False, True, False]


def test_the_canonical_order_is_sorted_names_then_flat_index() -> None:
    # d = 5, k = int(5 * 0.4) = 2 of five equal magnitudes: both elements of "a", although "b" was inserted first.
    base = model(b=[0, 0, 0], a=[0, 0])
    merged = oracle.ties(base, [model(b=[1, 1, -1], a=[-1, 1])], density=0.4, tie_policy="exact_k")
    assert merged.tensors["a"].tolist() == [-1, 1]
    assert merged.tensors["b"].tolist() == [0, 0, 0]


def test_k_of_zero_keeps_the_largest_under_keep_all_and_nothing_under_exact_k() -> None:
    # d = 3, k = int(3 * 0.3) = 0. keep_all: T = 3rd smallest = 4.
    assert merge_vectors([1, -4, 2], density=0.3) == [0, -4, 0]
    assert merge_vectors([1, -4, 2], density=0.3, tie_policy="exact_k") == [0, 0, 0]


def test_a_density_of_one_keeps_everything_under_both_policies() -> None:
    assert merge_vectors([1, -4, 2]) == [1, -4, 2]
    assert merge_vectors([1, -4, 2], tie_policy="exact_k") == [1, -4, 2]


def test_k_is_computed_in_float64() -> None:
    # 100 * 0.29 = 28.999999999999996 in float64, so k = 28 (29 in float32).
    delta = np.arange(1, 101, dtype=np.float32)
    assert oracle.trim(delta, 0.29, "exact_k").keep.sum() == 28
    assert oracle.trim(delta, 0.29, "keep_all").keep.sum() == 29


def test_mergekit_keeps_at_least_one_entry_of_a_tensor_and_peft_none() -> None:
    # Per tensor d = 3, k = int(0.9) = 0.
    assert merge_vectors([1, -4, 2], density=0.3, semantics="mergekit") == [0, -4, 0]
    assert merge_vectors([1, -4, 2], density=0.3, semantics="peft") == [0, 0, 0]


def test_a_whole_model_threshold_compares_tensors_and_a_per_tensor_threshold_does_not() -> None:
    # Model: d = 4, k = 1, T = 3rd smallest of {1, 2, 10, 20} = 10. Tensor: d = 2, k = 0, T = the largest of each.
    base, expert = model(a=[0, 0], b=[0, 0]), model(a=[1, 2], b=[10, 20])
    whole = oracle.ties(base, [expert], density=0.25)
    assert (whole.tensors["a"].tolist(), whole.tensors["b"].tolist()) == ([0, 0], [10, 20])
    each = oracle.ties(base, [expert], density=0.25, trim_scope="tensor")
    assert (each.tensors["a"].tolist(), each.tensors["b"].tolist()) == ([0, 2], [0, 20])
    assert each.statistics.experts[0].thresholds == {"a": 2.0, "b": 20.0}


# --- elect and aggregate ---


def test_the_three_steps_by_hand() -> None:
    # d = 4, density 0.5: k = 2, T = 2nd smallest, three entries kept.
    #   expert 1: [ 4, -3, 2, 1] -> T = 2 -> [4, -3,  2, 0]
    #   expert 2: [-1,  5, 6, 2] -> T = 2 -> [0,  5,  6, 2]
    #   expert 3: [ 2,  2, 1, 8] -> T = 2 -> [2,  2,  0, 8]   (2 is tied: kept twice)
    # sums [6, 4, 8, 10]: all positive. Disjoint means: (4 + 2) / 2, (5 + 2) / 2, (2 + 6) / 2, (2 + 8) / 2.
    # lambda 0.5, base 1.
    merged = oracle.ties(
        model(w=[1, 1, 1, 1]),
        [model(w=[5, -2, 3, 2]), model(w=[0, 6, 7, 3]), model(w=[3, 3, 2, 9])],
        density=0.5,
        lam=0.5,
    )
    assert merged.tensors["w"].tolist() == [2.5, 2.75, 3.0, 3.5]
    first, second, third = merged.statistics.experts
    assert (first.threshold, first.kept, first.ties) == (2.0, 3, 1)
    assert (second.threshold, second.kept, second.ties) == (2.0, 3, 1)
    assert (third.threshold, third.kept, third.ties) == (2.0, 3, 2)
    assert merged.statistics.conflicts == 1  # the second element: -3 against 5 and 2
    assert merged.statistics.majority_sign == 1


def test_kept_zeros_are_counted_but_never_agree() -> None:
    # d = 4, k = int(4 * 0.8) = 3, T = the smallest = 0: all four pass, two of them nonzero.
    merged = oracle.ties(model(w=[0, 0, 0, 0]), [model(w=[0, 0, 1, 4]), model(w=[2, 0, 3, 0])], density=0.8)
    assert (merged.statistics.experts[0].kept, merged.statistics.experts[0].kept_nonzero) == (4, 2)
    # First element: only 2 agrees, so the mean is 2, not 1; the third is (1 + 3) / 2.
    assert merged.tensors["w"].tolist() == [2, 0, 2, 4]


def test_an_exact_cancellation_takes_the_majority_sign() -> None:
    # Sums [0, 5, 6, -2]: elected signs +, +, - sum to +1, so the first element is positive: 3.
    assert merge_vectors([3, 2, 4, -1], [-3, 3, 2, -1]) == [3, 2.5, 3, -1]
    # Mirrored: the majority is -1, so the first element is -3.
    assert merge_vectors([3, -2, -4, 1], [-3, -3, -2, 1]) == [-3, -2.5, -3, 1]


def test_a_majority_of_zero_counts_as_negative() -> None:
    # Sums [0, 5, -6]: the elected signs sum to 0.
    merged = oracle.ties(model(w=[0, 0, 0]), [model(w=[3, 2, -4]), model(w=[-3, 3, -2])], density=1.0)
    assert merged.tensors["w"].tolist() == [-3, 2.5, -3]
    assert merged.statistics.majority_sign == -1
    assert merged.statistics.cancellations == 1


def test_the_majority_is_counted_over_the_whole_model_even_if_the_trim_is_per_tensor() -> None:
    # "b" alone is negative; with the two positive signs of "a" the sum is +1.
    merged = oracle.ties(
        model(a=[0, 0], b=[0, 0]),
        [model(a=[1, 1], b=[3, -1]), model(a=[1, 1], b=[-3, -1])],
        density=1.0,
        trim_scope="tensor",
    )
    assert merged.tensors["b"].tolist() == [3, -1]


def test_zero_sign_positive_and_drop() -> None:
    # The majority would be negative.
    assert merge_vectors([3, -2], [-3, -4], zero_sign="positive") == [3, -3]
    assert merge_vectors([3, -2], [-3, -4], zero_sign="drop") == [0, -3]
    assert merge_vectors([3, -2], [-3, -4], zero_sign="majority") == [-3, -3]


def test_the_count_elects_the_more_frequent_sign_and_the_mass_the_heavier() -> None:
    # -5 outweighs 1 + 2, two positives outnumber one negative.
    assert merge_vectors([1], [2], [-5]) == [-5]
    assert merge_vectors([1], [2], [-5], elect="count") == [1.5]


def test_without_an_election_every_kept_value_takes_part() -> None:
    # First element: (1 + 2 - 5 + 4) / 4. Second: (6 - 2) / 2, the zeros are not counted.
    assert merge_vectors([1, 0], [2, 6], [-5, 0], [4, -2], elect="none") == [0.5, 2.0]
    assert merge_vectors([1, 0], [2, 6], [-5, 0], [4, -2], elect="none", aggregate="sum") == [2.0, 4.0]


def test_signs_come_from_another_model_where_one_is_given() -> None:
    # Reference delta: -, +, 0. First: -5. Second: +4. Third: no sign; the elected signs sum to 0, so negative: -1.
    chosen = model(w=[-0.1, 7, 0])
    assert merge_vectors([1, 4, 2], [-5, -8, -1], elect_from=chosen) == [-5, 4, -1]
    assert merge_vectors([1, 4, 2], [-5, -8, -1], elect_from=chosen, elect="none") == [-5, 4, -1]
    assert merge_vectors([1, 4, 2], [-5, -8, -1], elect_from=chosen, zero_sign="positive") == [-5, 4, 2]


def test_the_four_aggregates() -> None:
    # Weighted: 1 * 2 = 2, 3 * 4 = 12, 4 * -1 = -4, so the sign is + and 2 and 12 agree.
    deltas, weights = ([2], [4], [-1]), [1.0, 3.0, 4.0]
    assert merge_vectors(*deltas, weights=weights) == [3.5]  # 14 / (1 + 3)
    assert merge_vectors(*deltas, weights=weights, aggregate="sum") == [14]
    assert merge_vectors(*deltas, weights=weights, aggregate="max") == [12]
    assert merge_vectors(*deltas, weights=weights, aggregate="average") == [1.75]  # 14 / (1 + 3 + 4)


def test_the_largest_magnitude_keeps_the_elected_sign() -> None:
    # -9 disagrees with the sum of 1; of the agreeing 3 and 7 the larger.
    assert merge_vectors([3, -3], [-9, 9], [7, -7], aggregate="max") == [7, -7]
    # Without an election the largest of all, with its own sign.
    assert merge_vectors([3, -3], [-9, 9], [7, -7], aggregate="max", elect="none") == [-9, 9]


def test_weights_before_the_election_turn_it_and_after_it_do_not() -> None:
    # Unweighted 3 beats -2. Weighted 3 * 0.5 = 1.5 loses to -2 * 1 = -2: mean -2 / 1.
    assert merge_vectors([3], [-2], weights=[0.5, 1.0]) == [-2]
    # After: 3 is elected, value 1.5, divided by its weight 0.5.
    assert merge_vectors([3], [-2], weights=[0.5, 1.0], weight_before_elect=False) == [3]
    # peft: the same election, divided by the number of agreeing experts, 1.
    assert merge_vectors([3], [-2], weights=[0.5, 1.0], semantics="peft") == [1.5]


def test_a_weight_of_zero_takes_the_expert_out_of_vote_and_mean() -> None:
    for options in ({}, {"weight_before_elect": False}, {"elect": "count"}, {"elect": "none"}):
        assert merge_vectors([-9, 3], [1, 1], weights=[0.0, 1.0], **options) == [1, 1]


def test_a_weight_of_zero_still_votes_and_is_counted_in_peft() -> None:
    # First: -9 is elected, its value is 0. Second: 3 and 1 agree: (0 * 3 + 1 * 1) / 2.
    assert merge_vectors([-9, 3], [1, 1], weights=[0.0, 1.0], semantics="peft") == [0, 0.5]


def test_average_divides_by_what_full_agreement_would_give() -> None:
    # 3 and 4 agree, -1 does not. Weights 1, 3, 4, after the election: (1 * 3 + 3 * 4) / (1 + 3 + 4), or / 3 experts.
    deltas, weights = ([3], [4], [-1]), [1.0, 3.0, 4.0]
    assert merge_vectors(*deltas, weights=weights, aggregate="average", weight_before_elect=False) == [1.875]
    assert merge_vectors(*deltas, weights=weights, aggregate="average", semantics="peft") == [5]


def test_mergekit_divides_by_the_signed_sum_of_weights_and_by_one_where_it_is_zero() -> None:
    # Weights 1, -1, 3. Element 1: 2, -(-4) = 4, -15: the sum is -9, only -15 agrees: -15 / 3.
    # Element 2: 2, 4, 0: both agree, 1 - 1 = 0, so 6 / 1. Element 3: 2, 4, 3: 9 / 3.
    merged = merge_vectors([2, 2, 2], [-4, -4, -4], [-5, 0, 1], weights=[1.0, -1.0, 3.0], semantics="mergekit")
    assert merged == [-5, 6, 3]


# --- rounding, storage types, what is copied ---


def test_experts_are_summed_in_recipe_order() -> None:
    # float32 counts by twos above 2^24: 1 + 1 + 2^24 = 2^24 + 2, but 2^24 + 1 = 2^24 (half to even), twice.
    assert merge_vectors([1], [1], [2**24], aggregate="sum") == [2**24 + 2]
    assert merge_vectors([2**24], [1], [1], aggregate="sum") == [2**24]


def test_the_mean_is_rounded_before_lambda_scales_it() -> None:
    # 1 / 3 = 11184811 * 2^-25 in float32, times 5 = 55924055 * 2^-25, rounded to 24 bits: 13981014 * 2^-23.
    # The other order, 5 / 3, would be 13981013 * 2^-23.
    assert merge_vectors([0.25], [0.25], [0.5], lam=5.0) == [13981014 * 2**-23]


def test_lambda_and_base_are_two_roundings() -> None:
    # 11184811 * 2^-25 times 3 = 1 + 2^-25, rounded to 1; minus 1 is 0. A fused multiply-add would leave 2^-25.
    assert merge_vectors([-0.75], [-0.75], [-0.5], base=[-1.0], lam=3.0) == [0]


def test_a_weighted_value_is_rounded_before_it_is_summed() -> None:
    # The same with the weight 1 / 3 on a delta of 3: -1 + 1, not -1 + (1 + 2^-25).
    merged = oracle.task_arithmetic(model(w=[0]), [model(w=[-1]), model(w=[3])], weights=[1.0, 1 / 3])
    assert merged["w"].tolist() == [0]


def test_minus_zero_of_the_base_becomes_plus_zero_where_nothing_is_added() -> None:
    merged = oracle.ties(model(w=[-0.0], x=[-0.0]), [model(w=[-0.0], x=[1])], density=1.0, exclude=["x"])
    assert not np.signbit(merged.tensors["w"]).any()
    assert np.signbit(merged.tensors["x"]).all()


def test_tensors_that_are_not_floating_point_are_the_bases_bytes() -> None:
    base = model(w=[0, 0]) | {"position_ids": np.arange(3)}
    merged = oracle.ties(base, [model(w=[1, 2])], density=1.0, out_dtype="float16")
    assert merged.tensors["position_ids"].dtype == np.int64
    assert merged.tensors["position_ids"].tolist() == [0, 1, 2]
    assert merged.tensors["w"].dtype == np.float16
    assert merged.statistics.elements == 2


def test_empty_models_and_empty_tensors_are_merged() -> None:
    assert oracle.ties({}, [{}], density=0.5).tensors == {}
    merged = oracle.ties(model(a=[], b=[1]), [model(a=[], b=[3])], density=0.5)
    assert merged.tensors["a"].shape == (0,)
    assert merged.tensors["b"].tolist() == [3]


def test_deltas_are_formed_in_float32_from_sixteen_bit_inputs_and_rounded_once() -> None:
    # bfloat16 has 8 significant bits: 1 and 1.0078125 = 1 + 2^-7 are neighbours. Two experts 1 + 2^-7 and 1 + 2 * 2^-7
    # have the mean delta 1.5 * 2^-7; 1 + 1.5 * 2^-7 lies halfway and goes to the even neighbour, 1 + 2 * 2^-7.
    base = {"w": oracle.bfloat16([1.0])}
    experts = [{"w": oracle.bfloat16([1 + 2**-7])}, {"w": oracle.bfloat16([1 + 2**-6])}]
    merged = oracle.ties(base, experts, density=1.0)
    assert merged.tensors["w"].dtype == oracle.BFLOAT16
    assert oracle.widen(merged.tensors["w"]).tolist() == [1 + 2**-6]
    exact = oracle.ties(base, experts, density=1.0, out_dtype="float32").tensors["w"]
    assert exact.tolist() == [1 + 1.5 * 2**-7]


def test_bfloat16_rounding_goes_to_the_nearest_and_halves_to_even() -> None:
    # Steps of 2^-7 above 1: a quarter goes down, a half to the even one (0 or 2 steps), three quarters up.
    values = [1 + 0.25 * 2**-7, 1 + 0.5 * 2**-7, 1 + 0.75 * 2**-7, 1 + 1.5 * 2**-7, -1 - 1.5 * 2**-7, 1e-45]
    rounded = oracle.widen(oracle.bfloat16(values)).tolist()
    assert rounded == [1, 1, 1 + 2**-7, 1 + 2**-6, -1 - 2**-6, 0]
    assert np.isinf(oracle.widen(oracle.bfloat16([np.finfo(np.float32).max]))).all()


def test_every_bfloat16_pattern_widens_as_torch_does() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    ours = oracle.widen(patterns.view(oracle.BFLOAT16))
    theirs = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert ours.view(np.uint32).tolist() == theirs.view(np.uint32).tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrowing_equals_torchs_cast(dtype: str) -> None:
    # Random bit patterns reach every exponent; the second half sits on and next to the midpoints of bfloat16.
    random = np.random.default_rng(7)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint32)
    middle = (bits & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    values = np.concatenate([bits, middle, middle + np.uint32(1), middle - np.uint32(1)]).view(np.float32)
    values = values[~np.isnan(values)]
    ours = oracle.narrow(values, oracle.DTYPES[dtype])
    theirs = oracle.from_torch(torch.from_numpy(values).to(getattr(torch, dtype)))
    assert ours.tobytes() == theirs.tobytes()


def test_arrays_survive_the_way_to_torch_and_back() -> None:
    scalar = oracle.bfloat16([2.5]).reshape(())
    for array in (
        oracle.bfloat16([[1.5, -0.0]]),
        scalar,
        np.float16([3.25]),
        np.zeros((2, 0), np.float32),
        np.array(7),
    ):
        assert oracle.same_bytes({"w": array}, {"w": oracle.from_torch(oracle.to_torch(array))}) == []


# --- the other methods ---


def test_task_arithmetic_by_hand() -> None:
    # base 1; deltas 2 and 4, weights 0.5 and -1: 1 - 4 = -3, times lambda 2, plus 1.
    merged = oracle.task_arithmetic(model(w=[1]), [model(w=[3]), model(w=[5])], weights=[0.5, -1.0], lam=2.0)
    assert merged["w"].tolist() == [-5]


def test_linear_by_hand() -> None:
    # (3 * 1 + 1 * 5) / (3 + 1), and the plain sum.
    models = [model(w=[1]), model(w=[5])]
    assert oracle.linear(models, weights=[3.0, 1.0])["w"].tolist() == [2]
    assert oracle.linear(models, weights=[3.0, 1.0], normalize=False)["w"].tolist() == [8]


# --- the published algorithm ---


def published_merge(
    base: dict[str, torch.Tensor],
    experts: list[dict[str, torch.Tensor]],
    *,
    keep: float,
    combine: str,
    lam: float,
    elect: bool = True,
    signs: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The authors' pipeline on whole flattened models, restated: kthvalue trim, sign of the sum, disjoint merge."""
    names = sorted(base)
    origin = torch.cat([base[name].flatten() for name in names])
    deltas = torch.stack([torch.cat([expert[name].flatten() for name in names]) for expert in experts]) - origin

    # Trim: the (d - k)-th smallest magnitude of each row, and everything from there up.
    numel = deltas.shape[1]
    cut = deltas.abs().kthvalue(numel - int(numel * keep), dim=1, keepdim=True).values
    deltas = torch.where(deltas.abs() >= cut, deltas, torch.zeros(()))

    # Elect: the sign of the column sums; where it is zero, the sign of the sum of signs.
    if signs is None and elect:
        signs = deltas.sum(dim=0).sign()
        signs = torch.where(signs == 0, signs.sum().sign(), signs)

    # Disjoint merge: a sign that is not positive selects the negative entries.
    agrees = (deltas != 0) if signs is None else torch.where(signs > 0, deltas > 0, deltas < 0)
    chosen = torch.where(agrees, deltas, torch.zeros(()))
    if combine == "mean":
        merged = chosen.sum(dim=0) / agrees.sum(dim=0).float().clamp(min=1)
    elif combine == "sum":
        merged = chosen.sum(dim=0)
    else:
        assert signs is not None
        merged = chosen.abs().amax(dim=0) * signs
    flat = origin + lam * merged
    parts = flat.split([base[name].numel() for name in names])
    return {name: part.reshape(base[name].shape) for name, part in zip(names, parts, strict=True)}


def drawn_models(seed: int, experts: int, step: float) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """Models with a base on a coarse grid; updates on multiples of `step` tie and cancel often, without it never."""
    random = np.random.default_rng(seed)
    shapes = {"b.weight": (17, 11), "a.weight": (40, 9), "c": (1,), "b": (2,), "empty": (0, 4)}
    base = {name: (random.integers(-64, 64, shape) / 64).astype(np.float32) for name, shape in shapes.items()}
    models = []
    for _ in range(experts):
        drawn = {name: random.standard_normal(shape) for name, shape in shapes.items()}
        if step:
            drawn = {name: np.round(values / step) * step for name, values in drawn.items()}
        models.append({name: (base[name] + drawn[name]).astype(np.float32) for name in shapes})
    return base, models


@pytest.mark.parametrize("combine", ["mean", "sum", "max"])
@pytest.mark.parametrize("keep", [0.001, 0.1, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("experts", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [0, 0.5], ids=["no-ties", "many-ties"])
def test_paper_semantics_equal_the_published_algorithm(step: float, experts: int, keep: float, combine: str) -> None:
    base, models = drawn_models(100 * experts + int(1000 * keep), experts, step)
    theirs = published_merge(
        {name: torch.from_numpy(array) for name, array in base.items()},
        [{name: torch.from_numpy(array) for name, array in expert.items()} for expert in models],
        keep=keep,
        combine=combine,
        lam=0.7,
    )
    ours = oracle.ties(base, models, density=keep, lam=0.7, aggregate=combine)  # type: ignore[arg-type]
    assert oracle.same_bytes(ours.tensors, {name: oracle.from_torch(tensor) for name, tensor in theirs.items()}) == []
    if step and experts > 1 and keep > 0.1:
        assert ours.statistics.cancellations > 0
        assert all(expert.ties > 1 for expert in ours.statistics.experts)


@pytest.mark.parametrize("combine", ["mean", "sum"])
@pytest.mark.parametrize("step", [0, 0.5], ids=["no-ties", "many-ties"])
def test_merging_without_an_election_equals_the_published_algorithm(step: float, combine: str) -> None:
    base, models = drawn_models(5, 3, step)
    theirs = published_merge(
        {name: torch.from_numpy(array) for name, array in base.items()},
        [{name: torch.from_numpy(array) for name, array in expert.items()} for expert in models],
        keep=0.3,
        combine=combine,
        lam=1.0,
        elect=False,
    )
    ours = oracle.ties(base, models, density=0.3, elect="none", aggregate=combine)  # type: ignore[arg-type]
    assert oracle.same_bytes(ours.tensors, {name: oracle.from_torch(tensor) for name, tensor in theirs.items()}) == []


def test_signs_of_a_given_model_equal_the_published_algorithm() -> None:
    # The reference's delta has no zero: there the published code takes the negative values, ours the majority's.
    base, (reference, *models) = drawn_models(6, 4, 0)
    names = sorted(base)
    signs = torch.cat([torch.from_numpy(reference[name] - base[name]).flatten() for name in names]).sign()
    assert bool((signs != 0).all())
    theirs = published_merge(
        {name: torch.from_numpy(array) for name, array in base.items()},
        [{name: torch.from_numpy(array) for name, array in expert.items()} for expert in models],
        keep=0.3,
        combine="mean",
        lam=1.0,
        signs=signs,
    )
    ours = oracle.ties(base, models, density=0.3, elect_from=reference)
    assert oracle.same_bytes(ours.tensors, {name: oracle.from_torch(tensor) for name, tensor in theirs.items()}) == []
