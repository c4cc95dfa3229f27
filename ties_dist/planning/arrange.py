"""The opened models of a recipe by the part they play: nobody counts positions in a list afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ties_dist.adapters.merging import align, merged_config
from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.errors import CheckpointError
from ties_dist.messages import listing
from ties_dist.methods.base import Method
from ties_dist.recipe.recipe import ModelReference, Recipe
from ties_dist.recipe.references import ADAPTER_CONFIG
from ties_dist.statistics.collected import ExpertStatistics
from ties_dist.values.inputs import Input


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """One model: its catalogue, and what of it travels."""

    catalogue: Checkpoint
    input: Input


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is read. base: what plays its part. extras: whose signs are taken, and Fisher diagonals; grams: per expert.

    stores: the experts' statistics, if the method needs any. companions: files of the output that follow from the
    inputs. into_adapter: whether adapters are merged with each other.
    """

    base: OpenModel
    experts: tuple[OpenModel, ...]
    extras: tuple[OpenModel, ...]
    grams: tuple[OpenModel, ...]
    stores: tuple[ExpertStatistics, ...]
    into_adapter: bool = False
    companions: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def alike(self) -> tuple[OpenModel, ...]:
        """All that looks like the base; Gram matrices have shapes of their own."""
        return (self.base, *self.experts, *self.extras)

    @property
    def all(self) -> tuple[OpenModel, ...]:
        return (*self.alike, *self.grams)


def models_of(recipe: Recipe) -> list[ModelReference]:
    """What is read, in this order: what plays the base's part, the experts, the model whose signs are taken, the
    experts' statistics."""
    base = recipe.base or replace(recipe.experts[0].model, adapter=None)
    oracle = [recipe.elect_from] if recipe.elect_from else []
    return [base, *(e.model for e in recipe.experts), *oracle, *(e.statistics for e in recipe.experts if e.statistics)]


def arrange(recipe: Recipe, method: Method, opened: Sequence[Checkpoint], identities: Sequence[str]) -> Inputs:
    """opened: in the order of `models_of`. Raises CheckpointError."""
    count, companions, into_adapter = len(recipe.experts), {}, recipe.options.output == "adapter"
    if into_adapter:
        adapters = opened[1:]
        opened = align(adapters, count)
        companions[ADAPTER_CONFIG] = merged_config(adapters[:count])
        identities = [opened[0].name, *identities[1:]]
    base, *others = (
        OpenModel(catalogue=catalogue, input=_input(catalogue, reference, identity))
        for catalogue, reference, identity in zip(opened, models_of(recipe), identities, strict=True)
    )
    rest = others[count:]
    grams = rest[len(rest) - count :] if method.needs.statistics == "gram" else []
    return Inputs(
        base=base,
        experts=tuple(others[:count]),
        extras=tuple(rest[: len(rest) - len(grams)]),
        grams=tuple(grams),
        stores=tuple(_statistics(recipe, method, identities[1:])),
        into_adapter=into_adapter,
        companions=companions,
    )


def _input(catalogue: Checkpoint, reference: ModelReference, identity: str) -> Input:
    return Input(
        name=reference.name,
        path=str(reference.path.absolute()),
        adapter=str(reference.adapter.absolute()) if reference.adapter is not None else None,
        views={name: parameter.view for name, parameter in catalogue.parameters.items()},
        identity=identity,
    )


def _statistics(recipe: Recipe, method: Method, identities: Sequence[str]) -> list[ExpertStatistics]:
    """The experts' stores, if the method needs any. identities: of the experts, and of what follows them.

    Raises CheckpointError where one is of another kind, or of another checkpoint than its expert.
    """
    stores, problems = [], []
    for expert, identity in zip(recipe.experts, identities, strict=False):
        if expert.statistics is not None and method.needs.statistics is not None:
            stores.append(store := ExpertStatistics.open(expert.statistics.path))
            if problem := store.check(method.needs.statistics, identity, name=expert.model.text):
                problems.append(problem)
    if problems:
        raise CheckpointError(listing("statistics that are not of these models:", problems))
    return stores
