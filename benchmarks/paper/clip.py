"""The literature's eight CLIP ViT-B/32 experts (fusion-bench's, from the hub), zero-shot heads from the text encoder.

`python -m benchmarks.paper.run --domains clip --report`, where huggingface.co is reachable, with the packages
`datasets` and `fusion-bench` (class names and templates). Some 5 GB of models, and each data set's test split.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetune import Head
from safetensors.torch import load_file
from tasks import Example, Task
from torch import Tensor
from torch.func import functional_call

from benchmarks.paper.domain import digest_of
from benchmarks.paper.peft_experts import Adapter, Kind, Tensors

BASE = "openai/clip-vit-base-patch32"
EXPERT = "tanganke/clip-vit-base-patch32_{}"
DATA: Mapping[str, tuple[str, ...]] = {
    "sun397": ("tanganke/sun397",),
    "stanford-cars": ("tanganke/stanford_cars",),
    "resisc45": ("tanganke/resisc45",),
    "eurosat": ("tanganke/eurosat",),
    "svhn": ("svhn", "cropped_digits"),
    "gtsrb": ("tanganke/gtsrb",),
    "mnist": ("mnist",),
    "dtd": ("tanganke/dtd",),
}
"""Arguments of `datasets.load_dataset`."""
SIDE, MEAN, STD = 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    name = "clip"
    base_name = f"{BASE}, its vision tower; heads are its text encoder's"
    merged = tuple(DATA)
    held_out: tuple[str, ...] = ()
    pace = 1
    trains = False
    subject = None
    adapters: tuple[Kind, ...] = ()

    def load_tasks(self, names: Sequence[str], sizes: Mapping[str, int], seed: int) -> tuple[Task, ...]:
        """`test` and `dev` are disjoint draws of the test split: the experts have seen the others."""
        tasks = []
        for name in names:
            labels = _labels(name)
            order = random.Random(f"{seed} {name}").sample(range(len(labels)), len(labels))
            cut = sizes["test"], sizes["test"] + sizes["dev"]
            examples = [Example(group=str(i), text=f"{name} {i}", label=labels[i]) for i in order[: cut[1]]]
            tasks.append(
                Task(
                    name=name,
                    question=f"{EXPERT.format(name)}, which of its classes?",
                    source=" ".join(DATA[name]),
                    labels=tuple(_classes(name)[0]),
                    test=tuple(examples[: cut[0]]),
                    dev=tuple(examples[cut[0] :]),
                    probe=(),
                    tune=(),
                )
            )
        return tuple(tasks)

    def code(self) -> str:
        return digest_of([Path(__file__)])

    def base(self, build: Path) -> Tensors:
        """Named as the experts are: those of a `CLIPVisionModel`."""
        return {name: tensor.contiguous() for name, tensor in _model(BASE).vision_model_state().items()}

    def companions(self) -> Sequence[Path]:
        return []

    def head(self, task: Task) -> Head | None:
        names, templates = _classes(task.name)
        clip = _model(BASE)
        rows = [clip.text_embeddings([template(name) for template in templates]).mean(0) for name in names]
        weight = torch.nn.functional.normalize(torch.stack(rows), dim=-1)
        return Head(weight=weight, bias=torch.zeros(len(names)))

    def features(self, model: Tensors, examples: Sequence[Example]) -> Tensor:
        batches = [examples[i : i + 32] for i in range(0, len(examples), 32)]
        pictures = (torch.stack([prepared(_image(e.text)) for e in batch]) for batch in batches)
        return torch.cat([_model(BASE).image_embeddings(model, batch) for batch in pictures])

    def fine_tune(
        self, start: Tensors, heads: Sequence[Head], tasks: Sequence[Task], *, steps: int, seed: int
    ) -> Tensors:
        """The published expert of the one task."""
        from huggingface_hub import hf_hub_download

        (task,) = tasks
        stored = load_file(hf_hub_download(EXPERT.format(task.name), "model.safetensors"))
        return {name: stored[name] for name in start}

    def tune_adapter(self, kind: Kind, base: Tensors, head: Head, task: Task, *, steps: int, seed: int) -> Adapter:
        raise NotImplementedError(f"no {kind} of {BASE}")


class TwoTowers:
    """A CLIP model whose vision tower takes the tensors of any model named like it."""

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = CLIPModel.from_pretrained(name).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(name)

    def vision_model_state(self) -> Tensors:
        state = self.model.state_dict()
        return {n: t for n, t in state.items() if n.startswith("vision_model.") and t.is_floating_point()}

    @torch.no_grad()
    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), width), unit vectors."""
        inputs = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        pooled = self.model.text_model(**inputs).pooler_output
        return torch.nn.functional.normalize(self.model.text_projection(pooled), dim=-1)

    @torch.no_grad()
    def image_embeddings(self, tensors: Tensors, pictures: Tensor) -> Tensor:
        """pictures: (batch, 3, SIDE, SIDE). Returns (batch, width), unit vectors."""
        tower = {n.removeprefix("vision_model."): t for n, t in tensors.items()}
        pooled = functional_call(self.model.vision_model, tower, kwargs={"pixel_values": pictures}).pooler_output
        return torch.nn.functional.normalize(self.model.visual_projection(pooled), dim=-1)


def prepared(image: Any) -> Tensor:
    """CLIP's preparation of a PIL image: the shorter side to SIDE, bicubic, the middle, normalised. (3, SIDE, SIDE)."""
    from PIL import Image

    image = image.convert("RGB")
    scale = SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1).float()


@cache
def _model(name: str) -> TwoTowers:
    return TwoTowers(name)


@cache
def _split(task: str) -> Any:
    from datasets import load_dataset

    return load_dataset(*DATA[task], split="test")


def _labels(task: str) -> list[int]:
    return list(_split(task)["label"])


def _image(text: str) -> Any:
    task, index = text.split()
    return _split(task)[int(index)]["image"]


def _classes(task: str) -> tuple[list[str], list[Any]]:
    """Names in the order of the labels, and templates, which make a sentence of a name."""
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    names, templates = get_classnames_and_templates(task)
    return list(names), list(templates)
