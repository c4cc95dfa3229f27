"""Merging slices on NVIDIA GPUs: the same loop as on the processor, as PTX, with the same bits.

The driver is called directly (cuda-bindings, NVIDIA's own; nothing of torch): PTX is compiled for whatever GPU is there
by its driver. All slices of a unit go over in one copy from a reused pinned buffer (a copy straight from a file's map
would stop at every page fault), and come back in another. A unit has a slot of its own: a stream and its
buffers. With several slots on each GPU the copies of one unit run beside the kernels of the next.
"""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from ties_dist.compiler.loop import Loop, Target, emit
from ties_dist.compiler.slices import Slice, flat
from ties_dist.dtypes import LOOP_BYTES
from ties_dist.errors import PlanError

logger = logging.getLogger(__name__)

TRIPLE, OLDEST, PTX = "nvptx64-nvidia-cuda", "sm_70", "+ptx60"
"""Volta and later: PTX for the oldest runs on all of them."""
LEAST_SLOTS, MOST_SLOTS = 3, 8
"""Per GPU: one being filled, one copied and computed, one coming back; more where many cores fill them, since one core
copies at a fraction of what the bus takes."""
ALIGNMENT = 256
THREADS = 256
BLOCKS_PER_PROCESSOR = 4
GRANULE = 1 << 20

_compiling = threading.Lock()


def compile_ptx(loop: Loop) -> str:
    """PTX of a loop. Its float operations are `.rn` and never fused, flushed or approximated (tests/unit)."""
    with _compiling:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        machine = llvm.Target.from_triple(TRIPLE).create_target_machine(cpu=OLDEST, features=PTX, opt=3)
        target = Target(triple=TRIPLE, layout=str(machine.target_data), lanes=1, gpu=True)
        module = llvm.parse_assembly(emit(loop, target))
        module.verify()
        builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
        builder.getModulePassManager().run(module, builder)
        return str(machine.emit_assembly(module))


def load_driver() -> Any:
    """The driver's functions, initialised. Raises PlanError, saying what is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise PlanError(
            "--device cuda needs the package cuda-bindings: pip install 'ties-dist[cuda]', or use --device cpu "
            "(the same bytes)."
        ) from error
    try:
        _ask(driver.cuInit(0))
        count = _ask(driver.cuDeviceGetCount())
    except Exception as error:  # no driver library, no device, a driver that is too old
        raise PlanError(
            f"--device cuda found no usable NVIDIA driver ({error}). Use --device cpu: the same bytes."
        ) from error
    if not count:
        raise PlanError("--device cuda found no GPU (CUDA_VISIBLE_DEVICES?). Use --device cpu: the same bytes.")
    return driver


def _ask(answer: Any) -> Any:
    """What a driver's function returns after its status."""
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else values or None


@dataclass
class Gpu:
    """One device: its context, and the kernels loaded into it."""

    driver: Any
    device: Any
    context: Any
    processors: int
    functions: dict[str, Any] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Calls on this thread go to this GPU."""
        _ask(self.driver.cuCtxPushCurrent(self.context))
        try:
            yield
        finally:
            _ask(self.driver.cuCtxPopCurrent())

    def function(self, ptx: str) -> Any:
        with self.lock:
            if ptx not in self.functions:
                image = np.frombuffer(ptx.encode() + b"\0", dtype=np.uint8)
                module = _ask(self.driver.cuModuleLoadData(image.ctypes.data))
                self.functions[ptx] = _ask(self.driver.cuModuleGetFunction(module, b"merge"))
            return self.functions[ptx]


@dataclass
class Slot:
    """A stream with a pinned buffer and device memory, which grow to what a unit needs."""

    gpu: Gpu
    stream: Any
    host: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    address: int = 0
    memory: int = 0

    def reserve(self, size: int) -> None:
        if size <= self.host.nbytes:
            return
        driver, size = self.gpu.driver, -(-size // GRANULE) * GRANULE
        self.release()
        try:
            self.address = int(_ask(driver.cuMemHostAlloc(size, 0)))
            self.memory = int(_ask(driver.cuMemAlloc(size)))
        except RuntimeError as error:
            raise PlanError(
                f"no room for a unit of {size >> 20}MiB in pinned and GPU memory ({error}). Give a smaller "
                "--unit-size, or use --device cpu: the same bytes."
            ) from error
        self.host = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))

    def release(self) -> None:
        if self.host.nbytes:
            self.host = np.zeros(0, dtype=np.uint8)
            _ask(self.gpu.driver.cuMemFreeHost(self.address))
            _ask(self.gpu.driver.cuMemFree(self.memory))


@dataclass(frozen=True)
class Placed:
    """Where a slice lies in a slot, as offsets: table of operand addresses, state, counters, result."""

    slice: Slice
    table: int
    state: int
    counters: int
    count: int
    out: int


def slots_of_each(threads: int, gpus: int) -> int:
    """Slots of one of so many GPUs, in a process with so many threads to fill them."""
    return min(MOST_SLOTS, max(LEAST_SLOTS, threads // gpus))


class Gpus:
    """All GPUs that are visible, and a queue of their free slots: whoever merges a unit takes one."""

    def __init__(self, driver: Any, threads: int) -> None:
        """threads: of this process, which fill the slots."""
        self.driver = driver
        self.gpus: list[Gpu] = []
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        for number in range(_ask(driver.cuDeviceGetCount())):
            device = _ask(driver.cuDeviceGet(number))
            context = _ask(driver.cuDevicePrimaryCtxRetain(device))
            self.gpus.append(Gpu(driver, device, context, int(_ask(driver.cuDeviceGetAttribute(attribute, device)))))
        each = slots_of_each(threads, len(self.gpus))
        self.slots = [self._slot(gpu) for _ in range(each) for gpu in self.gpus]
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in self.slots:
            self._free.put(slot)

    def _slot(self, gpu: Gpu) -> Slot:
        with gpu.current():
            non_blocking = 1
            return Slot(gpu, _ask(self.driver.cuStreamCreate(non_blocking)))

    def merge(self, slices: Sequence[Slice], compiled: Callable[[Slice], tuple[str, int]]) -> list[np.ndarray]:
        """Merge slices into their `out`. compiled: PTX of a slice's loop, and how many counters it has.

        Returns the counters of each slice, int64.
        """
        if not slices:
            return []
        kernels = [compiled(each) for each in slices]
        slot = self._free.get()
        try:
            with slot.gpu.current():
                return self._merge(slot, slices, kernels)
        finally:
            self._free.put(slot)

    def _merge(self, slot: Slot, slices: Sequence[Slice], kernels: Sequence[tuple[str, int]]) -> list[np.ndarray]:
        driver, stream = self.driver, slot.stream
        placed, operands, outs, end = _place(slices, [count for _, count in kernels])
        slot.reserve(end)
        host, memory = slot.host, slot.memory
        head = operands[0]
        host[:head] = 0  # counters begin at 0
        following = iter(operands)
        for given in slices:
            _copy(host, given, [next(following) for _ in given.operands])
        following = iter(operands)
        for each in placed:
            addresses = [memory + next(following) for _ in each.slice.operands]
            _put(host, each.table, np.array(addresses, dtype=np.uint64))
            _put(host, each.state, flat(each.slice.state))
        _ask(driver.cuMemcpyHtoDAsync(memory, slot.address, outs, stream))
        for each, (ptx, _) in zip(placed, kernels, strict=True):
            if each.slice.elements:
                self._launch(slot, each, slot.gpu.function(ptx))
        _ask(driver.cuMemcpyDtoHAsync(slot.address, memory, head, stream))
        _ask(driver.cuMemcpyDtoHAsync(slot.address + outs, memory + outs, end - outs, stream))
        _ask(driver.cuStreamSynchronize(stream))
        for each in placed:
            size = len(each.slice.out)
            np.frombuffer(each.slice.out, dtype=np.uint8)[:] = host[each.out : each.out + size]
        return [host[p.counters : p.counters + 8 * p.count].view(np.int64).copy() for p in placed]

    def _launch(self, slot: Slot, placed: Placed, function: Any) -> None:
        n, memory = placed.slice.elements, slot.memory
        arguments = [
            ctypes.c_uint64(memory + placed.table),
            ctypes.c_uint64(memory + placed.out),
            ctypes.c_uint64(memory + placed.state),
            ctypes.c_uint64(memory + placed.counters),
            ctypes.c_int64(placed.slice.position),
            ctypes.c_int64(n),
        ]
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        blocks = min(-(-n // THREADS), slot.gpu.processors * BLOCKS_PER_PROCESSOR)
        launched = self.driver.cuLaunchKernel(
            function, blocks, 1, 1, THREADS, 1, 1, 0, slot.stream, ctypes.addressof(pointers), 0
        )
        _ask(launched)

    def close(self) -> None:
        for slot in self.slots:
            with slot.gpu.current():
                slot.release()
                _ask(self.driver.cuStreamDestroy(slot.stream))
        for gpu in self.gpus:
            _ask(self.driver.cuDevicePrimaryCtxRelease(gpu.device))


def _place(slices: Sequence[Slice], counters: Sequence[int]) -> tuple[list[Placed], list[int], int, int]:
    """Lay a unit out: tables, states and counters first, then operands, then results.

    Returns the slices' places, the operands' offsets in order, where results begin, and the end.
    """
    end = 0

    def take(size: int) -> int:
        nonlocal end
        start, end = end, -(-(end + size) // ALIGNMENT) * ALIGNMENT
        return start

    heads = [
        (take(8 * len(s.operands)), take(4 * sum(np.size(v) for v in s.state.values())), take(8 * count))
        for s, count in zip(slices, counters, strict=True)
    ]
    operands = [take(s.elements * LOOP_BYTES[kind]) for s in slices for kind in s.types]
    outs = end
    placed = [
        Placed(s, *head, count, take(s.elements * LOOP_BYTES[s.out_type]))
        for s, head, count in zip(slices, heads, counters, strict=True)
    ]
    return placed, operands, outs, end


def _copy(host: np.ndarray, given: Slice, offsets: Sequence[int]) -> None:
    """Put a slice's operands where they were placed, decoded where they have to be."""
    for first, contents, _ in given.ready:
        for offset, content, kind in zip(offsets, contents, given.types, strict=True):
            at = offset + first * LOOP_BYTES[kind]
            host[at : at + len(content)] = np.frombuffer(content, dtype=np.uint8)


def _put(host: np.ndarray, offset: int, values: np.ndarray) -> None:
    host[offset : offset + values.nbytes] = values.view(np.uint8)
