"""What a run may use, and how it is to go about it: every option said once, with its type, default, unit and help.

The switches of the command line, the keywords of the Python functions (`keywords`) and what travels to workers
(`Resources`) are made from `RunOptions`. Imports nothing heavy, since `--help` is made from it, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin, get_type_hints

from ties_dist.cache import KERNELS, cache_folder
from ties_dist.compiler.kinds import KernelKind
from ties_dist.errors import PlanError
from ties_dist.messages import readable
from ties_dist.methods.declared import unfit
from ties_dist.storage.base import Backend

ExecutorName = Literal["auto", "local", "ray"]
ThresholdPass = Literal["auto", "speculate", "scan"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is said of an option. unset: what holds where its default is None.

    switch, metavar: on the command line, where they do not follow from its name and type.
    """

    help: str
    unit: Literal["bytes", "seconds"] | None = None
    unset: str | None = None
    switch: str | None = None
    metavar: str | None = None
    least: int = 1
    """Of a number."""


def said(
    help: str,
    *,
    unit: Literal["bytes", "seconds"] | None = None,
    unset: str | None = None,
    switch: str | None = None,
    metavar: str | None = None,
    least: int = 1,
) -> Mapping[str, Said]:
    """Metadata of a field that is an option."""
    return {"said": Said(help=help, unit=unit, unset=unset, switch=switch, metavar=metavar, least=least)}


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field, as those need it that make something of all options. kind: its type, where it is not None."""

    name: str
    hint: object
    default: object
    said: Said

    @property
    def kind(self) -> object:
        chosen = [each for each in get_args(self.hint) if each is not NoneType]
        return chosen[0] if NoneType in get_args(self.hint) else self.hint

    @property
    def words(self) -> tuple[str, ...]:
        """Those that it may be; empty where it is no word."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def default_text(self) -> str | None:
        """As a person writes it on the command line; None where there is nothing to say."""
        if self.default is None:
            return self.said.unset
        if isinstance(self.default, bool | Mapping | tuple):
            return None
        if isinstance(self.default, int) and self.said.unit == "bytes":
            return readable(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def options_of(kind: type[RunOptions | Cluster]) -> tuple[Option, ...]:
    """In the order in which they are told."""
    hints = get_type_hints(kind)
    return tuple(
        Option(name=f.name, hint=hints[f.name], default=getattr(kind, f.name, {}), said=f.metadata["said"])
        for f in fields(kind)
    )


def check(options: RunOptions | Cluster) -> None:
    """Raises PlanError: a word that is misspelt must not do what `auto` does, nor "no" what True does."""
    for each in options_of(type(options)):
        value = getattr(options, each.name)
        if wrong := unfit(value, each.hint):
            raise PlanError(f"{each.name}: {wrong}{f', in {each.said.unit}' if each.said.unit else ''}")
        if isinstance(value, int | float) and each.kind is not bool and value < each.said.least:
            raise PlanError(f"{each.name}: {value} is too small; it is at least {each.said.least}.")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where `executor="ray"` runs, and what of it it takes. resources, labels: as Ray spells them."""

    address: str = field(
        default="auto",
        metadata=said(
            "Of the Ray cluster: HOST:PORT of its head; local: one of this machine's own; "
            "auto: $RAY_ADDRESS or one that runs here, else local.",
            metavar="A",
        ),
    )
    workers: int | None = field(default=None, metadata=said("Worker processes of the cluster.", unset="as many as fit"))
    start_seconds: float = field(
        default=300.0,
        metadata=said(
            "How long a first worker is waited for.", unit="seconds", switch="--worker-timeout", metavar="SECONDS"
        ),
    )
    resources: Mapping[str, float] = field(
        default_factory=dict,
        metadata=said(
            "A custom resource of Ray that every worker takes; repeatable.",
            switch="--worker-resource",
            metavar="NAME=AMOUNT",
        ),
    )
    labels: Mapping[str, str] = field(
        default_factory=dict,
        metadata=said(
            "Only nodes with this label of Ray work; repeatable.", switch="--node-label", metavar="NAME=VALUE"
        ),
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """All options of all functions that plan or merge; which takes which is in `keywords`. Raises PlanError."""

    semantics: str | None = field(
        default=None,
        metadata=said("Whose TIES: paper, mergekit or peft.", unset="as the recipe says, else paper", metavar="S"),
    )
    threads: int | None = field(
        default=None, metadata=said("Compute threads.", unset="all cores; of a worker of Ray 8 at most")
    )
    memory_budget: int = field(
        default=2 << 30,
        metadata=said("For buffers, per worker process; Python and torch need about 0.5GiB more.", unit="bytes"),
    )
    unit_size: int | None = field(
        default=None, metadata=said("Output bytes of a unit of work.", unit="bytes", unset="8MiB, or what fits")
    )
    read_backend: Backend = field(
        default="auto",
        metadata=said("How inputs are read; direct: past the page cache; auto: by what of them it holds."),
    )
    allow: tuple[str, ...] = field(
        default=(),
        metadata=said("A word that a refusal named: no obstacle any more; repeatable.", metavar="WORD"),
    )
    strict: bool = field(default=False, metadata=said("Refuse what is only warned of, configs that differ a little."))
    allow_external_methods: bool = field(
        default=False, metadata=said("Run `merge_method: package.module:Class` from other packages.")
    )
    max_shard_size: int | None = field(
        default=None,
        metadata=said("Largest output shard; no tensor is split.", unit="bytes", unset="as the base"),
    )
    random_seed: int | None = field(
        default=None,
        metadata=said("Of methods that draw random numbers.", unset="as the recipe says, else 0", least=0),
    )
    executor: ExecutorName = field(
        default="auto",
        metadata=said("auto, local: this machine; ray: the workers of a cluster; same bytes."),
    )
    cluster: Cluster | None = field(
        default=None, metadata=said("For executor ray: which cluster, and what of it.", unset="Cluster()")
    )
    device: Device = field(default="auto", metadata=said("auto, cpu: no GPU; cuda: all NVIDIA GPUs; same bytes."))
    threshold_pass: ThresholdPass = field(
        default="auto",
        metadata=said("Scan for thresholds, or predict and prove them; auto: predict where likely; same bytes."),
    )
    kernel: KernelKind = field(
        default="auto", metadata=said("Merge loops; auto: compiled, else eager by torch; same bytes.")
    )
    cache_dir: Path | str | None = field(
        default=None,
        metadata=said("Where counts and compiled loops are kept.", unset="$TIES_DIST_CACHE, else ~/.cache/ties_dist"),
    )
    fresh: bool = field(default=False, metadata=said("Discard an unfinished merge in OUT."))
    overwrite: bool = field(default=False, metadata=said("Replace the finished model of another merge in OUT."))
    wait: bool = field(default=False, metadata=said("Wait for another run that is merging into OUT."))
    trust_journal: bool = field(default=False, metadata=said("Resume without reading finished ranges again."))

    def __post_init__(self) -> None:
        check(self)

    @property
    def cache(self) -> Path:
        return cache_folder(Path(self.cache_dir) if self.cache_dir is not None else None)

    @property
    def speculate(self) -> bool | None:
        """Whether predicted thresholds are taken without a scan; None: where they are likely to hold."""
        return {"auto": None, "speculate": True, "scan": False}[self.threshold_pass]

    def resources(self, *, threads: int | None = None, gpu_slots: int = 0, outputs: int = 1) -> Resources:
        """Of one worker process. threads, gpu_slots: what it has; outputs: merges that are done together."""
        return Resources(
            threads=threads or self.threads,
            memory_budget=self.memory_budget,
            unit_bytes=self.unit_size,
            kernel=self.kernel,
            kernel_cache=self.cache / KERNELS,
            outputs=outputs,
            gpu_slots=gpu_slots,
            backend=self.read_backend,
        )


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a worker process may use: what of the options travels to it, and what its machine has."""

    threads: int | None = RunOptions.threads
    memory_budget: int = RunOptions.memory_budget
    unit_bytes: int | None = RunOptions.unit_size
    kernel: KernelKind = RunOptions.kernel
    kernel_cache: Path | None = None
    outputs: int = 1
    """Merges of the same inputs that are done together, each with its own result of every unit."""
    gpu_slots: int = 0
    """Units that GPUs hold at once; 0: the processor merges."""
    backend: Backend = RunOptions.read_backend

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))
