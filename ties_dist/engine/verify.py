"""`verify`: whether a finished output is still what was written, and whether merging it again gives the same bytes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ties_dist.engine.earlier import doubts
from ties_dist.engine.passes import Forgetful, Passes
from ties_dist.errors import CheckpointError, DamageError, OutputError, TiesDistError
from ties_dist.executors.local import LocalExecutor
from ties_dist.inputs.opening import opener
from ties_dist.messages import listing, readable
from ties_dist.output.companions import RECIPE_COPY
from ties_dist.output.documents import load_document
from ties_dist.output.folder import MANIFEST, OutFolder
from ties_dist.output.manifest import Manifest
from ties_dist.planning.options import RunOptions
from ties_dist.planning.plan import SEMANTICS_VERSION
from ties_dist.planning.prepare import Job, prepare
from ties_dist.progress import Progress, Silent, phase
from ties_dist.recipe.document import read_document
from ties_dist.recipe.references import as_seen_from
from ties_dist.storage.base import BLOCK_BYTES, Reader
from ties_dist.storage.digests import block_digests
from ties_dist.storage.memory import MemoryWriter
from ties_dist.storage.place import Place
from ties_dist.values.items import WorkItem
from ties_dist.worker.matrices import MemoryMatrices
from ties_dist.worker.merging import MergeStep, Worker

READ_BYTES = 16 * BLOCK_BYTES


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """blocks: of 1 MiB, all intact. remerged_units: of how many the bytes were computed again and agree.

    doubts: what may be wrong with a model of an earlier version, though it is what was written.
    """

    blocks: int
    bytes_read: int
    remerged_units: int
    units: int
    skipped: str | None
    sha256: Mapping[str, str]
    doubts: tuple[str, ...] = ()


def verify(
    out: Place,
    options: RunOptions,
    *,
    sample: float | None = None,
    sha256: bool = False,
    progress: Progress,
) -> VerifyReport:
    """Check OUT against its manifest, then merge a random share of its units again.

    options: for what is merged again. sample: share of units, (0, 1]; 0 for none; None for 2 %, or none where the
    inputs are gone.
    Raises DamageError naming the damaged megabytes, OutputError where OUT is not a finished output.
    """
    manifest = _manifest(out)
    sums, blocks = _check_blocks(out, manifest, sha256=sha256, progress=progress)
    checked, total, skipped = 0, 0, None
    if sample is None or sample > 0:
        try:
            share = 0.02 if sample is None else sample
            checked, total = _check_sample(out, manifest, share, progress, options)
        except DamageError:
            raise
        except TiesDistError as error:
            if sample is not None:
                raise
            skipped = str(error)
    return VerifyReport(
        blocks=blocks,
        bytes_read=sum(s.size for s in manifest.shards.values()),
        remerged_units=checked,
        units=total,
        skipped=skipped,
        sha256=sums,
        doubts=doubts(manifest),
    )


def _manifest(out: Place) -> Manifest:
    try:
        found = load_document(out, MANIFEST, Manifest)
    except OutputError as error:
        raise OutputError(f"{out} is not a finished output of ties_dist: {error}") from error
    if found is None:
        raise OutputError(f"{out} is not a finished output of ties_dist: no {MANIFEST}.")
    return found


def _check_blocks(out: Place, manifest: Manifest, *, sha256: bool, progress: Progress) -> tuple[dict[str, str], int]:
    """Hash every block of every shard. Returns sha256 sums by file (if asked) and the number of blocks."""
    folder = OutFolder(place=out, fingerprint=manifest.fingerprint)
    problems = [f"{name}: missing" for name in folder.lost_companions()]
    sums: dict[str, str] = {}
    blocks = 0
    reader = out.reader()
    with phase(progress, "verify", sum(s.size for s in manifest.shards.values())):
        for name, shard in manifest.shards.items():
            if (size := out.size(name)) != shard.size:
                problems.append(f"{name}: {'missing' if size is None else f'{size:,} bytes, expected {shard.size:,}'}")
                continue
            whole = hashlib.sha256()
            for first, found in _digests(reader, name, size, progress, whole.update if sha256 else None):
                problems += [
                    f"{name}: MiB {at} (bytes from {at * BLOCK_BYTES:,}) is damaged"
                    for at, digest in enumerate(found, first)
                    if digest != shard.blocks[at]
                ]
                blocks += len(found)
            if sha256:
                sums[name] = whole.hexdigest()
    if problems:
        raise DamageError(listing(f"{out} is not what was written:", problems, "Merge again with --overwrite --fresh."))
    return sums, blocks


def _digests(
    reader: Reader, name: str, size: int, progress: Progress, also: Callable[[memoryview], None] | None
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Digests of the blocks of a file, several at a time, with the number of the first. also: is given all bytes."""
    for start in range(0, size, READ_BYTES):
        span = reader.read(name, start, min(size, start + READ_BYTES))
        if also is not None:
            also(span.view)
        yield start // BLOCK_BYTES, block_digests(span.view)
        progress.advance(len(span.view))
        span.release()


def _check_sample(
    out: Place,
    manifest: Manifest,
    share: float,
    progress: Progress,
    options: RunOptions,
) -> tuple[int, int]:
    """Merge a random share of the units again and compare digests. Returns how many, and of how many."""
    if manifest.semantics_version != SEMANTICS_VERSION:
        raise CheckpointError(
            f"{out} was merged by another version of ties_dist (semantics {manifest.semantics_version}, this one has "
            f"{SEMANTICS_VERSION}): the same recipe may give other bytes."
        )
    origin = manifest.origin
    as_then = replace(options, max_shard_size=origin.max_shard_bytes)
    job = prepare(_recipe(out, origin.models), as_then, publishes=False)
    if job.plan.fingerprint != manifest.fingerprint:
        raise CheckpointError(f"the inputs of {out} are not what they were when it was merged.")
    units = list(job.plan.items())
    chosen = random.sample(units, max(1, min(len(units), round(share * len(units)))))
    passes = _passes(job)
    trim = job.plan.needs.trim
    if trim is not None and trim.scope == "model":
        if len(origin.thresholds) != len(job.plan.experts):
            raise OutputError(f"{out}/{MANIFEST} is damaged: {len(origin.thresholds)} thresholds.")
        passes.find_thresholds(origin.thresholds)
    problems = []
    with phase(progress, "sample", sum(u.nbytes for u in chosen)):
        for unit in sorted(chosen):
            if _again(passes, unit, origin.majority or 1) != _blocks(manifest, unit):
                problems.append(f"{unit} differ from a new merge")
            progress.advance(unit.nbytes)
    if problems:
        raise DamageError(
            listing(f"{out} is not what its recipe gives:", problems, "The output or an input was changed since.")
        )
    return len(chosen), len(units)


def _recipe(out: Place, models: Mapping[str, Sequence[str]]) -> Mapping[str, object]:
    """The resolved recipe with its models where they were, as seen from OUT: as written they may be relative."""
    if (text := out.read(RECIPE_COPY)) is None:
        raise OutputError(f"{out} has no {RECIPE_COPY}, by which a sample could be merged again.")
    document, _, _ = read_document(text.decode(errors="replace"))

    def placed(key: str, value: object) -> object:
        if isinstance(value, Mapping):
            return {k: placed(k, v) for k, v in value.items()}
        if isinstance(value, list):
            return [placed("", v) for v in value]
        if isinstance(value, str) and key in ("model", "base_model", "elect_from", "statistics") and value in models:
            return as_seen_from(str(out), models[value])
        return value

    return {key: placed(key, value) for key, value in document.items()}


def _passes(job: Job) -> Passes:
    """The passes of a merge whose results go nowhere."""
    return Passes(
        plan=job.plan,
        step=MergeStep(
            Worker(
                job.plan, opener(job.plan.models, job.resources.backend, reread_bytes=job.plan.reread_bytes), "eager"
            ),
            MemoryWriter(),
        ),
        executor=LocalExecutor(job.plan.threads),
        keeper=Forgetful(),
        progress=Silent(),
    )


def _again(passes: Passes, unit: WorkItem, majority: int) -> tuple[str, ...]:
    passes.select_for([unit])
    passes.step.matrices = MemoryMatrices()  # those of other units would fill the memory
    passes.solve([unit])
    task = passes.task(unit, majority)
    buffer, _, _ = passes.step.compute(task, passes.step.load(task))
    return block_digests(buffer.data[: unit.nbytes])


def _blocks(manifest: Manifest, unit: WorkItem) -> tuple[str, ...]:
    return tuple(
        digest
        for each in unit.ranges
        for digest in manifest.shards[each.file].blocks[each.start // BLOCK_BYTES :][: each.blocks]
    )


def summary(report: VerifyReport) -> str:
    said = f"{report.blocks:,} blocks ({readable(report.bytes_read)}) are what was written"
    if report.skipped is not None:
        return f"{said}; no sample was merged again: {report.skipped}"
    if not report.remerged_units:
        return f"{said}; no sample was merged again."
    return f"{said}; {report.remerged_units} of {report.units} units merged again: the same bytes."
