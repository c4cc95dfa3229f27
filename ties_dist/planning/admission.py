"""Whether a method from elsewhere can do what the engine will ask of it: found while planning, before any work.

All that such a method says is asked for here, under one guard (`methods/outside`). Ours are covered by tests; a merge
of theirs does not import torch to look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ties_dist.compiler.kernel import eager_reason, shapes
from ties_dist.errors import RecipeError
from ties_dist.messages import nearest
from ties_dist.methods.base import Cut, Found, Method, State, float32
from ties_dist.methods.declared import unfit
from ties_dist.methods.needs import ONE, MajoritySign, Needs, Product, Sums, TrimRule
from ties_dist.methods.outside import asking, defined, is_ours
from ties_dist.planning.plan import MergePlan
from ties_dist.recipe.recipe import Recipe

SAID: Mapping[str, object] = {
    "trim": TrimRule | None,
    "sums": Sums | None,
    "asks_majority": bool,
    "is_random": bool,
    "needs": Needs,
}
"""What a method says of itself without being called."""


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe describes. Raises RecipeError where what it says of itself cannot be gone by."""
    spec = recipe.spec
    assert isinstance(spec, type) and issubclass(spec, Method)
    with asking(spec, "from_options"):
        method = spec.from_options(
            {**recipe.options.model_dump(), "elect_from": recipe.elect_from, "of_moved": recipe.of_moved},
            {name: s.constant for name, s in recipe.parameters.items() if s.constant is not None},
        )
    if is_ours(spec):
        return method
    if wrong := unfit(method, Method):
        raise _refused(spec, "from_options", f"gives no method: {wrong}")
    for part, hint in SAID.items():
        with asking(spec, part):
            said = getattr(method, part)
        if wrong := unfit(said, hint):
            raise _refused(spec, part, "lacks @property" if callable(said) else f"is wrong: {wrong}")
    if method.needs.statistics != spec.statistics:
        raise _refused(spec, "needs", f"asks for {method.needs.statistics}, `statistics` is {spec.statistics}")
    rule, count = method.needs.trim, len(recipe.experts)
    if rule is not None and len(rule.of_moved) not in (0, count):
        raise _refused(spec, "trim", f"has {len(rule.of_moved)} `of_moved` for {count} experts")
    with asking(spec, "counters"):
        own = method.counters(count)
    if wrong := unfit(own, tuple[str, ...]):
        raise _refused(spec, "counters", f"gives no names: {wrong}")
    if method.needs.sums is not None:
        with asking(spec, "products"):
            pairs = method.products(len(recipe.experts))
        strange = [pair for pair in pairs if unfit(pair, Product) or len(pair) != 2 or pair[0] < 0 or pair[1] < ONE]
        if wrong := unfit(pairs, tuple[object, ...]) or (f"{strange[0]} is none" if strange else None):
            raise _refused(spec, "products", f"gives no pairs of factors: {wrong}")
    return method


def unfit_numbers(method: Method, experts: Sequence[Mapping[str, float]]) -> str | None:
    """What a method says against the numbers of one tensor's experts."""
    with asking(type(method), "check"):
        try:
            method.check(experts)
        except ValueError as error:
            return str(error)
    return None


def admit(plan: MergePlan) -> tuple[str, ...]:
    """What to tell of a plan's method. Raises RecipeError where it cannot be merged by."""
    if is_ours(type(plan.method)) or not plan.numbers:
        return ()
    _check_needs(plan)
    reasons = []
    for before, scalars in _states(plan):
        for factor in (None, *range(plan.factors)):
            state = before | scalars if factor is None else before
            part = "merge" if factor is None else "factors"
            with asking(type(plan.method), part, "on a slice of a few numbers"):
                reasons.append(eager_reason(plan.method, len(plan.operands), len(plan.experts), state, factor))
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None:
        return ()
    return (f"merge_method `{plan.method.name}` runs eagerly, about 20 times slower: {reason}.",)


def _states(plan: MergePlan) -> Iterator[tuple[State, State]]:
    """Numbers of a slice, of every kind there is: the same names and shapes, the same loop; and what sums add to them.

    Raises RecipeError.
    """
    kind, met = type(plan.method), set()
    asked = {}
    for tensor, numbers in plan.numbers.items():
        parameters = plan.parameters_of(tensor)
        asked[(*parameters.items(), *(tuple(each.items()) for each in numbers.experts))] = (
            tensor,
            parameters,
            numbers.experts,
        )
    for tensor, parameters, experts in asked.values():
        state, again = (_state(plan, parameters, experts) for _ in range(2))
        if shapes(state) != shapes(again) or any(state[n].tobytes() != again[n].tobytes() for n in state):
            raise _refused(
                kind, "state", "gives other numbers when it is asked again (time, chance, a count of calls?)"
            )
        for name, value in state.items():
            if np.isnan(value).any():
                raise _refused(kind, "state", f"gives NaN as `{name}`")
        with asking(kind, "scalars"):
            scalars = {name: float32(value) for name, value in plan.sample_scalars(tensor)}
        if (known := (*shapes(state).items(), *shapes(scalars).items())) not in met:
            met.add(known)
            yield state, scalars


def _state(plan: MergePlan, parameters: Mapping[str, float], experts: Sequence[Mapping[str, float]]) -> State:
    found = Found(cuts=(Cut(threshold=0.5, keep=0.5),) * plan.counters.trimmed)
    with asking(type(plan.method), "state"):
        return plan.method.numbers(dict(parameters), [dict(each) for each in experts], found)


def _check_needs(plan: MergePlan) -> None:
    """Raises RecipeError where what a method asks for does not fit what it takes and counts."""
    method, own, majority = plan.method, plan.counters.own, plan.needs.majority
    if plan.needs.trim is not None:
        _check_trim(plan, plan.needs.trim)
    if twice := [name for name, times in Counter(own).items() if times > 1]:
        raise RecipeError(
            f"merge_method `{method.name}` declares the counter {twice[0]} twice; each needs its own name."
        )
    if majority is not None and majority.signs not in own:
        raise RecipeError(
            f"merge_method `{method.name}` asks for the majority sign, but has no counter `{majority.signs}` to sum up."
        )
    if majority is not None and majority.dependent not in (*own, MajoritySign.dependent):
        raise RecipeError(
            f"merge_method `{method.name}` asks for the majority sign, but has no counter `{majority.dependent}` of "
            f"what depends on it; {nearest(majority.dependent, own)}"
        )


def _check_trim(plan: MergePlan, rule: TrimRule) -> None:
    method = plan.method
    if method.operand != "delta":
        raise RecipeError(f'merge_method `{method.name}` trims, but takes weights: give it `operand = "delta"`.')
    densities = {tuple(e.get("density") for e in numbers.experts) for numbers in plan.numbers.values()}
    if any(each is None for numbers in densities for each in numbers):
        raise RecipeError(
            f"merge_method `{method.name}` trims, but models have no density: give it "
            "`density(...)` of ties_dist.methods.base among its `parameters`."
        )
    if rule.scope == "model" and len(densities) > 1:
        raise RecipeError(
            f"merge_method `{method.name}` has one threshold for a whole model, but the recipe's density varies inside "
            "of it: give one number."
        )


def _refused(method: type[Method], part: str, why: str) -> RecipeError:
    return RecipeError(f"merge_method `{method.name}`: its `{part}` {why}{defined(method, part)}.")
