"""Whether a job may go on in OUT, start there, or is done already; with messages for everything in between."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace

from ties_dist.errors import CheckpointError, OutputError, PlanError
from ties_dist.inputs.stamps import changed_since
from ties_dist.messages import listing, readable
from ties_dist.output.documents import load_document
from ties_dist.output.folder import BEGUN, OutFolder
from ties_dist.output.journal import Record, read_journals
from ties_dist.output.lock import STATE
from ties_dist.output.manifest import Begun, Origin
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import OutputShard
from ties_dist.planning.plan import SEMANTICS_VERSION, MergePlan
from ties_dist.planning.prepare import Job
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.place import Check, unchecked
from ties_dist.storage.rehearsal import rehearse
from ties_dist.values.items import Range
from ties_dist.values.stretches import Vector, blocks_of

WRITE_BACK = "write-back"
"""The word that allows an OUT on a cache that stores later what it acknowledges."""
SPARE_BYTES = 64 << 20
"""Journals, companions and the file system's own needs."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a job finds in OUT. done: the same merge, finished. begun: it was interrupted. record: what that left."""

    done: MergeReport | None = None
    begun: bool = False
    record: Record = field(default_factory=Record)


def gate(out: OutFolder, job: Job, coming_bytes: int = 0) -> Standing:
    """Whether a job may work in OUT: all that a merge refuses before it works, and `plan` with it. Leaves no trace.

    coming_bytes: that inputs, once downloaded, will take of OUT's disk.
    Raises OutputError where OUT holds something else or cannot be written, CheckpointError where inputs changed since
    an interruption, PlanError where the disk has no room.
    """
    if (done := _finished(out, job)) is not None:
        return Standing(done=done)
    if out.place.keeps == "cache" and WRITE_BACK not in job.recipe.options.allow:
        raise OutputError(
            f"OUT {out.place} lies on a mount that acknowledges what is only in its cache: a model is lost, unseen, "
            f"with the mount's process. Choose another OUT and copy the model there, or --allow {WRITE_BACK}."
        )
    _check_holder(out, job)
    fresh = job.options.fresh
    begun = None if fresh else _begun(out, out.fingerprint)
    if changed := _changed(job, begun):
        raise _inputs_changed(out, changed)
    record = Record() if fresh else usable(read_journals(out.place, out.run, job.plan.counters.names), job.plan)
    _check_space(out, job, record, coming_bytes)
    if any(entry.name == STATE for entry in out.place.list()):
        rehearse(out.place, STATE, into=STATE)
    else:
        rehearse(out.place.standing())
    return Standing(begun=begun is not None, record=record)


def claim(out: OutFolder, job: Job, check: Check = unchecked) -> Standing:
    """Make OUT ready for this job, called with its lock held; of a merge that is done, tidy up. Raises as `gate`.

    check: raises where the lock was lost meanwhile: whoever took over may have published, and removed the folders.
    """
    out.fence()
    standing = gate(out, job)
    check()
    if standing.done is not None:
        out.discard()  # left by a kill between the commit point and the tidying
        return standing
    for run in out.runs() if job.options.fresh else ():
        out.discard(run)
    out.place.make(out.parts)
    if job.plan.matrices:
        out.place.make(out.matrices)
    if not standing.begun:
        facts = {"recipe": job.recipe.canonical(), "sight": asdict(job.sight), "semantics_version": SEMANTICS_VERSION}
        out.place.put(_record(out.fingerprint), json.dumps(facts).encode())
    return standing


def _finished(out: OutFolder, job: Job) -> MergeReport | None:
    """The report of the same merge, where it is done and not to be done again."""
    done, options = out.finished(), job.options
    if done is None or done.fingerprint != out.fingerprint or (options.fresh and options.overwrite):
        return None
    manifest = out.manifest()
    if changed := _changed(job, manifest.origin if manifest is not None else None):
        raise CheckpointError(
            listing(
                f"OUT {out.place} holds this merge, made before these inputs were written again:",
                changed,
                "Merge again with --fresh --overwrite, or keep it as it is.",
            )
        )
    return replace(done, already_done=True)


def _check_holder(out: OutFolder, job: Job) -> None:
    """Raises OutputError where OUT holds what this job may not discard or replace."""
    done, options = out.finished(), job.options
    if (others := out.other_runs()) and not options.fresh:
        raise _unfinished(out, job, others[0])
    out.check_strays(job.plan.layout)
    strange = out.holds_model() and not out.is_begun() and not out.lacks_files()
    if not options.overwrite and (done is not None or strange):
        manifest = out.manifest()
        what = "the finished model of another merge (other recipe, inputs or --max-shard-size)"
        if manifest is not None and manifest.semantics_version != SEMANTICS_VERSION:
            what = f"a finished model of another version of ties_dist ({_versions(manifest.semantics_version)})"
        what = what if done else "model files that no finished merge left"
        raise OutputError(f"OUT {out.place} holds {what}. Choose another OUT, or replace it with --overwrite.")


def _record(run: str) -> str:
    return f"{STATE}/{run}/{BEGUN}"


def _begun(out: OutFolder, run: str) -> Begun | None:
    """What an unfinished merge was begun with; None where that cannot be read."""
    with suppress(OutputError):
        return load_document(out.place, _record(run), Begun)
    return None


def _changed(job: Job, before: Begun | Origin | None) -> list[str]:
    """Input files that hold other content than when a merge was begun."""
    return changed_since(before.sight, job.plan.models) if before is not None and before.sight is not None else []


def _inputs_changed(out: OutFolder, changed: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        listing(
            f"inputs changed since the interrupted merge in {out.place}:",
            changed,
            "Restore them and run again, or start over with --fresh.",
        )
    )


def _unfinished(out: OutFolder, job: Job, other: str) -> OutputError | CheckpointError:
    found = _begun(out, other)
    same_recipe = found is not None and found.recipe == json.loads(json.dumps(job.recipe.canonical()))
    what, with_what = "other inputs or shard sizes" if same_recipe else "another recipe", "its own command"
    if found is not None and found.semantics_version != SEMANTICS_VERSION:
        what = f"another version of ties_dist ({_versions(found.semantics_version)})"
        with_what = "that version"
    elif found is not None and same_recipe and (changed := _changed(job, found)):
        return _inputs_changed(out, changed)
    discard = "--fresh --overwrite" if out.holds_model() else "--fresh"  # some shards may have their names
    return OutputError(
        f"OUT {out.place} holds an unfinished merge of {what}. Finish it with {with_what}, choose another OUT, or "
        f"discard it with {discard}."
    )


def _versions(found: int) -> str:
    return f"semantics {found}, this one has {SEMANTICS_VERSION}"


def usable(record: Record, plan: MergePlan) -> Record:
    """What of a record can be of this plan: a journal that is none of ours must not reach beyond it."""
    sizes = {shard.name: shard.size for shard in plan.layout.shards}
    counted = {tensor.source for tensor in plan.counted}

    def fits(each: Range) -> bool:
        size = sizes.get(each.file, 0)
        return each.stop == size or (each.stop < size and each.stop % BLOCK_BYTES == 0)

    return replace(
        record,
        merged=[r for r in record.merged if all(map(fits, r.item.ranges)) and r.counts.keys() <= counted],
        cuts={tensor: cuts for tensor, cuts in record.cuts.items() if len(cuts) == len(plan.experts)},
        sums={tensor: _fitting(blocks, tensor, plan) for tensor, blocks in record.sums.items() if tensor in counted},
        thresholds=record.thresholds if len(record.thresholds or ()) == len(plan.experts) else None,
    )


def _fitting(blocks: Mapping[int, Vector], tensor: str, plan: MergePlan) -> dict[int, Vector]:
    """Of the sums of a tensor's blocks those that are as many as are asked for."""
    count, width = blocks_of(plan.sizes[tensor]), len(plan.products)
    return {block: vector for block, vector in blocks.items() if block < count and len(vector) == width}


def adopt(out: OutFolder, shards: Iterable[OutputShard], *, publishing: bool) -> None:
    """Copy partial shards, and go on with the copies: who was replaced, but may live, still has the old ones open.

    A range that it wrote before it was paused can reach them at any time, merged with a guess that has been corrected
    since. publishing: see `OutFolder.part`. Raises OutputError.
    """
    for shard in shards if out.place.reads_parts else ():  # elsewhere such shards are begun anew
        if (part := out.resumable(shard, publishing=publishing)) is not None:
            out.place.copy(part, out.partial(shard.name))


def _check_space(out: OutFolder, job: Job, record: Record, coming_bytes: int) -> None:
    """Raises PlanError where the disk has no room for what is still to be written."""
    free = out.place.free()
    if free is None:
        return
    have = 0
    if job.options.fresh:  # what is discarded makes room
        free += sum(out.used(run) for run in out.runs())
    else:
        used = {f"{out.parts}/{e.name}": e.used for e in out.place.list(out.parts)}
        used |= {e.name: e.used for e in out.place.list()}
        parts = (out.resumable(shard, publishing=record.publishing) for shard in job.plan.layout.shards)
        have = sum(used.get(part, 0) for part in parts if part is not None)
    needed = job.plan.disk_bytes + job.copied.nbytes
    if needed - have + coming_bytes + SPARE_BYTES > free:
        raise PlanError(
            f"the disk of {out.place} has {readable(free)} free; the output needs {readable(needed)}"
            + (f", of which {readable(have)} are there" if have else "")
            + (f", inputs that are to be downloaded there {readable(coming_bytes)}" if coming_bytes else "")
            + f", and {readable(SPARE_BYTES)} to spare. Free some space (a model that is replaced stays until the new "
            "one is whole), or choose another OUT."
        )
