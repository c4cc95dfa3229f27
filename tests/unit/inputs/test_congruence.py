"""Base against experts: the mergeable set, and every way in which they do not fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pytest

from tests.unit.inputs.catalogues import Shape, checkpoint
from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.errors import CheckpointError
from ties_dist.inputs.congruence import EqualCheck, Explanation, MergeSet, OutputTensor, compare


def compared(base: Checkpoint, *experts: Checkpoint, exclude: Sequence[str] = (), **options: str) -> MergeSet:
    given = {"non_float": "equal", "operand": "delta", **options}
    return compare(base, experts, exclude=exclude, **given)


def refusal(base: Checkpoint, *experts: Checkpoint, exclude: Sequence[str] = (), **options: str) -> str:
    with pytest.raises(CheckpointError, match=r" do not (match|fit) the (base|first model)") as error:
        compared(base, *experts, exclude=exclude, **options)
    return str(error.value)


def actions(merge_set: MergeSet) -> dict[str, str]:
    return {tensor.name: tensor.action for tensor in merge_set.tensors}


PLAIN = {"b": ("BF16", (2, 3)), "a": ("F32", (4,)), "empty": ("F16", (0,)), "scalar": ("F32", ())}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"tie_word_embeddings": True}


# -- the mergeable set ------------------------------------------------------------------------------------------------


def test_tensors_are_sorted_and_counted() -> None:
    merge_set = compared(checkpoint("base", PLAIN), checkpoint("math", PLAIN))
    assert merge_set.tensors == (
        OutputTensor(name="a", dtype="F32", shape=(4,), action="merge", source="a", counted=True),
        OutputTensor(name="b", dtype="BF16", shape=(2, 3), action="merge", source="b", counted=True),
        OutputTensor(name="empty", dtype="F16", shape=(0,), action="merge", source="empty", counted=True),
        OutputTensor(name="scalar", dtype="F32", shape=(), action="merge", source="scalar", counted=True),
    )
    assert merge_set.elements == 4 + 6 + 0 + 1
    assert (merge_set.notes, merge_set.equal) == ((), ())


def test_float_dtypes_may_differ_and_are_said_with_counts() -> None:
    expert = checkpoint("math", {**PLAIN, "a": ("BF16", (4,)), "scalar": ("BF16", ()), "b": ("F16", (2, 3))})
    merge_set = compared(checkpoint("base", PLAIN), expert)
    assert [tensor.dtype for tensor in merge_set.tensors] == ["F32", "BF16", "F16", "F32"]
    assert sorted(merge_set.notes) == [
        "expert 'math': 1 tensor stored as F16, base BF16",
        "expert 'math': 2 tensors stored as BF16, base F32",
    ]


@pytest.mark.parametrize("tensors", [{}, {"a": ("F32", (0, 3))}, {"a": ("I64", (2,))}])
def test_nothing_to_merge_is_said_not_refused(tensors: dict[str, tuple[str, Shape]]) -> None:
    merge_set = compared(checkpoint("base", tensors), checkpoint("math", tensors))
    assert merge_set.elements == 0
    assert merge_set.notes == ("nothing to merge (d = 0): the output is a copy of the base",)


def test_no_experts_merge_nothing_away() -> None:
    assert compared(checkpoint("base", PLAIN)).elements == 11


def test_an_expert_that_is_the_first_model_itself_is_not_compared_with_itself() -> None:
    first = checkpoint("first", {"a": ("F32", (1,)), "n": ("I64", (1,))})
    merge_set = compared(first, first, checkpoint("second", first_tensors := {"a": ("F32", (1,)), "n": ("I64", (1,))}))
    assert len(first_tensors) == len(merge_set.tensors)
    assert [check.expert for check in merge_set.equal] == [2]


# -- mismatches -------------------------------------------------------------------------------------------------------


def test_shape_mismatches_are_listed_as_in_the_style_page() -> None:
    rest = {f"w{i}": ("BF16", (1,)) for i in range(721)}
    base = checkpoint("b", {**rest, EMBED: ("BF16", (32000, 4096)), HEAD: ("BF16", (32000, 4096))})
    expert = checkpoint("math", {**rest, EMBED: ("BF16", (32016, 4096)), HEAD: ("BF16", (32016, 4096))})
    assert refusal(base, expert) == (
        "2 of 723 tensors do not match the base:\n"
        "  lm_head.weight:            expert 'math' has shape (32016, 4096), base (32000, 4096)\n"
        "  model.embed_tokens.weight: expert 'math' has shape (32016, 4096), base (32000, 4096)\n"
        "`vocab: base` merges the rows that both have; rows of tokens that only one has stay the base's."
    )


def test_every_mismatch_of_every_expert_is_in_one_error() -> None:
    base = checkpoint(
        "b", {"a": ("F32", (1,)), "b": ("F32", (2,)), "c": ("F32", (3,)), "d": ("I64", (1,)), "e": ("F32", (1,))}
    )
    one = checkpoint("one", {"a": ("F32", (2,)), "c": ("I32", (3,)), "d": ("F32", (1,)), "e": ("F64", (1,))})
    two = checkpoint(
        "two", {**{n: (e.dtype, e.shape) for n, e in base.tensors.items()}, "x": ("BF16", (9,)), "b": ("F32", (2, 1))}
    )
    assert refusal(base, one, two, exclude=["nothing"]) == (
        "6 of 6 tensors do not match the base:\n"
        "  exclude: 'nothing' matches no tensor.\n"
        "  a: expert 'one' has shape (2,), base (1,)\n"
        "  b: missing in expert 'one'\n"
        "  b: expert 'two' has shape (2, 1), base (2,)\n"
        "  c: expert 'one' has dtype I32, base F32\n"
        "  d: expert 'one' has dtype F32, base I64\n"
        "  e: expert 'one' has dtype F64, base F32\n"
        "  x: extra in expert 'two', base does not have it\n"
        "No option mends this: these models have other parts than the base. Name the base that each was tuned from. "
        "Patterns of `exclude` are globs over whole names: '*.bias', 'model.layers.0.*'."
    )


def test_long_lists_fold_layer_numbers_so_that_nothing_is_cut_off() -> None:
    names = {f"model.layers.{i}.mlp.bias": ("F32", (1,)) for i in range(50)}
    base = checkpoint("b", {**names, "norm": ("F32", (4,))})
    message = refusal(base, checkpoint("math", {"norm": ("F32", (5,))}))
    assert message == (
        "51 of 51 tensors do not match the base:\n"
        "  model.layers.*.mlp.bias: missing in expert 'math' (50 tensors)\n"
        "  norm:                    expert 'math' has shape (5,), base (4,)\n"
        "No option mends this: these models have other parts than the base. Name the base that each was tuned from."
    )


def test_f64_is_refused_unless_excluded() -> None:
    tensors: dict[str, tuple[str, Shape]] = {"a": ("F64", (1,)), "b": ("F32", (1,))}
    base, expert = checkpoint("b", tensors), checkpoint("math", tensors)
    assert "\n  a: base has dtype F64\n  a: expert 'math' has dtype F64" in refusal(base, expert)
    assert actions(compared(base, expert, exclude=["a"])) == {"a": "copy", "b": "merge"}


def test_buffers_that_models_compute_get_their_own_advice() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    base, expert = checkpoint("b", {"a": ("F32", (1,)), name: ("F32", (64,))}), checkpoint("math", {"a": ("F32", (1,))})
    assert "missing in expert 'math'" in refusal(base, expert)
    assert "`exclude: ['*.inv_freq']` leaves alone a buffer" in refusal(base, expert)
    assert actions(compared(base, expert, exclude=["*.inv_freq"])) == {"a": "merge", name: "copy"}
    reverse = compared(expert, base, exclude=["*.inv_freq"])
    assert actions(reverse) == {"a": "merge"}
    assert reverse.notes == ("expert 'b': 1 tensor excluded that the base does not have",)


def test_weights_are_compared_with_the_first_model_by_name() -> None:
    message = refusal(checkpoint("first", PLAIN), checkpoint("second", {**PLAIN, "a": ("F32", (5,))}), operand="weight")
    assert message.startswith(
        "1 of 4 tensors do not match the first model 'first':\n"
        "  a: model 'second' has shape (5,), first model 'first' (4,)"
    )


# -- exclude ----------------------------------------------------------------------------------------------------------


def test_excluded_tensors_are_copied_whatever_the_experts_have() -> None:
    base = checkpoint("b", {"l.0.w": ("F32", (1,)), "l.1.w": ("F32", (1,)), "L.0.w": ("F32", (1,)), "n": ("I64", (1,))})
    expert = checkpoint(
        "math", {"l.0.w": ("I8", (7,)), "L.0.w": ("F32", (1,)), "n": ("I32", (2,)), "l.9.w": ("F64", (1,))}
    )
    merge_set = compared(base, expert, exclude=["l.*.w", "?"])
    assert actions(merge_set) == {"L.0.w": "merge", "l.0.w": "copy", "l.1.w": "copy", "n": "copy"}
    assert merge_set.elements == 1
    assert merge_set.equal == ()
    assert merge_set.notes == (
        "exclude: 3 tensors copied from the base",
        "expert 'math': 1 tensor excluded that the base does not have",
    )


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("lm_haed.weight", "nearest: lm_head.weight"),
        ("model.layers.*.self_atn.q_proj.weight", "nearest: model.layers.*.self_attn.q_proj.weight"),
        (r"model\.layers\.\d+\.self_attn\.q_proj\.weight", "nearest: model.layers.*.self_attn.q_proj.weight"),
        ("model.layers.99.self_attn.q_proj.weight", "nearest: model.layers.*.self_attn.q_proj.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_that_names_the_nearest(pattern: str, nearest: str) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(30)]
    base = checkpoint("b", {name: ("F32", (1,)) for name in [*names, HEAD, "model.norm.weight"]})
    message = refusal(base, base, exclude=["*.norm.weight", pattern])
    assert message.startswith(f"the models do not fit the base:\n  exclude: '{pattern}' matches no tensor; {nearest}")
    assert message.endswith("globs over whole names: '*.bias', 'model.layers.0.*'.")


# -- tensors that are not floating point ------------------------------------------------------------------------------


def test_non_float_tensors_are_the_bases_and_checked_for_equality() -> None:
    tensors: dict[str, tuple[str, Shape]] = {
        "a": ("F32", (1,)),
        "ids": ("I64", (1, 512)),
        "mask": ("BOOL", (2,)),
        "z": ("C64", (1,)),
    }
    base, one, two = checkpoint("b", tensors), checkpoint("one", tensors), checkpoint("two", {"a": ("F32", (1,))})
    merge_set = compared(base, one, two)
    assert actions(merge_set) == {"a": "merge", "ids": "copy", "mask": "copy", "z": "copy"}
    assert merge_set.elements == 1
    assert [check.base.name for check in merge_set.equal] == ["ids", "mask", "z"]
    assert merge_set.equal[0] == EqualCheck(
        base=base.parameters["ids"],
        expert=1,
        other=one.parameters["ids"],
        message="ids (I64 (1, 512), not merged): expert 'one' differs from the base. "
        "`non_float: base` takes the base's all the same.",
    )
    assert merge_set.notes == ("expert 'two': 3 tensors absent, not floating point; the base's stay",)


def test_non_float_tensors_of_another_shape_are_refused_unless_the_base_is_taken() -> None:
    base = checkpoint("b", {"ids": ("I64", (1, 512)), "n": ("I64", (1,))})
    expert = checkpoint("math", {"ids": ("I64", (1, 1024)), "n": ("I32", (1,))})
    message = refusal(base, expert)
    assert (
        "\n  ids: expert 'math' has I64 (1, 1024), base I64 (1, 512)\n  n:   expert 'math' has I32 (1,), base"
        in message
    )
    assert "\nKeep the base's with `non_float: base`." in message
    merge_set = compared(base, expert, non_float="base")
    assert (actions(merge_set), merge_set.equal) == ({"ids": "copy", "n": "copy"}, ())


def test_float_against_non_float_is_refused_even_where_the_base_is_taken() -> None:
    base, expert = checkpoint("b", {"n": ("I64", (1,))}), checkpoint("math", {"n": ("F32", (1,))})
    assert "n: expert 'math' has dtype F32, base I64" in refusal(base, expert, non_float="base")


def test_an_extra_non_float_tensor_is_dropped_and_said() -> None:
    merge_set = compared(
        checkpoint("b", {"a": ("F32", (1,))}), checkpoint("math", {"a": ("F32", (1,)), "n": ("I64", ())})
    )
    assert merge_set.notes == ("expert 'math': 1 tensor dropped, not floating point and not in the base",)


# -- quantised weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [None, "text_config"])
def test_a_quantization_config_that_is_left_over_is_said(nested: str | None) -> None:
    config: dict[str, object] = {"quantization_config": {"quant_method": "gptq"}}
    expert = checkpoint("math", PLAIN, config={nested: config} if nested else config)
    merge_set = compared(checkpoint("b", PLAIN), expert)
    assert merge_set.elements == 11
    assert merge_set.notes == (
        "expert 'math': config.json has a quantization_config (gptq), and its weights are plain",
    )


def test_a_quantised_model_is_one_line_and_its_codes_and_scales_are_none() -> None:
    layers = [f"layers.{i}.q" for i in range(28)]
    base = checkpoint("b", {f"{layer}.weight": ("BF16", (8, 8)) for layer in layers})
    codes = {f"{layer}.qweight": ("I32", (1, 8)) for layer in layers}
    scales = {f"{layer}.scales": ("F16", (1, 8)) for layer in layers}
    expert = checkpoint("math", {**codes, **scales}, {"quantization_config": {"quant_method": "gptq"}})
    assert refusal(base, expert) == (
        "the models do not fit the base:\n"
        "  expert 'math': 28 tensors quantised as I32 (layers.0.q.qweight), by gptq.\n"
        "Quantised weights are not read yet: name the model that they were made from."
    )
    assert "\n  base: 28 tensors quantised as I32 (layers.0.q.qweight), by gptq.\nQuant" in refusal(expert, base)
    # Following it leads on.
    assert compared(base, checkpoint("math", {f"{layer}.weight": ("F16", (8, 8)) for layer in layers})).elements == 1792


def test_an_empty_quantization_config_means_nothing() -> None:
    assert compared(checkpoint("b", PLAIN, {"quantization_config": None}), checkpoint("x", PLAIN)).elements == 11


@pytest.mark.parametrize(
    "dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"]
)
def test_small_float_dtypes_are_refused_by_name(dtype: str) -> None:
    quantised = checkpoint("q", {"a": (dtype, (8,)), "b": (dtype, (8,)), "c": ("F32", (1,))})
    plain = checkpoint("p", {"a": ("BF16", (8,)), "b": ("BF16", (8,)), "c": ("F32", (1,))})
    assert f"\n  base: 2 tensors quantised as {dtype} (a)." in refusal(quantised, plain)
    assert f"\n  expert 'q': 2 tensors quantised as {dtype} (a)." in refusal(plain, quantised)
    assert "Quantised weights are not read yet" in refusal(quantised, quantised)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("m.qweight", "I32", (4, 4)),
        ("m.qzeros", "I32", (1, 4)),
        ("m.weight_packed", "I32", (4, 4)),
        ("m.weight", "U8", (8, 1)),
        ("m.weight", "I8", (4, 4)),
        ("m.experts.gate_up_proj_blocks", "U8", (2, 2, 2, 2)),
    ],
)
def test_integers_that_hold_packed_weights_are_refused(name: str, dtype: str, shape: Shape) -> None:
    packed = checkpoint("q", {name: (dtype, shape), "c": ("F32", (1,))})
    assert f"base: 1 tensor quantised as {dtype} ({name})." in refusal(packed, packed)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"), [("num_blocks", "I32", ()), ("ids", "I64", (1, 4)), ("weight", "BOOL", (2, 2))]
)
def test_counters_ids_and_masks_are_not_taken_for_packed_weights(name: str, dtype: str, shape: Shape) -> None:
    model = checkpoint("m", {name: (dtype, shape), "c": ("F32", (1,))})
    assert actions(compared(model, checkpoint("x", {"c": ("F32", (1,))})))[name] == "copy"


def test_quantised_weights_may_be_excluded_together_with_their_scales() -> None:
    model = checkpoint(
        "m", {"l.weight": ("F8_E4M3", (8, 8)), "l.weight_scale_inv": ("F32", (1, 1)), "n.scale": ("F32", (1,))}
    )
    other = checkpoint(
        "x", {"l.weight": ("F8_E4M3", (8, 8)), "l.weight_scale_inv": ("F32", (1, 1)), "n.scale": ("F32", (1,))}
    )
    assert "l.weight_scale_inv: scales quantised weights that are excluded" in refusal(
        model, other, exclude=["l.weight"]
    )
    assert actions(compared(model, other, exclude=["l.*"])) == {
        "l.weight": "copy",
        "l.weight_scale_inv": "copy",
        "n.scale": "merge",
    }


def test_dtypes_of_less_than_a_byte_cannot_even_be_copied() -> None:
    model = checkpoint("m", {"a": ("F4", (8,)), "b": ("F32", (1,))})
    assert "base: 1 tensor quantised as F4 (a)" in refusal(model, checkpoint("x", {"b": ("F32", (1,))}), exclude=["a"])


# -- vocabulary -------------------------------------------------------------------------------------------------------


def vocabulary(name: str, rows: int, extra: Mapping[str, tuple[str, Shape]] | None = None) -> Checkpoint:
    return checkpoint(
        name, {EMBED: ("F32", (rows, 4)), HEAD: ("F32", (rows, 4)), "lm_head.bias": ("F32", (rows,)), **(extra or {})}
    )


def test_columns_of_another_number_are_no_matter_of_rows() -> None:
    base, expert = checkpoint("b", {EMBED: ("F32", (10, 4))}), checkpoint("math", {EMBED: ("F32", (12, 5))})
    message = refusal(base, expert)
    assert f"{EMBED}: expert 'math' has shape (12, 5), base (10, 4)" in message
    assert "vocab" not in message


def test_weights_of_fewer_rows_are_not_to_be_had_from_the_first_model() -> None:
    one, two = vocabulary("one", 10), vocabulary("two", 9)
    assert "`vocab: base` drops the rows that the base does not have." in refusal(two, one, operand="weight")
    assert "`vocab" not in refusal(one, two, operand="weight")


def test_what_explains_other_shapes_comes_first() -> None:
    base, expert = checkpoint("b", {"a": ("F32", (4, 4))}), checkpoint("math", {"a": ("F32", (8, 8))})
    why = Explanation(lines=["expert 'math': config.json has hidden_size 8 (the base's: 4)"])
    with pytest.raises(
        CheckpointError, match=r"do not match the base:\n  expert 'math': config.json has hidden_size 8"
    ):
        compare(base, [expert], exclude=(), non_float="error", operand="delta", explain=lambda: why)


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_twenty_thousand_tensors_and_four_experts_are_compared_in_a_moment() -> None:
    tensors: dict[str, tuple[str, Shape]] = {
        f"model.layers.{i}.experts.{j}.weight": ("BF16", (2,)) for i in range(200) for j in range(100)
    }
    models = [checkpoint(f"m{i}", {**tensors, f"extra{i}": ("I64", (1,))}) for i in range(5)]
    start = time.process_time()
    merge_set = compared(*models, exclude=["model.layers.0.*", "*.experts.1.*"])
    assert len(merge_set.tensors) == 20_001
    assert time.process_time() - start < 2.0  # 0.2 s on a quiet machine; quadratic would be minutes


@pytest.mark.alone
def test_twenty_thousand_mismatches_are_told_in_a_moment() -> None:
    base = checkpoint("b", {f"model.layers.{i}.w{i % 7}.weight": ("BF16", (2,)) for i in range(20_000)})
    expert = checkpoint("math", {f"model.layers.{i}.v{i % 7}.weight": ("BF16", (2,)) for i in range(20_000)})
    start = time.process_time()
    message = refusal(base, expert, exclude=["model.layer.*.w", "nothing"])
    assert message.startswith("40000 of 40000 tensors do not match the base:")
    assert time.process_time() - start < 4.0
