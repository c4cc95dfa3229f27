"""Merging tensors that are in memory already, with the semantics and the bytes of `merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.forms.known import parameters_of
from ties_dist.checkpoints.header import TensorEntry
from ties_dist.checkpoints.parameters import OpenFiles
from ties_dist.compiler.kinds import KernelKind
from ties_dist.compiler.native import KernelStore
from ties_dist.dtypes import TORCH_NAMES, torch_dtype
from ties_dist.engine.passes import Forgetful, Passes
from ties_dist.errors import RecipeError
from ties_dist.executors.local import LocalExecutor
from ties_dist.inputs.vocabulary import beside_base
from ties_dist.methods.known import METHODS
from ties_dist.planning.arrange import models_of
from ties_dist.planning.options import RunOptions
from ties_dist.planning.prepare import Job, assemble
from ties_dist.progress import LogProgress
from ties_dist.recipe.options import OptionKeywords
from ties_dist.recipe.recipe import load_recipe
from ties_dist.storage.memory import MemoryReader, MemoryWriter
from ties_dist.worker.merging import MergeStep, Worker


def merge_state_dicts(
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    *,
    method: str = "ties",
    semantics: str | None = None,
    dtype: str | None = None,
    out_dtype: str | None = None,
    parameters: Mapping[str, object] | None = None,
    expert_parameters: Sequence[Mapping[str, object]] | None = None,
    elect_from: Mapping[str, Tensor] | None = None,
    kernel: KernelKind = RunOptions.kernel,
    threads: int | None = None,
    **options: Unpack[OptionKeywords],
) -> dict[str, Tensor]:
    """Merge tensors in memory, with the semantics and the bytes of `merge`.

    base, experts, elect_from: name -> CPU tensor. parameters, expert_parameters, options: as in a recipe's
    `parameters`, under each model, and in its `ties_dist:` block. Returns name -> tensor of the base's dtype, or of
    `out_dtype`.
    """
    names = [f"memory/expert-{i}" for i in range(len(experts))]
    given = expert_parameters or [{}] * len(experts)
    if len(given) != len(experts):
        raise RecipeError(f"expert_parameters has {len(given)} entries for {len(experts)} experts; give one each.")
    block: dict[str, object] = dict(options) | ({"elect_from": "memory/elect-from"} if elect_from is not None else {})
    document: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": n, "parameters": dict(p)} for n, p in zip(names, given, strict=True)],
        "parameters": dict(parameters or {}),
    }
    document |= {"base_model": "memory/base"} if base is not None else {}
    document |= {"ties_dist": block} if block else {}
    document |= {key: value for key, value in (("dtype", dtype), ("out_dtype", out_dtype)) if value}
    recipe = load_recipe(document, methods=METHODS, semantics=semantics, fetch=lambda location: Path(location.text))
    named = {"memory/base": base, **dict(zip(names, experts, strict=True)), "memory/elect-from": elect_from}
    models = [str(reference.path) for reference in models_of(recipe)]
    opened = _open({name: tensors for name, tensors in named.items() if tensors is not None}, models)
    chosen = RunOptions(threads=threads, kernel=kernel)
    job = assemble(recipe, opened, models, chosen)
    readers = {
        m.path: beside_base(c.opened, opened[0].opened)
        for m, c in zip((job.plan.base, *job.plan.experts, *job.plan.extras), opened, strict=True)
    }
    writer = MemoryWriter()
    for shard in job.plan.layout.shards:
        writer.create(shard.name, shard.size)
    worker = Worker(job.plan, lambda model: readers[model.path], kernel, KernelStore(job.resources.kernel_cache))
    Passes(
        plan=job.plan,
        step=MergeStep(worker, writer),
        executor=LocalExecutor(job.plan.threads),
        keeper=Forgetful(),
        progress=LogProgress(),
    ).run()
    return _tensors(job, writer, base if base is not None else experts[0])


_HEADER_NAMES = {torch_dtype(name): header for header, name in TORCH_NAMES.items()}


def _open(given: Mapping[str, Mapping[str, Tensor]], models: Sequence[str]) -> list[Checkpoint]:
    """One for each of `models`; who is named twice is opened once."""
    held = {name: _in_memory(name.removeprefix("memory/"), tensors) for name, tensors in given.items()}
    return [held[name] for name in models]


def _in_memory(name: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A state dict as a checkpoint: each tensor is a file of its own."""
    entries, files = {}, {}
    for key, tensor in tensors.items():
        if tensor.dtype not in _HEADER_NAMES:
            raise RecipeError(f"{name}: tensor '{key}' has dtype {tensor.dtype}, which cannot be merged or copied.")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        files[key] = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        entries[key] = TensorEntry(
            name=key,
            dtype=_HEADER_NAMES[tensor.dtype],
            shape=tuple(tensor.shape),
            file=key,
            start=0,
            stop=tensor.numel() * tensor.element_size(),
        )
    return Checkpoint(
        name=name,
        opened=OpenFiles((MemoryReader(files),)),
        shards=("memory",),
        files={},
        tensors=entries,
        parameters=parameters_of(entries),
        config=None,
        metadata={},
        index_file=None,
        index_metadata={},
        notes=(),
    )


def _tensors(job: Job, writer: MemoryWriter, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    dtypes = {name: dtype for dtype, name in _HEADER_NAMES.items()}
    for shard in job.plan.layout.shards:
        for spec, start in zip(shard.tensors, shard.starts, strict=True):
            content = memoryview(writer.files[shard.name])[start : start + spec.nbytes]
            flat = (
                torch.frombuffer(content, dtype=dtypes[spec.dtype])
                if spec.nbytes
                else torch.empty(0, dtype=dtypes[spec.dtype])
            )
            merged[spec.name] = flat.reshape(spec.shape)
    return {name: merged[name] for name in base}
