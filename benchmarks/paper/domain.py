"""What a lab needs to know of a kind of data: its tasks, its base model, and how that is trained and asked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from finetune import Head
from tasks import Example, Task
from torch import Tensor

from benchmarks.paper.peft_experts import Adapter, Kind, Tensors


class Domain(Protocol):
    name: str
    base_name: str
    """Of the base model, in words."""
    merged: tuple[str, ...]
    held_out: tuple[str, ...]
    pace: int
    """Steps of a fine-tuning for each that the size gives."""
    trains: bool
    """Whether experts can be fine-tuned, or only those be had that others have trained."""
    subject: str | None
    """What `ties-dist collect --model` runs, `module:function`; None: no statistics."""
    adapters: tuple[Kind, ...]
    """Kinds of adapters that its base can be given."""

    def load_tasks(self, names: Sequence[str], sizes: Mapping[str, int], seed: int) -> tuple[Task, ...]: ...

    def code(self) -> str:
        """A digest of the programs and packages that experts depend on."""

    def base(self, build: Path) -> Tensors:
        """The pretrained model; what it takes to make is kept under build."""

    def companions(self) -> Sequence[Path]:
        """Files that stand beside a model's weights."""

    def head(self, task: Task) -> Head | None:
        """A head that needs no training; None: it is fitted on `probe`."""

    def features(self, model: Tensors, examples: Sequence[Example]) -> Tensor:
        """(examples, width) float32, without gradients."""

    def fine_tune(
        self, start: Tensors, heads: Sequence[Head], tasks: Sequence[Task], *, steps: int, seed: int
    ) -> Tensors: ...

    def tune_adapter(self, kind: Kind, base: Tensors, head: Head, task: Task, *, steps: int, seed: int) -> Adapter:
        """Asked for the kinds in `adapters` only."""


def digest_of(files: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
