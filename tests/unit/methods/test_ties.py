"""TIES on three to six numbers, computed by hand from Yadav et al. 2023, Algorithm 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ties_dist.methods import Cut, Linear, TaskArithmetic, Ties, TrimRule
from ties_dist.methods.base import State

ZERO = torch.tensor(0)


def tensors(state: State) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in state.items()}


def state_of(
    method: Ties, *, cuts: list[float], weights: list[float] | None = None, lam: float = 1.0, majority: int = 1
) -> dict[str, torch.Tensor]:
    experts = [{"weight": w} for w in (weights or [1.0] * len(cuts))]
    return tensors(method.state({"lambda": lam}, experts, [Cut(threshold=c, keep=c) for c in cuts], majority))


def merged(
    method: Ties,
    base: list[float],
    deltas: list[list[float]],
    state: dict[str, torch.Tensor],
    extras: list[list[float]] | None = None,
) -> list[float]:
    result, _ = method.merge(
        torch.tensor(base), [torch.tensor(d) for d in deltas], [torch.tensor(e) for e in extras or []], state, ZERO
    )
    values: list[float] = result.tolist()
    return values


def counts(method: Ties, deltas: list[list[float]], state: dict[str, torch.Tensor]) -> dict[str, int]:
    _, found = method.merge(torch.zeros(len(deltas[0])), [torch.tensor(d) for d in deltas], [], state, ZERO)
    return dict(zip(method.counters(len(deltas)), (int(c) for c in found), strict=True))


def test_trim_elect_and_disjoint_mean_by_hand() -> None:
    # Trim at 2: expert 0 keeps 4, -3 and 2; expert 1 keeps 2, 5 and -6.
    # Sums: 6, 2, -4, 0 -> signs +, +, -, none. Means of what agrees: (4+2)/2, 5/1, -6/1, nothing.
    deltas = [[4.0, -3.0, 2.0, 1.0], [2.0, 5.0, -6.0, -1.0]]
    method = Ties()
    assert merged(method, [10.0] * 4, deltas, state_of(method, cuts=[2.0, 2.0])) == [13.0, 15.0, 4.0, 10.0]


def test_exact_cancellation_takes_the_majority_sign() -> None:
    deltas = [[3.0], [-3.0]]
    method = Ties()
    assert merged(method, [0.0], deltas, state_of(method, cuts=[1.0, 1.0], majority=1)) == [3.0]
    assert merged(method, [0.0], deltas, state_of(method, cuts=[1.0, 1.0], majority=-1)) == [-3.0]


def test_zero_sign_positive_and_drop_ignore_the_majority() -> None:
    deltas = [[3.0], [-3.0]]
    for zero_sign, expected in (("positive", 3.0), ("drop", 0.0)):
        method = Ties(zero_sign=zero_sign)  # type: ignore[arg-type]
        assert not method.asks_majority
        assert merged(method, [0.0], deltas, state_of(method, cuts=[1.0, 1.0], majority=-1)) == [expected]


def test_conflicts_are_named_and_signs_summed() -> None:
    # Trim at 2. Kept: [4, -2, 0], [2, 3, 0]; sums 6, 1, 0 -> two plus signs, and the last is no cancellation: all zero.
    method = Ties()
    found = counts(method, [[4.0, -2.0, 1.0], [2.0, 3.0, -1.0]], state_of(method, cuts=[2.0, 2.0]))
    assert found == {"conflicts": 1, "cancellations": 0, "sign_sum": 2}


def test_cancellations_count_only_where_something_cancels() -> None:
    method = Ties()
    found = counts(method, [[3.0, 0.0, 1.0], [-3.0, 0.0, 1.0]], state_of(method, cuts=[0.5, 0.5]))
    assert (found["cancellations"], found["sign_sum"]) == (1, 1)


def test_weights_act_before_the_election_and_divide_the_mean() -> None:
    # 0.25 * 4 = 1 against 0.5 * -3 = -1.5: minus wins, mean = -1.5 / 0.5.
    method = Ties()
    assert merged(method, [0.0], [[4.0], [-3.0]], state_of(method, cuts=[1.0, 1.0], weights=[0.25, 0.5])) == [-3.0]


def test_peft_votes_unweighted_and_divides_by_the_number_of_agreeing_experts() -> None:
    # Unweighted 4 - 3 = 1: plus wins; 4 * 0.25 / 1.
    method = Ties(weight_before_elect=False, divide_by="count", zero_sign="positive")
    assert merged(method, [0.0], [[4.0], [-3.0]], state_of(method, cuts=[1.0, 1.0], weights=[0.25, 0.5])) == [1.0]


def test_elect_count_goes_by_heads() -> None:
    # Sum 10 - 1 - 2 = 7 is positive, but two of three vote minus: mean of -1 and -2.
    method = Ties(elect="count")
    assert merged(method, [0.0], [[10.0], [-1.0], [-2.0]], state_of(method, cuts=[0.5] * 3)) == [-1.5]


def test_elect_none_averages_everything_kept() -> None:
    method = Ties(elect="none")
    assert not method.asks_majority
    assert merged(method, [0.0], [[4.0], [-2.0], [0.5]], state_of(method, cuts=[1.0] * 3)) == [1.0]


def test_oracle_signs_override_the_vote() -> None:
    method = Ties(oracle=True)
    state = state_of(method, cuts=[1.0, 1.0])
    assert merged(method, [0.0], [[4.0], [-2.0]], state, extras=[[-0.1]]) == [-2.0]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [("mean", 3.0), ("sum", 6.0), ("max", 4.0), ("average", 2.0)],
)
def test_aggregates_by_hand(aggregate: str, expected: float) -> None:
    # 4 and 2 agree, -1 does not.
    method = replace(Ties(), aggregate=aggregate)
    assert merged(method, [0.0], [[4.0], [2.0], [-1.0]], state_of(method, cuts=[0.5] * 3)) == [expected]


def test_lambda_scales_the_merged_delta_and_zero_plus_minus_zero_is_plus_zero() -> None:
    method = Ties()
    state = state_of(method, cuts=[1.0], lam=0.5)
    result = merged(method, [1.0, -0.0], [[4.0, 0.5]], state)
    assert result == [3.0, 0.0]
    assert str(result[1]) == "0.0"


def test_weight_zero_drops_an_expert_from_vote_and_mean() -> None:
    method = Ties(weight_before_elect=False)
    assert merged(method, [0.0], [[4.0], [-9.0]], state_of(method, cuts=[1.0, 1.0], weights=[1.0, 0.0])) == [4.0]


@pytest.mark.parametrize(
    ("tie_policy", "numel", "density", "rank"),
    [
        ("keep_all", 10, 0.2, 3),  # T is the 8th smallest, which is the 3rd largest
        ("exact_k", 10, 0.2, 2),
        ("keep_all", 10, 1.0, None),
        ("exact_k", 10, 1.0, None),
        ("keep_all", 3, 0.2, 1),  # k = 0: the published rule still keeps the largest
        ("exact_k", 3, 0.2, 0),
        ("keep_all", 0, 0.2, None),
        ("keep_all", 10, 0.3, 4),  # int(10 * 0.3) == 3 in float64
        ("exact_k", 100, 0.29, 28),  # int(100 * 0.29) == 28 in float64: 28.999999999999996
    ],
)
def test_trim_rank_is_that_of_the_published_codes(
    tie_policy: str, numel: int, density: float, rank: int | None
) -> None:
    assert TrimRule(scope="model", tie_policy=tie_policy).rank(numel, density) == rank  # type: ignore[arg-type]


def test_mergekit_keeps_at_least_one_entry() -> None:
    assert TrimRule(scope="tensor", tie_policy="exact_k", at_least=1).rank(3, 0.2) == 1


def test_task_arithmetic_by_hand() -> None:
    # 1 + 0.5 * (2 * 3 - 1 * 4) = 2
    method = TaskArithmetic()
    state = tensors(method.state({"lambda": 0.5}, [{"weight": 2.0}, {"weight": -1.0}], [], 1))
    result, _ = method.merge(torch.tensor([1.0]), [torch.tensor([3.0]), torch.tensor([4.0])], [], state, ZERO)
    assert result.tolist() == [2.0]


def test_linear_by_hand_and_refuses_weights_that_cancel() -> None:
    method = Linear()
    experts = [{"weight": 1.0}, {"weight": 3.0}]
    result, _ = method.merge(
        torch.tensor([0.0]),
        [torch.tensor([2.0]), torch.tensor([6.0])],
        [],
        tensors(method.state({}, experts, [], 1)),
        ZERO,
    )
    assert result.tolist() == [5.0]
    with pytest.raises(ValueError, match="the weights sum to 0"):
        method.check([{"weight": 1.0}, {"weight": -1.0}])
