"""Merges and other commands of a part, each a process of its own, measured from start to exit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device.parts import Bench
from benchmarks.measure import Run, run
from ties_dist.cache import KERNELS

PYTHON = sys.executable


@dataclass(frozen=True, kw_only=True)
class Merged:
    """One `ties-dist merge`. cost: from start to exit; report: its own."""

    cost: Run
    report: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return str(self.report["output_digest"])

    @property
    def merging(self) -> float:
        """Seconds of the pass that merges."""
        return float(self.report["phases"]["merge"])


def merge(
    bench: Bench,
    recipe: Path,
    out: Path,
    *,
    device: str,
    cache: Path,
    threads: int = 0,
    watch: Path | None = None,
) -> Merged:
    """Into a folder that is made anew. threads: 0 is the command's own choice."""
    given = ["merge", recipe, out, "--json", "--fresh", "--overwrite", "--device", device]
    given += ["--threads", str(threads)] if threads else []
    cost = run([*module(bench, device, watch), "ties_dist", *given], environment=caches(cache))
    return Merged(cost=cost, report=json.loads(cost.stdout))


def module(bench: Bench, device: str, watch: Path | None = None) -> list[str | Path]:
    """`python -m`; by way of `gpu` where the driver is stood in for or watched."""
    stood_in = ["--stand-in"] if bench.stood_in and device == "cuda" else []
    watched = ["--watch", watch] if watch else []
    if not stood_in and not watched:
        return [PYTHON, "-m"]
    return [PYTHON, "-m", "benchmarks.device.gpu", *stood_in, *watched]


def caches(folder: Path) -> dict[str, str]:
    """Everything that a first start leaves for the second lies here: ours, numba's and the driver's."""
    found = {"TIES_DIST_CACHE": "ours", "NUMBA_CACHE_DIR": "numba", "CUDA_CACHE_PATH": "driver"}
    for name in found.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    return {variable: str(folder / name) for variable, name in found.items()}


def forget_statistics(folder: Path) -> None:
    """What earlier merges have counted would spare the next one a read."""
    for path in Path(caches(folder)["TIES_DIST_CACHE"]).iterdir():
        if path.name != KERNELS:
            shutil.rmtree(path)


def one_digest(merges: Iterable[Merged]) -> tuple[bool, str]:
    """Whether all have the same, and what was found, in words."""
    digests = [each.digest for each in merges]
    found = sorted(set(digests))
    return len(found) == 1, f"{' and '.join(f'`{digest}`' for digest in found)} in {len(digests)} merges"
