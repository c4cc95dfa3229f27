"""Normalised accuracies of merges, and their differences on the same examples, over the labs of all seeds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.paper.lab import Lab
from benchmarks.paper.statistics import Estimate, Groups, Values, estimate


def score(labs: Sequence[Lab], model: str, tasks: Sequence[str], experts: str = "experts") -> Estimate:
    """Normalised accuracy."""
    return estimate([(values_of(lab, model, tasks, experts), groups_of(lab, tasks)) for lab in labs])


def gain(labs: Sequence[Lab], model: str, over: str, tasks: Sequence[str], experts: str = "experts") -> Estimate:
    """How much more of the experts' accuracy one model keeps than another, on the same examples."""
    pairs = []
    for lab in labs:
        one, other = values_of(lab, model, tasks, experts), values_of(lab, over, tasks, experts)
        pairs.append(({t: one[t] - other[t] for t in tasks}, groups_of(lab, tasks)))
    return estimate(pairs)


def own_task(labs: Sequence[Lab], name: Callable[[str], str], over: Callable[[str], str] | None = None) -> Estimate:
    """Of models that are each evaluated on one task."""
    pairs: list[tuple[Values, Groups]] = []
    for lab in labs:
        tasks = lab.domain.merged
        values = {t: values_of(lab, name(t), [t])[t] for t in tasks}
        if over is not None:
            values = {t: v - values_of(lab, over(t), [t])[t] for t, v in values.items()}
        pairs.append((values, groups_of(lab, tasks)))
    return estimate(pairs)


def values_of(lab: Lab, model: str, tasks: Sequence[str], experts: str = "experts") -> dict[str, np.ndarray]:
    return {t: v.double().numpy() for t, v in lab.normalised(model, tasks, experts=experts).items()}


def groups_of(lab: Lab, tasks: Sequence[str]) -> dict[str, list[str]]:
    return {t: [e.group for e in lab.tasks[t].test] for t in tasks}


def subsets(tasks: Sequence[str], count: int, draws: int) -> list[tuple[str, ...]]:
    """Distinct sets of tasks; the same whenever they are asked for."""
    rng, found = random.Random(count), dict[tuple[str, ...], None]()
    while len(found) < min(draws, math.comb(len(tasks), count)):
        found[tuple(sorted(rng.sample(tasks, count), key=tasks.index))] = None
    return list(found)


def over_sets(
    labs: Sequence[Lab],
    sets: Sequence[tuple[str, ...]],
    name: Callable[[int], str],
    over: Callable[[int], str] | None = None,
) -> Estimate:
    """Mean over sets of tasks of a merge's normalised accuracy, or of its gain over another.

    An example that is asked in several sets is one example: its values are added up, so that it is drawn once.
    """
    pairs: list[tuple[Values, Groups]] = []
    for lab in labs:
        summed: dict[str, np.ndarray] = {}
        for at, tasks in enumerate(sets):
            values = values_of(lab, name(at), tasks)
            if over is not None:
                other = values_of(lab, over(at), tasks)
                values = {t: values[t] - other[t] for t in tasks}
            for task, value in values.items():
                summed[task] = summed.get(task, np.zeros(len(value))) + value / len(sets) / len(tasks)
        # `estimate` divides by the number of tasks.
        scaled = {task: value * len(summed) for task, value in summed.items()}
        pairs.append((scaled, groups_of(lab, list(summed))))
    return estimate(pairs)
