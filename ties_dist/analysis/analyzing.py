"""`analyze`: what a merge would meet, from one read of its inputs.

Trimming over the whole model needs thresholds before the read that counts: the statistics store's, which are exact, or
those of a sample of at most 0.4 of the inputs. The read then counts what is above and at them, so that every number is
exact for a threshold that is stated with its true rank. An analysis is kept in the store, finished or interrupted; its
key holds the inputs' sizes and times, because no merge proves it.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ties_dist.analysis.figures import VERSION, Analysis, Run, advise
from ties_dist.analysis.loops import MOST_EXPERTS
from ties_dist.analysis.summing import Question, summarise
from ties_dist.analysis.tally import Analyse, Signs, Tally, TallyStep
from ties_dist.engine.scan import nonfinite_error
from ties_dist.errors import OutputError, RecipeError, StoppedError
from ties_dist.executors.base import check_stop
from ties_dist.executors.local import LocalExecutor
from ties_dist.inputs.opening import opener
from ties_dist.methods.needs import TrimRule
from ties_dist.planning.keywords import AnalyzeKeywords, takes
from ties_dist.planning.options import RunOptions
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.prepare import Job, prepare
from ties_dist.planning.sample import sample_slices
from ties_dist.progress import LogProgress, Progress, phase
from ties_dist.recipe.document import RecipeSource, as_source
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.digests import digest
from ties_dist.storage.local import write_durably
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.memory import MemoryWriter
from ties_dist.storage.snapshot import Snapshot
from ties_dist.thresholds import predict, to_bits, zero_share
from ties_dist.values.items import WorkItem, as_item
from ties_dist.values.machine import peak_rss_bytes
from ties_dist.values.views import read_bytes
from ties_dist.worker.merging import Worker

logger = logging.getLogger(__name__)

DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
PAPER_DENSITY = 0.2
SAMPLED = 0.4
"""Of the inputs at most: with the read that counts, 1.5 times the inputs."""
READ_AHEAD = 2
"""Units that are read while others are counted, one per thread; the plan has room for four."""
DOCUMENT, PAGE = "analysis.json", "report.html"
ANALYSES = "analyses"
"""Finished ones and the counts of interrupted ones, in a folder beside the statistics."""


@takes(AnalyzeKeywords)
def analyze(
    recipe: RecipeSource,
    out: Path | str | None = None,
    *,
    density: float | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    told: Callable[[Sequence[str]], None] | None = None,
    **options: Unpack[AnalyzeKeywords],
) -> Analysis:
    """Measure the deltas of a recipe's experts. out: a folder for `analysis.json` and `report.html`.

    density: of the figures and groups; by default the recipe's, where it trims with one, else the paper's 0.2. recipe,
    progress, stop and told are those of `merge`. Raises the errors of `ties_dist.errors`.
    """
    began, common = time.monotonic(), RunOptions(**options)
    folder = None if out is None else _usable(Path(out))
    job = prepare(as_source(recipe), common, publishes=False)
    chosen = _density(job, density)
    if told is not None:
        told(job.notes)
    cache = common.cache
    kept = cache / ANALYSES / f"{_key(job, chosen)}.json"
    snapshot = Snapshot(LocalPlace(kept.parent), kept.with_suffix(".partial").name, shared=True)
    found = _kept(kept)
    if found is None:
        executor = LocalExecutor(job.plan.threads + READ_AHEAD, stop or threading.Event())
        try:
            found = _measure(job, chosen, StatisticsStore(cache), executor, progress or LogProgress(), snapshot)
        except StoppedError:
            raise StoppedError(
                "stopped. Run the same command again: it goes on from the counts that are kept."
            ) from None
        _keep(found, kept)
    snapshot.drop()
    found = replace(found, run=replace(found.run, elapsed_seconds=time.monotonic() - began))
    if folder is not None:
        _write(found, folder)
    return found


def to_json(found: Analysis) -> str:
    return TypeAdapter(Analysis).dump_json(found, indent=1).decode()  # the json module takes ten times as long


def _usable(folder: Path) -> Path:
    """Made, and with all that a page needs, before hours are spent. Raises OutputError."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError(
            "--out writes a page with charts, for which matplotlib is needed: pip install 'ties-dist[report]'. "
            "Without --out the table and --json work as they are."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}. Give another folder with --out.") from error
    write_durably(folder / f".{PAGE}", b"")
    (folder / f".{PAGE}").unlink()
    return folder


def _density(job: Job, asked: float | None) -> float:
    """Of the figures. Raises RecipeError also where there are no deltas to measure."""
    recipe, plan = job.recipe, job.plan
    if recipe.base is None and recipe.options.output == "model":
        raise RecipeError("an analysis is of deltas, and this recipe has no `base_model`: name the experts' base.")
    if len(plan.experts) > MOST_EXPERTS:
        raise RecipeError(f"an analysis takes up to {MOST_EXPERTS} experts; this recipe has {len(plan.experts)}.")
    if not plan.elements:
        raise RecipeError("an analysis needs tensors to merge, and this recipe excludes all of them.")
    if asked is not None:
        return asked
    given = {e.parameters["density"].constant for e in recipe.experts if "density" in e.parameters}
    own = given.pop() if len(given) == 1 and plan.needs.trim is not None else None
    return own if own is not None else PAPER_DENSITY


def _measure(
    job: Job, density: float, store: StatisticsStore, executor: LocalExecutor, progress: Progress, snapshot: Snapshot
) -> Analysis:
    """One read of base and experts, in any order of units."""
    plan = job.plan
    worker = Worker(plan, opener(plan.models, job.resources.backend, reread_bytes=plan.reread_bytes))
    question, source = ask(plan, density, store, worker, _rule(job))
    done, tally = _resume(question, snapshot)
    resumed, models = sum(unit.nbytes for unit in done), len(plan.experts) + 1
    units = list(plan.items(done))
    step = TallyStep(worker, MemoryWriter(), turns=threading.Semaphore(plan.threads))
    with phase(progress, "analyze", plan.layout.total_bytes * models):
        progress.advance(resumed * models)
        try:
            for unit, part in executor.call(step, Analyse(question.bits, question.chosen), units):
                tally.add(part)
                done.append(unit)
                progress.advance(unit.nbytes * models)
                snapshot.keep_now_and_then(lambda: _as_kept(question, done, tally))
                check_stop(executor.stop)
        except StoppedError:
            if done:
                snapshot.keep(*_as_kept(question, done, tally))
            raise
    if tally.nonfinite:
        snapshot.drop()
        raise nonfinite_error(plan, worker, tally.nonfinite)
    found = summarise(question, tally)
    run = Run(
        bytes_read=worker.requested_bytes,
        resumed_fraction=resumed / plan.layout.total_bytes,
        input_bytes=input_bytes(plan),
        peak_rss_bytes=peak_rss_bytes(),
        projected_bytes=plan.projected_bytes,
        threads=plan.threads,
        unit_bytes=plan.unit_bytes,
        thresholds_from=source,
    )
    trims = plan.needs.trim == question.rule
    return replace(found, warnings=tuple(advise(found, trims=trims)), notes=job.notes, run=run)


def _rule(job: Job) -> TrimRule:
    """How the figures are trimmed: over the whole model, all ties kept, of what the recipe's density is a share of."""
    moved = job.recipe.of_moved
    return TrimRule(scope="model", tie_policy="keep_all", of_moved=moved if any(moved) else ())


def _as_kept(question: Question, done: Sequence[WorkItem], tally: Tally) -> tuple[Any, dict[str, np.ndarray]]:
    facts, arrays = tally.as_kept()
    return {"thresholds": question.bits, "items": done, **facts}, arrays


def _resume(question: Question, snapshot: Snapshot) -> tuple[list[WorkItem], Tally]:
    """What an interrupted run has counted at the same thresholds, and the units it is of."""
    same = [list(row) for row in question.bits]
    if (kept := snapshot.load()) is not None and kept[0]["thresholds"] == same and "items" in kept[0]:
        logger.info("going on where an interrupted analysis was")
        return [as_item(each) for each in kept[0]["items"]], Tally.from_kept(*kept)
    return [], Tally(Signs.empty(len(question.plan.experts)))


def input_bytes(plan: MergePlan) -> int:
    """One read of what is measured."""
    models = (plan.base, *plan.experts)
    return sum(read_bytes(m.views[t.source], 0, t.numel) for m in models for t in plan.counted)


def ask(
    plan: MergePlan, density: float, store: StatisticsStore, worker: Worker, rule: TrimRule
) -> tuple[Question, str]:
    """Thresholds for every expert and density, and where they are from: 'cache', 'sample' or both."""
    densities = tuple(sorted({*DENSITIES, density}, reverse=True))
    found: dict[tuple[int, int], int] = {}

    def rank(i: int, j: int, zeros: int) -> int | None:
        return rule.rank(rule.ranked(i, plan.elements, zeros), densities[j])

    for i in range(len(plan.experts)):
        known = store.load(store.key(plan.base, plan.experts[i], plan.sizes), plan.elements)
        zeros = known.zeros if known and rule.is_of_moved(i) else 0
        for j in range(len(densities)):
            threshold = known.threshold(place) if known and zeros is not None and (place := rank(i, j, zeros)) else None
            if threshold is not None:
                found[i, j] = threshold.bits
    from_store = bool(found)
    found |= {(i, j): 0 for i in range(len(plan.experts)) for j, d in enumerate(densities) if d >= 1}
    wanted = [i for i in range(len(plan.experts)) if any((i, j) not in found for j in range(len(densities)))]
    if wanted:
        magnitudes, weights = worker.sample(*thinned(plan), wanted)
        for i in wanted:
            zeros = round(plan.elements * zero_share(magnitudes[i], weights))
            for j in range(len(densities)):
                if (i, j) not in found:
                    place = rank(i, j, zeros)
                    value = predict(magnitudes[i], weights, place / plan.elements).value if place else 0.0
                    found[i, j] = to_bits(value)
    # A sample's may fall behind an exact neighbour's.
    rows = [np.maximum.accumulate([found[i, j] for j in range(len(densities))]) for i in range(len(plan.experts))]
    question = Question(
        plan=plan,
        rule=rule,
        densities=densities,
        density=density,
        bits=tuple(tuple(int(b) for b in row) for row in rows),
    )
    return question, "cache and sample" if wanted and from_store else "sample" if wanted else "cache"


def thinned(plan: MergePlan) -> tuple[list[tuple[str, int, int]], list[float]]:
    """Slices of a sample and their elements' weights; shorter where the usual ones are much of a small model."""
    slices, weights = sample_slices(plan)
    part = SAMPLED * plan.elements / sum(stop - start for _, start, stop in slices)
    if part >= 1:
        return slices, weights
    shorter = [(name, start, start + max(1, int(part * (stop - start)))) for name, start, stop in slices]
    grown = [
        weight * (stop - start) / (cut - start)
        for weight, (_, start, stop), (_, _, cut) in zip(weights, slices, shorter, strict=True)
    ]
    return shorter, grown


def _key(job: Job, density: float) -> str:
    plan = job.plan
    counted = [(t.source, t.numel) for t in plan.counted]
    models = [(m.name, m.identity) for m in (plan.base, *plan.experts)]
    method = (plan.method.name, plan.needs.trim, job.recipe.of_moved, density, DENSITIES)
    # What is counted of an interrupted one are byte ranges of the output's files, and sums are rounded at their MiB.
    layout = [(shard.name, shard.size, shard.tensors) for shard in plan.layout.shards]
    facts = (VERSION, method, models, counted, layout, job.notes, sorted(job.stamps.items()))
    return digest(repr(facts).encode())


def _kept(path: Path) -> Analysis | None:
    try:
        found = TypeAdapter(Analysis).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        logger.warning("the kept analysis %s is unreadable (%s): reading the inputs", path.name, type(error).__name__)
        return None
    logger.info("these inputs were analysed before: taken from the statistics store")
    run = replace(found.run, cached=True, bytes_read=0, resumed_fraction=0.0, peak_rss_bytes=peak_rss_bytes())
    return replace(found, run=run)


def _keep(found: Analysis, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, to_json(found), shared=True)
    except OSError as error:
        logger.warning("cannot keep the analysis in %s (%s): the next one reads again", path.parent, error)


def _write(found: Analysis, folder: Path) -> None:
    """Raises OutputError."""
    from ties_dist.analysis.page import page

    write_durably(folder / DOCUMENT, to_json(found))
    write_durably(folder / PAGE, page(found))
    logger.info("%s and %s written", folder / DOCUMENT, folder / PAGE)
