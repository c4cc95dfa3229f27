"""What configs and tokenizers say of the models of a recipe, and which rows of their vocabularies take part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.errors import RecipeError
from ties_dist.inputs.compatibility import layer_counts, shape_differences
from ties_dist.inputs.congruence import Explanation
from ties_dist.inputs.names import is_vocabulary
from ties_dist.inputs.tokenizers import Tokenizer, compare_tokens
from ties_dist.inputs.verdict import Side, judge
from ties_dist.inputs.vocabulary import fit_rows, with_other_rows
from ties_dist.messages import listing
from ties_dist.methods.base import Method
from ties_dist.recipe.recipe import Recipe


def compared_models(recipe: Recipe) -> int:
    """How many of `models_of` are models like the base, itself included; adapters merged with each other are none."""
    if recipe.options.output == "adapter":
        return 0
    return 1 + len(recipe.experts) + (recipe.elect_from is not None)


class Fitting:
    """opened: all models of the recipe; those with other rows than the base have its number, where that is allowed."""

    def __init__(
        self, recipe: Recipe, method: Method, opened: Sequence[Checkpoint], tokenizers: Sequence[Tokenizer]
    ) -> None:
        self.recipe, self.method = recipe, method
        self.notes: list[str] = []
        count = compared_models(recipe)
        self._tokenizers = tokenizers or [Tokenizer({})] * count
        self.opened = [self._fit(opened[0], i, each) if 0 < i < count else each for i, each in enumerate(opened)]

    def judge(self, *, strict: bool) -> list[str]:
        """What to say of the models. Raises CheckpointError where they must not be merged."""
        if not (sides := list(self._sides())):
            return self.notes
        return [*self.notes, *judge(sides[0], sides[1:], allow=self.recipe.options.allow, strict=strict)]

    def explain(self) -> Explanation:
        """Which keys of configs explain other shapes, and whether tokens are the same."""
        sides = list(self._sides())
        found = [(side.label, shape_differences(sides[0].config, side.config)) for side in sides[1:]]
        lines = [f"{label}: config.json has {', '.join(keys)}" for label, keys in found if keys]
        foreign = [side.label for side in sides[1:] if _disagree(sides[0].tokenizer, side.tokenizer)]
        lines += [f"{label}: its tokenizer gives the same ids to other tokens" for label in foreign]
        return Explanation(lines=lines, rows_fit=not foreign)

    def _sides(self) -> Iterator[Side]:
        kind = "expert" if self.method.operand != "weight" else "model"
        count = compared_models(self.recipe)
        for i, (each, tokenizer) in enumerate(zip(self.opened[:count], self._tokenizers, strict=True)):
            if i == 0 or each is not self.opened[0]:
                yield Side(label=f"{kind} '{each.name}'", config=each.config, tokenizer=tokenizer)

    def _fit(self, base: Checkpoint, position: int, model: Checkpoint) -> Checkpoint:
        """Brought to the base's rows where the recipe says so, or where the tokenizers give the same ids to both."""
        wanted = [name for name in base.parameters if is_vocabulary(name)]
        names = with_other_rows(base, model, wanted)
        if not names or not (self.recipe.options.vocab == "base" or self._agree(position)):
            return model
        fitted, notes = fit_rows(base, model, names, prolong=self.method.operand != "weight")
        self.notes += notes
        return fitted

    def _agree(self, position: int) -> bool:
        if self.recipe.options.vocab == "error":
            return False
        found = compare_tokens(self._tokenizers[0], self._tokenizers[position])
        return found is not None and not found.refused


def check_layers(recipe: Recipe, models: Sequence[Checkpoint]) -> None:
    """A slice over all layers of its models is read as `models`. Raises RecipeError where it takes a part of them."""
    problems = [
        f"{model.name}: its config.json says {' and '.join(map(str, sorted(said)))}"
        for model in models[: compared_models(recipe)]
        if recipe.layers is not None and (said := layer_counts(model.config)) and recipe.layers not in said
    ]
    if problems:
        title = f"layer_range ends at {recipe.layers}, but these models have another number of layers:"
        advice = "Name all of their layers; a slice of a part of them is not supported yet."
        raise RecipeError(listing(title, list(dict.fromkeys(problems)), advice))


def _disagree(base: Tokenizer, other: Tokenizer) -> bool:
    found = compare_tokens(base, other)
    return found is not None and found.refused
