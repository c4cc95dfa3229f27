"""MiniLM and twelve text tasks: the demo's encoder, fine-tuning and slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import encoder
from encoder import BASE_PACKAGE, base_directory, embed_texts, load_tokenizer
from finetune import Head, fine_tune
from safetensors.torch import load_file
from tasks import Example, Task
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.paper import text_tasks
from benchmarks.paper.domain import digest_of
from benchmarks.paper.peft_experts import KINDS, Adapter, Kind, Tensors, tune_adapter

QUICKSTART = Path(encoder.__file__).parent


class Text:
    name = "text"
    base_name = f"MiniLM ({BASE_PACKAGE} {version(BASE_PACKAGE)})"
    merged = tuple(text_tasks.MERGED)
    held_out = tuple(text_tasks.HELD_OUT)
    pace = 1
    trains = True
    subject = "benchmarks.paper.subject:make_text"
    adapters = KINDS

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(base_directory())

    def load_tasks(self, names: Sequence[str], sizes: Mapping[str, int], seed: int) -> tuple[Task, ...]:
        return text_tasks.load(tuple(names), dict(sizes), seed)

    def code(self) -> str:
        return digest_of([QUICKSTART / name for name in ("encoder.py", "finetune.py", "tasks.py")])

    def base(self, build: Path) -> Tensors:
        return load_file(base_directory() / "model.safetensors")

    def companions(self) -> Sequence[Path]:
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
        return [base_directory() / name for name in names]

    def head(self, task: Task) -> Head | None:
        return None

    def features(self, model: Tensors, examples: Sequence[Example]) -> Tensor:
        return embed_texts(model, self.tokenizer, [example.text for example in examples])

    def fine_tune(
        self, start: Tensors, heads: Sequence[Head], tasks: Sequence[Task], *, steps: int, seed: int
    ) -> Tensors:
        return fine_tune(start, self.tokenizer, heads, tasks, steps=steps, seed=seed)

    def tune_adapter(self, kind: Kind, base: Tensors, head: Head, task: Task, *, steps: int, seed: int) -> Adapter:
        return tune_adapter(kind, base, self.tokenizer, head, task, steps=steps, seed=seed)
