"""Two configs of one model, however it was saved, say the same; two that mean other functions do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ties_dist.inputs.compatibility import Difference, differences, shape_differences

Config = Mapping[str, Any]

LLAMA_4: Config = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16", "transformers_version": "4.57.6",
}  # fmt: skip
LLAMA_5: Config = {
    **{k: v for k, v in LLAMA_4.items() if not k.startswith("rope_") and k != "torch_dtype"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "head_dim": 8, "dtype": "bfloat16",
    "transformers_version": "5.23.0", "mlp_bias": False,
}  # fmt: skip
GEMMA3_4: Config = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "num_attention_heads": 4,
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
}  # fmt: skip
GEMMA3_5: Config = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
}


def graded(base: Config, expert: Config) -> dict[str, str]:
    found = {each.word: each.grade for each in differences(base, expert)}
    assert found == {each.word: each.grade for each in differences(expert, base)}, "whichever is the base"
    return found


@pytest.mark.parametrize(("one", "other"), [(LLAMA_4, LLAMA_5), (GEMMA3_4, GEMMA3_5)])
def test_spellings_of_transformers_4_and_5_are_one(one: Config, other: Config) -> None:
    assert graded(one, other) == {}


@pytest.mark.parametrize("form", [LLAMA_4, LLAMA_5])
@pytest.mark.parametrize(
    ("key", "value", "grade"),
    [
        ("num_attention_heads", 16, "refused"),
        ("num_key_value_heads", 8, "refused"),
        ("hidden_act", "gelu", "refused"),
        ("rms_norm_eps", 1e-6, "refused"),
        ("rms_norm_eps", 2e-5, "warned"),
        ("rms_norm_eps", 0.0, "refused"),
        ("max_position_embeddings", 4096, "warned"),
        ("num_attention_heads", None, None),
        ("sliding_window", 512, None),
        ("attention_dropout", 0.1, None),
        ("hidden_act", "swish", None),
    ],
)
def test_each_difference_has_its_grade(form: Config, key: str, value: object, grade: str | None) -> None:
    found = graded(LLAMA_4, {**form, key: value})
    assert list(found.values()) == ([grade] if grade else [])


@pytest.mark.parametrize(
    ("parameters", "grades"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": "warned"}),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, {"rope_scaling": "warned"}),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"partial_rotary_factor": "refused"},
        ),
    ],
)
def test_rope_in_the_new_spelling_is_compared_with_the_old_one(parameters: Config, grades: dict[str, str]) -> None:
    assert graded({**LLAMA_4, "partial_rotary_factor": 1.0}, {**LLAMA_5, "rope_parameters": parameters}) == grades


@pytest.mark.parametrize("old", ["type", "rope_type"])
def test_an_old_scaling_is_that_of_the_new_spelling(old: str) -> None:
    one = {**LLAMA_4, "rope_scaling": {old: "yarn", "factor": 4.0, "mscale": None}}
    other = {**LLAMA_5, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}
    assert graded(one, other) == {}
    other["rope_parameters"]["factor"] = 8.0
    assert graded(one, other) == {"rope_scaling": "warned"}


@pytest.mark.parametrize(
    ("base", "expert", "word"),
    [
        ({"n_head": 12}, {"num_attention_heads": 16}, "num_attention_heads"),
        ({"rotary_pct": 0.25}, {"partial_rotary_factor": 1.0}, "partial_rotary_factor"),
        ({"alibi": True}, {"alibi": False}, "alibi"),
        ({"use_parallel_residual": True}, {"use_parallel_residual": False}, "use_parallel_residual"),
        ({"final_logit_softcapping": 30.0}, {"final_logit_softcapping": 50.0}, "final_logit_softcapping"),
        ({"query_pre_attn_scalar": 256}, {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
        ({"residual_multiplier": 0.2}, {"residual_multiplier": 0.5}, "residual_multiplier"),
        ({"num_experts_per_tok": 2}, {"moe_top_k": 4}, "num_experts_per_tok"),
        ({"norm_topk_prob": True}, {"norm_topk_prob": False}, "norm_topk_prob"),
        ({"feed_forward_proj": "relu"}, {"feed_forward_proj": "gated-gelu"}, "hidden_act"),
        ({"alibi": True, "position_embedding_type": "a"}, {"position_embedding_type": "b"}, "position_embedding_type"),
        ({"rope_interleave": True}, {"rope_interleave": False}, "rope_interleave"),
        ({"position_buckets": 128}, {"position_buckets": 64}, "position_buckets"),
        ({"x_config": {"hidden_act": "relu"}}, {"x_config": {"hidden_act": "gelu"}}, "x_config.hidden_act"),
        ({"model_type": "llama"}, {"model_type": "gemma"}, "model_type"),
        ({"text_config": {"num_attention_heads": 8}}, {"num_attention_heads": 4}, "num_attention_heads"),
    ],
)  # fmt: skip
def test_what_makes_another_function_of_the_same_shapes_is_refused(base: Config, expert: Config, word: str) -> None:
    assert graded(base, expert) == {word: "refused"}


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ({"model_type": "llama"}, {"model_type": "mistral"}),
        ({"model_type": "roberta"}, {"model_type": "xlm-roberta"}),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, {"model_type": "gemma3_text"}),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, {"model_type": "llama"}),
        ({"model_type": "gemma", "hidden_act": "gelu"}, {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh"}),
        ({"use_sliding_window": False, "sliding_window": 9}, {"use_sliding_window": False, "sliding_window": 4}),
        ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"id2label": {"0": "a"}, "_name_or_path": "x"}, {"id2label": {"0": "b"}, "_name_or_path": "y"}),
        ({}, {"model_type": "llama", "num_attention_heads": 3}),
    ],
)  # fmt: skip
def test_known_equivalents_parts_and_keys_without_effect_are_no_difference(base: Config, expert: Config) -> None:
    assert graded(base, expert) == {}


def test_the_keys_that_shapes_follow_from_are_said_most_telling_first() -> None:
    base = {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100, "rope_theta": 1.0}
    expert = {"n_embd": 32, "n_layer": 4, "vocab_size": 120, "rope_theta": 2.0}
    assert shape_differences(base, expert) == ["hidden_size 32 (the base's: 64)", "vocab_size 120 (the base's: 100)"]
    assert shape_differences(None, expert) == []


@pytest.mark.parametrize("odd", [[], "x", 3, {"rope_theta": []}, {"a": {"rope_theta": 1.0}}, {"a": 3}])
def test_values_of_any_shape_are_compared(odd: object) -> None:
    for key in ("rope_parameters", "rope_scaling", "text_config", "num_attention_heads", "layer_types", "model_type"):
        found = differences({**LLAMA_4, key: odd}, LLAMA_5)
        assert all(isinstance(each, Difference) for each in found)
