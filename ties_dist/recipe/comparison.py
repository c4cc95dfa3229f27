"""What mergekit 0.1.5 would do differently with a recipe that is valid here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ties_dist.recipe.draft import Draft
from ties_dist.recipe.mergekit import METHODS
from ties_dist.recipe.options import MERGEKIT_WOULD, PRESETS
from ties_dist.recipe.references import spell
from ties_dist.recipe.spec import has_presets


def differences(draft: Draft) -> list[str]:
    """What mergekit would do differently with a valid recipe, each said after "would"."""
    assert draft.spec is not None
    if draft.method not in METHODS:
        return [f"refuse it: it has no method {draft.method}"]
    return [*_refusals(draft), *_other_arithmetic(draft)]


def _refusals(draft: Draft) -> Iterator[str]:
    assert draft.spec is not None
    if any(p.name == "weight" for p in draft.spec.parameters):
        for entry, settings in zip(draft.models, draft.expert_parameters, strict=True):
            if settings["weight"].origins[0].startswith("default"):
                yield f"refuse it: {entry.where} has no weight, which it requires"
    locations = [entry.location for entry in draft.models]
    yield from (
        f"refuse it: {entry.where} is listed before, and it takes a model once"
        for i, entry in enumerate(draft.models)
        if entry.location in locations[:i]
    )
    if draft.parts.base[1] is not None and draft.parts.layers is not None and not _lists_base(draft):
        yield "refuse it: the slice does not list its base_model"
    if draft.options.output == "adapter":
        yield "refuse it: it does not merge adapters with each other"
    if _base_is_apart(draft) and draft.method == "passthrough":
        yield "refuse it: it takes base_model for one more model, and passthrough has one"


def _lists_base(draft: Draft) -> bool:
    base = spell(draft.parts.base[1])
    entries = (source.entry for source in draft.parts.sources)
    return any(spell(entry.get("model")) == base for entry in entries if isinstance(entry, Mapping))


def _base_is_apart(draft: Draft) -> bool:
    """Whether a base is named that is none of the models of a method on weights."""
    assert draft.spec is not None
    listed = any(entry.location == draft.base for entry in draft.models)
    return draft.base is not None and draft.spec.operand == "weight" and not listed


def _other_arithmetic(draft: Draft) -> Iterator[str]:
    assert draft.spec is not None
    options = draft.options
    if has_presets(draft.spec):
        for name, words in MERGEKIT_WOULD.items():
            if getattr(options, name) != PRESETS["mergekit"].get(name, type(options).model_fields[name].default):
                yield words
    if draft.method == "linear" and _base_is_apart(draft):
        yield "merge base_model, too, with the global weight, and refuse it where there is none"
    if draft.method.startswith("dare_"):
        yield "draw other random numbers, and other ones each time unless `--random-seed` is given"
        if draft.parameters["rescale"].constant and options.rescale_by == "density":
            yield "rescale what is left of a tensor to the sum of magnitudes it had, not by 1/density"
    arithmetic = "the type that the models are stored in" if draft.dtype is None else draft.dtype
    if draft.dtype != "float32" and draft.method != "passthrough":
        yield f"do its arithmetic in {arithmetic}, not in float32"
    if block := sorted(draft.given_options - {"semantics"}):
        yield f"read over `ties_dist:` ({', '.join(block)})"
