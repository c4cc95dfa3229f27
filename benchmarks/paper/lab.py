"""Models on disk, made once: heads, experts, merges, and what each gets right.

Everything is kept under the build folder with a digest of what it was made from, so that a run that was killed goes on,
and a change trains again only what depends on it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from finetune import Head, fit_head, label_tensor
from safetensors.torch import load_file, save_file
from tasks import Task

import ties_dist
from benchmarks.paper import peft_experts
from benchmarks.paper.domain import Domain
from benchmarks.paper.peft_experts import Kind, Tensors
from ties_dist.errors import OutputError
from ties_dist.output.report import MergeReport


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is done. steps: of one fine-tuning, a batch of 32 each."""

    name: str
    seeds: tuple[int, ...]
    slices: Mapping[str, int]
    steps: int
    restarts: int
    """Of how many tasks: fine-tunings that start from a merge of the others."""
    subsets: int
    """Draws of experts per number of tasks."""
    statistics: int
    """Examples a task for Fisher and RegMean."""


QUICK = Size(
    name="quick",
    seeds=(0,),
    slices={"test": 120, "probe": 300, "dev": 60, "tune": 3200},
    steps=25,
    restarts=1,
    subsets=1,
    statistics=32,
)
FULL = Size(
    name="full",
    seeds=(0, 1, 2),
    slices={"test": 400, "probe": 300, "dev": 160, "tune": 3200},
    steps=100,
    restarts=8,
    subsets=4,
    statistics=128,
)


@dataclass
class Lab:
    """One seed's models. A seed draws the slices and the order of the examples."""

    domain: Domain
    size: Size
    seed: int
    build: Path
    tasks: dict[str, Task] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    _scores: dict[str, str] = field(default_factory=dict)
    _digests: dict[str, tuple[str, tuple[int, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.build / self.domain.name / self.size.name / f"seed-{self.seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        names = (*self.domain.merged, *self.domain.held_out)
        self.tasks = {task.name: task for task in self.domain.load_tasks(names, self.size.slices, self.seed)}
        self.store = self.folder / "scores.json"
        self._scores = json.loads(self.store.read_text()) if self.store.exists() else {}
        made_from = [self.domain.base_name, self.domain.code()]
        if not self.made("base", made_from):  # once: merges know their inputs by the time of the file
            self.make("base", self.domain.base(self.build), made_from)
        for name, task in self.tasks.items():
            self.heads[name] = self._head(task)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: without the model that was loaded last."""
        return {name: value for name, value in vars(self).items() if name != "_last"}

    # -- models

    def path(self, name: str) -> Path:
        return self.folder / name

    def _write(self, name: str, tensors: Tensors) -> None:
        folder = self.path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.domain.companions():
            shutil.copyfile(file, folder / file.name)
        partial = folder / "model.safetensors.partial"
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata={"format": "pt"})
        partial.replace(folder / "model.safetensors")

    def load(self, name: str) -> Tensors:
        return load_file(self.path(name) / "model.safetensors")

    def made(self, name: str, made_from: Sequence[Any]) -> bool:
        """Whether a model was made from just this."""
        stamp = self.path(name) / "made_from.json"
        return stamp.exists() and json.loads(stamp.read_text()) == json.loads(json.dumps(made_from))

    def _stamp(self, name: str, made_from: Sequence[Any]) -> None:
        (self.path(name) / "made_from.json").write_text(json.dumps(made_from))

    def make(self, name: str, tensors: Tensors, made_from: Sequence[Any]) -> str:
        """A model of our own making, such as one with flipped signs."""
        self._write(name, tensors)
        self._stamp(name, made_from)
        return name

    def _head(self, task: Task) -> Head:
        made_from = [self.domain.code(), task_digest(task)]
        name = f"heads/{task.name}"
        file = self.path(name) / "head.safetensors"
        if not self.made(name, made_from):
            head = self.domain.head(task)
            if head is None:
                features = self.domain.features(self._loaded("base"), task.probe)
                head = fit_head(features, label_tensor(task.probe), len(task.labels))
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"weight": head.weight, "bias": head.bias}, file)
            self._stamp(name, made_from)
        return Head(**load_file(file))

    def expert(self, tasks: Sequence[str], *, start: str = "base", steps: int | None = None) -> str:
        """The encoder fine-tuned on tasks, from the base or from another model; returns its name."""
        steps = steps or self.size.steps * self.domain.pace * len(tasks)
        label = tasks[0] if len(tasks) == 1 else "multitask"
        name = f"experts/{label}" if start == "base" else f"experts/{label} from {start.replace('/', '-')}"
        made_from = [
            self.domain.code(),
            [task_digest(self.tasks[t]) for t in tasks],
            steps,
            self.seed,
            self.digest(start),
        ]
        if not self.made(name, made_from):
            began = time.monotonic()
            chosen = [self.tasks[t] for t in tasks]
            heads = [self.heads[t] for t in tasks]
            tuned = self.domain.fine_tune(self.load(start), heads, chosen, steps=steps, seed=self.seed)
            self._write(name, tuned)
            self._stamp(name, made_from)
            say(f"{self.domain.name}, seed {self.seed}: {name}, {steps} steps in {time.monotonic() - began:.0f} s")
        return name

    def adapter(self, kind: Kind, task: str) -> str:
        """An adapter of the base fine-tuned on a task; returns its name."""
        name = f"{kind}/{task}"
        made_from = [self.domain.code(), peft_experts.code(), task_digest(self.tasks[task]), self.size.steps, self.seed]
        if not self.made(name, made_from):
            began = time.monotonic()
            base, head, steps = self.load("base"), self.heads[task], self.size.steps
            tuned = self.domain.tune_adapter(kind, base, head, self.tasks[task], steps=steps, seed=self.seed)
            tuned.write(self.path(name))
            self._stamp(name, made_from)
            say(f"{self.domain.name}, seed {self.seed}: {name}, {steps} steps in {time.monotonic() - began:.0f} s")
        return name

    def forget(self) -> None:
        """Remove the merges, 90 MB each: made again in a second, with the digest that their scores are kept under."""
        for part in ("merged", "swept", "flipped"):
            shutil.rmtree(self.path(part), ignore_errors=True)

    def merge(self, name: str, method: str, models: Sequence[str], **recipe: Any) -> MergeReport:
        """recipe: `parameters`, `ties_dist`, `statistics` by model."""
        file, out = self._recipe(name, method, models, **recipe), self.path(f"merged/{name}")
        return ties_dist.merge(file, out, overwrite=True)

    def budget(self, name: str) -> dict[str, float]:
        """Of a merge: which share of each kind of weight the whole-model trim keeps, the mean over the experts.

        Kinds that have a thousandth of all parameters or more, the largest first.
        """
        found = ties_dist.analyze(self.path("recipes") / f"{name}.yml")
        kinds = [kind for kind in found.kinds if kind.elements >= found.elements / 1000]
        return {
            kind.name: sum(e.kept_fraction for e in kind.experts) / len(kind.experts)
            for kind in sorted(kinds, key=lambda kind: -kind.elements)
        }

    def sweep(
        self, name: str, method: str, models: Sequence[str], *, density: Sequence[float] = (), lam: Sequence[float]
    ) -> dict[tuple[float, ...], str]:
        """Merges of one read, by density, where it is given, and lambda."""
        parameters = {"density": 0.2} if density else {}  # replaced by the sweep's
        file, out = self._recipe(name, method, models, parameters=parameters), self.path(f"swept/{name}")
        done = ties_dist.sweep(file, out, density=density, lam=lam, overwrite=True, fresh=True)
        return {tuple(one.variant.values.values()): str(one.path.relative_to(self.folder)) for one in done}

    def _recipe(
        self,
        name: str,
        method: str,
        models: Sequence[str],
        *,
        statistics: Mapping[str, Path] | None = None,
        ties_dist: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Path:
        stores = statistics or {}
        block = dict(ties_dist or {})
        if "elect_from" in block:
            block["elect_from"] = str(self.path(block["elect_from"]))
        document: dict[str, Any] = {
            "merge_method": method,
            "base_model": str(self.path("base")),
            "models": [
                {"model": str(self.path(m))} | ({"statistics": str(stores[m])} if m in stores else {}) for m in models
            ],
            "dtype": "float32",
            **({"ties_dist": block} if block else {}),
            **more,
        }
        file = self.path("recipes") / f"{name.replace('/', '-')}.yml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        return file

    def collect(self, kind: Literal["fisher", "gram"], task: str, examples: int) -> Path:
        """The store of an expert's statistics over its own task's examples."""
        expert = f"experts/{task}"
        data = self.path("data") / f"{task}.jsonl"
        data.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"text": e.text, "label": e.label}) for e in self.tasks[task].tune[:examples]]
        data.write_text("\n".join(lines))
        (self.path(expert) / "head.json").write_text(json.dumps(str(self.path(f"heads/{task}") / "head.safetensors")))
        out = self.path(f"statistics/{kind}-{task}")
        # By the library: of 17 s as a command of its own 9 went into importing transformers, for each of 16 stores.
        collect = partial(ties_dist.collect, kind, self.path(expert), data, out, model=self.domain.subject)
        try:
            collect()
        except OutputError:  # of an expert that was trained again since
            collect(fresh=True)
        return out

    # -- what they get right

    def digest(self, name: str) -> str:
        path = self.path(name) / "model.safetensors"
        stamp = path.stat().st_mtime_ns, path.stat().st_size
        if self._digests.get(name, ("", (0, 0)))[1] != stamp:  # a fifth of a second for MiniLM, asked for each task
            with open(path, "rb") as file:
                self._digests[name] = hashlib.file_digest(file, "sha256").hexdigest(), stamp
        return self._digests[name][0]

    def right(self, name: str, task: str, part: str = "test") -> torch.Tensor:
        """(examples,) bool, of one slice of a task."""
        key = f"{self.digest(name)} {task_digest(self.tasks[task])} {self.domain.code()} {part}"
        if key not in self._scores:
            examples = getattr(self.tasks[task], part)
            model = self._loaded(name)
            found = self.heads[task](self.domain.features(model, examples)).argmax(dim=1) == label_tensor(examples)
            self._scores[key] = "".join("01"[r] for r in found.tolist())
            self.store.write_text(json.dumps(self._scores))
        return torch.tensor([c == "1" for c in self._scores[key]])

    def _loaded(self, name: str) -> Tensors:
        digest = self.digest(name)
        if getattr(self, "_last", ("", None))[0] != digest:
            self._last = digest, self.load(name)
        return self._last[1]

    def normalised(
        self, name: str, tasks: Iterable[str], part: str = "test", experts: str = "experts"
    ) -> dict[str, torch.Tensor]:
        """Per task, each example's correctness over the expert's accuracy: the mean is the normalised accuracy.

        experts: where they are, by task.
        """
        found = {}
        for task in tasks:
            own = self.right(f"{experts}/{task}", task, part).float().mean()
            found[task] = self.right(name, task, part).float() / own
        return found


def task_digest(task: Task) -> str:
    content = repr((task.name, task.labels, task.test, task.probe, task.dev, task.tune))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
