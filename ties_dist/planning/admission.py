"""Whether a method from elsewhere can do what the engine will ask of it: found while planning, before any work.

Ours are covered by tests; a merge of theirs does not import torch to look.
"""

from __future__ import annotations

from collections import Counter

from ties_dist.compiler.kernel import eager_reason, place_of
from ties_dist.errors import RecipeError
from ties_dist.methods.base import Cut, Found, is_ours
from ties_dist.planning.plan import MergePlan


def admit(plan: MergePlan) -> tuple[str, ...]:
    """What to tell of a plan's method. Raises RecipeError where it cannot be merged by."""
    if is_ours(plan.method) or not plan.numbers:
        return ()
    _check_needs(plan)
    tensor = next(iter(plan.numbers))
    found = Found(cuts=(Cut(threshold=0.5, keep=0.5),) * plan.counters.trimmed)
    try:
        state = plan.method.numbers(plan.parameters_of(tensor), plan.numbers[tensor].experts, found)
        reason = eager_reason(plan.method, len(plan.operands), len(plan.experts), state)
    except RecipeError:
        raise
    except Exception as error:  # whatever code from elsewhere may raise
        raise RecipeError(
            f"merge_method `{plan.method.name}` fails on a slice of a few numbers: {type(error).__name__}: "
            f"{error}{place_of(error)}."
        ) from error
    if reason is None:
        return ()
    return (f"merge_method `{plan.method.name}` runs eagerly, about 20 times slower: {reason}.",)


def _check_needs(plan: MergePlan) -> None:
    """Raises RecipeError where what a method asks for does not fit what it takes and counts."""
    method, own, majority = plan.method, plan.counters.own, plan.needs.majority
    if plan.needs.trim is not None and method.operand != "delta":
        raise RecipeError(f'merge_method `{method.name}` trims, but takes weights: give it `operand = "delta"`.')
    if twice := [name for name, times in Counter(own).items() if times > 1]:
        raise RecipeError(
            f"merge_method `{method.name}` declares the counter {twice[0]} twice; each needs its own name."
        )
    if majority is not None and majority.signs not in own:
        raise RecipeError(
            f"merge_method `{method.name}` asks for the majority sign, but has no counter `{majority.signs}` to sum up."
        )
