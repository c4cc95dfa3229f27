"""The memory that a worker process will need, and the largest units that fit a budget. Pure: it opens no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ties_dist.dtypes import ITEM_BYTES
from ties_dist.errors import PlanError
from ties_dist.messages import listing, readable, show
from ties_dist.methods.base import Method
from ties_dist.planning.layout import Layout
from ties_dist.planning.options import Resources
from ties_dist.planning.plan import Matrix
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.values.inputs import Input
from ties_dist.values.items import UNITS_AROUND
from ties_dist.values.stretches import BLOCK_ELEMENTS

DEFAULT_UNIT_BYTES = 8 << 20
"""Output bytes: 4M elements of 16 bits, the best of 1M, 4M and 16M."""
PROCESS_BYTES = 480 << 20
"""Resident set of a worker before any unit: Python, torch, numba and their libraries."""
GPU_BYTES = 512 << 20
"""What the driver adds to a process that uses GPUs: an allowance, not yet measured."""
SOLVER_BYTES = 192 << 20
"""What numba adds to a process that compiles the solver for the first time, and malloc keeps of freed matrices."""
SEGMENT_BYTES = 1 << 10
"""What Python keeps of a slice of a tensor and of each of its operands: 16 elements of 9 models took 0.8 KiB each."""
MANY_SEGMENTS = 4096
"""Of a unit: where tensors are tiny smaller units are made, which end within a second or two when told to stop."""
EAGER_TEMPORARIES = 12
"""Float32 temporaries per operand and element of an eager block."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a worker process will need. solvers: matrices that are merged at once."""

    unit_bytes: int
    solvers: int
    projected_bytes: int


def fit(
    method: Method, layout: Layout, alike: Sequence[Input], matrices: Mapping[str, Matrix], resources: Resources
) -> Memory:
    """The largest units that fit, and the projected peak with them. alike: the base, and what looks like it.

    Raises PlanError where the budget is too small, or a form of storage cannot be read in units.
    """
    operands = alike if method.operand != "weight" else alike[1:]
    _check_grains(operands)
    unit_bytes, buffers = fit_unit_bytes(
        asked=resources.unit_bytes,
        budget=resources.memory_budget,
        threads=resources.thread_count,
        # A slot has a pinned copy of its unit.
        units=(2 * resources.gpu_slots or resources.thread_count) + UNITS_AROUND,
        outputs=resources.outputs,
        method=method,
        layout=layout,
        operands=operands,
    )
    solvers, peak = fit_matrices(
        matrices, budget=resources.memory_budget, threads=resources.thread_count, buffers=buffers
    )
    gpus = GPU_BYTES if resources.gpu_slots else 0
    return Memory(unit_bytes=unit_bytes, solvers=solvers, projected_bytes=PROCESS_BYTES + gpus + peak)


def _check_grains(operands: Sequence[Input]) -> None:
    """Units end at any element so far: what is stored in grains waits for items that own whole ones."""
    problems = [
        f"{show(name)} of '{model.name}' can be read {view.grain:,} elements at a time only"
        for model in operands
        for name, view in model.views.items()
        if view.grain > 1
    ]
    if problems:
        raise PlanError(listing("parameters that cannot be cut into units:", problems, "Store them as plain tensors."))


def fit_unit_bytes(
    *,
    asked: int | None,
    budget: int,
    threads: int,
    units: int,
    outputs: int,
    method: Method,
    layout: Layout,
    operands: Sequence[Input],
) -> tuple[int, int]:
    """Unit size and the buffers' projected peak, in bytes. Raises PlanError where the budget is too small.

    asked: the user's unit size, or None for the largest of 8, 4, 2, 1 MiB that fits. units: how many are under way,
    each with `outputs` results.
    """
    if asked is not None and asked < BLOCK_BYTES:
        raise PlanError(
            f"--unit-size {readable(asked)} is too small: cuts are at multiples of 1MiB. Give 1MiB or more."
        )
    # Widest ratio of bytes read to bytes written over the merged tensors, for all operands together.
    ratio = max(
        (
            sum(ITEM_BYTES[m.views[t.source].dtype] for m in operands) / ITEM_BYTES[t.dtype]
            for t in layout.tensors if t.merged
        ),
        default=1.0,
    )  # fmt: skip
    sizes = [asked // BLOCK_BYTES * BLOCK_BYTES] if asked else [DEFAULT_UNIT_BYTES >> i for i in range(4)]
    if not asked:
        sizes = [size for size in sizes if layout.most_segments(size) <= MANY_SEGMENTS] or sizes[-1:]
    fixed = (
        sums_bytes(method, len(operands), threads)
        + statistics_bytes(method, len(operands), threads)
        + 4 * EAGER_TEMPORARIES * len(operands) * (1 << 15)
    )
    for unit_bytes in sizes:
        slices = units * layout.most_segments(unit_bytes) * (len(operands) + outputs) * SEGMENT_BYTES
        buffers = int(units * unit_bytes * (outputs + ratio)) + slices + fixed
        if buffers <= budget:
            return unit_bytes, buffers
    raise PlanError(
        f"--memory-budget {readable(budget)} is too small: units of {readable(unit_bytes)} need {readable(buffers)} of "
        f"buffers ({len(operands)} inputs, {threads} threads). Raise --memory-budget (it is per worker process) to at "
        f"least {readable(_whole_mebibytes(buffers))}"
        + (", or give a smaller --unit-size." if asked and asked > BLOCK_BYTES else ".")
    )


def fit_matrices(matrices: Mapping[str, Matrix], *, budget: int, threads: int, buffers: int) -> tuple[int, int]:
    """How many matrices are merged at once, and the projected peak with them, in bytes. Raises PlanError.

    They are merged before the units are: the buffers of these stay allocated only later.
    """
    if not matrices:
        return 1, buffers
    name, largest = max(matrices.items(), key=lambda item: item[1].work_bytes)
    if largest.work_bytes > budget:
        raise PlanError(
            f"'{name}' ({largest.outputs:,} x {largest.inputs:,}) is merged whole and needs "
            f"{readable(largest.work_bytes)} per worker in float64; --memory-budget is {readable(budget)}. Raise "
            f"--memory-budget (it is per worker process) to at least {readable(_whole_mebibytes(largest.work_bytes))}, "
            "or list the tensor under `exclude`."
        )
    solvers = max(1, min(threads, budget // largest.work_bytes))
    return solvers, max(buffers, solvers * largest.work_bytes) + SOLVER_BYTES


def _whole_mebibytes(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def sums_bytes(method: Method, operands: int, threads: int) -> int:
    """A block of each operand, at most in float32, and some elements of each factor, of which there are less."""
    return 2 * 4 * threads * BLOCK_ELEMENTS * operands if method.needs.sums is not None else 0


def statistics_bytes(method: Method, operands: int, threads: int) -> int:
    """Histograms of a scan: per thread and expert a coarse one and four fine windows, and the driver's sum."""
    if method.needs.trim is None:
        return 0
    zeros = (1 << 15) + (1 << 16) if method.needs.trim.counts_zeros else 0
    return (threads + 2) * operands * 8 * ((1 << 15) + 4 * (1 << 16) + zeros)
