"""Merges of Llama-3-8B's shapes whose inputs no disk and no memory has to hold: `benchmarks.rehearsal`.

The real plan, thresholds and kernels on bytes that are made up as they are read; what is written is hashed and dropped.
Making a byte up costs a copy by a thread, which is measured alone, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from benchmarks.device.commands import caches, module
from benchmarks.device.parts import Bench, Teller
from benchmarks.measure import available_bytes, mib
from benchmarks.measure import run as measured_run
from benchmarks.rehearsal import FEW_TENSORS, Rehearsal

NAME, EXPERTS = "llama-3-8b", 3
BUDGET_BYTES = 4 << 30


def run(bench: Bench, tell: Teller) -> None:
    if not bench.has_gpu:
        tell.skipped("merges by CUDA", "no GPU")
    budget = min(BUDGET_BYTES, available_bytes() // 2) >> 20
    tell.note(f"base and {EXPERTS} experts, bfloat16, {bench.cores} threads, `--memory-budget {budget}MiB`")
    if budget < BUDGET_BYTES >> 20:
        tell.skipped(f"a budget of {mib(BUDGET_BYTES)}", f"{mib(available_bytes())} of memory are free")
    devices = ["cuda", "cpu"] if bench.has_gpu else ["cpu"]
    for device in devices:
        rehearse(bench, device, budget, "--tensors", FEW_TENSORS)  # compiles
    rate = math.inf
    for options in bench.scale.large:
        planned = rehearse(bench, "cpu", budget, *options.split(), "--plan-only")
        if planned.input_bytes / rate > bench.seconds_left:
            tell.skipped(f"{planned.gigabytes:.0f} GB of inputs", "no time was left for them")
            break
        began, digests = bench.seconds_left, {}
        for device in devices:
            found = rehearse(bench, device, budget, *options.split())
            digests[device] = found.digest
            what = f"`ties` of {found.parameters:,} parameters" + (f" (`{options}`)" if options else "")
            tell.row(what, **dict(cells(bench, device, found)))
        tell.check(
            f"{what}: one digest over devices",
            holds=len(set(digests.values())) == 1,
            said=", ".join(f"{device} `{digest}`" for device, digest in digests.items()),
        )
        rate = planned.input_bytes / (began - bench.seconds_left)


def rehearse(bench: Bench, device: str, budget: int, *options: object) -> Rehearsal:
    """budget: MiB."""
    given = [
        "--shapes",
        NAME,
        "--experts",
        EXPERTS,
        "--threads",
        bench.cores,
        "--memory-budget",
        f"{budget}MiB",
        *options,
    ]
    command = [*module(bench, device), "benchmarks.rehearsal", "--device", device, *map(str, given)]
    cost = measured_run(command, environment=caches(bench.scratch / "caches"))
    return Rehearsal(**json.loads(cost.stdout))


def cells(bench: Bench, device: str, found: Rehearsal) -> Iterator[tuple[str, object]]:
    rate = found.input_bytes / found.phases["merge"] / 1e9
    yield "", device
    yield "inputs, GB", f"{found.gigabytes:.1f}"
    yield "all passes s", f"{found.passes_seconds:.2f}"
    yield "CPU-s", f"{found.passes_cpu_seconds:.1f}"
    yield "merging s", f"{found.phases['merge']:.2f}"
    yield "inputs, GB/s", f"{rate:.2f}"
    if device == "cuda" and "to_gpu" in bench.figures:
        yield "of the rate to the GPU", f"{rate / bench.figures['to_gpu']:.0%}"
    yield "making bytes up alone, s", f"{found.synthesis_seconds:.2f}"
    yield "reads", f"{found.reads:.2f}"
    yield "peak RSS less pools", mib(found.peak_bytes - found.pool_bytes)
