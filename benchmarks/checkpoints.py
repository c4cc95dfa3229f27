"""Realistic checkpoints of any size, written shard by shard in bounded memory: a base and fine-tunes of it.

Names, shapes and shards are those of published models; numbers are noise. Fresh normals would cost more than the merge
under test, so every block is a slice of one pool of normals, at an offset and with a sign of its own: two models
agree in no element's draw. The scale of the deltas differs by tensor, so whole-model and per-tensor trims differ.

    python -m benchmarks.checkpoints build/bench --shapes llama-3-8b --layers 4 --experts 3 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

Shape = tuple[int, ...]
DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "float32": (torch.float32, "F32")}

POOL, BLOCK = 1 << 24, 1 << 20  # elements
BASE_SIGMA = 0.02
DELTA_SCALE, SCALE_SPREAD = 1e-4, 0.6
"""Of a tensor's deltas: median over tensors, and the standard deviation of its logarithm. In bfloat16 more than a third
of the deltas are then exactly zero, and a threshold is an atom that many entries share."""
RECORD = "checkpoints.json"
"""Written last: what stands in the folder."""


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


@dataclass(frozen=True, kw_only=True)
class Family:
    """A base and its fine-tunes on disk. parameters: of each model."""

    base: Path
    experts: tuple[Path, ...]
    dtype: str
    parameters: int

    @property
    def models(self) -> tuple[Path, ...]:
        return (self.base, *self.experts)

    @property
    def files(self) -> list[Path]:
        """Every weight file that a merge reads."""
        return [file for model in self.models for file in sorted(model.glob("*.safetensors"))]

    @property
    def input_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def output_bytes(self) -> int:
        return self.input_bytes // len(self.models)

    def recipe(self, method: str, **top: object) -> dict[str, object]:
        """A recipe that ties_dist and mergekit both read; density 0.2 is the paper's."""
        weight = 1.0 if method == "ties" else 1 / len(self.experts)
        listed = [{"model": str(model.absolute()), "parameters": {"weight": weight}} for model in self.experts]
        recipe: dict[str, object] = {"merge_method": method, "models": listed, **top}
        if method != "linear":
            recipe["base_model"] = str(self.base.absolute())
        if method == "ties":
            recipe["parameters"] = {"density": 0.2}
        return recipe


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


class Noise:
    """Independent normals for every (model, tensor, block), as slices of one pool."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))

    def block(self, model: str, tensor: str, start: int, size: int) -> tuple[Tensor, float]:
        """(size,) float32, a view of the pool, and the sign to multiply it by. size: at most BLOCK."""
        draw = random.Random(f"{self.seed}/{model}/{tensor}/{start}")
        offset = draw.randrange(POOL - BLOCK)
        return self.pool[offset : offset + size], draw.choice((-1.0, 1.0))

    def delta_scale(self, model: str, tensor: str) -> float:
        """Mostly the tensor's, a little the expert's own: log-normal around DELTA_SCALE."""
        by_tensor = random.Random(f"{self.seed}/{tensor}").gauss(0.0, SCALE_SPREAD)
        by_expert = random.Random(f"{self.seed}/{model}/{tensor}").gauss(0.0, SCALE_SPREAD / 4)
        return DELTA_SCALE * math.exp(by_tensor + by_expert)


def write_family(
    out: Path,
    tensors: Mapping[str, Shape],
    *,
    experts: int,
    dtype: str,
    shard_bytes: int = 5_000_000_000,
    config: Mapping[str, object] | None = None,
    seed: int = 0,
) -> Family:
    """Write `out/base`, `out/expert-0`, ...; what stands there already from the same request is taken as it is.

    Memory: the pool and a few blocks, whatever the models' size. Every file is synced, so that it can be evicted.
    """
    kind, header_dtype = DTYPES[dtype]
    names = ["base", *(f"expert-{i}" for i in range(experts))]
    parameters = sum(math.prod(shape) for shape in tensors.values())
    family = Family(base=out / "base", experts=tuple(out / n for n in names[1:]), dtype=dtype, parameters=parameters)
    request = {
        "experts": experts,
        "dtype": dtype,
        "shard_bytes": shard_bytes,
        "seed": seed,
        "config": dict(config or {}),
        "tensors": {name: list(shape) for name, shape in tensors.items()},
    }
    if (out / RECORD).is_file() and json.loads((out / RECORD).read_text()) == request:
        return family
    if any((out / name).exists() for name in [RECORD, *names]):
        raise SystemExit(f"{out} holds other or unfinished checkpoints: remove it, or choose another folder.")
    needed = parameters * kind.itemsize * len(names)
    out.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(out).free:
        raise SystemExit(f"{out} needs {needed / 1e9:.1f} GB, {shutil.disk_usage(out).free / 1e9:.1f} GB are free.")

    noise = Noise(seed)
    shards = assign_shards(tensors, kind.itemsize, shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for model in family.models:
        model.mkdir()
        if config is not None:
            (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": parameters * kind.itemsize}, "weight_map": weight_map}
            (model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(files, shards, strict=True):
        ordered = {name: tensors[name] for name in sorted(shard)}  # one dtype, so by name, as safetensors writes them
        with ExitStack() as stack:
            opened = [stack.enter_context(open(model / file, "wb", buffering=0)) for model in family.models]
            for stream in opened:
                stream.write(header(ordered, header_dtype, kind.itemsize))
            for name, shape in ordered.items():
                for start in range(0, math.prod(shape), BLOCK):
                    size = min(BLOCK, math.prod(shape) - start)
                    blocks = family_block(noise, names, name, start, size, kind)
                    for stream, block in zip(opened, blocks, strict=True):
                        stream.write(block.view(torch.uint8).numpy().data)
            for stream in opened:
                os.fsync(stream.fileno())
    (out / RECORD).write_text(json.dumps(request))
    return family


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


def family_block(
    noise: Noise, models: Sequence[str], tensor: str, start: int, size: int, kind: torch.dtype
) -> list[Tensor]:
    """One block of every model, (size,) each: the base around 0 (norms around 1), experts a delta away from it."""
    normals, sign = noise.block(models[0], tensor, start, size)
    centre = 1.0 if tensor.endswith("norm.weight") else 0.0
    base = (normals * (sign * BASE_SIGMA) + centre).to(kind)
    theta = base.float()
    blocks = [base]
    for model in models[1:]:
        normals, sign = noise.block(model, tensor, start, size)
        blocks.append(torch.add(theta, normals, alpha=sign * noise.delta_scale(model, tensor)).to(kind))
    return blocks


def add_arguments(parser: argparse.ArgumentParser, *, dtype: str = "bfloat16", experts: int = 3) -> None:
    """The options by which every script here names its models."""
    parser.add_argument("--shapes", choices=sorted(SHAPES), default="tinyllama-1.1b")
    parser.add_argument("--experts", type=int, default=experts)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=dtype)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, each as it is")
    parser.add_argument("--divide", type=int, default=1, help="divide every width by 2, 4 or 8")
    parser.add_argument("--seed", type=int, default=0)


def family_name(arguments: argparse.Namespace) -> str:
    """The folder of a family under the data folder."""
    layers = f"-{arguments.layers}-layers" if arguments.layers else ""
    width = f"-width-{arguments.divide}" if arguments.divide > 1 else ""
    return f"{arguments.shapes}{layers}{width}-{arguments.dtype}"


def family_from(arguments: argparse.Namespace, out: Path) -> Family:
    """The models that the options of `add_arguments` name, in the folder `out`."""
    shapes = SHAPES[arguments.shapes].scaled(layers=arguments.layers, divide=arguments.divide)
    return write_family(
        out,
        shapes.tensors,
        experts=arguments.experts,
        dtype=arguments.dtype,
        shard_bytes=shapes.shard_bytes,
        config=shapes.config(arguments.dtype),
        seed=arguments.seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a base and experts in the shapes of a published model.")
    parser.add_argument("out", type=Path)
    add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # blocks are small: barriers between threads would cost more than they save
    began, before = time.monotonic(), time.process_time()
    family = family_from(arguments, arguments.out)
    seconds, cpu = time.monotonic() - began, time.process_time() - before
    print(
        f"{arguments.out}: base and {arguments.experts} experts of {family.parameters:,} parameters, "
        f"{arguments.dtype}, {family.input_bytes / 1e9:.2f} GB in {seconds:.1f} s, {cpu:.1f} CPU-s"
    )


if __name__ == "__main__":
    main()
