"""Many merges of one recipe, with other densities and lambdas, from one read of the inputs.

Every output is byte for byte what its own merge would write, in a folder of its own with its own journal: a sweep that
is interrupted goes on where each of its merges was.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Unpack

from ties_dist.engine.run import run
from ties_dist.errors import RecipeError, TiesDistError
from ties_dist.executors.local import LocalExecutor
from ties_dist.messages import listing
from ties_dist.output.report import MergeReport
from ties_dist.planning.keywords import SweepKeywords, takes
from ties_dist.planning.options import RunOptions
from ties_dist.planning.prepare import Job, prepare
from ties_dist.progress import LogProgress, Progress, Silent
from ties_dist.recipe.document import RecipeSource, as_source, read_document
from ties_dist.recipe.parts import read_parts
from ties_dist.statistics.counts import StatisticsStore
from ties_dist.storage.local_place import LocalPlace
from ties_dist.sweeping.shared import Meeting, SharedExecutor

MOST_VARIANTS = 64


def parse_values(text: str, name: str) -> list[float]:
    """`0.1,0.2,0.3`, or `0.8:1.6:0.2` (from, to and step, both ends included), or both mixed. Raises RecipeError."""
    values: list[float] = []
    for part in text.split(","):
        try:
            numbers = [Decimal(word.strip()) for word in part.split(":")]
        except InvalidOperation:
            numbers = []
        if len(numbers) not in (1, 3) or not all(n.is_finite() for n in numbers):
            raise RecipeError(f"--{name} '{part}': give numbers like 0.1,0.2 or a range from:to:step like 0.8:1.6:0.2.")
        if len(numbers) == 1:
            values.append(float(numbers[0]))
            continue
        start, stop, step = numbers
        if step <= 0 or stop < start or (stop - start) / step >= MOST_VARIANTS:
            raise RecipeError(
                f"--{name} '{part}': from {start} to {stop} in steps of {step} is no range of up to {MOST_VARIANTS} "
                "values."
            )
        while start <= stop:  # in decimal: 0.8 + 2 * 0.2 is 1.2, not 1.2000000000000002
            values.append(float(start))
            start += step
    return list(dict.fromkeys(values))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One output of a sweep. values: what it has instead of the recipe's own."""

    values: Mapping[str, float]

    @property
    def name(self) -> str:
        return "_".join(f"{name}-{value:g}" for name, value in self.values.items())


def variants(values: Mapping[str, Sequence[float]]) -> list[Variant]:
    """All combinations, the first parameter varying slowest. Raises RecipeError."""
    given = {name: listed for name, listed in values.items() if listed}
    found = [Variant(values=dict(zip(given, chosen, strict=True))) for chosen in itertools.product(*given.values())]
    if not given or len(found) > MOST_VARIANTS:
        raise RecipeError(f"a sweep is over 1 to {MOST_VARIANTS} outputs; give --density or --lambda, or fewer values.")
    if twice := sorted({v.name for v in found if sum(v.name == w.name for w in found) > 1}):
        raise RecipeError(listing("values too close to name folders by:", twice))
    return found


def with_values(document: Mapping[str, object], values: Mapping[str, float]) -> dict[str, object]:
    """The recipe of one variant. Raises RecipeError where a model sets a swept parameter itself."""
    parts = read_parts(document, [])
    models = ((s.where, s.entry.get("parameters")) for s in parts.sources if isinstance(s.entry, Mapping))
    for where, own in (*models, *((place, own) for place, own in parts.scopes if place != "parameters")):
        if stuck := sorted(set(values) & set(own if isinstance(own, Mapping) else ())):
            raise RecipeError(
                f"{where} sets {' and '.join(stuck)} itself, so a sweep over it would change nothing there. "
                "Remove it there."
            )
    parameters = document.get("parameters")
    return {**document, "parameters": {**(parameters if isinstance(parameters, Mapping) else {}), **values}}


@dataclass(frozen=True, kw_only=True)
class Swept:
    """One finished output."""

    variant: Variant
    path: Path
    report: MergeReport


@takes(SweepKeywords)
def sweep(
    recipe: RecipeSource,
    out: Path | str,
    *,
    density: Sequence[float] = (),
    lam: Sequence[float] = (),
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    told: Callable[[Sequence[str]], None] | None = None,
    **options: Unpack[SweepKeywords],
) -> list[Swept]:
    """Merge a recipe once for every density and lambda, into folders like `out/density-0.2_lambda-1.4`.

    The inputs are read once for all; recipe, progress, stop and told are those of `merge`. Whatever fails, what is done
    is kept: the same call resumes. Raises the errors of `ties_dist.errors`.
    """
    chosen, common = variants({"density": density, "lambda": lam}), RunOptions(**options)
    document, _, folder = read_document(as_source(recipe))
    resources = common.resources(outputs=len(chosen))
    jobs = [prepare(with_values(document, v.values), common, resources=resources, root=folder) for v in chosen]
    if told is not None:
        told(jobs[0].notes)
    stop = stop or threading.Event()
    meeting = Meeting(running=len(jobs))
    inner = LocalExecutor(resources.thread_count, stop)
    reports: dict[int, MergeReport] = {}
    failures: dict[int, BaseException] = {}

    def work(number: int, job: Job) -> None:
        try:
            reports[number] = run(
                job,
                LocalPlace(Path(out) / chosen[number].name),
                executor=SharedExecutor(inner, meeting, chosen[number].name),
                progress=(progress or LogProgress()) if number == 0 else Silent(),
                store=StatisticsStore(common.cache),
                also=[j.plan for j in jobs[number + 1 :]],
                stop=stop,
            )
        except BaseException as error:
            failures[number] = error
        finally:
            meeting.leave()

    workers = [
        threading.Thread(target=work, args=(i, job), name=chosen[i].name, daemon=True) for i, job in enumerate(jobs)
    ]
    for worker in workers:
        running = meeting.running
        worker.start()
        meeting.wait_for(running)  # the first looks for its thresholds alone: the others find theirs in the store
    for worker in workers:
        worker.join()
    if failures:
        raise _worst(failures, chosen)
    return [Swept(variant=v, path=Path(out) / v.name, report=reports[i]) for i, v in enumerate(chosen)]


def _worst(failures: Mapping[int, BaseException], chosen: Sequence[Variant]) -> BaseException:
    """What to tell: bugs first, then what a person can correct, then that all were stopped."""
    order = sorted(failures, key=lambda i: (isinstance(failures[i], TiesDistError), _exit(failures[i]) == 75, i))
    error = failures[order[0]]
    labelled = str(error).startswith(tuple(f"{v.name}: " for v in chosen))
    if labelled or _exit(error) == 75 or not isinstance(error, TiesDistError):
        return error
    return type(error)(f"{chosen[order[0]].name}: {error}")


def _exit(error: BaseException) -> int:
    return error.exit_status if isinstance(error, TiesDistError) else 1
