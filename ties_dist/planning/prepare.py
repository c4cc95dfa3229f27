"""From a recipe to a plan: opens every header, compares, lays out. Everything that headers can tell is found here."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from ties_dist.adapters.merging import align, merged_config, on_factors
from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.dtypes import HEADER_DTYPES
from ties_dist.errors import CheckpointError, RecipeError
from ties_dist.inputs.congruence import MergeSet, compare
from ties_dist.inputs.opening import compare_bytes, open_all, stamp_inputs
from ties_dist.messages import listing, readable
from ties_dist.methods.base import Method
from ties_dist.methods.known import known_methods
from ties_dist.planning.layout import SINGLE_NAME, TensorSpec, lay_out
from ties_dist.planning.memory import GPU_BYTES, PROCESS_BYTES, UNITS_AROUND, fit_matrices, fit_unit_bytes
from ties_dist.planning.options import Resources
from ties_dist.planning.plan import Matrix, MergePlan, fingerprint
from ties_dist.recipe.recipe import ModelReference, Recipe, layer_depths, load_recipe
from ties_dist.recipe.references import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Location, fetch
from ties_dist.statistics.collected import ExpertStatistics, how_to_collect
from ties_dist.values.inputs import Input, Source
from ties_dist.values.numbers import TensorNumbers


@dataclass(frozen=True, kw_only=True)
class Job:
    """A merge that is ready to run. notes: what to tell the user."""

    recipe: Recipe
    plan: MergePlan
    base: Checkpoint
    base_path: Path
    merge_set: MergeSet
    notes: tuple[str, ...]
    resources: Resources
    max_shard_bytes: int | None
    companions: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the output that are made, not copied."""

    @cached_property
    def stamps(self) -> Mapping[str, tuple[int, int]]:
        """Size and time of every input file, as they were when first asked for."""
        return stamp_inputs(self.plan.models)


def prepare(
    recipe: Path | str | Mapping[str, object],
    *,
    semantics: str | None = None,
    resources: Resources | None = None,
    max_shard_bytes: int | None = None,
    root: Path | None = None,
    fetch: Callable[[Location], Path] = fetch,
    allow_external_methods: bool = False,
) -> Job:
    """Read a recipe and all headers. root: see `load_recipe`. fetch: finds a model.

    allow_external_methods: whether `merge_method: package.module:Class` may import and run that.

    Raises RecipeError, CheckpointError, PlanError.
    """
    resources = resources or Resources()
    _allow_many_files()
    methods = known_methods(allow_external=allow_external_methods)
    chosen = load_recipe(recipe, methods=methods, semantics=semantics, root=root, fetch=fetch)
    references = models_of(chosen)
    opened, identities = open_all(references, resources.backend)
    return assemble(chosen, opened, identities, resources, max_shard_bytes)


def _allow_many_files() -> None:
    """Every shard of every model stays open: 8 models of 90 shards exceed the usual soft limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def models_of(recipe: Recipe) -> list[ModelReference]:
    """What is read, in this order: what plays the base's part, the experts, the model whose signs are taken, the
    experts' statistics."""
    base = recipe.base or replace(recipe.experts[0].model, adapter=None)
    oracle = [recipe.elect_from] if recipe.elect_from else []
    return [base, *(e.model for e in recipe.experts), *oracle, *(e.statistics for e in recipe.experts if e.statistics)]


def assemble(
    recipe: Recipe,
    opened: Sequence[Checkpoint],
    identities: Sequence[str],
    resources: Resources,
    max_shard_bytes: int | None = None,
) -> Job:
    """The job of a recipe whose models are open, in the order of `models_of`. Raises CheckpointError, PlanError."""
    method = cast("type[Method]", recipe.spec).from_options(
        {**recipe.options.model_dump(), "elect_from": recipe.elect_from},
        {name: s.constant for name, s in recipe.parameters.items() if s.constant is not None},
    )
    companions, into_adapter = {}, recipe.options.output == "adapter"
    if into_adapter:
        adapters = opened[1:]
        opened = align(adapters, len(recipe.experts))
        companions[ADAPTER_CONFIG] = merged_config(adapters[: len(recipe.experts)])
        identities = [opened[0].name, *identities[1:]]
    base, count = opened[0], len(recipe.experts)
    models = [_input(*each) for each in zip(opened, models_of(recipe), identities, strict=True)]
    stores = _statistics(recipe, method, identities)
    # Gram matrices have shapes of their own; whatever else is read looks like the base.
    alike = len(opened) - (count if method.statistics == "gram" else 0)
    merge_set = compare(
        base,
        opened[1:alike],
        exclude=recipe.options.exclude,
        vocab=recipe.options.vocab,
        non_float=recipe.options.non_float,
        operand=method.operand,
    )
    compare_bytes(opened[:alike], merge_set)
    specs = [
        TensorSpec(
            name=t.name,
            dtype=HEADER_DTYPES.get(recipe.output_dtype or "", t.dtype) if t.action == "merge" else t.dtype,
            shape=t.shape,
            merged=t.action == "merge",
            source=t.source,
            counted=t.counted,
        )
        for t in merge_set.tensors
    ]
    shard_of = {name: ADAPTER_WEIGHTS if into_adapter else entry.file for name, entry in base.tensors.items()}
    # peft reads adapters of one file.
    shard_bytes, single = (None, ADAPTER_WEIGHTS) if into_adapter else (max_shard_bytes, SINGLE_NAME)
    layout = lay_out(specs, shard_of, shard_bytes, single=single)
    unit_bytes, buffers = fit_unit_bytes(
        asked=resources.unit_bytes,
        budget=resources.memory_budget,
        threads=resources.thread_count,
        # A slot has a pinned copy of its unit.
        units=(2 * resources.gpu_slots or resources.thread_count) + UNITS_AROUND,
        outputs=resources.outputs,
        method=method,
        tensors=specs,
        operands=models[:alike] if method.operand == "delta" else models[1:alike],
    )
    matrices = _matrices(specs, stores) if method.statistics == "gram" else {}
    solvers, peak = fit_matrices(
        matrices, budget=resources.memory_budget, threads=resources.thread_count, buffers=buffers
    )
    plan = MergePlan(
        method=method,
        layout=layout,
        base=models[0],
        experts=tuple(models[1 : 1 + count]),
        extras=tuple(models[1 + count : alike]),
        numbers=_numbers(recipe, method, specs),
        fingerprint=fingerprint(recipe.canonical(), layout, models),
        unit_bytes=unit_bytes,
        threads=resources.thread_count,
        memory_budget=resources.memory_budget,
        projected_bytes=PROCESS_BYTES + (GPU_BYTES if resources.gpu_slots else 0) + peak,
        grams=tuple(models[alike:]),
        matrices=matrices,
        solvers=solvers,
    )
    return Job(
        recipe=recipe,
        plan=plan,
        base=base,
        base_path=models_of(recipe)[0].path,
        merge_set=merge_set,
        notes=(
            *recipe.notes,
            *dict.fromkeys(note for checkpoint in opened for note in checkpoint.notes),
            *merge_set.notes,
            *_equal_inputs(models, count, method),
            *_whole(matrices, solvers),
        ),
        max_shard_bytes=max_shard_bytes,
        resources=resources,
        companions=companions,
    )


def _statistics(recipe: Recipe, method: Method, identities: Sequence[str]) -> list[ExpertStatistics]:
    """The experts' stores, if the method needs any.

    Raises CheckpointError where one is of another kind, or of another checkpoint than its expert.
    """
    stores, problems = [], []
    for expert, identity in zip(recipe.experts, identities[1:], strict=False):
        if expert.statistics is not None and method.statistics is not None:
            stores.append(store := ExpertStatistics.open(expert.statistics.path))
            if problem := store.check(method.statistics, identity, name=expert.model.text):
                problems.append(problem)
    if problems:
        raise CheckpointError(listing("statistics that are not of these models:", problems))
    return stores


def _matrices(specs: Sequence[TensorSpec], stores: Sequence[ExpertStatistics]) -> dict[str, Matrix]:
    """Tensors that are merged whole: those for which every expert's store has a Gram matrix.

    Raises CheckpointError where a matrix does not fit its weight, or none fits any.
    """
    problems, matrices = [], {}
    for tensor in specs:
        found = [s.arrays[tensor.source] for s in stores if tensor.source in s.arrays]
        if not tensor.counted or len(found) < len(stores):
            continue
        if len(tensor.shape) != 2 or len({f.transposed for f in found}) > 1:
            problems.append(f"{tensor.source}: {tensor.shape} is no weight of a linear layer of all models")
            continue
        outputs, inputs = reversed(tensor.shape) if found[0].transposed else tensor.shape
        problems += [
            f"{tensor.source}: takes {inputs:,} inputs, a Gram matrix is {f.shape}"
            for f in found
            if f.shape != (inputs,) * 2
        ]
        matrices[tensor.source] = Matrix(
            inputs=inputs, outputs=outputs, transposed=found[0].transposed, dtype=tensor.dtype
        )
    if problems:
        raise CheckpointError(listing("Gram matrices that do not fit their weights:", problems))
    if not matrices:
        raise CheckpointError(
            f"no tensor has a Gram matrix in all of {', '.join(str(s.path) for s in stores)}. "
            f"{how_to_collect('', 'gram')}"
        )
    return matrices


def _whole(matrices: Mapping[str, Matrix], solvers: int) -> list[str]:
    if not matrices:
        return []
    largest = max(matrices.values(), key=lambda m: m.work_bytes)
    return [
        f"{len(matrices):,} matrices are merged whole, {solvers} at a time; the largest ({largest.outputs:,} x "
        f"{largest.inputs:,}) needs {readable(largest.work_bytes)} of memory."
    ]


def _equal_inputs(models: Sequence[Input], count: int, method: Method) -> list[str]:
    """What to say of experts that look like the base or like each other: headers, sizes and sampled pages agree."""
    base, experts, notes = models[0], models[1 : 1 + count], []
    for i, expert in enumerate(experts):
        if method.operand == "delta" and expert.identity == base.identity:
            notes.append(f"expert '{expert.name}' looks equal to the base: its delta is zero.")
        if twin := next((e.name for e in experts[:i] if e.identity == expert.identity), None):
            notes.append(f"experts '{twin}' and '{expert.name}' look equal: one model counts twice.")
    return notes


def _input(checkpoint: Checkpoint, reference: ModelReference, identity: str) -> Input:
    return Input(
        name=reference.name,
        path=str(reference.path.absolute()),
        adapter=str(reference.adapter.absolute()) if reference.adapter is not None else None,
        tensors={name: Source(file=e.file, start=e.start, dtype=e.dtype) for name, e in checkpoint.tensors.items()},
        identity=identity,
    )


def _numbers(recipe: Recipe, method: Method, tensors: Sequence[TensorSpec]) -> dict[str, TensorNumbers]:
    """The recipe's numbers for every merged tensor; all tensors share one object where nothing varies."""
    merged = [t.source for t in tensors if t.merged]
    problems = []
    settings = [
        *recipe.parameters.values(),
        *(setting for expert in recipe.experts for setting in expert.parameters.values()),
    ]
    for setting in settings:
        problems += [
            f"{setting.where}: filter '{pattern}' is part of no merged tensor's name"
            for pattern in setting.unmatched(merged)
        ]
    if problems:
        raise RecipeError(listing("filters that match nothing:", problems, "Correct or remove them."))
    depths = layer_depths(merged)
    by_tensor = recipe.options.output == "adapter"
    varies = by_tensor or any(setting.constant is None for setting in settings)
    numbers: dict[str, TensorNumbers] = {}
    failures: dict[str, None] = {}
    for name in merged:
        if numbers and not varies:
            numbers[name] = next(iter(numbers.values()))
            continue
        try:
            numbers[name] = TensorNumbers(
                parameters={k: s.at(name, depths[name]) for k, s in recipe.parameters.items()},
                experts=tuple({k: s.at(name, depths[name]) for k, s in e.parameters.items()} for e in recipe.experts),
            )
            if by_tensor:
                numbers[name] = on_factors(numbers[name], name)
            method.check(numbers[name].experts)
        except (RecipeError, ValueError) as error:
            failures[str(error)] = None
    if failures:
        raise RecipeError(listing("the recipe's numbers do not fit:", list(failures)))
    return numbers
