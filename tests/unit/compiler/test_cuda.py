"""The GPU path without a GPU: PTX by NVIDIA's own assembler, staging and streams against a stand-in for the driver.

What that cannot tell is what a real driver does: `test_on_a_real_gpu` needs one; `benchmarks.device` checks the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ties_dist
from tests import cuda_checks
from tests.conftest import Checkpoints, random_models
from tests.cuda_driver import Driver
from ties_dist.compiler import cuda
from ties_dist.compiler.cuda import Gpus, compile_ptx, load_driver
from ties_dist.compiler.fuse import fuse
from ties_dist.compiler.kernel import MergeKernel
from ties_dist.compiler.loop import Loop
from ties_dist.compiler.native import KernelStore
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


def test_ptx_is_kept_and_taken_again_without_tracing(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, first, second = (slices_of([1000], "bfloat16") for _ in range(3))
    MergeKernel(Ties(), 2, store=KernelStore(tmp_path))(expected)
    MergeKernel(Ties(), 2, store=KernelStore(tmp_path), gpus=Gpus(driver, threads=2))(first)
    assert len(list(tmp_path.iterdir())) == 2, "the processor's and the GPUs'"
    monkeypatch.setattr("ties_dist.compiler.trace.trace", None)
    MergeKernel(Ties(), 2, store=KernelStore(tmp_path), gpus=Gpus(driver, threads=2))(second)
    assert bytes(first[0].out) == bytes(second[0].out) == bytes(expected[0].out)


def test_damaged_ptx_is_never_run(driver: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = slices_of([1000], "bfloat16"), slices_of([1000], "bfloat16")
    MergeKernel(Ties(), 2, store=KernelStore(tmp_path), gpus=Gpus(driver, threads=2))(first)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes().replace(b".f32", b".f64", 1))
    MergeKernel(Ties(), 2, store=KernelStore(tmp_path), gpus=Gpus(driver, threads=2))(second)
    assert "cannot be used" in caplog.text
    assert bytes(first[0].out) == bytes(second[0].out)


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


def test_on_a_real_gpu(tmp_path: Path) -> None:
    try:
        load_driver()
    except PlanError as reason:
        pytest.skip(str(reason))
    wrong = {str(check): cuda_checks.differences(check, tmp_path) for check in cuda_checks.every_check()}
    assert {check: found for check, found in wrong.items() if found} == {}
    assert cuda_checks.refusals(tmp_path) == []


def test_too_little_memory_on_the_gpu_is_said(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(driver, threads=2)
    monkeypatch.setattr(driver, "cuMemAlloc", lambda _: (2, 0))
    with pytest.raises(PlanError, match=r"no room for a unit of 1MiB .*--unit-size"):
        MergeKernel(Ties(), 2, gpus=gpus)(slices_of([1000], "bfloat16"))
