"""mergekit with `--cuda` on the files that the part `merges` has merged, each command from start to exit."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.checkpoints import Family
from benchmarks.device import files
from benchmarks.device.commands import PYTHON, merge
from benchmarks.device.packages import MERGEKIT, how_to_bring, missing
from benchmarks.device.parts import Bench, Skip, Teller
from benchmarks.measure import Run, mib
from benchmarks.measure import run as measured_run
from benchmarks.vs_peers import ALLOWED_ULPS, distances, mapped_tensors

COMMAND = "mergekit.scripts.run_yaml"
PAIRS = (("ties", "bfloat16"), ("linear", "float32"), ("task_arithmetic", "float32"), ("ties", "float32"))
"""Method, and what mergekit computes in."""


def run(bench: Bench, tell: Teller) -> None:
    if why := why_not():
        raise Skip(why)
    by_gpu = torch.cuda.is_available()
    if not by_gpu and not bench.stood_in:
        raise Skip("torch sees no GPU, and `benchmarks.vs_peers` compares on processors")
    if not by_gpu:
        tell.note("stood in for: mergekit runs on the processor, without `--cuda`")
    family, longest = files.family(bench.scratch), 0.0
    for method, dtype in PAIRS:
        if bench.seconds_left < 1.5 * longest:
            tell.skipped(f"`{method}` in {dtype}", "no time was left for it")
            continue
        began = bench.seconds_left
        theirs = by_mergekit(bench, family, method, dtype, by_gpu=by_gpu)
        ours = by_us(bench, family, method)
        tell.row("Whole commands", **dict(cells(f"`{method}`, in {dtype}", theirs, ours)))
        if method != "ties":
            compare(bench, tell, method)
        longest = max(longest, began - bench.seconds_left)


def why_not() -> str:
    """Why mergekit cannot be imported: what it says, and what of the packages that it may need is not there."""
    tried = subprocess.run([PYTHON, "-c", f"import {COMMAND}"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return ""
    said = tried.stderr.strip().splitlines()[-1]
    lacking = missing(MERGEKIT)
    return f"{said}. {how_to_bring(lacking)}" if lacking else said


def by_mergekit(bench: Bench, family: Family, method: str, dtype: str, *, by_gpu: bool) -> Run:
    recipe, out = bench.scratch / "mergekit.yml", bench.scratch / "by-mergekit"
    recipe.write_text(json.dumps(family.recipe(method, dtype=dtype, out_dtype=family.dtype)))
    shutil.rmtree(out, ignore_errors=True)
    given = ["--no-copy-tokenizer", "--quiet", *(["--cuda"] if by_gpu else []), recipe, out]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return measured_run([PYTHON, "-m", COMMAND, *given], environment=offline)


def by_us(bench: Bench, family: Family, method: str) -> Run:
    recipe = bench.scratch / "ours.yml"
    semantics = {"ties_dist": {"semantics": "mergekit"}} if method == "ties" else {}
    recipe.write_text(json.dumps(family.recipe(method, **semantics)))
    device = "cuda" if bench.has_gpu else "cpu"
    return merge(bench, recipe, bench.scratch / "by-us", device=device, cache=bench.scratch / "caches").cost


def cells(name: str, theirs: Run, ours: Run) -> Iterator[tuple[str, object]]:
    yield "", name
    for tool, cost in (("mergekit", theirs), ("ties_dist", ours)):
        yield f"{tool} wall s", f"{cost.wall_seconds:.1f}"
        yield f"{tool} CPU-s", f"{cost.cpu_seconds:.1f}"
        yield f"{tool} peak RSS", mib(cost.peak_bytes)
    yield "faster", f"{theirs.wall_seconds / ours.wall_seconds:.1f} x"


def compare(bench: Bench, tell: Teller, method: str) -> None:
    outputs: list[Path] = [bench.scratch / "by-us", bench.scratch / "by-mergekit"]
    left, right = (mapped_tensors(out) for out in outputs)
    differing, beyond, furthest = distances(left, right)
    tell.check(
        f"`{method}` within {ALLOWED_ULPS} unit in the last place of mergekit's",
        holds=not beyond and left.keys() == right.keys(),
        said=f"{differing:.3%} of the elements differ, by {furthest:.1f} at most",
    )
