"""Whether this machine can work on a merge: what a worker looks at before it is given anything.

A folder that another machine does not see, sees differently or cannot write is found here, not hours later.
"""

from __future__ import annotations

import itertools
import mmap
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from ties_dist.compiler.native import processor
from ties_dist.errors import CheckpointError, OutputError
from ties_dist.inputs.opening import open_input
from ties_dist.inputs.stamps import files_of
from ties_dist.messages import readable
from ties_dist.output.folder import OutFolder
from ties_dist.planning.options import Resources
from ties_dist.planning.plan import MergePlan
from ties_dist.storage.backends import memory_limit
from ties_dist.storage.base import Backend
from ties_dist.storage.rehearsal import rehearse
from ties_dist.values.inputs import Input
from ties_dist.values.machine import Machine

COMPARED = ("ties-dist", "numpy", "llvmlite", "torch")


def versions() -> dict[str, str]:
    """What has to be the same on every machine."""
    return {"python": ".".join(map(str, sys.version_info[:2])), **{name: version(name) for name in COMPARED}}


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the driver has, for workers to compare. token: the name of a file that it just wrote into OUT's state."""

    token: str
    versions: dict[str, str] = field(default_factory=versions)


def machine(resources: Resources, gpus: int, problems: Sequence[str] = ()) -> Machine:
    """This one, for what has to be the same on all of them."""
    if gpus:
        return Machine(kind="cuda", text=f"{gpus} GPUs", problems=tuple(problems))
    kernel = "eager" if resources.kernel == "eager" else f"compiled for {processor()}"
    text = f"{resources.thread_count} threads, kernel {kernel}"
    return Machine(kind=platform.machine(), text=text, problems=tuple(problems))


def preflight(plan: MergePlan, resources: Resources, folder: OutFolder, expected: Expectation) -> tuple[str, ...]:
    """All that speaks against this machine, one line each; empty where nothing does."""
    problems = (
        _versions(expected),
        _inputs(plan, resources.backend),
        _output(folder, expected.token),
        _memory(plan.projected_bytes),
    )
    return tuple(itertools.chain.from_iterable(problems))


def _versions(expected: Expectation) -> Iterator[str]:
    for name, found in versions().items():
        if found != expected.versions[name]:
            yield f"{name} {found} is installed here, {expected.versions[name]} where the merge was started"


def _inputs(plan: MergePlan, backend: Backend) -> Iterator[str]:
    for model in {(m.path, m.adapter): m for m in plan.models}.values():
        try:
            adapter = Path(model.adapter) if model.adapter else None
            _, found = open_input(Path(model.path), adapter, model.name, backend)
        except (CheckpointError, OSError) as error:
            yield f"{model.path}: {error}"
            continue
        if found != model.identity:
            yield f"{model.path}: '{model.name}' is not the model it is where the merge was started"
        elif backend in ("auto", "mmap") and (reason := _unmappable(model)):
            yield f"{model.path}: files cannot be mapped here ({reason}); give --read-backend pread"


def _unmappable(model: Input) -> str | None:
    for path in files_of(model)[:1]:
        try:
            with open(path, "rb") as file:
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).close()
        except (OSError, ValueError) as error:
            return str(error)
    return None


def _output(folder: OutFolder, token: str) -> Iterator[str]:
    """Whether it is the same folder, and can be written here."""
    place, run = folder.place, folder.run
    if place.size(f"{run}/{token}") is None:
        yield f"{place}: not the folder it is where the merge was started; OUT must be on a shared file system"
        return
    try:
        rehearse(place, run, into=run)
    except OutputError as error:
        yield str(error)


def _memory(needed: int) -> Iterator[str]:
    limit = memory_limit()
    if limit is not None and needed > limit:
        yield (
            f"a worker needs {readable(needed)} of memory, the limit here is {readable(limit)}; "
            "give a smaller --memory-budget or larger workers"
        )
