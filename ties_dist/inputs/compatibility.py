"""Do configs say that tensors of equal names and shapes mean the same?

transformers 4 and 5 spell one thing in several ways, families have names of their own, and what a config leaves out it
leaves to a default that only transformers knows: so keys are compared by one name each, and only where both configs say
something. What would make other functions of the same numbers is refused, what models are commonly fine-tuned with is
said, the rest is for `-v`. The output has the base's config, whatever an expert's says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ties_dist.inputs.configs import TEXT_CONFIGS
from ties_dist.messages import brief

Config = Mapping[str, object]
Grade = Literal["refused", "warned", "noted"]

_SPELLINGS: Final = {
    "num_attention_heads": "n_head n_heads num_heads attention_heads",
    "num_key_value_heads": "num_kv_heads n_head_kv multi_query_group_num n_kv_heads",
    "num_experts_per_tok": "num_experts_per_token experts_per_token moe_top_k moe_topk moe_k num_selected_experts",
    "head_dim": "d_kv attention_head_dim kv_channels",
    "hidden_act": "hidden_activation activation_function activation afn dense_act_fn feed_forward_proj mlp_hidden_act",
    "norm_eps": (
        "rms_norm_eps layer_norm_eps layer_norm_epsilon norm_epsilon layernorm_epsilon layernorm_eps rms_norm_epsilon"
    ),
    "partial_rotary_factor": "rotary_pct rope_pct",
    "rope_theta": "rotary_emb_base rope_base rotary_base global_rope_theta",
    "rope_theta.sliding_attention": "rope_local_base_freq local_rope_theta",
    "max_position_embeddings": "n_positions n_ctx max_sequence_length seq_length max_seq_len max_seq_length",
    "hidden_size": "n_embd d_model n_embed",
    "num_hidden_layers": "n_layer n_layers num_layers",
    "intermediate_size": "n_inner d_ff ffn_dim ffn_hidden_size",
}  # fmt: skip
_CANONICAL: Final = {other: name for name, others in _SPELLINGS.items() for other in others.split()}

_REFUSED: Final = frozenset(
    """
    num_attention_heads num_key_value_heads encoder_attention_heads decoder_attention_heads head_dim v_head_dim
    qk_rope_head_dim qk_nope_head_dim hidden_act is_gated_act partial_rotary_factor rotary_dim rope_interleave
    rotary_emb_interleaved position_embedding_type alibi use_alibi relative_attention relative_attention_max_distance
    relative_attention_num_buckets pos_att_type position_biased_input position_buckets max_relative_positions
    parallel_attn use_parallel_residual new_decoder_architecture do_layer_norm_before normalize_before
    apply_residual_connection_post_layernorm query_pre_attn_scalar logits_scaling logit_scale scale_attn_weights
    scale_attn_by_inverse_layer_idx scale_embedding scale_emb scale_depth dim_model_base softmax_scale attn_scale
    attention_scale clip_qkv use_qk_norm num_experts_per_tok norm_topk_prob scoring_func topk_method
    routed_scaling_factor n_group topk_group no_rope_layers attn_temperature_tuning
    """.split()  # noqa: SIM905
)
_REFUSED_ENDINGS: Final = re.compile(r"_(multipliers?|softcapping)$")
_WARNED: Final = re.compile(
    r"(norm_eps|max_position_embeddings|(use_)?sliding_window(_pattern|_size)?|max_window_layers|layer_types|"
    r"attention_window|local_attention|attention_chunk_size|window_size|(rope_theta|rope_scaling|rope)(\..*)?)"
)
_SHAPES: Final = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size",
    "encoder_layers", "decoder_layers", "type_vocab_size", "max_position_embeddings",
)  # fmt: skip
"""What tensors have their shapes from, the most telling first."""

_IGNORED: Final = re.compile(
    r"_.*|transformers_version|(torch_)?dtype|architectures|auto_map|use_cache|id2label|label2id|.*dropout.*|.*_pdrop|"
    r"initializer_(range|factor)|.*_init(_value|_std|_range)?|task_specific_params|quantization_config|attn_implementation|"
    r"gradient_checkpointing|output_.*|return_dict|pretraining_tp|problem_type|finetuning_task|tie_word_embeddings|"
    r"tie_encoder_decoder|is_(decoder|encoder_decoder)|add_cross_attention|cross_attention_hidden_size|torchscript|"
    r"pruned_heads|use_bfloat16|chunk_size_feed_forward|.*_token_id|router_aux_loss_coef|layerdrop|.*_loss_.*|"
    # of generation, which transformers 4 keeps here, too
    r"(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_[kp]|"
    r"typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|"
    r"num_return_sequences|remove_invalid_values|exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens|"
    r"tokenizer_class|prefix|sep_token_id|tf_legacy_loss"
)
_ALIKE: Final[Mapping[str, str]] = {
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate"), "gelu by tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    "sine": "absolute",
}
"""Names of one function; they differ by rounding. Learned and computed positions differ in what is stored."""
_FAMILIES: Final = (
    {"llama", "mistral"},
    {"roberta", "xlmroberta", "camembert", "data2vectext"},
    {"t5", "mt5"},
    {"deepseekv3", "kimik2"},
    {"bart", "plbart"},
)
"""Model types whose modules compute the same; what a config says beside is compared like any other's."""
_SAME_TO: Final = 1e-6
_FAR: Final = 9.99
"""Two norm epsilons with this ratio are a factor of ten apart, whatever the rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What two configs say of one thing. word: its name, by which it can be allowed."""

    word: str
    base: object
    expert: object
    grade: Grade

    def __str__(self) -> str:
        return f"{self.word} {brief(self.expert)} (the base's: {brief(self.base)})"


def layer_counts(config: Config | None) -> set[int]:
    """How many layers a config says that the model, or a part of it, has."""
    said = (part.get("num_hidden_layers") for part in parts(config or {}).values())
    return {count for count in said if isinstance(count, int)}


def differences(base: Config | None, expert: Config | None) -> list[Difference]:
    """What both configs say, and say differently; sorted by what it is called."""
    if not base or not expert:
        return []
    ours, theirs = parts(base), parts(expert)
    found = [each for part in ours.keys() & theirs.keys() for each in _compared(part, ours[part], theirs[part])]
    if _kinds(base).isdisjoint(_kinds(expert)) and _kinds(base) and _kinds(expert):
        kinds = (base.get("model_type"), expert.get("model_type"))
        found.append(Difference(word="model_type", base=kinds[0], expert=kinds[1], grade="refused"))
    return sorted(found, key=lambda each: each.word)


def shape_differences(base: Config | None, expert: Config | None) -> list[str]:
    """The keys that explain other shapes, most telling first: `hidden_size 2048 (the base's: 4096)`."""
    if not base or not expert:
        return []
    ours, theirs = parts(base).get("", {}), parts(expert).get("", {})
    keys = [key for key in _SHAPES if key in ours and key in theirs and not _same(ours[key], theirs[key])]
    return [str(Difference(word=k, base=ours[k], expert=theirs[k], grade="noted")) for k in keys]


def _compared(part: str, base: Config, expert: Config) -> Iterator[Difference]:
    for key in base.keys() & expert.keys():
        if key != "model_type" and not _same(base[key], expert[key], key):
            word = f"{part}.{key}" if part else key
            yield Difference(word=word, base=base[key], expert=expert[key], grade=_grade(key, base[key], expert[key]))


def _grade(key: str, base: object, expert: object) -> Grade:
    if key == "norm_eps" and isinstance(base, int | float) and isinstance(expert, int | float):
        low, high = sorted((float(base), float(expert)))
        return "refused" if low <= 0 or high / low > _FAR else "warned"
    if key in _REFUSED or _REFUSED_ENDINGS.search(key):
        return "refused"
    return "warned" if _WARNED.fullmatch(key) else "noted"


def _kinds(config: Config) -> set[str]:
    """Model types of a config and of its language model's part; those that compute the same have one name."""
    said = [config, *(part for key in TEXT_CONFIGS if isinstance(part := config.get(key), dict))]
    # transformers itself spells some in two ways: EvollaModel, glm4v_moe_text as Glm4vMoe_text.
    names = {
        re.sub(r"(_text|Model)$|[_-]", "", str(each["model_type"])).lower() for each in said if each.get("model_type")
    }
    return {min(next((family for family in _FAMILIES if name in family), {name})) for name in names}


# -- one spelling -----------------------------------------------------------------------------------------------------


def parts(config: Config) -> dict[str, dict[str, object]]:
    """A config by the parts of the model, each in one spelling; the language model is the part without a name."""
    text: dict[str, object] = {}
    for key in TEXT_CONFIGS:
        if isinstance(part := config.get(key), dict):
            text |= part
    inner = {k: v for k, v in config.items() if isinstance(v, dict) and _is_part(k, v) and k not in TEXT_CONFIGS}
    own = {k: v for k, v in config.items() if k not in inner and k not in TEXT_CONFIGS}
    found = {"": _spelt({**own, **text})}
    for name, part in inner.items():
        found |= {f"{name}.{deeper}".strip("."): values for deeper, values in parts(part).items()}
    return found


def _is_part(key: str, value: Mapping[str, object]) -> bool:
    return "model_type" in value or (key.endswith("_config") and key != "quantization_config")


def _spelt(config: Config) -> dict[str, object]:
    """What a part says, by one name a thing; without what it leaves open, or what has no effect."""
    found: dict[str, object] = {}
    for key in sorted(config, key=lambda key: key not in _SPELLINGS):  # the usual name wins over a family's own
        if config[key] is not None and not _IGNORED.fullmatch(key) and not key.startswith("rope_parameters"):
            found.setdefault(_CANONICAL.get(key, key), config[key])
    found |= dict(_rope(config))
    if config.get("use_sliding_window") is False:
        for key in ("sliding_window", "max_window_layers", "layer_types"):
            found.pop(key, None)
    if config.get("model_type") == "gemma":  # its code overrides what early files say
        found["hidden_act"] = config.get("hidden_activation") or "gelu_pytorch_tanh"
    return found


def _rope(config: Config) -> Iterator[tuple[str, object]]:
    """Base, scaling and rotated share, by kind of layer where kinds differ; of `rope_parameters` or its elders."""
    given = config.get("rope_parameters")
    if isinstance(given, dict) and given and all(isinstance(each, dict) for each in given.values()):
        for kind, values in given.items():
            suffix = "" if kind == "full_attention" else f".{kind}"
            yield from ((f"{name}{suffix}", value) for name, value in _one_rope(values))
    elif isinstance(given, dict):
        yield from _one_rope(given)
    elif isinstance(scaling := config.get("rope_scaling"), dict):
        yield from (pair for pair in _one_rope(scaling) if pair[0] == "rope_scaling")
    elif "rope_theta" in config or "rope_scaling" in config:
        yield "rope_scaling", "default"


def _one_rope(given: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = "default" if kind in ("mrope", "axial") else kind  # sections of positions, not another scale
    for name in ("rope_theta", "partial_rotary_factor"):
        if given.get(name) is not None:
            yield name, given[name]
    apart = ("rope_theta", "partial_rotary_factor", "rope_type", "type", "mrope_section", "mrope_interleaved")
    numbers = {k: v for k, v in sorted(given.items()) if k not in apart and v is not None}
    yield "rope_scaling", {"rope_type": kind, **numbers} if kind != "default" else kind


def _same(base: object, expert: object, key: str = "") -> bool:
    if key == "rope_scaling" and isinstance(base, dict) and isinstance(expert, dict):
        return all(_same(base[k], expert[k]) for k in base.keys() & expert.keys())
    if isinstance(base, bool) or isinstance(expert, bool):
        return base == expert
    if isinstance(base, int | float) and isinstance(expert, int | float):
        return abs(base - expert) <= _SAME_TO * max(abs(base), abs(expert))
    if isinstance(base, str) and isinstance(expert, str):
        return _ALIKE.get(base.lower(), base.lower()) == _ALIKE.get(expert.lower(), expert.lower())
    return base == expert
