"""The Python interface; the command line is a thin coat over it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from ties_dist.engine.forecast import PlanReport, forecast
from ties_dist.engine.run import run
from ties_dist.executors.create import staff
from ties_dist.inputs.survey import Survey
from ties_dist.output.report import MergeReport
from ties_dist.planning.keywords import MergeKeywords, PlanKeywords, takes
from ties_dist.planning.options import RunOptions
from ties_dist.planning.prepare import prepare
from ties_dist.progress import LogProgress, Progress
from ties_dist.recipe.document import RecipeSource, as_source
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.local_place import LocalPlace


@takes(MergeKeywords)
def merge(
    recipe: RecipeSource,
    out: Path | str,
    *,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    told: Callable[[Sequence[str]], None] | None = None,
    **options: Unpack[MergeKeywords],
) -> MergeReport:
    """Merge the models of a recipe into the folder `out`; resumes an interrupted run of the same merge.

    recipe: a file, YAML text (a str of more than one line), or the document itself. stop: set it to end after the unit
    at hand (StoppedError; the same call resumes). told: is given the plan's notes before the work starts.
    Raises the errors of `ties_dist.errors`.
    """
    chosen, stop = RunOptions(**options), stop or threading.Event()
    with staff(chosen, stop) as hired:
        resources = chosen.resources(threads=hired.threads, gpu_slots=hired.gpu_slots)
        job = prepare(as_source(recipe), chosen, resources=resources)
        if told is not None:
            told(job.notes)
        return run(
            job,
            LocalPlace(Path(out)),
            executor=hired.executor,
            progress=progress or LogProgress(),
            store=StatisticsStore(chosen.cache),
            stop=stop,
            gpus=hired.gpus,
        )


@takes(PlanKeywords)
def plan(
    recipe: RecipeSource, out: Path | str | None = None, *, sample: bool = False, **options: Unpack[PlanKeywords]
) -> PlanReport:
    """What `merge` would do, from headers and a few pages; with `sample`, more pages of every model.

    Of models on the hub that are not in its cache no weights are downloaded.

    Raises what `merge` would before it starts to work.
    """
    with Survey() as survey:
        job = prepare(as_source(recipe), RunOptions(**options), fetch=survey.fetch, reader=survey.reader, prove=False)
        survey.check(sample=sample)
        place = None if out is None else LocalPlace(Path(out))
        return forecast(
            job,
            place,
            sample=sample,
            download_bytes=survey.download_bytes,
            coming_bytes=survey.onto(place.standing().root) if place is not None else 0,
        )
