"""The GPU path without a GPU: PTX by NVIDIA's own assembler, staging and streams against a driver that only remembers.

The stand-in's memory is this process's, and its streams do nothing before they are waited for. A launch calls the loop
compiled for the processor. What it cannot tell is what a real driver does: `test_on_a_real_gpu` needs one.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ties_dist
from tests.conftest import Checkpoints, random_models
from ties_dist.compiler import cuda
from ties_dist.compiler.cuda import Gpus, compile_ptx, load_driver
from ties_dist.compiler.fuse import fuse
from ties_dist.compiler.kernel import MergeKernel
from ties_dist.compiler.loop import Loop
from ties_dist.compiler.native import compile_loop, load
from ties_dist.compiler.slices import Slice
from ties_dist.compiler.trace import trace
from ties_dist.dtypes import DType
from ties_dist.errors import PlanError
from ties_dist.methods import Cut, Found, Linear, Method, TaskArithmetic, Ties

DTYPES: list[DType] = ["bfloat16", "float16", "float32"]
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
METHODS: list[Method] = [Ties(), Ties(elect="count", aggregate="max"), TaskArithmetic(normalize=True), Linear()]


def loop_of(method: Method, dtype: DType, experts: int = 3) -> Loop:
    cuts = [Cut(threshold=0.5, keep=0.5)] * (experts if method.needs.trim else 0)
    state = method.numbers({"lambda": 1.0}, [{"weight": 1.0}] * experts, Found(cuts=cuts, majority=1))
    operands = experts + (method.operand == "delta")
    return trace(fuse(method, experts, dtype), [dtype] * operands, {n: np.shape(v) for n, v in state.items()})


# -- the code ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_nothing_is_fused_flushed_or_approximated(method: Method, dtype: DType) -> None:
    ptx = compile_ptx(loop_of(method, dtype))
    assert not re.search(r"\bfma|\.ftz|\.approx|\bmad\.[a-z.]*f32|\bdiv\.full", ptx)
    arithmetic = re.findall(r"\b(?:add|sub|mul|div)\.[a-z.]*f32", ptx)
    assert arithmetic and all(word.split(".")[1] == "rn" for word in arithmetic)  # plain `add` may be contracted
    assert ".visible .entry merge(" in ptx


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="NVIDIA's assembler is not installed")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_assembler_takes_it(architecture: str, dtype: DType, tmp_path: Path) -> None:
    (tmp_path / "merge.ptx").write_text(compile_ptx(loop_of(Ties(), dtype)))
    command = ["ptxas", f"-arch={architecture}", str(tmp_path / "merge.ptx"), "-o", str(tmp_path / "merge.cubin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- the driver --------------------------------------------------------------------------------------------------------


@dataclass
class Driver:
    """As much of the driver's interface as is used, over this process's memory."""

    devices: int = 2
    CUdevice_attribute: Any = field(
        default_factory=lambda: SimpleNamespace(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=16)
    )
    allocated: dict[int, Any] = field(default_factory=dict)
    loops: dict[str, Loop] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    launches: list[int] = field(default_factory=list)
    _context: threading.local = field(default_factory=threading.local)

    def compile(self, loop: Loop) -> str:
        """In place of `compile_ptx`."""
        name = f"// {len(self.loops)}"
        self.loops[name] = loop
        return name

    def _inside(self) -> None:
        assert getattr(self._context, "stack", []), "a call without a current context"

    def cuInit(self, _: int) -> tuple[int]:
        return (0,)

    def cuDeviceGetCount(self) -> tuple[int, int]:
        return 0, self.devices

    def cuDeviceGet(self, number: int) -> tuple[int, int]:
        return 0, number

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
        self.streams[len(self.streams)] = []
        return 0, len(self.streams) - 1

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
        loop = self.loops[module]
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


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(cuda, "compile_ptx", driver.compile)
    monkeypatch.setattr(cuda, "load_driver", lambda: driver)
    return driver


def slices_of(sizes: list[int], dtype: DType, seed: int = 0) -> list[Slice]:
    draw = np.random.default_rng(seed)
    state = Ties().numbers(
        {"lambda": 1.0}, [{"weight": 1.0}] * 2, Found(cuts=[Cut(threshold=0.5, keep=0.5)] * 2, majority=1)
    )
    slices = []
    for n in sizes:
        numbers = torch.from_numpy(draw.standard_normal((3, n)).astype(np.float32))
        kind = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[dtype]
        operands = [memoryview(row.to(kind).view(torch.uint8).numpy().tobytes() if n else b"") for row in numbers]
        out = memoryview(bytearray(n * SIZES[dtype]))
        slices.append(Slice(operands=operands, types=(dtype,) * 3, state=state, position=0, out=out, out_type=dtype))
    return slices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[], [0], [1], [5, 0, 4097], [100_000, 1, 3]], ids=str)
def test_a_unit_goes_over_and_comes_back_as_the_processor_has_it(
    sizes: list[int], dtype: DType, driver: Driver
) -> None:
    gpus = Gpus(driver, threads=2)
    ours, theirs = slices_of(sizes, dtype), slices_of(sizes, dtype)
    counted = MergeKernel(Ties(), 2, gpus=gpus)(ours)
    expected = MergeKernel(Ties(), 2)(theirs)
    assert [c.tolist() for c in counted] == [c.tolist() for c in expected]
    assert [bytes(s.out) for s in ours] == [bytes(s.out) for s in theirs]
    assert driver.launches == [n for n in sizes if n]
    gpus.close()
    assert driver.allocated == {} and driver.streams == {}


def test_slots_are_shared_by_threads_and_reused(driver: Driver) -> None:
    gpus = Gpus(driver, threads=2)
    kernel = MergeKernel(Ties(), 2, gpus=gpus)
    expected = slices_of([1000, 70_000], "bfloat16", 7)
    MergeKernel(Ties(), 2)(expected)

    def once(_: int) -> list[bytes]:
        slices = slices_of([1000, 70_000], "bfloat16", 7)
        kernel(slices)
        return [bytes(s.out) for s in slices]

    with ThreadPoolExecutor(12) as pool:
        assert all(found == [bytes(s.out) for s in expected] for found in pool.map(once, range(40)))
    assert len(gpus.slots) == 2 * cuda.LEAST_SLOTS
    assert len(driver.allocated) <= 2 * len(gpus.slots)
    gpus.close()
    assert driver.allocated == {}


def test_a_whole_merge_on_two_gpus_has_the_processors_digest(
    driver: Driver, merge_job: Checkpoints, tmp_path: Path
) -> None:
    shapes = {"a.weight": (1024, 1640), "b.weight": (513, 7), "c.norm.weight": (3,)}
    recipe = merge_job(random_models(shapes, experts=3, dtype=torch.bfloat16))
    expected = ties_dist.merge(recipe, tmp_path / "cpu", unit_size=1 << 20)
    report = ties_dist.merge(recipe, tmp_path / "cuda", unit_size=1 << 20, device="cuda", threads=2)
    assert report.output_digest == expected.output_digest
    assert (report.kernel, report.experts) == ("cuda", expected.experts)
    assert sum(driver.launches) >= expected.elements
    assert driver.allocated == {}, "the GPUs are given back"


@pytest.mark.parametrize("devices", [0, 1])
def test_without_a_gpu_it_says_what_to_do(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Driver(devices=0)
    if devices:
        monkeypatch.setattr(broken, "cuInit", lambda _: (SimpleNamespace(name="CUDA_ERROR_NO_DEVICE", __int__=None),))
    monkeypatch.setitem(__import__("sys").modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", SimpleNamespace(driver=broken))
    with pytest.raises(PlanError, match=r"--device cuda found no .*Use --device cpu"):
        load_driver()


def test_without_the_package_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, merge_job: Checkpoints, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    recipe = merge_job(random_models({"a.weight": (30, 10)}, experts=1))
    with pytest.raises(PlanError, match=r"pip install 'ties-dist\[cuda\]'"):
        ties_dist.merge(recipe, tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_real_gpu(dtype: torch.dtype, merge_job: Checkpoints, tmp_path: Path) -> None:
    try:
        load_driver()
    except PlanError as reason:
        pytest.skip(str(reason))
    recipe = merge_job(random_models({"a.weight": (1024, 3000), "b.weight": (513, 7)}, experts=3, dtype=dtype))
    one = ties_dist.merge(recipe, tmp_path / "cpu", device="cpu")
    two = ties_dist.merge(recipe, tmp_path / "cuda", device="cuda")
    assert (one.output_digest, two.kernel) == (two.output_digest, "cuda")


def test_too_little_memory_on_the_gpu_is_said(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(driver, threads=2)
    monkeypatch.setattr(driver, "cuMemAlloc", lambda _: (2, 0))
    with pytest.raises(PlanError, match=r"no room for a unit of 1MiB .*--unit-size"):
        MergeKernel(Ties(), 2, gpus=gpus)(slices_of([1000], "bfloat16"))
