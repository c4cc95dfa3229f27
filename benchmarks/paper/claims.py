"""What the paper claims, each as one function: what is measured, the paper's number or shape, and the verdict's rule.

Each makes the merges that it asks about, since none outlives its claim (`Lab.forget`).

Verdicts follow from the 95 % interval of a paired difference: separated where it excludes 0. Settings are chosen on the
`dev` slices; every number here is of the `test` slices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np

from benchmarks.paper.flips import flip_signs
from benchmarks.paper.lab import Lab
from benchmarks.paper.processes import at_once
from benchmarks.paper.scores import gain, groups_of, over_sets, own_task, score, subsets, values_of
from benchmarks.paper.statistics import Estimate, estimate, verdict

PAPER_DENSITY, PAPER_LAMBDA, ARITHMETIC_LAMBDA = 0.2, 1.0, 0.4
ARITHMETIC_LAMBDAS, TIES_LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0), (0.2, 0.4, 0.8, 1.2, 1.6, 2.4)
"""Lower than the paper's, whose least were chosen here."""


@dataclass
class Claim:
    """One section of the report. series: for a figure, name -> [(x, Estimate)]."""

    title: str
    paper: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    verdict: str = ""
    notes: str = ""
    series: dict[str, list[tuple[float, Estimate]]] = field(default_factory=dict)
    x_label: str = ""


def experts_of(lab: Lab) -> list[str]:
    return [f"experts/{task}" for task in lab.domain.merged]


def ties(lab: Lab, name: str, models: Sequence[str], density: float, lam: float, **options: object) -> str:
    lab.merge(name, "ties", models, parameters={"density": density, "lambda": lam}, ties_dist=options)
    return f"merged/{name}"


def compare(
    claim: Claim, labs: Sequence[Lab], models: Sequence[tuple[str, ...]], over: str, tasks: Sequence[str]
) -> None:
    """A row for each model: its words, its score, and its gain over one of them. models: (name, words, ...)."""
    for model, *words in models:
        against = gain(labs, model, over, tasks) if model != over else ""
        claim.rows.append((*words, score(labs, model, tasks), against))


def whole_model_against_per_tensor(labs: Sequence[Lab]) -> Claim:
    claim = Claim(
        title="Whole-model against per-tensor trim",
        paper="trims over the whole model; no comparison is printed",
        columns=("density", "whole model", "per tensor", "difference"),
        x_label="density",
    )
    tasks = labs[0].domain.merged
    found: dict[str, list[str]] = {}
    for density in (0.05, 0.1, 0.2):
        for lab in labs:
            for scope in ("model", "tensor"):
                ties(lab, f"{scope}-{density}", experts_of(lab), density, PAPER_LAMBDA, trim_scope=scope)
        whole, each = (score(labs, f"merged/{scope}-{density}", tasks) for scope in ("model", "tensor"))
        difference = gain(labs, f"merged/model-{density}", f"merged/tensor-{density}", tasks)
        better = "whole-model better" if difference.mean > 0 else "per-tensor better"
        found.setdefault(better if difference.separated else "not separable", []).append(f"{density}")
        claim.rows.append((density, whole, each, difference))
        claim.series.setdefault("whole model", []).append((density, whole))
        claim.series.setdefault("per tensor", []).append((density, each))
    claim.verdict = "; ".join(f"{words} at density {', '.join(densities)}" for words, densities in found.items())
    kept = ", ".join(f"{kind} {share:.1%}" for kind, share in labs[0].budget("model-0.1").items())
    claim.notes = f"At density 0.1 the whole-model trim keeps of each kind of weight, seed {labs[0].seed}: {kept}."
    return claim


def redundancy(labs: Sequence[Lab]) -> Claim:
    claim = Claim(
        title="Redundancy: the largest 20 % of a task vector keep its accuracy",
        paper="keeping the top 20 % costs almost nothing (its figure 3)",
        columns=("kept", "normalised accuracy", "against all"),
        x_label="density",
    )
    for density in (0.05, 0.1, 0.2, 0.5):
        for lab in labs:
            for task in lab.domain.merged:
                ties(lab, f"kept-{density}-{task}", [f"experts/{task}"], density, PAPER_LAMBDA)
        kept = own_task(labs, lambda t, d=density: f"merged/kept-{d}-{t}")  # type: ignore[misc]
        loss = own_task(labs, lambda t, d=density: f"merged/kept-{d}-{t}", lambda t: f"experts/{t}")  # type: ignore[misc]
        claim.rows.append((f"{density:.0%}", kept, loss))
        claim.series.setdefault("kept", []).append((density, kept))
        if density == PAPER_DENSITY:
            claim.verdict = "reproduced" if loss.low > -2 else "contradicted" if loss.high < -2 else "not separable"
    claim.notes = "Rule: reproduced where the loss at 20 % is above -2 points in the whole interval."
    return claim


def sign_conflicts(labs: Sequence[Lab]) -> Claim:
    claim = Claim(
        title="Sign conflicts grow with the number of experts",
        paper="about 10 % of the parameters with four experts (its figure 4), growing",
        columns=("experts", "parameters with a conflict, %"),
        x_label="experts",
    )
    shares: list[float] = []
    for count in range(2, len(labs[0].domain.merged) + 1):
        found = []
        for lab in labs:
            report = lab.merge(
                f"conflicts-{count}", "ties", experts_of(lab)[:count], parameters={"density": PAPER_DENSITY}
            )
            found.append(100 * (report.conflict_fraction or 0))
        shares.append(float(np.mean(found)))
        shown = Estimate(shares[-1], min(found), max(found))
        claim.rows.append((count, f"{shares[-1]:.1f}"))
        claim.series.setdefault("conflicts", []).append((count, shown))
    claim.verdict = "reproduced" if all(a < b for a, b in pairwise(shares)) else "contradicted"
    claim.notes = "Counted over all parameters after the trim; exact, so no interval but the range over seeds."
    return claim


def sign_flips(labs: Sequence[Lab]) -> Claim:
    claim = Claim(
        title="Flipping the signs of the top 20 % destroys a model, of the bottom 80 % hardly matters",
        paper="its figure 8: the top's flips ruin accuracy, the bottom's leave it",
        columns=("flipped", "normalised accuracy", "against none"),
    )
    for lab in labs:
        for task in lab.domain.merged:
            for part in ("top", "bottom"):
                name, made_from = f"flipped/{part}-{task}", [lab.digest("base"), lab.digest(f"experts/{task}"), part]
                if not lab.made(name, made_from):
                    flipped = flip_signs(lab.load("base"), lab.load(f"experts/{task}"), PAPER_DENSITY, part=part)
                    lab.make(name, flipped, made_from)
    losses = {}
    for part, words in (("top", "top 20 %"), ("bottom", "bottom 80 %")):
        flipped = own_task(labs, lambda t, p=part: f"flipped/{p}-{t}")  # type: ignore[misc]
        losses[part] = own_task(labs, lambda t, p=part: f"flipped/{p}-{t}", lambda t: f"experts/{t}")  # type: ignore[misc]
        claim.rows.append((words, flipped, losses[part]))
    difference = own_task(labs, lambda t: f"flipped/bottom-{t}", lambda t: f"flipped/top-{t}")
    claim.rows.append(("bottom against top", "", difference))
    claim.verdict = verdict(difference, expected=1)
    return claim


def methods(labs: Sequence[Lab]) -> Claim:
    claim = Claim(
        title="The methods, with and without validation",
        paper="T5-base without validation: averaging 65.9, task arithmetic 73.2, TIES 69.7 (of 82.8 fine-tuned); "
        "ViT-B/32: 65.8, 60.4, 72.4; with validation TIES is ahead everywhere",
        columns=("method", "settings", "normalised accuracy", "against averaging"),
    )
    tasks = labs[0].domain.merged
    chosen: dict[str, str] = {}
    for lab in labs:
        models = experts_of(lab)
        _merge_three(lab, tasks)
        lab.merge("dare_ties", "dare_ties", models, parameters={"density": PAPER_DENSITY, "lambda": ARITHMETIC_LAMBDA})
        for kind, method in (("fisher", "fisher"), ("gram", "regmean")) if lab.domain.subject else ():
            stores = at_once(partial(lab.collect, kind, task, lab.size.statistics) for task in tasks)
            lab.merge(method, method, models, statistics=dict(zip(models, stores, strict=True)))
        swept = lab.sweep("arithmetic", "task_arithmetic", models, lam=ARITHMETIC_LAMBDAS)
        chosen[f"{lab.seed} arithmetic"] = _best(lab, swept, "task_arithmetic-validated")
        swept = lab.sweep("ties", "ties", models, density=(0.1, 0.2, 0.3), lam=TIES_LAMBDAS)
        chosen[f"{lab.seed} ties"] = _best(lab, swept, "ties-validated")
    listed = (
        ("base", "pretrained", ""),
        ("merged/averaging", "averaging", ""),
        ("merged/fisher", "Fisher", f"{labs[0].size.statistics} examples a task"),
        ("merged/regmean", "RegMean", f"{labs[0].size.statistics} examples a task, alpha 0.9"),
        ("merged/task_arithmetic", "task arithmetic", f"lambda {ARITHMETIC_LAMBDA}"),
        ("merged/dare_ties", "DARE-TIES", f"density {PAPER_DENSITY}, lambda {ARITHMETIC_LAMBDA}"),
        ("merged/ties", "TIES", f"density {PAPER_DENSITY}, lambda {PAPER_LAMBDA:g}"),
        ("merged/task_arithmetic-validated", "task arithmetic, validated", "lambda on dev"),
        ("merged/ties-validated", "TIES, validated", "density and lambda on dev"),
        ("experts/multitask", "multitask", "trained on all tasks at once"),
    )
    left_out = set() if labs[0].domain.trains else {"experts/multitask"}
    left_out |= set() if labs[0].domain.subject else {"merged/fisher", "merged/regmean"}
    compare(claim, labs, [row for row in listed if row[0] not in left_out], "merged/averaging", tasks)
    plain = gain(labs, "merged/ties", "merged/task_arithmetic", tasks)
    tuned = gain(labs, "merged/ties-validated", "merged/task_arithmetic-validated", tasks)
    claim.rows.append(("TIES against task arithmetic", "without validation", "", plain))
    claim.rows.append(("TIES against task arithmetic", "with validation", "", tuned))
    claim.verdict = f"TIES above task arithmetic: {verdict(plain, expected=1)} without validation, "
    claim.verdict += f"{verdict(tuned, expected=1)} with it"
    claim.notes = "Chosen on dev: " + "; ".join(f"seed {k}: {v}" for k, v in chosen.items()) + "."
    return claim


def _best(lab: Lab, swept: Mapping[tuple[float, ...], str], name: str) -> str:
    """Copies the sweep's best model on the dev slices to `name`; returns its settings."""
    tasks = lab.domain.merged
    scores = {
        values: float(np.mean([v.mean().item() for v in lab.normalised(model, tasks, "dev").values()]))
        for values, model in swept.items()
    }
    best = max(scores, key=lambda values: scores[values])
    lab.make(f"merged/{name}", lab.load(swept[best]), [lab.digest(swept[best])])
    return "/".join(f"{v:g}" for v in best)


def number_of_tasks(labs: Sequence[Lab]) -> Claim:
    claim = Claim(
        title="Accuracy against the number of tasks",
        paper="TIES and task arithmetic are equal at two tasks; TIES falls slowest as tasks are added (its figure 5)",
        columns=("tasks", "sets", "averaging", "task arithmetic", "TIES", "TIES against task arithmetic"),
        x_label="tasks merged",
    )
    everything, size = labs[0].domain.merged, labs[0].size
    differences = []
    for count in range(2, len(everything) + 1, 2):
        sets = subsets(everything, count, size.subsets)
        for lab in labs:
            for at, tasks in enumerate(sets):
                _merge_three(lab, tasks, f"-of-{count}-{at}")
        names = ("averaging", "task_arithmetic", "ties")
        found = {m: over_sets(labs, sets, lambda at, m=m, c=count: f"merged/{m}-of-{c}-{at}") for m in names}  # type: ignore[misc]
        differences.append(
            over_sets(
                labs,
                sets,
                lambda at, c=count: f"merged/ties-of-{c}-{at}",  # type: ignore[misc]
                lambda at, c=count: f"merged/task_arithmetic-of-{c}-{at}",  # type: ignore[misc]
            )
        )
        claim.rows.append((count, len(sets), *found.values(), differences[-1]))
        for method, value in found.items():
            claim.series.setdefault(method.replace("_", " "), []).append((count, value))
    equal = "contradicted" if differences[0].separated else "not refuted"
    claim.verdict = f"equal at two tasks: {equal}; TIES ahead at all tasks: {verdict(differences[-1], expected=1)}"
    claim.notes = (
        "Sets of tasks are drawn at random, the same for all seeds; an interval that holds 0 proves no equality."
    )
    return claim


def _merge_three(lab: Lab, tasks: Sequence[str], label: str = "") -> None:
    """`merged/averaging`, `merged/task_arithmetic` and `merged/ties`, each with the label behind it."""
    models = [f"experts/{t}" for t in tasks]
    lab.merge(f"averaging{label}", "linear", models)
    lab.merge(f"task_arithmetic{label}", "task_arithmetic", models, parameters={"lambda": ARITHMETIC_LAMBDA})
    ties(lab, f"ties{label}", models, PAPER_DENSITY, PAPER_LAMBDA)


def held_out(labs: Sequence[Lab]) -> Claim | None:
    if not labs[0].domain.held_out:
        return None
    claim = Claim(
        title="Held-out tasks",
        paper="TIES generalises better than task arithmetic to tasks that were not merged",
        columns=("model", "normalised accuracy on the held-out tasks", "against pretrained"),
    )
    tasks = labs[0].domain.held_out
    for lab in labs:
        _merge_three(lab, lab.domain.merged)
    listed = (
        ("base", "pretrained"),
        ("merged/averaging", "averaging"),
        ("merged/task_arithmetic", "task arithmetic"),
        ("merged/ties", "TIES"),
    )
    compare(claim, labs, listed, "base", tasks)
    difference = gain(labs, "merged/ties", "merged/task_arithmetic", tasks)
    claim.rows.append(("TIES against task arithmetic", "", difference))
    claim.verdict = verdict(difference, expected=1)
    return claim


def initialisation(labs: Sequence[Lab]) -> Claim | None:
    if not labs[0].domain.trains:
        return None
    claim = Claim(
        title="A merged model as initialisation: merge the others, fine-tune on one",
        paper="starting from TIES is better than from the pretrained model and other merges (its table 7)",
        columns=("start", "normalised accuracy", "against pretrained"),
    )
    tasks = labs[0].domain.merged[: labs[0].size.restarts]
    starts = ("averaging", "task_arithmetic", "ties")
    for lab in labs:
        for task in tasks:
            rest = [t for t in lab.domain.merged if t != task]
            _merge_three(lab, rest, f"-without-{task}")
            at_once(partial(lab.expert, [task], start=f"merged/{start}-without-{task}") for start in starts)
    claim.rows.append(("pretrained", 100, ""))
    found = {}
    for start in starts:
        pairs, values = [], []
        for lab in labs:
            name = {t: f"experts/{t} from merged-{start}-without-{t}" for t in tasks}
            one = {t: values_of(lab, name[t], [t])[t] for t in tasks}
            values.append((one, groups_of(lab, tasks)))
            own = {t: values_of(lab, f"experts/{t}", [t])[t] for t in tasks}
            pairs.append(({t: one[t] - own[t] for t in tasks}, groups_of(lab, tasks)))
        found[start] = estimate(pairs)
        claim.rows.append((start.replace("_", " "), estimate(values), found[start]))
    claim.verdict = f"TIES above the pretrained start: {verdict(found['ties'], expected=1)}"
    claim.notes = f"Tasks: {', '.join(tasks)}; as many steps as the experts had."
    return claim


def ablation(labs: Sequence[Lab]) -> Claim:
    claim = Claim(
        title="Ablation: trim, election, disjoint mean",
        paper="each step helps (its table 5)",
        columns=("without", "normalised accuracy", "against TIES"),
    )
    tasks, parts = labs[0].domain.merged, []
    for lab in labs:
        _merge_three(lab, tasks)
    for words, density, options in (
        ("the trim", 1.0, {}),
        ("the election", PAPER_DENSITY, {"elect": "none"}),
        ("the disjoint mean (divide by all experts)", PAPER_DENSITY, {"aggregate": "average"}),
    ):
        name = f"without-{words.split()[1]}"
        for lab in labs:
            ties(lab, name, experts_of(lab), density, PAPER_LAMBDA, **options)
        difference = gain(labs, f"merged/{name}", "merged/ties", tasks)
        parts.append(f"{words}: {verdict(difference, expected=-1)}")
        claim.rows.append((words, score(labs, f"merged/{name}", tasks), difference))
    claim.verdict = "; ".join(parts)
    claim.notes = (
        "The scale is the validated row of the methods' table. All at lambda 1, where dividing by all experts is a "
        "smaller scale, too: what it gains or loses is not the disjoint mean's alone."
    )
    return claim


def oracle_signs(labs: Sequence[Lab]) -> Claim | None:
    if not labs[0].domain.trains:
        return None
    claim = Claim(
        title="The multitask model's signs",
        paper="with them TIES comes close to the multitask model (its table 4)",
        columns=("model", "normalised accuracy", "against TIES"),
    )
    tasks = labs[0].domain.merged
    for lab in labs:
        _merge_three(lab, tasks)
        ties(lab, "oracle", experts_of(lab), PAPER_DENSITY, PAPER_LAMBDA, elect_from="experts/multitask")
    listed = (
        ("merged/ties", "TIES"),
        ("merged/oracle", "TIES with the multitask model's signs"),
        ("experts/multitask", "multitask"),
    )
    compare(claim, labs, listed, "merged/ties", tasks)
    claim.verdict = verdict(gain(labs, "merged/oracle", "merged/ties", tasks), expected=1)
    return claim


ADAPTER_NAMES = {"lora": "LoRA", "ia3": "(IA)3"}


def adapters(labs: Sequence[Lab]) -> Claim | None:
    if not labs[0].domain.adapters:
        return None
    claim = Claim(
        title="The same tasks as LoRA and as (IA)3 experts",
        paper="(IA)3 on T0-3B over 11 tasks, merged as adapters, with validation: task arithmetic 63.9, TIES 66.4 (of "
        "71.4 fine-tuned); LoRA is not in the paper",
        columns=("experts", "method", "adapters merged into", "normalised accuracy", "against averaging into a model"),
    )
    tasks, verdicts = labs[0].domain.merged, []
    for kind in labs[0].domain.adapters:
        own = f"merged/{kind}-alone"
        for lab in labs:
            experts = at_once(partial(lab.adapter, kind, task) for task in tasks)
            for task, expert in zip(tasks, experts, strict=True):
                lab.merge(f"{kind}-alone/{task}", "task_arithmetic", [expert])
            for method, name, parameters in (
                ("linear", "averaging", {}),
                ("task_arithmetic", "task_arithmetic", {"lambda": ARITHMETIC_LAMBDA}),
                ("ties", "ties", {"density": PAPER_DENSITY, "lambda": PAPER_LAMBDA}),
            ):
                lab.merge(f"{kind}-{name}-model", method, experts, parameters=parameters)
                block = {"output": "adapter"}
                lab.merge(f"{kind}-{name}-merged", method, experts, parameters=parameters, ties_dist=block)
                lab.merge(f"{kind}-{name}-adapter", "task_arithmetic", [f"merged/{kind}-{name}-merged"])
        first = f"merged/{kind}-averaging-model"
        for into in ("model", "adapter"):
            for name in ("averaging", "task_arithmetic", "ties"):
                model = f"merged/{kind}-{name}-{into}"
                against = gain(labs, model, first, tasks, own) if model != first else ""
                found = score(labs, model, tasks, own)
                claim.rows.append((ADAPTER_NAMES[kind], name.replace("_", " "), into, found, against))
            over = f"merged/{kind}-task_arithmetic-{into}"
            difference = gain(labs, f"merged/{kind}-ties-{into}", over, tasks, own)
            claim.rows.append((ADAPTER_NAMES[kind], "TIES against task arithmetic", into, "", difference))
            article = "an" if into == "adapter" else "a"
            verdicts.append(f"{ADAPTER_NAMES[kind]} into {article} {into}: {verdict(difference, expected=1)}")
    claim.verdict = "TIES above task arithmetic: " + "; ".join(verdicts)
    claim.notes = (
        f"No setting was validated: lambda {ARITHMETIC_LAMBDA} and TIES at density {PAPER_DENSITY}, lambda "
        f"{PAPER_LAMBDA:g}, as for full fine-tunings. Normalised by the adapters' own accuracy."
    )
    return claim


CLAIMS: tuple[Callable[[Sequence[Lab]], Claim | None], ...] = (
    whole_model_against_per_tensor,
    redundancy,
    sign_conflicts,
    sign_flips,
    methods,
    number_of_tasks,
    held_out,
    initialisation,
    ablation,
    oracle_signs,
    adapters,
)
"""None: of this kind of data it cannot be said."""
