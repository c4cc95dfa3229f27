"""The sizing table of the README: `python -m cluster.sizing`. Computed from one measured rate, not measured itself."""

from __future__ import annotations

from dataclasses import dataclass

REPORT = "2026-11-25-rehearse-70b.md"
RATE_GB = 3.33
"""GB of inputs per second and worker: 70B, base and three experts, two threads, no disk, rereads included (REPORT)."""
READS = 1.558
"""Bytes read per byte of inputs, in the same run: a sample, a scan where the prediction missed, the merge, the redo."""
STORAGE_GB = (2.0, 20.0)
"""Storage of two speeds to compute with: GB per second, reads and writes together."""

SHAPES = {"7B": (6.74e9, (1, 1)), "70B": (70.55e9, (2, 4)), "405B": (405.9e9, (4, 8))}
"""Elements, and workers for three and for eight experts."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes in GB (bf16), times in seconds. storage_seconds: for each of STORAGE_GB, were it the only limit."""

    model: str
    experts: int
    workers: int
    inputs: float
    output: float
    computing_seconds: float
    storage_seconds: tuple[float, ...]

    @property
    def needed_storage(self) -> float:
        """GB per second of storage at which computing is the limit."""
        return (READS * self.inputs + self.output) / self.computing_seconds


def size(model: str, elements: float, experts: int, workers: int) -> Size:
    output = 2 * elements / 1e9
    inputs = output * (1 + experts)
    moved = READS * inputs + output
    return Size(
        model=model,
        experts=experts,
        workers=workers,
        inputs=inputs,
        output=output,
        computing_seconds=inputs / (RATE_GB * workers),
        storage_seconds=tuple(moved / rate for rate in STORAGE_GB),
    )


def sizes() -> list[Size]:
    return [
        size(model, elements, experts, count)
        for model, (elements, workers) in SHAPES.items()
        for experts, count in zip((3, 8), workers, strict=True)
    ]


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def table() -> str:
    storage = " | ".join(f"time at {rate:.0f} GB/s of storage" for rate in STORAGE_GB)
    lines = [
        f"| model, bf16 | experts | inputs | output | workers | by computing alone | storage for that | {storage} |",
        "|---|--:|--:|--:|--:|--:|--:|" + "--:|" * len(STORAGE_GB),
    ]
    for s in sizes():
        times = " | ".join(_time(max(s.computing_seconds, seconds)) for seconds in s.storage_seconds)
        lines.append(
            f"| {s.model} | {s.experts} | {s.inputs:,.0f} GB | {s.output:,.0f} GB | {s.workers} | "
            f"{_time(s.computing_seconds)} | {s.needed_storage:.0f} GB/s | {times} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
