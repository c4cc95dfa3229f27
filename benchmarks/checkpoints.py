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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.shapes import INDEX, SHAPES, Shape, assign_shards, header, index, name_shards

DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16"), "float32": (torch.float32, "F32")}

POOL, BLOCK = 1 << 24, 1 << 20  # elements
BASE_SIGMA = 0.02
DELTA_SCALE, SCALE_SPREAD = 1e-4, 0.6
"""Of a tensor's deltas: median over tensors, and the standard deviation of its logarithm. In bfloat16 more than a third
of the deltas are then exactly zero, and a threshold is an atom that many entries share."""
RECORD = "checkpoints.json"
"""Written last: what stands in the folder."""


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
    files = name_shards(len(shards))
    for model in family.models:
        model.mkdir()
        if config is not None:
            (model / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if len(shards) > 1:
            (model / INDEX).write_text(index(shards, parameters * kind.itemsize))
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
