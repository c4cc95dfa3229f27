"""DARE: random numbers that follow from their place, against a second implementation in Python integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

import ties_dist
from tests.conftest import Checkpoints, random_models
from ties_dist.methods.random import keys, uniform


def drawn(seed: int, expert: int, tensor: str, element: int) -> int:
    """As the docstrings of `methods.random` and `Method.is_random` say, with whole numbers of any size."""
    place = xxhash.xxh32_intdigest(tensor.encode())
    key = xxhash.xxh32_intdigest(f"{seed}/{expert}/{place}".encode())

    def mixed(word: int) -> int:
        for multiplier, shift in ((0x7FEB352D, 16), (0x2C1B3C6D, 15), (0x297A2D39, 14)):
            word = (word ^ (word >> shift)) * multiplier % 2**32
        return word ^ (word >> 16)

    return mixed(mixed((element % 2**32) ^ key) ^ ((element >> 32) + key)) >> 8


@pytest.mark.parametrize("position", [0, 1, 12345, 2**32 - 3, 2**40 + 7])
def test_every_number_follows_from_its_place(position: int) -> None:
    found = keys(7, xxhash.xxh32_intdigest(b"layer.weight"), 3)
    for expert in range(3):
        high, low = (torch.tensor(found[name][expert]) for name in ("key_high", "key_low"))
        numbers = uniform(torch.zeros(6), torch.tensor(position), high, low)
        assert numbers.tolist() == [drawn(7, expert, "layer.weight", position + i) for i in range(6)]


def test_the_numbers_are_uniform_and_independent() -> None:
    n = 1 << 18
    found = keys(0, 99, 2)
    draws = [
        uniform(torch.zeros(n), torch.tensor(0), *(torch.tensor(found[k][e]) for k in ("key_high", "key_low"))).numpy()
        for e in range(2)
    ]
    for each in draws:
        counts = np.histogram(each, bins=256, range=(0, 1 << 24))[0]
        # Chi-squared of 255 degrees: mean 255, deviation 22.6.
        assert abs(((counts - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * 22.6
        assert abs(np.corrcoef(each[:-1], each[1:])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(*draws)[0, 1]) < 5 / np.sqrt(n)


def test_entries_are_dropped_and_the_rest_rescaled_by_hand(merge_job: Checkpoints, tmp_path: Path) -> None:
    base = {"w": torch.zeros(8)}
    experts = [{"w": torch.arange(1.0, 9.0)}, {"w": torch.full((8,), 16.0)}]
    recipe = merge_job([base, *experts], method="dare_linear", parameters={"density": 0.5, "seed": 3, "lambda": 0.5})
    ties_dist.merge(recipe, tmp_path / "out")
    kept = [[drawn(3, e, "w", i) < 1 << 23 for i in range(8)] for e in range(2)]
    expected = [0.5 * (2 * (i + 1) * kept[0][i] + 32 * kept[1][i]) for i in range(8)]
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == expected
    assert 0 < sum(map(sum, kept)) < 16


def test_signs_are_elected_among_what_is_left_by_hand(merge_job: Checkpoints, tmp_path: Path) -> None:
    base = {"w": torch.zeros(6)}
    experts = [{"w": torch.full((6,), 4.0)}, {"w": torch.full((6,), -6.0)}, {"w": torch.full((6,), 3.0)}]
    recipe = merge_job([base, *experts], method="dare_ties", parameters={"density": 0.5, "rescale": False})
    ties_dist.merge(recipe, tmp_path / "out")
    expected = []
    for i in range(6):
        values = [v for e, v in enumerate((4.0, -6.0, 3.0)) if drawn(0, e, "w", i) < 1 << 23]
        sign = -1 if sum(values) < 0 else 1
        expected.append(float(sum(v for v in values if v * sign > 0)))
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == expected
    assert len(set(expected)) > 1


def test_what_is_left_has_the_norm_of_the_delta_by_hand(merge_job: Checkpoints, tmp_path: Path) -> None:
    base, expert = {"w": torch.zeros(8)}, {"w": torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0])}
    options = {"rescale_by": "l1"}
    recipe = merge_job([base, expert], method="dare_linear", parameters={"density": 0.5, "seed": 3}, options=options)
    ties_dist.merge(recipe, tmp_path / "out")
    kept = [v if drawn(3, 0, "w", i) < 1 << 23 else 0.0 for i, v in enumerate(expert["w"].tolist())]
    scale = np.float32(36 / sum(map(abs, kept)))
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [
        float(np.float32(v) * scale) for v in kept
    ]
    assert scale != 2 and 0 < sum(v == 0 for v in kept) < 8


def test_what_has_no_norm_is_left_as_it_is(merge_job: Checkpoints, tmp_path: Path) -> None:
    """Nothing moved; all of what moved dropped; less than 1e-7."""
    base = {"equal": torch.ones(9), "tiny": torch.zeros(9), "gone": torch.ones(1)}
    expert = {"equal": torch.ones(9), "tiny": torch.full((9,), 1e-9), "gone": torch.full((1,), 2.0)}
    options, parameters = {"rescale_by": "l1"}, {"density": 0.5, "seed": 1}
    recipe = merge_job([base, expert], method="dare_linear", parameters=parameters, options=options)
    ties_dist.merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["equal"].tolist() == base["equal"].tolist()
    assert set(found["tiny"].tolist()) == {0.0, float(np.float32(1e-9))}
    assert drawn(1, 0, "gone", 0) >= 1 << 23 and found["gone"].tolist() == [1.0]


@pytest.mark.parametrize("by", ["density", "l1"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_bytes_do_not_depend_on_units_threads_or_kernel(
    method: str, by: str, merge_job: Checkpoints, tmp_path: Path
) -> None:
    models = random_models({"a": (1100, 700), "b": (3,), "c": (300, 999)}, experts=3, dtype=torch.bfloat16)
    options = {"rescale_by": by}
    recipe = merge_job(models, method=method, parameters={"density": 0.3, "normalize": True}, options=options)
    digests = {
        ties_dist.merge(recipe, tmp_path / str(i), **options).output_digest  # type: ignore[arg-type]
        for i, options in enumerate(
            (
                {"kernel": "compiled"},
                {"kernel": "eager"},
                {"unit_size": 1 << 20, "threads": 1},
                {"unit_size": 1 << 20, "threads": 4},
            )
        )
    }
    assert len(digests) == 1


def test_another_seed_is_another_merge_and_density_one_is_task_arithmetic(
    merge_job: Checkpoints, tmp_path: Path
) -> None:
    models = random_models({"a": (50, 70)}, experts=2)

    def merged(name: str, method: str, **parameters: float) -> ties_dist.MergeReport:
        recipe = merge_job(models, method=method, parameters={**parameters}, folder=tmp_path / name)
        return ties_dist.merge(recipe, tmp_path / name / "out")

    half = [merged(f"seed-{s}", "dare_linear", density=0.5, seed=s) for s in (0, 1)]
    assert half[0].output_digest != half[1].output_digest
    assert half[0].fingerprint != half[1].fingerprint
    whole = merged("whole", "dare_linear", density=1.0)
    assert whole.output_digest == merged("plain", "task_arithmetic").output_digest


def test_about_the_share_that_was_asked_for_is_kept(merge_job: Checkpoints, tmp_path: Path) -> None:
    base, expert = {"w": torch.zeros(1 << 16)}, {"w": torch.ones(1 << 16)}
    recipe = merge_job([base, expert], method="dare_linear", parameters={"density": 0.2})
    ties_dist.merge(recipe, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert set(found.tolist()) == {0.0, 5.0}
    assert abs(float((found != 0).float().mean()) - 0.2) < 5 * np.sqrt(0.16 / (1 << 16))
