"""What a merge will read, write and need: `plan`. From headers alone, or with some pages of every model as well."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ties_dist.errors import OutputError
from ties_dist.inputs.opening import opener
from ties_dist.output.folder import OutFolder
from ties_dist.output.holder import Holder
from ties_dist.output.lock import RunLock
from ties_dist.output.resume import gate
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.prepare import Job
from ties_dist.planning.sample import sample_slices
from ties_dist.storage.place import Place
from ties_dist.thresholds import predict, zero_share
from ties_dist.values.views import read_bytes
from ties_dist.worker.merging import Worker


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Predictions from some pages of every model. thresholds, kept_fractions: per expert, whole-model trims only."""

    thresholds: tuple[float | None, ...]
    kept_fractions: tuple[float | None, ...]
    zero_fractions: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What a merge will do. passes and bytes: best and worst case. disk_free_bytes, out_holds: None without an OUT.

    unproven: each `A is B`; elements and what follows from them hold if it is so, which a merge finds out by reading
    proof_bytes. The fingerprint is None until then. download_bytes: that the hub's cache will still take;
    disk_needed_bytes has them too where they go to OUT's disk.
    companions: files of the base that go beside the weights, with their sizes in bytes.
    """

    method: str
    semantics: str
    tensors: int
    merged_tensors: int
    elements: int
    experts: tuple[str, ...]
    shards: int
    units: int
    unit_bytes: int
    passes: tuple[int, int]
    read_bytes: tuple[int, int]
    write_bytes: int
    projected_bytes: int
    memory_budget: int
    threads: int
    companions: Mapping[str, int]
    disk_needed_bytes: int
    disk_free_bytes: int | None
    out_holds: str | None
    fingerprint: str | None
    notes: tuple[str, ...]
    sample: Sample | None = None
    unproven: tuple[str, ...] = ()
    proof_bytes: int = 0
    download_bytes: int = 0


def forecast(
    job: Job, out: Place | None, *, sample: bool, download_bytes: int = 0, coming_bytes: int = 0
) -> PlanReport:
    """sample: read some pages, too. download_bytes: of the inputs; coming_bytes: those of them onto OUT's disk.

    Raises what a merge into OUT would before it works.
    """
    chosen = job.plan
    found = None if out is None else _look(out, job, coming_bytes)
    passes = _passes(chosen)
    return PlanReport(
        method=chosen.method.name,
        semantics=job.recipe.options.semantics,
        tensors=len(chosen.tensors),
        merged_tensors=sum(t.merged for t in chosen.tensors),
        elements=chosen.elements,
        experts=tuple(e.name for e in chosen.experts),
        shards=len(chosen.layout.shards),
        units=sum(1 for _ in chosen.items()),
        unit_bytes=chosen.unit_bytes,
        passes=passes,
        read_bytes=(passes[0] * chosen.input_bytes, passes[1] * chosen.input_bytes + _guess_bytes(chosen)),
        write_bytes=chosen.layout.total_bytes,
        projected_bytes=chosen.projected_bytes,
        memory_budget=chosen.memory_budget,
        threads=chosen.threads,
        companions=job.copied.sizes,
        disk_needed_bytes=chosen.disk_bytes + job.copied.nbytes + coming_bytes,
        disk_free_bytes=None if out is None else out.free(),
        out_holds=found.holds if found is not None else None,
        fingerprint=None if job.unproven else chosen.fingerprint,
        notes=(*job.notes, *(found.notes if found is not None else ())),
        sample=_sample(job) if sample else None,
        unproven=tuple(dict.fromkeys(f"{each.right} is {each.left}" for each in job.unproven)),
        proof_bytes=sum(each.nbytes for each in job.unproven),
        download_bytes=download_bytes,
    )


def _passes(chosen: MergePlan) -> tuple[int, int]:
    """Reads of the inputs, best and worst: cached statistics save the scan, a wrong guess adds a read.

    Ties that are cut are counted in another one, a wrong prediction on 16-bit models is merged once more, and units
    with exact cancellations are read again where the majority sign was not what they assumed.
    """
    rule = chosen.needs.trim
    if rule is None:
        reads = 2 if chosen.by_tensor else 1  # the second from the page cache, where it has room
        return reads, reads
    extra = (rule.tie_policy == "exact_k" or chosen.is_16_bit) + (chosen.needs.majority is not None)
    if rule.scope == "tensor":
        return 3, 3 + extra  # all but the first from the page cache, where it has room
    return 1, 3 + extra


def _guess_bytes(chosen: MergePlan) -> int:
    """Of the sample by which a whole-model scan guesses where to count finely."""
    if chosen.needs.trim is None or chosen.needs.trim.scope == "tensor":
        return 0
    models = (chosen.base, *chosen.experts)
    return sum(read_bytes(m.views[name], start, stop) for name, start, stop in sample_slices(chosen)[0] for m in models)


class _Look(NamedTuple):
    """What stands in OUT, in words, and what else there is to say of it."""

    holds: str
    notes: tuple[str, ...] = ()


def _look(out: Place, job: Job, coming_bytes: int) -> _Look:
    """Raises as `gate` does. A lock is told, not refused: who holds it may be done before the merge begins."""
    folder = OutFolder(place=out, fingerprint=job.plan.fingerprint)
    folder.check(job.plan.models)
    for last in (False, True):
        try:
            gate(folder, job, coming_bytes)
        except FileNotFoundError:  # journals that vanish were published just now
            if last:
                raise OutputError(f"OUT {out} changes faster than it can be looked at. Ask again.") from None
        else:
            break
    holder = RunLock(out).holder()
    busy = holder is not None and not holder.is_dead(Holder.myself())
    return _Look(folder.holds(), (f"another run is merging into {out}: {holder}.",) if busy else ())


def _sample(job: Job) -> Sample:
    """Thresholds and kept shares as the sampled slices have them, and the time at the rate they were counted."""
    chosen = job.plan
    worker = Worker(chosen, opener(chosen.models, job.resources.backend, reread_bytes=chosen.reread_bytes))
    rule = chosen.needs.trim
    thresholds: list[float | None] = []
    kept: list[float | None] = []
    zeros: list[float] = []
    experts = range(len(chosen.experts)) if chosen.method.operand != "weight" else []
    magnitudes, weights = worker.sample(*sample_slices(chosen), experts)
    for i, sampled in magnitudes.items():
        zeros.append(zero_share(sampled, weights))
        thresholds.append(None)
        kept.append(None)
        density = job.recipe.experts[i].parameters["density"].constant if rule else None
        if rule is None or density is None or not sampled.size:
            continue
        moved = round((1 - zeros[-1]) * chosen.elements)
        asked = density * rule.ranked(i, chosen.elements, chosen.elements - moved)
        kept[-1] = min(asked, moved) / chosen.elements
        if rule.scope == "model" and (rank := chosen.rank(i, chosen.elements - moved)):
            found = predict(sampled, weights, rank / chosen.elements)
            thresholds[-1] = found.value
            share = found.above + (found.equal if found.value else 0.0)  # a zero is never kept
            kept[-1] = min(share, asked / chosen.elements) if rule.tie_policy == "exact_k" else share
    return Sample(
        thresholds=tuple(thresholds),
        kept_fractions=tuple(kept),
        zero_fractions=tuple(zeros),
        seconds=_predict_seconds(chosen, worker),
    )


def _predict_seconds(chosen: MergePlan, worker: Worker) -> float:
    """Time of the likely case, at the rate one unit in the middle is read from where it lies and touched once."""
    units = list(chosen.items())
    unit = units[len(units) // 2]
    began, read = time.monotonic(), worker.requested_bytes
    for segment in worker.segments(unit):
        for model in worker.operands if segment.tensor.merged else [worker.base]:
            operand = model.read(segment.tensor.source, segment.start, segment.stop)
            if isinstance(operand.content, memoryview):
                np.frombuffer(operand.content, dtype=np.uint8).max()
            operand.release()
    rate = (worker.requested_bytes - read) / max(time.monotonic() - began, 1e-6)
    likely = 1 if chosen.needs.trim is None and not chosen.by_tensor else 2
    return (likely * chosen.input_bytes + chosen.layout.total_bytes) / rate
