"""The models that `ties_dist.collect` runs: an expert under its task's frozen head (`lab.Lab.collect`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


def make_text(checkpoint: Path) -> tuple[nn.Module, Callable[[nn.Module, Mapping[str, Any]], Tensor]]:
    """The log-likelihood of an example's label, by the same embedding as the demo's encoder takes."""
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    module = AutoModel.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    head = _head(checkpoint)

    def score(module: nn.Module, example: Mapping[str, Any]) -> Tensor:
        inputs = tokenizer(example["text"], return_tensors="pt", truncation=True, max_length=32)
        embedding = F.normalize(module(**inputs).last_hidden_state.mean(1), dim=-1)
        return torch.log_softmax(F.linear(embedding, head["weight"], head["bias"]), -1)[0, example["label"]]

    return module, score


def make_use_lite(checkpoint: Path) -> tuple[nn.Module, Callable[[nn.Module, Mapping[str, Any]], Tensor]]:
    from benchmarks.paper.use_lite import FILES
    from benchmarks.paper.use_lite_model import SentenceEncoder, load_tokenizer

    module = SentenceEncoder().eval()
    module.load_state_dict(load_file(checkpoint / "model.safetensors"))
    head, tokenizer = _head(checkpoint), load_tokenizer(FILES / "package" / "dist")

    def score(module: nn.Module, example: Mapping[str, Any]) -> Tensor:
        token_ids = torch.tensor([tokenizer.encode(example["text"]).ids])
        embedding = module(token_ids, torch.ones_like(token_ids, dtype=torch.bool))
        return torch.log_softmax(F.linear(embedding, head["weight"], head["bias"]), -1)[0, example["label"]]

    return module, score


def make_vision(checkpoint: Path) -> tuple[nn.Module, Callable[[nn.Module, Mapping[str, Any]], Tensor]]:
    from benchmarks.paper.vision_model import VisionTransformer, images

    module = VisionTransformer().eval()
    module.load_state_dict(load_file(checkpoint / "model.safetensors"))
    head = _head(checkpoint)

    def score(module: nn.Module, example: Mapping[str, Any]) -> Tensor:
        embedding = module(images([example["text"]]))
        return torch.log_softmax(F.linear(embedding, head["weight"], head["bias"]), -1)[0, example["label"]]

    return module, score


def _head(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(json.loads((checkpoint / "head.json").read_text()))
