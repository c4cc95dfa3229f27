"""What a first start costs, nothing having been compiled before, and what it leaves for the second.

Models are so small that a merge is nothing but its start: imports, tracing, compiling, the driver's own compiler, its
context and the pinned buffers. On a GPU the calls of the driver are told by themselves.
"""

from __future__ import annotations

import json

from benchmarks.device import files
from benchmarks.device.commands import Merged, merge, one_digest
from benchmarks.device.gpu import watched_rows
from benchmarks.device.parts import Bench, Teller

METHOD = "ties"
STARTS = ("first", "second")


def run(bench: Bench, tell: Teller) -> None:
    little = files.write(bench.scratch / "little", layers=1, divide=8)
    recipe, calls = bench.scratch / "start.yml", bench.scratch / "start.json"
    recipe.write_text(json.dumps(little.recipe(METHOD)))
    if not bench.has_gpu:
        tell.skipped("starts on a GPU", "no GPU")
    found: list[Merged] = []
    for device in ["cuda", "cpu"] if bench.has_gpu else ["cpu"]:
        cache = bench.scratch / f"start-{device}"
        for which in STARTS:
            found.append(merge(bench, recipe, bench.scratch / "started", device=device, cache=cache))
            cost, inside = found[-1].cost, float(found[-1].report["elapsed_seconds"])
            cells = {"wall s": f"{cost.wall_seconds:.2f}", "inside s": f"{inside:.2f}"}
            cells |= {"merging s": f"{found[-1].merging:.2f}", "CPU-s": f"{cost.cpu_seconds:.2f}"}
            tell.row(
                f"`{METHOD}` of {little.parameters:,} parameters, caches empty before the first",
                start=f"{device}, {which}",
                **cells,
            )
    holds, said = one_digest(found)
    tell.check("one digest over devices and starts", holds=holds, said=said)
    if bench.has_gpu:
        for which in STARTS:
            cache = bench.scratch / "start-watched"
            merge(bench, recipe, bench.scratch / "started", device="cuda", cache=cache, watch=calls)
            for row in watched_rows(calls):
                tell.row(f"Calls of the driver in the {which} start", **row)
