"""`verify`: whether a finished output is still what was written, and whether merging it again gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ties_dist.engine.passes import Forgetful, Passes
from ties_dist.errors import CheckpointError, DamageError, OutputError, TiesDistError
from ties_dist.executors.local import LocalExecutor
from ties_dist.inputs.opening import opener
from ties_dist.messages import listing, readable
from ties_dist.output.companions import RECIPE_COPY
from ties_dist.output.folder import STATE, OutFolder
from ties_dist.output.journal import unpack
from ties_dist.planning.options import Resources
from ties_dist.planning.prepare import Job, prepare
from ties_dist.progress import Progress, Silent, phase
from ties_dist.recipe.document import read_document
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.digests import block_digests
from ties_dist.storage.local import LocalWriter
from ties_dist.storage.readers import open_reader
from ties_dist.values.items import WorkItem
from ties_dist.worker.matrices import Matrices
from ties_dist.worker.merging import MergeStep, Worker

READ_BYTES = 16 * BLOCK_BYTES


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """blocks: of 1 MiB, all intact. remerged_units: of how many the bytes were computed again and agree."""

    blocks: int
    bytes_read: int
    remerged_units: int
    units: int
    skipped: str | None
    sha256: Mapping[str, str]


def verify(
    out: Path,
    *,
    sample: float | None = None,
    sha256: bool = False,
    progress: Progress,
    resources: Resources,
    allow_external_methods: bool = False,
) -> VerifyReport:
    """Check OUT against its manifest, then merge a random share of its units again.

    sample: share of units, (0, 1]; 0 for none; None for 2 %, or none where the inputs are gone.
    Raises DamageError naming the damaged megabytes, OutputError where OUT is not a finished output.
    """
    manifest = _manifest(out)
    sums, blocks = _check_blocks(out, manifest, sha256=sha256, progress=progress)
    checked, total, skipped = 0, 0, None
    if sample is None or sample > 0:
        try:
            share = 0.02 if sample is None else sample
            checked, total = _check_sample(out, manifest, share, progress, resources, allow_external_methods)
        except DamageError:
            raise
        except TiesDistError as error:
            if sample is not None:
                raise
            skipped = str(error)
    return VerifyReport(
        blocks=blocks,
        bytes_read=sum(s["size"] for s in manifest["shards"].values()),
        remerged_units=checked,
        units=total,
        skipped=skipped,
        sha256=sums,
    )


def _manifest(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / STATE / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise OutputError(f"{out} is not a finished output of ties_dist: no readable manifest ({error}).") from error
    if not isinstance(found, dict) or not {"shards", "origin", "fingerprint"} <= found.keys():
        raise OutputError(f"{out} is not a finished output of ties_dist: {STATE}/manifest.json is not a manifest.")
    return found


def _check_blocks(
    out: Path, manifest: Mapping[str, Any], *, sha256: bool, progress: Progress
) -> tuple[dict[str, str], int]:
    """Hash every block of every shard. Returns sha256 sums by file (if asked) and the number of blocks."""
    folder = OutFolder(path=out, fingerprint=manifest["fingerprint"])
    problems = [f"{name}: missing" for name in folder.lost_companions()]
    sums: dict[str, str] = {}
    blocks = 0
    reader = open_reader(out)
    with phase(progress, "verify", sum(s["size"] for s in manifest["shards"].values())):
        for name, shard in manifest["shards"].items():
            try:
                size = reader.size(name)
            except FileNotFoundError:
                problems.append(f"{name}: missing")
                continue
            if size != shard["size"]:
                problems.append(f"{name}: {size:,} bytes, expected {shard['size']:,}")
                continue
            whole = hashlib.sha256() if sha256 else None
            for start in range(0, size, READ_BYTES):
                span = reader.read(name, start, min(size, start + READ_BYTES))
                first = start // BLOCK_BYTES
                for i, found in enumerate(block_digests(span.view)):
                    if found != shard["blocks"][first + i]:
                        problems.append(
                            f"{name}: MiB {first + i} (bytes from {(first + i) * BLOCK_BYTES:,}) is damaged"
                        )
                    blocks += 1
                if whole is not None:
                    whole.update(span.view)
                progress.advance(len(span.view))
                span.release()
            if whole is not None:
                sums[name] = whole.hexdigest()
    if problems:
        raise DamageError(listing(f"{out} is not what was written:", problems, "Merge again with --overwrite --fresh."))
    return sums, blocks


def _check_sample(
    out: Path,
    manifest: Mapping[str, Any],
    share: float,
    progress: Progress,
    resources: Resources,
    allow_external_methods: bool,
) -> tuple[int, int]:
    """Merge a random share of the units again and compare digests. Returns how many, and of how many."""
    origin = manifest["origin"]
    job = prepare(
        _recipe(out, origin["models"]),
        resources=resources,
        max_shard_bytes=origin["max_shard_bytes"],
        allow_external_methods=allow_external_methods,
    )
    if job.plan.fingerprint != manifest["fingerprint"]:
        raise CheckpointError(f"the inputs of {out} are not what they were when it was merged.")
    units = list(job.plan.items())
    chosen = random.sample(units, max(1, min(len(units), round(share * len(units)))))
    passes = _passes(job, out)
    if origin["thresholds"]:
        passes.find_thresholds(unpack(origin["thresholds"]))
    problems = []
    with phase(progress, "sample", sum(u.nbytes for u in chosen)):
        for unit in sorted(chosen):
            if _again(passes, unit, origin["majority"] or 1) != _blocks(manifest, unit):
                problems.append(f"{unit} differ from a new merge")
            progress.advance(unit.nbytes)
    if problems:
        raise DamageError(
            listing(f"{out} is not what its recipe gives:", problems, "The output or an input was changed since.")
        )
    return len(chosen), len(units)


def _recipe(out: Path, places: Mapping[str, Sequence[str] | str]) -> Mapping[str, object]:
    """The resolved recipe with its models where they were, as seen from OUT: as written they may be relative."""
    document, _, _ = read_document(out / RECIPE_COPY)

    def placed(value: Any) -> Any:
        if isinstance(value, Mapping):
            keys = ("model", "base_model", "elect_from", "statistics")
            return {k: _place(out, places, v) if k in keys else placed(v) for k, v in value.items()}
        return [placed(v) for v in value] if isinstance(value, list) else value

    return cast("Mapping[str, object]", placed(document))


def _place(out: Path, places: Mapping[str, Sequence[str] | str], text: str) -> str:
    """A model, or model+adapter."""
    if text not in places:
        return text
    found = places[text]
    parts = [found] if isinstance(found, str) else found
    return "+".join(str((out / part).resolve()) for part in parts)


def _passes(job: Job, out: Path) -> Passes:
    """The passes of a merge whose results go nowhere."""
    return Passes(
        plan=job.plan,
        step=MergeStep(
            Worker(
                job.plan, opener(job.plan.models, job.resources.backend, reread_bytes=job.plan.reread_bytes), "eager"
            ),
            LocalWriter(out),
        ),
        executor=LocalExecutor(job.plan.threads),
        keeper=Forgetful(),
        progress=Silent(),
    )


def _again(passes: Passes, unit: WorkItem, majority: int) -> tuple[str, ...]:
    passes.select_for([unit])
    passes.step.matrices = Matrices()  # those of other units would fill the memory
    passes.solve([unit])
    task = passes.task(unit, majority)
    buffer, _, _ = passes.step.compute(task, passes.step.load(task))
    return block_digests(buffer.data[: unit.nbytes])


def _blocks(manifest: Mapping[str, Any], unit: WorkItem) -> tuple[str, ...]:
    return tuple(
        digest
        for each in unit.ranges
        for digest in manifest["shards"][each.file]["blocks"][each.start // BLOCK_BYTES :][: each.blocks]
    )


def summary(report: VerifyReport) -> str:
    said = f"{report.blocks:,} blocks ({readable(report.bytes_read)}) are what was written"
    if report.skipped is not None:
        return f"{said}; no sample was merged again: {report.skipped}"
    if not report.remerged_units:
        return f"{said}; no sample was merged again."
    return f"{said}; {report.remerged_units} of {report.units} units merged again: the same bytes."
