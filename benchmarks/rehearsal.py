"""A merge without its files: the real plan, catalogue, thresholds, executor and kernels on weights that are made up.

Models larger than any disk here are read in full: headers are those of the published model, and a tensor's bytes are a
pool of noise, repeated from a place that the tensor's name picks. Per expert there is a pool for each scale of deltas,
so whole-model thresholds are not those of any tensor. A read costs a copy into a reused buffer, as from the page cache;
that copy is measured alone too. Writes are hashed, then discarded.

    python -m benchmarks.rehearsal --shapes llama-3-8b --layers 4

prints one rehearsal as JSON; `rehearse_70b` and `scaling` make tables of them. Without torch, as `ties-dist merge`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from benchmarks.measure import Run
from benchmarks.measure import run as measured_run
from benchmarks.shapes import INDEX, SHAPES, Shape, assign_shards, header, index, name_shards
from ties_dist.cache import KERNELS, cache_folder
from ties_dist.checkpoints.catalogue import open_checkpoint
from ties_dist.checkpoints.parameters import OpenFiles
from ties_dist.cli.options import size
from ties_dist.compiler import cuda
from ties_dist.compiler.native import KernelStore
from ties_dist.engine.passes import Forgetful, Passes
from ties_dist.errors import CheckpointError, OutputError
from ties_dist.executors.local import LocalExecutor
from ties_dist.inputs.opening import identify
from ties_dist.methods.known import METHODS
from ties_dist.planning.options import Resources, RunOptions
from ties_dist.planning.plan import MergePlan
from ties_dist.planning.prepare import Job, assemble
from ties_dist.progress import LogProgress
from ties_dist.recipe.recipe import load_recipe
from ties_dist.storage.base import BLOCK_BYTES
from ties_dist.storage.buffers import Buffers
from ties_dist.storage.digests import output_digest
from ties_dist.storage.readers import LocalSpan
from ties_dist.values.items import MergeTask, blocks_by_file
from ties_dist.values.machine import peak_rss_bytes
from ties_dist.worker.merging import MergeStep, Worker

POOL_ELEMENTS = 4_194_301
"""A prime, 8 MiB in bfloat16: repeats of a long tensor never fall on the cuts of units."""
BASE_SIGMA = 0.02
DELTA_SCALES = (0.5e-4, 1e-4, 2e-4)
"""Around what `checkpoints` writes."""
EXPERT_SPREAD = 0.15
"""Standard deviation of the logarithm of an expert's own factor on them."""
ITEM_BYTES = 2
DENSITY = 0.2
SYNTHESIS_UNITS = 512
"""Read without compute to learn what making bytes up costs; spread evenly over the model."""
OTHER_UNIT_BYTES = 3 << 20
FEW_TENSORS = 20
THREADS = len(os.sched_getaffinity(0))
TENSOR_SIDE, TENSOR_SHARD_BYTES = 64, 50_000_000
"""Of `--tensors`."""
SPECULATE = {"auto": None, "speculate": True, "scan": False}
"""As `--threshold-pass` of `ties-dist merge`."""


# --- the storage back end ---


class Pools:
    """bfloat16 noise as bytes: one pool of the base, and one per expert and scale of deltas."""

    def __init__(self, experts: int, *, elements: int = POOL_ELEMENTS, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        theta = draw.standard_normal(elements, dtype=np.float32) * np.float32(BASE_SIGMA)
        self.base = _bfloat16(theta)
        self.elements = elements
        self.experts: list[list[np.ndarray]] = []
        for _ in range(experts):
            factor = math.exp(EXPERT_SPREAD * draw.standard_normal())
            noise = draw.standard_normal(elements, dtype=np.float32)
            self.experts.append([_bfloat16(theta + np.float32(factor * scale) * noise) for scale in DELTA_SCALES])

    @property
    def nbytes(self) -> int:
        return self.base.nbytes * (1 + len(DELTA_SCALES) * len(self.experts))

    def of(self, model: int, tensor: str) -> tuple[np.ndarray, int]:
        """The pool, (bytes,) uint8, that a tensor is taken from, and the byte it begins at. model: 0 is the base."""
        drawn = xxh3_64_intdigest(tensor.encode())
        start, scale = drawn % self.elements * ITEM_BYTES, (drawn >> 32) % len(DELTA_SCALES)
        return (self.experts[model - 1][scale] if model else self.base), start


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Bytes of finite float32 values rounded to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").view(np.uint8)


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """head: bytes before the data. starts: of each tensor, in file order; pools: what each one repeats, from where."""

    head: np.ndarray
    starts: Sequence[int]
    pools: Sequence[tuple[np.ndarray, int]]
    size: int

    def fill(self, out: np.ndarray, at: int) -> None:
        """Bytes [at, at + len(out)) of the file."""
        filled = 0
        while filled < len(out):
            piece = self._at(at + filled)[: len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)

    def _at(self, position: int) -> np.ndarray:
        """A view of the bytes from `position` to the next seam: end of head, of a tensor, or of its pool."""
        if position < len(self.head):
            return self.head[position:]
        i = bisect_right(self.starts, position) - 1
        pool, origin = self.pools[i]
        stop = self.starts[i + 1] if i + 1 < len(self.starts) else self.size
        place = (origin + position - self.starts[i]) % len(pool)
        return pool[place : place + stop - position]


@dataclass
class SynthesisingReader:
    """A checkpoint that is nowhere: heads as they would be on disk, weights out of the pools."""

    files: Mapping[str, StoredFile]
    _buffers: Buffers = field(default_factory=Buffers)

    def names(self) -> Sequence[str]:
        return sorted(self.files)

    def size(self, name: str) -> int:
        if name not in self.files:
            raise FileNotFoundError(name)
        return self.files[name].size

    def read(self, name: str, start: int, stop: int) -> LocalSpan:
        if stop > self.size(name):
            raise CheckpointError(f"{name} has {self.size(name):,} bytes where at least {stop:,} are expected.")
        buffer = self._buffers.take(stop - start)
        self.files[name].fill(buffer[: stop - start], start)
        return LocalSpan(view=buffer.data[: stop - start], done=lambda: self._buffers.give(buffer))


def synthesise(tensors: Mapping[str, Shape], shard_bytes: int, pools: Pools, model: int) -> SynthesisingReader:
    """The files of one model, bfloat16. model: 0 is the base, then the experts."""
    shards = assign_shards(tensors, ITEM_BYTES, shard_bytes)
    files = {}
    for file, shard in zip(name_shards(len(shards)), shards, strict=True):
        ordered = {name: tensors[name] for name in sorted(shard)}  # as safetensors writes one dtype
        head = header(ordered, "BF16", ITEM_BYTES)
        starts, end = [], len(head)
        for shape in ordered.values():
            starts.append(end)
            end += math.prod(shape) * ITEM_BYTES
        drawn = [pools.of(model, name) for name in ordered]
        files[file] = StoredFile(head=np.frombuffer(head, dtype=np.uint8), starts=starts, pools=drawn, size=end)
    if len(shards) > 1:
        text = index(shards, sum(math.prod(shape) for shape in tensors.values()) * ITEM_BYTES).encode()
        files[INDEX] = StoredFile(head=np.frombuffer(text, dtype=np.uint8), starts=(), pools=(), size=len(text))
    return SynthesisingReader(files)


class DiscardingWriter:
    """Takes every range and keeps none; that each was written once is the plan's promise, tested elsewhere."""

    def create(self, name: str, size: int) -> None: ...

    def write(self, name: str, start: int, block: memoryview) -> None: ...

    def sync(self, names: Sequence[str]) -> None: ...

    def close(self) -> None: ...

    def read(self, name: str, start: int, stop: int) -> memoryview:
        raise OutputError(f"{name}: nothing is kept in a rehearsal.")


# --- one rehearsal ---


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What one merge took. passes: from the first sample to the last proof, kernels compiled before.

    synthesis: making up as many bytes as the passes read, alone, with as many threads. peak_bytes: of the process, with
    `pool_bytes`. same_digest: with units of another size; None where that was not asked for.
    """

    tensors: int
    parameters: int
    shards: int
    experts: int
    threads: int
    plan_seconds: float
    projected_bytes: int
    pool_bytes: int
    peak_bytes: int = 0
    units: int = 0
    unit_bytes: int = 0
    input_bytes: int = 0
    bytes_read: int = 0
    passes_seconds: float = 0.0
    passes_cpu_seconds: float = 0.0
    synthesis_seconds: float = 0.0
    synthesis_cpu_seconds: float = 0.0
    phases: Mapping[str, float] = field(default_factory=dict)
    thresholds_from: str | None = None
    mispredicted: bool = False
    redone_units: int = 0
    kernel: str = ""
    digest: str = ""
    same_digest: bool | None = None

    @property
    def reads(self) -> float:
        """How often each input byte was read."""
        return self.bytes_read / self.input_bytes

    @property
    def net_seconds(self) -> float:
        return self.passes_seconds - self.synthesis_seconds

    @property
    def net_cpu_seconds(self) -> float:
        return self.passes_cpu_seconds - self.synthesis_cpu_seconds

    @property
    def proof(self) -> str:
        """How the thresholds were found, and whether what a sample said was proven by the merge's counts."""
        if self.thresholds_from == "sample":
            return "sample, proven"
        return "sample was wrong: scan" if self.mispredicted else str(self.thresholds_from)

    @property
    def gigabytes(self) -> float:
        """One read of all inputs."""
        return self.input_bytes / 1e9


@dataclass
class Stage:
    """One model family under an empty folder; every `merge` is a run of all passes with a worker of its own.

    gpus: where slices are merged, instead of on the processor.
    """

    folder: Path
    tensors: Mapping[str, Shape]
    shard_bytes: int
    experts: int
    resources: Resources
    pool_elements: int = POOL_ELEMENTS
    gpus: cuda.Gpus | None = None

    @cached_property
    def pools(self) -> Pools:
        return Pools(self.experts, elements=self.pool_elements)

    @cached_property
    def readers(self) -> dict[Path, SynthesisingReader]:
        """By path, base first. The catalogue wants folders that exist: these do, and stay empty."""
        readers = {}
        for model, name in enumerate(["base", *(f"expert-{i}" for i in range(self.experts))]):
            folder = self.folder.resolve() / name
            folder.mkdir()
            readers[folder] = synthesise(self.tensors, self.shard_bytes, self.pools, model)
        return readers

    def plan(self) -> Job:
        """Whole-model TIES by the real recipe, catalogue and planning: what `prepare` does, with these readers."""
        base, *experts = self.readers
        document = {
            "merge_method": "ties",
            "base_model": str(base),
            "models": [{"model": str(e), "parameters": {"weight": 1.0}} for e in experts],
            "parameters": {"density": DENSITY},
        }
        recipe = load_recipe(document, methods=METHODS)
        opened = [open_checkpoint(p, name=p.name, reader=lambda path: self.readers[path]) for p in self.readers]
        return assemble(recipe, opened, [identify(c) for c in opened], RunOptions(), self.resources)

    def passes(self, plan: MergePlan, speculate: bool | None = None) -> Passes:
        kernels = KernelStore(cache_folder(None) / KERNELS)
        worker = Worker(
            plan,
            lambda model: OpenFiles((self.readers[Path(model.path)],)),
            self.resources.kernel,
            kernels,
            self.gpus,
        )
        return Passes(
            plan=plan,
            step=MergeStep(worker, DiscardingWriter()),
            executor=LocalExecutor(plan.threads, computing=self.resources.gpu_slots or None),
            keeper=Forgetful(),
            progress=LogProgress(),
            speculate=speculate,
        )


def merge(passes: Passes) -> str:
    """All passes; the digest of what was written. Raises ProofError and NumericError as a merge does."""
    passes.run()
    blocks = blocks_by_file(passes.results.values())
    shards = passes.plan.layout.shards
    if any(len(blocks[s.name]) != -(-s.size // BLOCK_BYTES) for s in shards):
        raise SystemExit("units do not cover the output exactly once")
    return output_digest((s.name, s.size, blocks[s.name]) for s in shards)


def synthesis_cost(passes: Passes) -> tuple[float, float]:
    """Wall and CPU seconds of reading what the passes read, without computing; from evenly spread units."""
    before = passes.worker.requested_bytes
    units = list(passes.plan.items())

    def read(step: MergeStep, task: MergeTask) -> None:
        step.load(task).release()

    chosen = units[:: -(-len(units) // SYNTHESIS_UNITS)]
    seconds, cpu = timed(lambda: list(passes.executor.call(passes.step, read, [passes.task(unit) for unit in chosen])))[
        1:
    ]
    scale = before / (passes.worker.requested_bytes - before)
    return seconds * scale, cpu * scale


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, and its wall and CPU seconds."""
    began, before = time.monotonic(), time.process_time()
    result = work()
    return result, time.monotonic() - began, time.process_time() - before


def rehearse(stage: Stage, *, speculate: bool | None = None, plan_only: bool = False, check: bool = False) -> Rehearsal:
    assert stage.readers  # made up before the clock starts
    job, plan_seconds, _ = timed(stage.plan)
    plan: MergePlan = job.plan
    found = Rehearsal(
        tensors=len(plan.tensors),
        parameters=plan.elements,
        shards=len(plan.layout.shards),
        experts=stage.experts,
        threads=plan.threads,
        plan_seconds=plan_seconds,
        projected_bytes=plan.projected_bytes,
        pool_bytes=stage.pools.nbytes,
        unit_bytes=plan.unit_bytes,
        input_bytes=plan.input_bytes,
        peak_bytes=peak_rss_bytes(),
    )
    if plan_only:
        return found
    passes = stage.passes(plan, speculate)
    passes.worker.warm_up()
    digest, seconds, cpu = timed(lambda: merge(passes))
    found = replace(
        found,
        peak_bytes=peak_rss_bytes(),
        units=len(passes.results),
        bytes_read=passes.worker.requested_bytes,
        passes_seconds=seconds,
        passes_cpu_seconds=cpu,
        phases=passes.phases,
        thresholds_from=passes.thresholds_from,
        mispredicted=passes.mispredicted,
        redone_units=passes.redone,
        kernel=passes.worker.kernel.kind,
        digest=digest,
    )
    wall, cpu = synthesis_cost(passes)
    found = replace(found, synthesis_seconds=wall, synthesis_cpu_seconds=cpu)
    if check:
        other = OTHER_UNIT_BYTES if plan.unit_bytes != OTHER_UNIT_BYTES else BLOCK_BYTES
        again = merge(stage.passes(replace(plan, unit_bytes=other), speculate))
        found = replace(found, same_digest=again == digest)
    return found


@contextmanager
def gpus_of(device: str, threads: int) -> Iterator[cuda.Gpus | None]:
    """All GPUs of the machine, for the length of a rehearsal; None for the processor."""
    if device == "cpu":
        yield None
        return
    with closing(cuda.Gpus(cuda.load_driver(), threads)) as gpus:
        yield gpus


# --- in a process of its own ---


def in_fresh_process(*options: object) -> tuple[Rehearsal, Run]:
    """A rehearsal whose peak is its own, and what the whole process cost."""
    cost = measured_run([sys.executable, "-m", "benchmarks.rehearsal", *map(str, options)])
    return Rehearsal(**json.loads(cost.stdout)), cost


def compile_kernels(*options: object) -> None:
    """Fill the kernel cache: the compiler's memory and time are no part of what is compared."""
    in_fresh_process("--tensors", FEW_TENSORS, *options)


def shapes_list(text: str) -> list[str]:
    """Comma-separated names of published models."""
    names = [name for name in text.split(",") if name]
    if not names or not set(names) <= SHAPES.keys():
        raise argparse.ArgumentTypeError(f"'{text}': choose from {', '.join(sorted(SHAPES))}")
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description="Rehearse a whole-model TIES merge; print what it took as JSON.")
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, each as it is")
    parser.add_argument("--tensors", type=int, help=f"instead: so many of {TENSOR_SIDE} x {TENSOR_SIDE}")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--memory-budget", default="1GiB")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threshold-pass", choices=sorted(SPECULATE), default="auto")
    parser.add_argument("--plan-only", action="store_true")
    parser.add_argument("--check", action="store_true", help="merge again with units of another size")
    options = parser.parse_args()
    shapes = SHAPES[options.shapes].scaled(layers=options.layers)
    tensors, shard_bytes = shapes.tensors, SHAPES[options.shapes].shard_bytes
    if options.tensors:
        tensors = {f"layers.{i}.weight": (TENSOR_SIDE, TENSOR_SIDE) for i in range(options.tensors)}
        shard_bytes = TENSOR_SHARD_BYTES
    budget = size(options.memory_budget)
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal-") as folder,
        gpus_of(options.device, options.threads) as gpus,
    ):
        stage = Stage(
            folder=Path(folder),
            tensors=tensors,
            shard_bytes=shard_bytes,
            experts=options.experts,
            resources=Resources(
                threads=options.threads, memory_budget=budget, gpu_slots=len(gpus.slots) if gpus else 0
            ),
            gpus=gpus,
        )
        found = rehearse(
            stage, speculate=SPECULATE[options.threshold_pass], plan_only=options.plan_only, check=options.check
        )
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
