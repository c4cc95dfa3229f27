"""A stand-in for NVIDIA's driver over this process's memory: every call of `compiler/cuda.py`, and no GPU.

Its streams do nothing before they are waited for, memory comes uncleared, and a call without a current context fails.
PTX is made as for a GPU, with its loop in a comment: a launch calls that loop, compiled for the processor. What it
cannot tell is what a real driver does.
"""

from __future__ import annotations

import ctypes
import pickle
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np

from ties_dist.compiler import cuda
from ties_dist.compiler.cuda import compile_ptx
from ties_dist.compiler.loop import Loop
from ties_dist.compiler.native import compile_loop, load

COMMENT = "\n// "


@dataclass
class Driver:
    """As much of the driver's interface as is used, over this process's memory."""

    devices: int = 2
    CUdevice_attribute: Any = field(
        default_factory=lambda: SimpleNamespace(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16)
    )
    allocated: dict[int, Any] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    launches: list[int] = field(default_factory=list)
    _context: threading.local = field(default_factory=threading.local)
    _numbers: Iterator[int] = field(default_factory=count)

    def compile(self, loop: Loop) -> str:
        """In place of `compile_ptx`: the same text, which may be kept, and what it stands for."""
        return compile_ptx(loop) + COMMENT + b64encode(pickle.dumps(loop)).decode() + "\n"

    def _inside(self) -> None:
        assert getattr(self._context, "stack", []), "a call without a current context"

    def cuInit(self, _: int) -> tuple[int]:
        return (0,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, self.devices

    def cuDeviceGet(self, number: int) -> tuple[int, int]:
        return 0, number

    def cuDeviceGetName(self, length: int, _: int) -> tuple[int, bytes]:
        return 0, b"a stand-in, no GPU"[:length]

    def cuDeviceTotalMem(self, _: int) -> tuple[int, int]:
        return 0, 0

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, 0

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, str]:
        return 0, f"context {device}"

    def cuDevicePrimaryCtxRelease(self, _: int) -> tuple[int]:
        return (0,)

    def cuDeviceGetAttribute(self, attribute: int, _: int) -> tuple[int, int]:
        return 0, attribute

    def cuCtxPushCurrent(self, context: str) -> tuple[int]:
        self._context.stack = [*getattr(self._context, "stack", []), context]
        return (0,)

    def cuCtxPopCurrent(self) -> tuple[int, str]:
        return 0, self._context.stack.pop()

    def cuStreamCreate(self, flags: int) -> tuple[int, int]:
        self._inside()
        assert flags == 1
        number = next(self._numbers)
        self.streams[number] = []
        return 0, number

    def cuStreamDestroy(self, stream: int) -> tuple[int]:
        assert self.streams.pop(stream) == []
        return (0,)

    def _allocate(self, size: int) -> tuple[int, int]:
        self._inside()
        memory = np.full(size, 0xA5, dtype=np.uint8)  # not cleared
        self.allocated[memory.ctypes.data] = memory
        return 0, memory.ctypes.data

    def cuMemHostAlloc(self, size: int, _: int) -> tuple[int, int]:
        return self._allocate(size)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        return self._allocate(size)

    def _free(self, address: int) -> tuple[int]:
        del self.allocated[address]
        return (0,)

    cuMemFree = cuMemFreeHost = _free

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[int]:
        self._inside()
        self.streams[stream].append(lambda: ctypes.memmove(target, source, size) and None)
        return (0,)

    cuMemcpyDtoHAsync = cuMemcpyHtoDAsync

    def cuModuleLoadData(self, image: int) -> tuple[int, str]:
        self._inside()
        return 0, ctypes.string_at(image).decode()

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, Any]:
        assert name == b"merge"
        loop = pickle.loads(b64decode(module.rpartition(COMMENT)[2]))
        return 0, load(compile_loop(loop), len(loop.counters))

    def cuLaunchKernel(self, function: Any, *grid: int) -> tuple[int]:
        self._inside()
        blocks, _, _, threads, _, _, shared, stream, parameters, extra = grid
        assert 0 < blocks <= 16 * 4 and threads % 32 == 0 and shared == extra == 0
        pointers = (ctypes.c_void_p * 6).from_address(parameters)
        inputs, out, state, counters = (ctypes.c_uint64.from_address(p or 0).value for p in pointers[:4])
        position, n = (ctypes.c_int64.from_address(p or 0).value for p in pointers[4:])
        self.launches.append(n)
        self.streams[stream].append(lambda: function._function(inputs, out, state, counters, position, n))
        return (0,)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        self._inside()
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()
        return (0,)


def install(driver: Driver) -> None:
    """Merges of this process with `device="cuda"` go to the stand-in from now on."""
    cuda.compile_ptx = driver.compile
    cuda.load_driver = lambda: driver
