"""What `collect` runs: a Hugging Face model as its config.json names it, or one that a function of yours makes.

Either is a torch module and a function that scores one example: the log-likelihood that a Fisher diagonal takes the
gradients of. For Gram matrices any forward pass will do.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ties_dist.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

Example = Mapping[str, Any]
"""One line of the calibration data."""


@dataclass(frozen=True)
class Subject:
    """score: the log-likelihood of one example, 0-d; of Gram matrices only the forward pass in it is looked at."""

    module: nn.Module
    score: Callable[[nn.Module, Example], Tensor]


def load_subject(checkpoint: Path, kind: str, *, function: str | None, max_length: int) -> Subject:
    """function: `package.module:name`, called with the checkpoint's path; gives (module, score).

    Raises RecipeError where that cannot be had, PlanError where the model needs something that is not installed.
    """
    return _from_function(function, checkpoint) if function else _from_transformers(checkpoint, kind, max_length)


def _from_function(text: str, checkpoint: Path) -> Subject:
    module, colon, name = text.partition(":")
    try:
        make = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(f"--model {text}: {error}. It must be importable where ties_dist runs.") from error
    if make is None:
        raise RecipeError(f"--model {text}: name a function as package.module:function.")
    found = make(checkpoint)
    if not (isinstance(found, tuple) and len(found) == 2 and callable(found[1]) and hasattr(found[0], "parameters")):
        raise RecipeError(f"--model {text} must return (torch module, function of module and example that scores it).")
    return Subject(*found)


def _from_transformers(checkpoint: Path, kind: str, max_length: int) -> Subject:
    try:
        import transformers
    except ImportError as error:
        raise PlanError(
            "running a Hugging Face model needs transformers: pip install 'ties-dist[collect]', or name a function of "
            "yours with --model package.module:function."
        ) from error
    try:
        config = json.loads((checkpoint / "config.json").read_text())
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise PlanError(
            f"{checkpoint} has no config.json that names an architecture ({error}): name a function that makes the "
            "model with --model package.module:function."
        ) from error
    score = next((make for part, make in _SCORES.items() if part in architecture), None)
    if score is None and kind == "fisher":
        raise PlanError(
            f"{architecture} gives no likelihood of an example: name a function that does with "
            "--model package.module:function."
        )
    made = getattr(transformers, architecture, None)
    if made is None:
        raise PlanError(f"transformers {transformers.__version__} has no {architecture}: give --model.")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    module = made.from_pretrained(checkpoint, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)

    def scored(module: nn.Module, example: Example) -> Tensor:
        inputs = tokenizer(str(_field(example, "text")), return_tensors="pt", truncation=True, max_length=max_length)
        inputs = inputs.to(next(module.parameters()).device)
        if score is None:
            output: Tensor = module(**inputs)[0]
            return output.sum()
        return score(module, tokenizer, inputs, example)

    return Subject(module, scored)


def _field(example: Example, name: str) -> Any:
    try:
        return example[name]
    except KeyError as error:
        raise RecipeError(f"the data lack '{name}': a line has {', '.join(example) or 'nothing'}.") from error


def _causal(module: Any, tokenizer: Any, inputs: Any, example: Example) -> Tensor:
    """Sum over the tokens of log p(token | those before)."""
    mean: Tensor = -module(**inputs, labels=inputs["input_ids"]).loss
    return mean.mul(max(1, inputs["input_ids"].shape[1] - 1))


def _classification(module: Any, tokenizer: Any, inputs: Any, example: Example) -> Tensor:
    import torch

    label = torch.tensor([int(_field(example, "label"))], device=inputs["input_ids"].device)
    scores: Tensor = torch.log_softmax(module(**inputs).logits, dim=-1)
    return scores[0, label[0]]


def _sequence(module: Any, tokenizer: Any, inputs: Any, example: Example) -> Tensor:
    labels = tokenizer(str(_field(example, "target")), return_tensors="pt").input_ids.to(inputs["input_ids"].device)
    mean: Tensor = -module(**inputs, labels=labels).loss
    return mean.mul(labels.shape[1])


_SCORES: Mapping[str, Callable[[Any, Any, Any, Example], Tensor]] = {
    "ForCausalLM": _causal,
    "LMHeadModel": _causal,
    "ForSequenceClassification": _classification,
    "ForConditionalGeneration": _sequence,
}
