"""Compiling a kernel's loop for this processor, keeping it on disk, and calling it.

LLVM comes with numba (llvmlite): no compiler has to be installed on any machine. A kept kernel is an object file, or
PTX, beside the statistics cache; loading it takes milliseconds and no torch. A call releases the GIL, so threads
compute in parallel.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llvmlite
import llvmlite.binding as llvm
import numpy as np
import xxhash

from ties_dist.compiler.loop import Loop, Target, emit
from ties_dist.dtypes import DType
from ties_dist.storage.private import PrivateFolder

logger = logging.getLogger(__name__)

FUNCTION = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)
Kept = TypeVar("Kept")
LARGEST = 1 << 30
"""Elements of one call: longer slices are cut, so that no 32-bit counter overflows."""


@dataclass(frozen=True, eq=False)
class NativeKernel:
    """A compiled loop. counters: how many it writes."""

    counters: int
    _function: Any
    _owner: object = field(repr=False)

    def __call__(
        self, operands: Sequence[memoryview], state: np.ndarray, position: int, out: memoryview, items: Sequence[int]
    ) -> np.ndarray:
        """Merge one slice. state: (numbers,) float32. items: bytes of an element of each operand and of the result.

        Returns (counters,) int64.
        """
        n = len(out) // items[-1]
        pointers = np.array([address(operand) for operand in operands], dtype=np.uint64)
        target, found = address(out), np.empty(self.counters, dtype=np.int64)
        total = np.zeros(self.counters, dtype=np.int64)
        steps = np.array(items[:-1], dtype=np.uint64)
        for low in range(0, n, LARGEST):
            here = pointers + np.uint64(low) * steps
            size = min(LARGEST, n - low)
            self._function(
                here.ctypes.data, target + low * items[-1], state.ctypes.data, found.ctypes.data, position + low, size
            )
            total += found
        return total


def address(content: memoryview) -> int:
    """Where bytes lie in memory; valid while the view is."""
    if not len(content):
        return 0
    return int(np.frombuffer(content, dtype=np.uint8).__array_interface__["data"][0])


class Processor(NamedTuple):
    """What loops are compiled for, as LLVM names it. features: besides those that the name stands for."""

    name: str
    features: str

    def has(self, feature: str) -> bool:
        listed = self.features.split(",")
        return f"+{feature}" in listed or (f"-{feature}" not in listed and feature in LEVELS.get(self.name, ()))

    @property
    def lanes(self) -> int:
        """Float32 that it computes at once."""
        return 16 if self.has("avx512f") else 8 if self.has("avx2") else 4

    def __str__(self) -> str:
        return f"{self.name}, {self.lanes} float32 at once"


LEVELS = {"x86-64-v3": ("avx2", "f16c"), "x86-64-v4": ("avx512f", "avx2", "f16c")}
"""What the names of x86 levels stand for, as far as it matters here."""


@lru_cache(maxsize=1)
def processor() -> Processor:
    """This one; or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say instead, as numba reads them for its own loops.

    A name alone keeps the features found here (but `generic`, which has none): to lower them, say which, or "".
    """
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = os.environ.get("NUMBA_CPU_NAME"), os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if str(name).lower() == "generic" else llvm.get_host_cpu_features().flatten()
    return Processor(llvm.get_host_cpu_name() if name is None else name, features)


def runs_here(types: Sequence[DType]) -> bool:
    """Whether the processor can do it all: without F16C, float16 needs functions that are not there."""
    return "float16" not in types or "x86" not in llvm.get_process_triple() or processor().has("f16c")


def target_machine() -> Any:
    name, features = processor()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(
        cpu=name, features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )


def compile_loop(loop: Loop) -> bytes:
    """The object file of a loop for this processor: about 0.1 s."""
    machine, lanes = target_machine(), processor().lanes
    module = llvm.parse_assembly(
        emit(loop, Target(triple=llvm.get_process_triple(), layout=str(machine.target_data), lanes=lanes))
    )
    module.verify()
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_unrolling = False  # a turn is a hundred instructions
    builder = llvm.create_pass_builder(machine, tuning)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


_loading = threading.Lock()


def load(code: bytes, counters: int) -> NativeKernel:
    with _loading:
        processor()
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        return NativeKernel(counters, FUNCTION(engine.get_function_address("merge")), engine)


@dataclass(frozen=True)
class KernelStore:
    """Compiled code by name, for this processor or (PTX) any GPU, in a folder of this user's alone; None: none is kept.

    What is damaged, and what another user can have written, is compiled again.
    """

    folder: Path | None = None

    def key(self, *facts: object) -> str:
        """Names a kernel for this processor. facts: everything its code follows from, as printed."""
        text = repr((llvmlite.__version__, llvm.llvm_version_info, *processor(), *facts))
        return xxhash.xxh3_128_hexdigest(text.encode())

    def get(self, key: str) -> NativeKernel | None:
        return self._get(key, load)

    def get_ptx(self, key: str) -> tuple[str, int] | None:
        """PTX, and how many counters it has."""
        return self._get(key, lambda code, counters: (code.decode(), counters))

    def _get(self, key: str, opened: Callable[[bytes, int], Kept]) -> Kept | None:
        if self.folder is None:
            return None
        try:
            head, _, code = PrivateFolder(self.folder).read(f"{key}.o").partition(b"\n")
            checksum, counters = head.split()
            if _checksum(counters + code) != checksum:
                raise ValueError("it is damaged")
            return opened(code, int(counters))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("kept kernel %s cannot be used (%s): compiling again", key, error)
            return None

    def put(self, key: str, code: bytes, counters: int) -> None:
        """Keep a kernel. A folder that cannot be written is said, never an error."""
        if self.folder is None:
            return
        size = str(counters).encode()
        try:
            PrivateFolder(self.folder).write(f"{key}.o", _checksum(size + code) + b" " + size + b"\n" + code)
        except OSError as error:
            logger.warning("cannot keep the kernel in %s (%s): the next merge compiles again", self.folder, error)


def _checksum(content: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(content).encode()
