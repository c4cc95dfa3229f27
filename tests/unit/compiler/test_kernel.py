"""Tracing, keeping and loading compiled loops; the loop of a GPU as far as it can be checked without one."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from ties_dist.compiler.elementwise import NotElementwiseError
from ties_dist.compiler.kernel import MergeKernel
from ties_dist.compiler.loop import literal
from ties_dist.compiler.native import KernelStore
from ties_dist.compiler.slices import Slice
from ties_dist.compiler.trace import trace
from ties_dist.dtypes import DType
from ties_dist.methods import Cut, Found, Linear, Method, Ties
from ties_dist.methods.base import State


@dataclass(frozen=True, kw_only=True)
class Odd(Method):
    """Does what no loop can: sorts."""

    name: ClassVar[str] = "odd"
    summary: ClassVar[str] = ""
    operand: ClassVar[Literal["delta", "weight"]] = "weight"
    parameters: ClassVar[tuple[()]] = ()

    def merge(
        self,
        base: Tensor,
        operands: Sequence[Tensor],
        extras: Sequence[Tensor],
        state: Mapping[str, Tensor],
        position: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        return torch.exp(operands[0]), []


def merge_with(
    kernel: MergeKernel, operands: list[memoryview], state: State, out: memoryview, out_type: DType = "float32"
) -> list[int]:
    types: tuple[DType, ...] = ("float32",) * len(operands)
    each = Slice(operands=operands, types=types, state=state, position=0, out=out, out_type=out_type)
    return [int(c) for c in kernel([each])[0]]


def ones(n: int) -> memoryview:
    return memoryview(np.ones(n, np.float32).tobytes())


def state_of(method: Method, experts: int) -> State:
    cuts = [Cut(threshold=0.5, keep=0.5)] * experts
    return method.numbers(
        {"lambda": 1.0}, [{"weight": 1.0}] * experts, Found(cuts=cuts if method.needs.trim else [], majority=1)
    )


def test_a_float_literal_is_the_bits_of_the_equal_double() -> None:
    assert literal(1.0, "float32") == "0x3FF0000000000000"
    assert literal(0.1, "float32") == "0x3FB99999A0000000"  # the float32 next to 0.1
    assert literal(-0.0, "float32") == "0x8000000000000000"
    assert literal(float("inf"), "float32") == "0x7FF0000000000000"


def test_a_method_that_no_loop_can_do_runs_eagerly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    kernel = MergeKernel(Odd(), 1)
    out = memoryview(bytearray(12))
    numbers = memoryview(np.array([0, 1, -1], np.float32).tobytes())
    with caplog.at_level(logging.WARNING):
        merge_with(kernel, [numbers], {}, out)
    assert np.frombuffer(out, np.float32).tolist() == pytest.approx([1, 2.7182817, 0.36787945])
    assert kernel.kind == "eager"
    assert "`odd` cannot be compiled (there is no loop for torch's `exp`)" in caplog.text


def test_a_tensor_from_outside_of_the_function_is_refused() -> None:
    outside = torch.ones(())

    def function(operands: Sequence[Tensor], state: object, position: Tensor) -> tuple[Tensor, Tensor]:
        return operands[0] * outside, torch.stack([(operands[0] > 0).sum(dtype=torch.int32)])

    with pytest.raises(NotElementwiseError, match="outside"):
        trace(function, ["float32"], {})  # type: ignore[arg-type]


def test_a_kernel_is_kept_and_loaded_again_without_tracing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = memoryview(bytearray(40))
    merge_with(MergeKernel(Linear(), 2, store=KernelStore(tmp_path)), [ones(10)] * 2, state_of(Linear(), 2), out)
    assert len(list(tmp_path.glob("*.o"))) == 1
    monkeypatch.setattr("ties_dist.compiler.trace.trace", None)
    again = MergeKernel(Linear(), 2, store=KernelStore(tmp_path))
    out = memoryview(bytearray(40))
    merge_with(again, [ones(10)] * 2, state_of(Linear(), 2), out)
    assert np.frombuffer(out, np.float32).tolist() == [1.0] * 10
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # other types are another kernel
        merge_with(again, [ones(10)] * 2, state_of(Linear(), 2), memoryview(bytearray(20)), "bfloat16")


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_kernel_is_never_run(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    store = KernelStore(tmp_path)
    arguments = ([ones(10)] * 2, state_of(Linear(), 2))
    merge_with(MergeKernel(Linear(), 2, store=store), *arguments, memoryview(bytearray(40)))
    (kept,) = tmp_path.glob("*.o")
    code = bytearray(kept.read_bytes())
    code[len(code) // 2] ^= 1
    kept.write_bytes({"flipped": code, "cut": code[:100], "empty": b""}[how])
    out = memoryview(bytearray(40))
    merge_with(MergeKernel(Linear(), 2, store=store), *arguments, out)
    assert np.frombuffer(out, np.float32).tolist() == [1.0] * 10
    assert "cannot be used" in caplog.text
    again = MergeKernel(Linear(), 2, store=store)
    caplog.clear()
    merge_with(again, *arguments, out)
    assert "cannot be used" not in caplog.text, "it was compiled and kept again"


def test_a_folder_that_cannot_be_written_is_said_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    out = memoryview(bytearray(40))
    kernel = MergeKernel(Linear(), 2, store=KernelStore(tmp_path / "file" / "folder"))
    merge_with(kernel, [ones(10)] * 2, state_of(Linear(), 2), out)
    assert np.frombuffer(out, np.float32).tolist() == [1.0] * 10
    assert "cannot keep the kernel" in caplog.text


def test_a_kernel_in_a_folder_that_others_may_write_to_is_never_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = KernelStore(tmp_path / "kept")
    arguments = ([ones(10)] * 2, state_of(Linear(), 2))
    merge_with(MergeKernel(Linear(), 2, store=store), *arguments, memoryview(bytearray(40)))
    (tmp_path / "kept").chmod(0o777)
    monkeypatch.setattr("ties_dist.compiler.native.load", None)
    (kept,) = (tmp_path / "kept").glob("*.o")
    assert store.get(kept.stem) is None
    assert "others may write to" in caplog.text


def test_methods_from_elsewhere_are_never_kept(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Foreign(Linear):
        pass

    out = memoryview(bytearray(40))
    kernel = MergeKernel(Foreign(), 2, store=KernelStore(tmp_path))
    merge_with(kernel, [ones(10)] * 2, state_of(Linear(), 2), out)
    assert kernel.kind == "compiled"
    assert list(tmp_path.iterdir()) == []


def test_many_threads_may_call_a_kernel_that_is_not_compiled_yet() -> None:
    kernel = MergeKernel(Ties(), 3)
    operands = [memoryview(np.random.default_rng(i).standard_normal(50_000).astype(np.float32).tobytes()) for i in range(4)]  # fmt: skip # noqa: E501

    def call(_: int) -> tuple[bytes, list[int]]:
        out = memoryview(bytearray(200_000))
        return bytes(out), merge_with(kernel, operands, state_of(Ties(), 3), out)

    with ThreadPoolExecutor(8) as pool:
        assert len({(o, tuple(c)) for o, c in pool.map(call, range(32))}) == 1


@pytest.mark.slow
def test_a_merge_whose_kernel_is_kept_imports_neither_torch_nor_numba(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    draw = np.random.default_rng(0)
    base = draw.standard_normal((64, 64)).astype(np.float16)
    for name, noise in (("base", 0.0), ("one", 0.01), ("two", 0.01)):
        (tmp_path / name).mkdir()
        changed = (base + noise * draw.standard_normal((64, 64))).astype(np.float16)
        save_file({"a.weight": changed}, tmp_path / name / "model.safetensors")
    (tmp_path / "recipe.yml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: one}, {model: two}]\nparameters: {density: 0.2}\n"
    )
    script = (
        "import sys, ties_dist\n"
        "report = ties_dist.merge(sys.argv[1], sys.argv[2], cache_dir=sys.argv[3], threshold_pass='speculate')\n"
        "loaded = ['torch' in sys.modules, 'numba' in sys.modules]\n"
        "print(report.mispredicted, report.thresholds_from, report.kernel, *loaded)"
    )
    said = []
    for out in ("first", "second"):
        arguments = [str(tmp_path / "recipe.yml"), str(tmp_path / out), str(tmp_path / "cache")]
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        said.append(done.stdout.split())
    assert said == [["False", "sample", "compiled", "True", "False"], ["False", "sample", "compiled", "False", "False"]]
