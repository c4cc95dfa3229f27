"""A remedy is said where following it leaves nothing of the list; tried here by following it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from tests.unit.inputs.catalogues import Shape, checkpoint
from tests.unit.inputs.test_congruence import EMBED, HEAD, compared, refusal
from ties_dist.inputs.remedies import shortest_globs

Tensors = Mapping[str, tuple[str, Shape]]


def gpt2(*, masks: bool) -> Tensors:
    """Names of GPT-2, whose masks some versions store."""
    tensors: dict[str, tuple[str, Shape]] = {"wte.weight": ("F32", (9, 4))}
    for i in range(3):
        tensors[f"h.{i}.attn.c_attn.bias"] = ("F32", (12,))
        tensors[f"h.{i}.attn.c_proj.bias"] = ("F32", (4,))
        tensors[f"h.{i}.mlp.c_fc.bias"] = ("F32", (16,))
        if masks:
            tensors[f"h.{i}.attn.bias"] = ("F32", (1, 1, 8, 8))
            tensors[f"h.{i}.attn.masked_bias"] = ("F32", ())
    return tensors


def excluded(message: str) -> list[str]:
    found = re.search(r"`exclude: \[(.*)\]`", message)
    assert found is not None, message
    return re.findall(r"'([^']*)'", found[1])


@pytest.mark.parametrize("stored_by", ["base", "expert"])
def test_stored_masks_are_excluded_and_no_trained_bias_with_them(stored_by: str) -> None:
    base, expert = (checkpoint(n, gpt2(masks=n == stored_by)) for n in ("base", "expert"))
    globs = excluded(refusal(base, expert))
    assert globs == ["*.attn.bias", "*.masked_bias"]
    merge_set = compared(base, expert, exclude=globs)
    assert {t.name for t in merge_set.tensors if t.action == "merge"} == gpt2(masks=False).keys()


def test_a_layers_own_attention_bias_is_no_mask() -> None:
    tensors: Tensors = {"layers.0.attn.bias": ("F32", (4,)), "layers.0.attn.weight": ("F32", (4, 4))}
    message = refusal(checkpoint("b", tensors), checkpoint("x", {k: v for k, v in tensors.items() if "weight" in k}))
    assert "exclude" not in message.replace("No option", "")


def test_a_part_that_one_model_has_beside_its_layers_may_be_left_out() -> None:
    tensors: Tensors = {f"layers.{i}.weight": ("F32", (4, 4)) for i in range(6)}
    base, expert = checkpoint("b", tensors), checkpoint("x", {**tensors, "score.weight": ("F32", (2, 4))})
    globs = excluded(refusal(base, expert))
    assert globs == ["score.weight"]
    assert all(t.action == "merge" for t in compared(base, expert, exclude=globs).tensors)


SQUARE: tuple[str, Shape] = ("F32", (4, 4))
BODY: Tensors = {"a": SQUARE, EMBED: ("F32", (9, 4))}


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ({f"layers.{i}.weight": SQUARE for i in range(2)}, {f"layers.{i}.weight": SQUARE for i in range(3)}),
        ({"a": SQUARE, "b": ("F32", (4,))}, {"a": ("F32", (8, 8)), "b": ("F32", (8,))}),
        (BODY, {**BODY, HEAD: ("F32", (9, 4))}),
        ({"bert.a": SQUARE, "bert.b": SQUARE}, {"a": SQUARE, "b": SQUARE}),
    ],
    ids=["deeper", "another model", "untied head", "prefix"],
)
def test_nothing_is_excluded_that_hides_what_is_wrong(base: Tensors, expert: Tensors) -> None:
    message = refusal(checkpoint("b", base), checkpoint("x", expert))
    assert "exclude:" not in message
    assert "Name the base that each was tuned from." in message


def test_empty_tensors_are_known_for_what_they_are() -> None:
    base: Tensors = {EMBED: ("F32", (9, 4)), "norm": ("F32", (4,))}
    message = refusal(checkpoint("b", base), checkpoint("x", {name: ("F32", (0,)) for name in base}))
    assert "ZeRO-3" in message and "zero_to_fp32.py" in message
    assert "vocab" not in message and "exclude" not in message


def test_a_remedy_of_a_part_of_the_list_alone_is_not_said() -> None:
    base: Tensors = {EMBED: ("F32", (9, 4)), "layers.0.a": ("F32", (4,))}
    expert: Tensors = {EMBED: ("F32", (11, 4)), "layers.0.a": ("F32", (5,))}
    assert "vocab" not in refusal(checkpoint("b", base), checkpoint("x", expert))


@pytest.mark.parametrize(
    ("wanted", "others", "globs"),
    [
        (["m.0.attn.bias", "m.1.attn.bias"], ["m.0.mlp.bias", "m.0.c_attn.bias"], ["*.attn.bias"]),
        (["m.0.rotary.inv_freq"], ["m.0.weight"], ["*.inv_freq"]),
        (["score"], ["m.score"], ["score"]),
        (["a[0].bias"], ["a0.bias"], ["a[[]0].bias"]),
    ],
)
def test_the_shortest_glob_matches_what_is_wanted_alone(wanted: list[str], others: list[str], globs: list[str]) -> None:
    assert shortest_globs(wanted, [*wanted, *others]) == globs


def test_more_globs_than_a_person_would_write_are_none() -> None:
    wanted = [f"part{i}" for i in range(5)]
    assert shortest_globs(wanted, [*wanted, "other"]) is None
