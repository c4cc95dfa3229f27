"""A small vision transformer, pretrained here on the Latin letters of some 110 typefaces, and its tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from finetune import BATCH, Head, label_tensor, optimise
from safetensors.torch import load_file, save_file
from tasks import Example, Task
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.paper import vision_tasks
from benchmarks.paper.domain import digest_of
from benchmarks.paper.peft_experts import Adapter, Kind, Tensors
from benchmarks.paper.text import QUICKSTART
from benchmarks.paper.vision_model import DEPTH, WIDTH, VisionTransformer, images, pretrain

FINE_TUNING_RATE = 1e-3
"""The better of two (the other: 3e-4) on the dev slices of six tasks."""
HERE = Path(__file__).parent


class Vision:
    name = "vision"
    base_name = f"a vision transformer of {DEPTH} layers and width {WIDTH}, pretrained here on the letters of 110 fonts"
    merged = tuple(vision_tasks.MERGED)
    held_out = tuple(vision_tasks.HELD_OUT)
    pace = 2
    trains = True
    subject = "benchmarks.paper.subject:make_vision"
    adapters: tuple[Kind, ...] = ()

    def __init__(self) -> None:
        with torch.device("meta"):  # the code alone: weights come with each call
            self.module = VisionTransformer()

    def load_tasks(self, names: Sequence[str], sizes: Mapping[str, int], seed: int) -> tuple[Task, ...]:
        return vision_tasks.load(tuple(names), dict(sizes), seed)

    def code(self) -> str:
        here = [HERE / name for name in ("vision.py", "vision_model.py", "vision_tasks.py")]
        return digest_of([*here, *(QUICKSTART / name for name in ("finetune.py", "tasks.py"))])

    def base(self, build: Path) -> Tensors:
        learnt = hashlib.sha256((HERE / "vision_model.py").read_bytes())
        for text, label in vision_tasks.letters()[::50]:
            learnt.update(vision_tasks.draw(text).tobytes() + bytes([label]))
        file = build / self.name / f"pretrained-{learnt.hexdigest()[:16]}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(pretrain(), file)
        return load_file(file)

    def companions(self) -> Sequence[Path]:
        return []

    def head(self, task: Task) -> Head | None:
        return None

    @torch.no_grad()
    def features(self, model: Tensors, examples: Sequence[Example]) -> Tensor:
        inputs = images([example.text for example in examples]).split(128)
        return torch.cat([functional_call(self.module, model, part) for part in inputs])

    def fine_tune(
        self, start: Tensors, heads: Sequence[Head], tasks: Sequence[Task], *, steps: int, seed: int
    ) -> Tensors:
        expert = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}

        def loss(turn: int, batch: tuple[Example, ...]) -> Tensor:
            assert len(batch) <= BATCH
            found = functional_call(self.module, expert, images([example.text for example in batch]))
            return F.cross_entropy(heads[turn](found), label_tensor(batch))

        optimise(list(expert.values()), loss, tasks, steps=steps, seed=seed, peak=FINE_TUNING_RATE)
        return {name: tensor.detach() for name, tensor in expert.items()}

    def tune_adapter(self, kind: Kind, base: Tensors, head: Head, task: Task, *, steps: int, seed: int) -> Adapter:
        raise NotImplementedError(f"no {kind} for {self.base_name}")
