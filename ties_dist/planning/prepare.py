"""From a recipe to a plan: opens every header, compares, lays out. Everything that headers can tell is found here."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ties_dist.adapters.merging import on_factors
from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.dtypes import HEADER_DTYPES
from ties_dist.errors import CheckpointError, RecipeError
from ties_dist.inputs.aliases import Aliases, find_aliases
from ties_dist.inputs.companions import Companions, find_companions
from ties_dist.inputs.congruence import MergeSet, compare, compare_bytes
from ties_dist.inputs.equality import Equality, Unproven
from ties_dist.inputs.opening import OpenReader, contents_of, open_all, tokenizer_of
from ties_dist.inputs.stamps import see, stamp_inputs
from ties_dist.inputs.tokenizers import Tokenizer
from ties_dist.messages import listing, readable
from ties_dist.methods.base import Method
from ties_dist.methods.known import known_methods
from ties_dist.planning.admission import admit, method_of, unfit_numbers
from ties_dist.planning.arrange import Inputs, arrange, models_of
from ties_dist.planning.fitting import Fitting, check_layers, compared_models
from ties_dist.planning.layout import Layout, TensorSpec, lay_out
from ties_dist.planning.memory import fit
from ties_dist.planning.options import Resources, RunOptions
from ties_dist.planning.plan import Matrix, MergePlan, fingerprint
from ties_dist.recipe.document import RecipeSource
from ties_dist.recipe.recipe import Recipe, Setting, layer_depths, load_recipe
from ties_dist.recipe.references import ADAPTER_WEIGHTS, Location, fetch
from ties_dist.statistics.answers import FOLDER, Answers
from ties_dist.statistics.collected import ExpertStatistics, how_to_collect
from ties_dist.storage.readers import open_reader
from ties_dist.values.inputs import Sight, Stamp
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
    options: RunOptions
    resources: Resources
    companions: Mapping[str, bytes] = field(default_factory=dict)
    """Files of the output that are made, not copied."""
    copied: Companions = field(default_factory=Companions)
    """Files of the base that go beside the merged weights."""
    unproven: tuple[Unproven, ...] = ()
    """What the plan takes for one parameter after a look at some pages; empty where it was all compared."""

    @property
    def stamps(self) -> Mapping[str, Stamp]:
        """Size, times and inode of every input file, as they are now."""
        return stamp_inputs(self.plan.models)

    @cached_property
    def sight(self) -> Sight:
        """What the input files looked like when first asked for."""
        return see(self.plan.models)


def prepare(
    recipe: RecipeSource,
    options: RunOptions | None = None,
    *,
    resources: Resources | None = None,
    root: Path | None = None,
    fetch: Callable[[Location], Path] = fetch,
    reader: OpenReader = open_reader,
    prove: bool = True,
    publishes: bool = True,
) -> Job:
    """Read a recipe and all headers. root: see `load_recipe`. fetch, reader: find and open a model.

    resources: of the worker processes, where the options alone do not say them. prove: whether what looks like one
    parameter under two names is compared byte by byte. publishes: whether there will be an output, in which files stand
    beside the weights.
    Raises RecipeError, CheckpointError, PlanError.
    """
    options = options or RunOptions()
    _allow_many_files()
    methods = known_methods(allow_external=options.allow_external_methods)
    chosen = load_recipe(
        recipe, methods=methods, semantics=options.semantics, seed=options.random_seed, root=root, fetch=fetch
    )
    references = models_of(chosen)
    opened, identities = open_all(references, options.read_backend, reader)
    kept = Answers(options.cache / FOLDER)
    equality = Equality(kept=kept, contents=contents_of(references, identities), proves=prove)
    tokenizers = [tokenizer_of(reference) for reference in references[: compared_models(chosen)]]
    job = assemble(chosen.allowing(options.allow), opened, identities, options, resources, equality, tokenizers)
    copied = _copied(chosen, opened) if publishes else Companions()
    return replace(job, copied=copied, notes=(*job.notes, *copied.notes))


def _copied(recipe: Recipe, opened: Sequence[Checkpoint]) -> Companions:
    """What stands beside the base, or, where adapters become an adapter, beside the first of these."""
    is_model = recipe.options.output == "model"
    models, place = models_of(recipe), 0 if is_model else 1
    return find_companions(
        models[place].path,
        name=models[place].name,
        modules=opened[place].modules,
        listed=recipe.options.companions,
        is_model=is_model,
    )


def _allow_many_files() -> None:
    """Every shard of every model stays open: 8 models of 90 shards exceed the usual soft limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def assemble(
    recipe: Recipe,
    opened: Sequence[Checkpoint],
    identities: Sequence[str],
    options: RunOptions,
    resources: Resources | None = None,
    equality: Equality | None = None,
    tokenizers: Sequence[Tokenizer] = (),
) -> Job:
    """The job of a recipe whose models are open, in the order of `models_of`. Raises CheckpointError, PlanError.

    tokenizers: of the models that are compared, in that order; none are known of models in memory.
    """
    check_layers(recipe, opened)
    method, resources, equality = method_of(recipe), resources or options.resources(), equality or Equality()
    aliases = _find_aliases(recipe, method, opened, equality)
    folded = {id(each): aliases.fold(each) for each in opened}
    fitting = Fitting(recipe, method, [folded[id(each)] for each in opened], tokenizers)
    inputs = arrange(recipe, method, fitting.opened, identities)
    merge_set = _compare(recipe, method, inputs, aliases, fitting)
    judged = fitting.judge(strict=options.strict)
    layout = _lay_out(recipe, merge_set, inputs, opened[0], options.max_shard_size)
    matrices = _matrices(layout.tensors, inputs.stores) if method.needs.statistics == "gram" else {}
    memory = fit(method, layout, [each.input for each in inputs.alike], matrices, resources)
    plan = MergePlan(
        method=method,
        layout=layout,
        base=inputs.base.input,
        experts=tuple(each.input for each in inputs.experts),
        extras=tuple(each.input for each in inputs.extras),
        grams=tuple(each.input for each in inputs.grams),
        matrices=matrices,
        numbers=_numbers(recipe, method, layout.tensors),
        fingerprint=fingerprint(recipe.canonical(), layout, [each.input for each in inputs.all]),
        threads=resources.thread_count,
        memory_budget=resources.memory_budget,
        unit_bytes=memory.unit_bytes,
        projected_bytes=memory.projected_bytes,
        solvers=memory.solvers,
    )
    return Job(
        recipe=recipe,
        plan=plan,
        base=inputs.base.catalogue,
        base_path=models_of(recipe)[0].path,
        merge_set=merge_set,
        notes=tuple(_notes(recipe, plan, inputs, merge_set, judged)),
        options=options,
        resources=resources,
        companions=inputs.companions,
        unproven=tuple(equality.unproven),
    )


def _find_aliases(recipe: Recipe, method: Method, opened: Sequence[Checkpoint], equality: Equality) -> Aliases:
    """Stores of statistics have the names of their models, and prove nothing; adapters' own tensors have one each."""
    if recipe.options.output == "adapter":
        return Aliases()
    models = opened[: compared_models(recipe)]
    return find_aliases(
        models,
        lambda i, left, right: equality(i, models[i], left, right),
        exclude=recipe.options.exclude,
        untie=recipe.options.tie_word_embeddings is False,
        kind="expert" if method.operand != "weight" else "model",
    )


def _compare(recipe: Recipe, method: Method, inputs: Inputs, aliases: Aliases, fitting: Fitting) -> MergeSet:
    """What is merged, once headers and the few bytes that must be equal were compared. Raises CheckpointError."""
    catalogues = [each.catalogue for each in inputs.alike]
    merge_set = compare(
        catalogues[0],
        catalogues[1:],
        exclude=recipe.options.exclude,
        non_float=recipe.options.non_float,
        operand=method.operand,
        aliases=aliases,
        explain=fitting.explain,
    )
    compare_bytes(catalogues, merge_set)
    return merge_set


def _lay_out(
    recipe: Recipe, merge_set: MergeSet, inputs: Inputs, base: Checkpoint, max_shard_bytes: int | None
) -> Layout:
    """The output's files, by what the base stores where; of an adapter one, as peft reads it."""
    dtype = HEADER_DTYPES.get(recipe.output_dtype or "")
    specs = [
        TensorSpec(
            name=t.name,
            dtype=dtype or t.dtype if t.action == "merge" else t.dtype,
            shape=t.shape,
            merged=t.action == "merge",
            source=t.source,
            counted=t.counted,
        )
        for t in merge_set.tensors
    ]
    if inputs.into_adapter:
        return lay_out(specs, dict.fromkeys((t.name for t in specs), ADAPTER_WEIGHTS), single=ADAPTER_WEIGHTS)
    stored = base.parameters
    shard_of = {t.name: (stored.get(t.name) or inputs.base.catalogue.parameters[t.source]).file for t in specs}
    return lay_out(specs, shard_of, max_shard_bytes)


def _notes(
    recipe: Recipe, plan: MergePlan, inputs: Inputs, merge_set: MergeSet, judged: Sequence[str]
) -> Iterator[str]:
    yield from recipe.notes
    yield from dict.fromkeys(note for each in inputs.all for note in each.catalogue.notes)
    yield from judged
    yield from merge_set.notes
    yield from _other_numbers(recipe, plan.tensors)
    yield from _equal_inputs(plan)
    yield from _of_moved(recipe, plan)
    yield from _whole(plan)
    yield from admit(plan)


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
            inputs=inputs,
            outputs=outputs,
            rows=tuple(f.rows for f in found),
            transposed=found[0].transposed,
            dtype=tensor.dtype,
        )
    if problems:
        raise CheckpointError(listing("Gram matrices that do not fit their weights:", problems))
    if not matrices:
        raise CheckpointError(
            f"no tensor has a Gram matrix in all of {', '.join(str(s.path) for s in stores)}. "
            f"{how_to_collect(kind='gram')}"
        )
    return matrices


def _of_moved(recipe: Recipe, plan: MergePlan) -> Iterator[str]:
    """What to say of densities that are shares of what differs from the base, where nobody asked for that."""
    rule = plan.needs.trim
    moved = [f"'{e.name}'" for i, e in enumerate(plan.experts) if rule is not None and rule.is_of_moved(i)]
    if moved and recipe.options.density_of == "auto":
        yield (
            f"the density of {', '.join(moved)} is a share of the entries that an adapter changes: a share of the "
            "whole model would trim nothing of it (`density_of: all` takes that)."
        )


def _whole(plan: MergePlan) -> Iterator[str]:
    if plan.matrices:
        largest = max(plan.matrices.values(), key=lambda m: m.work_bytes)
        yield (
            f"{len(plan.matrices):,} matrices are merged whole, {plan.solvers} at a time; the largest "
            f"({largest.outputs:,} x {largest.inputs:,}) needs {readable(largest.work_bytes)} of memory."
        )


def _other_numbers(recipe: Recipe, tensors: Sequence[TensorSpec]) -> Iterator[str]:
    """Where filters would give a parameter's other name another number than its canonical one, whose it has."""
    for setting in _settings(recipe):
        if setting.constant is None:
            for tensor in tensors:
                if tensor.merged and tensor.name != tensor.source:
                    own, taken = (_number(setting, name) for name in (tensor.name, tensor.source))
                    if own != taken:
                        yield f"{setting.where}: {tensor.name} has {taken}, as {tensor.source}, and not {own}"


def _number(setting: Setting, name: str) -> str:
    try:
        return f"{setting.at(name, 0.0):g}"
    except RecipeError:
        return "no value"


def _settings(recipe: Recipe) -> list[Setting]:
    own = (setting for expert in recipe.experts for setting in expert.parameters.values())
    return [*recipe.parameters.values(), *own]


def _equal_inputs(plan: MergePlan) -> Iterator[str]:
    """What to say of experts that look like the base or like each other: headers, sizes and sampled pages agree."""
    for i, expert in enumerate(plan.experts):
        if plan.method.operand != "weight" and expert.identity == plan.base.identity:
            yield f"expert '{expert.name}' looks equal to the base: its delta is zero."
        if twin := next((e.name for e in plan.experts[:i] if e.identity == expert.identity), None):
            yield f"experts '{twin}' and '{expert.name}' look equal: one model counts twice."


def _numbers(recipe: Recipe, method: Method, tensors: Sequence[TensorSpec]) -> dict[str, TensorNumbers]:
    """The recipe's numbers for every merged parameter; all share one object where nothing varies."""
    merged = [t.source for t in tensors if t.counted]
    problems = []
    settings = _settings(recipe)
    for setting in settings:
        problems += [
            f"{setting.where}: filter '{pattern}' is part of no merged tensor's name"
            for pattern in setting.unmatched([*merged, *(t.name for t in tensors if t.merged)])
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
        except RecipeError as error:
            failures[str(error)] = None
            continue
        if wrong := unfit_numbers(method, numbers[name].experts):
            failures[wrong] = None
    if failures:
        raise RecipeError(listing("the recipe's numbers do not fit:", list(failures)))
    return numbers
