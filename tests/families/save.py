"""Saves tiny random models of many families with the transformers that is installed; nothing else of ours is imported.

    python tests/families/save.py FOLDER [FAMILY ...]       # FOLDER/FAMILY/{config.json,model.safetensors}

Run with transformers 4.57 and with 5: names of tensors, what is stored once and what config.json says differ.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LLAMA = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
BERT = {
    "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16, "type_vocab_size": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {
    "vocab_size": 40,
    "n_positions": 16,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
    "relative_attention_num_buckets": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "llama-untied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", {**LLAMA, "head_dim": 4, "sliding_window": 8}),
    "mistral": ("MistralForCausalLM", LLAMA),
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "phi": ("PhiForCausalLM", {**LLAMA, "num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 40, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 16,
         "attention_types": [[["global", "local"], 1]], "window_size": 4, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 2}),
    "openai-gpt": ("OpenAIGPTLMHeadModel", {k: v for k, v in GPT.items() if not k.endswith("_id")}),
    "opt": (
        "OPTForCausalLM",
        {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "ffn_dim": 12, "num_attention_heads": 2,
         "max_position_embeddings": 16, "word_embed_proj_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 40, "hidden_size": 8, "n_layer": 1, "n_head": 2}),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "mamba": (
        "MambaForCausalLM",
        {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2},
    ),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "mbart": ("MBartForConditionalGeneration", SEQ2SEQ),
    "pegasus": ("PegasusForConditionalGeneration", SEQ2SEQ),
    "marian": ("MarianMTModel", {**SEQ2SEQ, "decoder_vocab_size": 40}),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5-v1.1": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8, "suppress_tokens": None,
         "begin_suppress_tokens": None},
    ),
    "bert": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForMaskedLM", BERT),
    "albert": ("AlbertForMaskedLM", {**BERT, "embedding_size": 8}),
    "electra": ("ElectraForMaskedLM", {**BERT, "embedding_size": 8}),
    "deberta-v2": ("DebertaV2ForMaskedLM", BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": 40, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 16},
    ),
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": 40, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 12}),
    "bert-classifier": ("BertForSequenceClassification", {**BERT, "num_labels": 3}),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "image_size": 8,
         "patch_size": 4, "num_labels": 3},
    ),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3},
    ),
}  # fmt: skip


def make(family: str, seed: int = 0) -> Any:
    """A model of random numbers in every parameter, biases and norms included, and in the buffers that are stored."""
    import torch
    import transformers

    class_name, values = FAMILIES[family]
    cls = getattr(transformers, class_name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**values))
    draw = torch.Generator().manual_seed(seed)
    stored = model.state_dict()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and name in stored:
                tensor += 0.05 * torch.randn(tensor.shape, generator=draw)
    return model


def main(folder: str, *families: str) -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for family in families or FAMILIES:
        make(family).save_pretrained(Path(folder) / family)


if __name__ == "__main__":
    main(*sys.argv[1:])
