"""LoRA and (IA)3 experts of MiniLM, written as PEFT directories.

The weights that an adapter makes are put into the demo's encoder, which is what peft's modules compute: W + s * B A, or
W with its outputs (key, value) or inputs (the feed-forward's second layer) scaled.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from encoder import embed, token_batches
from finetune import BATCH, Head, label_tensor, optimise
from safetensors.torch import save_file
from tasks import Example, Task
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]
Kind = Literal["lora", "ia3"]
KINDS: tuple[Kind, ...] = ("lora", "ia3")
RANK, ALPHA = 8, 16
LEARNING_RATE = {"lora": 3e-3, "ia3": 3e-2}
"""The better of two each on the dev slices of three tasks (the other: a third of it)."""
ATTENTION = r".*\.attention\.self\.(query|key|value)"
SCALED_OUTPUTS, SCALED_INPUTS = r".*\.attention\.self\.(key|value)", r".*\.\d+\.output\.dense"
CONFIG: Mapping[str, Mapping[str, object]] = {
    "lora": {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ATTENTION, "bias": "none"},
    "ia3": {
        "peft_type": "IA3",
        "target_modules": f"{SCALED_OUTPUTS}|{SCALED_INPUTS}",
        "feedforward_modules": SCALED_INPUTS,
    },
}


@dataclass(frozen=True)
class Adapter:
    """tensors: by PEFT's names without its prefix, in its shapes."""

    kind: Kind
    tensors: Tensors

    @classmethod
    def fresh(cls, kind: Kind, base: Tensors, seed: int) -> Adapter:
        """One that changes nothing yet: A is random, B zero, l ones."""
        draw = torch.Generator().manual_seed(random.Random(f"{kind} {seed}").getrandbits(32))
        tensors: Tensors = {}
        for name, weight in sorted(base.items()):
            module = name.removesuffix(".weight")
            outputs, inputs = weight.shape if weight.dim() == 2 else (0, 0)
            if kind == "lora" and re.fullmatch(ATTENTION, module):
                bound = inputs**-0.5
                tensors[f"{module}.lora_A.weight"] = (2 * torch.rand(RANK, inputs, generator=draw) - 1) * bound
                tensors[f"{module}.lora_B.weight"] = torch.zeros(outputs, RANK)
            elif kind == "ia3" and re.fullmatch(SCALED_OUTPUTS, module):
                tensors[f"{module}.ia3_l"] = torch.ones(outputs, 1)
            elif kind == "ia3" and re.fullmatch(SCALED_INPUTS, module):
                tensors[f"{module}.ia3_l"] = torch.ones(1, inputs)
        return cls(kind, tensors)

    def applied(self, base: Tensors) -> Tensors:
        changed = dict(base)
        for name, tensor in self.tensors.items():
            if name.endswith(".ia3_l"):
                module = name.removesuffix(".ia3_l")
                changed[f"{module}.weight"] = base[f"{module}.weight"] * tensor
                if tensor.shape[1] == 1:
                    changed[f"{module}.bias"] = base[f"{module}.bias"] * tensor[:, 0]
            elif name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                product = self.tensors[f"{module}.lora_B.weight"] @ tensor
                changed[f"{module}.weight"] = base[f"{module}.weight"] + ALPHA / RANK * product
        return changed

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = {**CONFIG[self.kind], "fan_in_fan_out": False, "inference_mode": True, "task_type": None}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
        tensors = {f"base_model.model.{n}": t.detach().contiguous() for n, t in self.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def tune_adapter(
    kind: Kind, base: Tensors, tokenizer: Tokenizer, head: Head, task: Task, *, steps: int, seed: int
) -> Adapter:
    """As `finetune.fine_tune`, but that the adapter alone is trained."""
    adapter = Adapter.fresh(kind, base, seed)
    trained = [tensor.requires_grad_() for tensor in adapter.tensors.values()]

    def loss(turn: int, batch: tuple[Example, ...]) -> Tensor:
        ((positions, token_ids, mask),) = token_batches(tokenizer, [example.text for example in batch], size=BATCH)
        found = head(embed(adapter.applied(base), token_ids, mask))
        return F.cross_entropy(found, label_tensor(batch)[positions])

    optimise(trained, loss, [task], steps=steps, seed=seed, peak=LEARNING_RATE[kind])
    return adapter


def code() -> str:
    """A digest of what the adapters depend on here."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
