"""Names, shapes and shards of published models, and the heads of the files that hold them.

Standard library only: what is measured in a process of its own must not carry torch's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

Shape = tuple[int, ...]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """A decoder of the Llama family, as Hugging Face stores it. experts: of a mixture, 0 for a dense model.

    shard_bytes: the largest shard its publisher wrote, of 16-bit weights.
    """

    architecture: str
    model_type: str
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    normed_heads: bool = False
    shard_bytes: int = 5_000_000_000
    config_extra: Mapping[str, object] | None = None

    @cached_property
    def tensors(self) -> dict[str, Shape]:
        """name -> shape, in the order of the state dict, in which shards are filled."""
        named: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            named |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in self._layer().items()}
        return named | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    def _layer(self) -> dict[str, Shape]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        parts: dict[str, Shape] = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
        }
        if self.normed_heads:
            parts |= {"self_attn.q_norm": (self.head_dim,), "self_attn.k_norm": (self.head_dim,)}
        if self.experts:
            parts["mlp.gate"] = (self.experts, self.hidden)
        for mlp in [f"mlp.experts.{i}" for i in range(self.experts)] or ["mlp"]:
            parts[f"{mlp}.gate_proj"] = parts[f"{mlp}.up_proj"] = (self.inner, self.hidden)
            parts[f"{mlp}.down_proj"] = (self.hidden, self.inner)
        return parts | {"input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,)}

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    def config(self, dtype: str) -> dict[str, object]:
        """config.json, as far as loaders and mergekit look at it."""
        mixture: dict[str, object] = {}
        if self.experts:
            mixture = {"num_experts": self.experts, "num_experts_per_tok": 8, "moe_intermediate_size": self.inner}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
            **mixture,
            **(self.config_extra or {}),
        }

    def scaled(self, *, layers: int | None = None, divide: int = 1) -> Shapes:
        """For small machines: fewer layers of the same tensors, or every width divided; about as many shards."""
        if self.hidden % divide or self.inner % divide or self.vocabulary % divide or self.heads % divide:
            raise SystemExit(f"--divide {divide}: the widths of this model are not multiples of it; try 2, 4 or 8.")
        smaller = replace(
            self,
            vocabulary=self.vocabulary // divide,
            hidden=self.hidden // divide,
            inner=self.inner // divide,
            layers=layers or self.layers,
            heads=self.heads // divide,
            kv_heads=max(1, self.kv_heads // divide),
        )
        return replace(smaller, shard_bytes=self.shard_bytes * smaller.elements // self.elements)


SHAPES: Mapping[str, Shapes] = {
    "tinyllama-1.1b": Shapes(
        architecture="LlamaForCausalLM", model_type="llama", vocabulary=32000, hidden=2048, inner=5632, layers=22,
        heads=32, kv_heads=4, head_dim=64, config_extra={"max_position_embeddings": 2048, "rope_theta": 10000.0},
    ),
    "llama-3-8b": Shapes(
        architecture="LlamaForCausalLM", model_type="llama", vocabulary=128256, hidden=4096, inner=14336, layers=32,
        heads=32, kv_heads=8, head_dim=128, config_extra={"max_position_embeddings": 8192, "rope_theta": 500000.0},
    ),
    "llama-3-70b": Shapes(
        architecture="LlamaForCausalLM", model_type="llama", vocabulary=128256, hidden=8192, inner=28672, layers=80,
        heads=64, kv_heads=8, head_dim=128, config_extra={"max_position_embeddings": 8192, "rope_theta": 500000.0},
    ),
    "qwen3-30b-a3b": Shapes(
        architecture="Qwen3MoeForCausalLM", model_type="qwen3_moe", vocabulary=151936, hidden=2048, inner=768,
        layers=48, heads=32, kv_heads=4, head_dim=128, experts=128, normed_heads=True, shard_bytes=4_000_000_000,
        config_extra={"max_position_embeddings": 40960, "rope_theta": 1000000.0},
    ),
}  # fmt: skip


def assign_shards(tensors: Mapping[str, Shape], item_bytes: int, shard_bytes: int) -> list[list[str]]:
    """Greedy in state-dict order, as huggingface_hub's `split_torch_state_dict_into_shards` cuts."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * item_bytes
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def name_shards(count: int) -> list[str]:
    """File names as Hugging Face writes them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def index(shards: Sequence[Sequence[str]], total_bytes: int) -> str:
    """The index of a sharded model."""
    files = name_shards(len(shards))
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2) + "\n"


def header(tensors: Mapping[str, Shape], dtype: str, item_bytes: int) -> bytes:
    """The head of a safetensors file that holds these tensors in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        stop = position + math.prod(shape) * item_bytes
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
