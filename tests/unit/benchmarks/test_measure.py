"""The benchmarks' own instruments: generated checkpoints, the cost of a command, distances between results."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.checkpoints import Family, write_family
from benchmarks.measure import run, table
from benchmarks.shapes import SHAPES, assign_shards, header
from benchmarks.vs_peers import ulps_apart

SMALL = {"a.norm.weight": (7,), "b.weight": (300, 500), "c.weight": (64, 64)}


def load(model: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(model.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    # Number of tensors, `total_size` of the index and number of shards, as published with the model.
    ("name", "tensors", "total_size", "shards"),
    [
        ("tinyllama-1.1b", 201, 2_200_096_768, 1),
        ("llama-3-8b", 291, 16_060_522_496, 4),
        ("llama-3-70b", 723, 141_107_412_992, 30),
        ("qwen3-30b-a3b", 18_867, 61_064_245_248, 16),
    ],
)
def test_shapes_and_shards_are_those_of_the_published_model(
    name: str, tensors: int, total_size: int, shards: int
) -> None:
    shapes = SHAPES[name]
    assert len(shapes.tensors) == tensors
    assert 2 * shapes.elements == total_size
    assert len(assign_shards(shapes.tensors, 2, shapes.shard_bytes)) == shards


def test_a_generated_file_has_the_size_of_the_published_one() -> None:
    shapes = SHAPES["tinyllama-1.1b"]  # its model.safetensors has 2,200,119,864 bytes
    head = header({name: shapes.tensors[name] for name in sorted(shapes.tensors)}, "BF16", 2)
    assert len(head) + 2 * shapes.elements == 2_200_119_864


def test_fewer_layers_keep_the_shapes_of_the_others() -> None:
    whole, part = SHAPES["llama-3-8b"], SHAPES["llama-3-8b"].scaled(layers=2)
    assert part.tensors.items() <= whole.tensors.items()
    assert len(part.tensors) == 3 + 2 * 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_generated_checkpoints_load_and_differ_as_fine_tunes_do(tmp_path: Path, dtype: str) -> None:
    family = write_family(tmp_path, SMALL, experts=2, dtype=dtype, shard_bytes=200_000)
    base, *experts = (load(model) for model in family.models)
    assert {name: tuple(t.shape) for name, t in base.items()} == SMALL
    assert {t.dtype for t in base.values()} == {getattr(torch, dtype)}
    assert base["b.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert base["a.norm.weight"].float().mean().item() == pytest.approx(1.0, abs=0.05)
    deltas = [expert["b.weight"].float() - base["b.weight"].float() for expert in experts]
    assert all(1e-5 < delta.std().item() < 1e-3 for delta in deltas)
    correlation = np.corrcoef([delta.numpy().ravel() for delta in deltas])[0, 1]
    assert abs(correlation) < 0.02  # five standard errors of 150,000 pairs


def test_generated_checkpoints_are_sharded_with_an_index(tmp_path: Path) -> None:
    family = write_family(tmp_path, SMALL, experts=1, dtype="bfloat16", shard_bytes=200_000)
    names = [file.name for file in sorted(family.base.glob("*.safetensors"))]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert (family.base / "model.safetensors.index.json").is_file()


def test_the_same_request_is_not_written_twice_and_another_is_refused(tmp_path: Path) -> None:
    first = write_family(tmp_path, SMALL, experts=1, dtype="bfloat16")
    written = [file.stat().st_mtime_ns for file in first.files]
    second = write_family(tmp_path, SMALL, experts=1, dtype="bfloat16")
    assert [file.stat().st_mtime_ns for file in second.files] == written
    with pytest.raises(SystemExit, match="holds other or unfinished checkpoints"):
        write_family(tmp_path, SMALL, experts=1, dtype="float32")


def test_memory_of_a_command_is_its_own_and_not_its_starters() -> None:
    ballast = bytearray(512 << 20)
    idle = run([sys.executable, "-S", "-c", "pass"])
    busy = run([sys.executable, "-S", "-c", "print(len(bytearray(200 << 20)))"])
    assert len(ballast) > 0
    assert idle.peak_bytes < 100 << 20
    assert 200 << 20 <= busy.peak_bytes < 300 << 20
    assert busy.stdout == "209715200\n"


def test_cpu_seconds_count_children_too() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {burn!r}])"
    assert run([sys.executable, "-S", "-c", child]).cpu_seconds >= 0.3


def test_a_failing_command_ends_the_bench_with_its_message() -> None:
    with pytest.raises(SystemExit, match=r"ended with 3:\n.*sorry"):
        run([sys.executable, "-S", "-c", "import sys; print('sorry', file=sys.stderr); sys.exit(3)"])


def test_distances_count_units_in_the_last_place() -> None:
    # bfloat16 has 8 digits: above 1 they are 2^-7 apart, below 1 half as much; the unit is that of the larger number.
    one, above, below = (np.array([bits], dtype=np.uint16) for bits in (0x3F80, 0x3F81, 0x3F7F))
    assert ulps_apart(one, above).tolist() == [1.0]
    assert ulps_apart(above, one).tolist() == [1.0]
    assert ulps_apart(one, below).tolist() == [0.5]
    one, three = np.array([1.0], dtype=np.float32), np.array([1 + 3 * 2.0**-23], dtype=np.float32)
    assert ulps_apart(one, three).tolist() == [3 * 2.0**-23 / 2.0**-23]
    # Next to zero the unit is 2^-25, what a float32 sum of weights loses.
    assert ulps_apart(np.array([0.0], dtype=np.float32), np.array([2.0**-24], dtype=np.float32)).tolist() == [2.0]


def test_a_recipe_names_absolute_models_and_linear_has_no_base(tmp_path: Path) -> None:
    family = Family(base=tmp_path / "base", experts=(tmp_path / "e",), dtype="bfloat16", parameters=1)
    assert family.recipe("ties")["base_model"] == str(tmp_path / "base")
    assert "base_model" not in family.recipe("linear")


def test_tables_are_aligned_markdown() -> None:
    assert table(["", "s"], [("first", 1.5), ("b", 10)]).splitlines() == [
        "|       |   s |",
        "| ----- | --: |",
        "| first | 1.5 |",
        "| b     |  10 |",
    ]
