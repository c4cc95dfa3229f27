"""Which models a recipe lists: under `models`, or in one slice that takes all of their layers, also inside `modules`.

mergekit writes `models` as such a slice itself, before it plans; parameters of a slice and of a module stand between
those of a model and those of the recipe. Several slices stack layers, which is another thing than merging models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as short

from ties_dist.messages import nearest

_UNSUPPORTED = "which ties_dist does not support yet"
_UNSTACKED = f"{_UNSUPPORTED}; one slice over all layers of its models is read as `models`"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One entry of `models`, or of a slice's `sources`, as written; `layer_range` is not in it."""

    where: str
    entry: object


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a recipe lists. scopes: key paths and contents of what holds for all models, inner ones first.

    base: key path and content. layers: how many each model must have; None where the recipe does not say.
    """

    sources: tuple[Source, ...] = ()
    scopes: tuple[tuple[str, object], ...] = ()
    base: tuple[str, object] = ("base_model", None)
    layers: int | None = None


def read_parts(document: Mapping[str, object], problems: list[str]) -> Parts:
    """What a recipe lists. What is wrong with the way in which it does goes to `problems`."""
    outer = Parts(scopes=(("parameters", document.get("parameters")),), base=("base_model", document.get("base_model")))
    given = [key for key in ("models", "slices", "modules") if document.get(key) is not None]
    if len(given) > 1:
        problems.append(f"{' and '.join(given)}: models are listed once; give one of them")
    elif given == ["models"]:
        return replace(outer, sources=_models(document["models"], "models", problems))
    elif given == ["slices"]:
        return _slice(document["slices"], "slices", outer, document.get("merge_method"), problems)
    elif given == ["modules"]:
        return _modules(document["modules"], outer, document.get("merge_method"), problems)
    return outer


def _models(listed: object, where: str, problems: list[str]) -> tuple[Source, ...]:
    if not isinstance(listed, (list, tuple)):
        problems.append(f"{where}: must be a list of entries with a `model` key, found {short(listed)}")
        return ()
    return tuple(Source(where=f"{where}[{i}]", entry=entry) for i, entry in enumerate(listed))


def _modules(modules: object, outer: Parts, method: object, problems: list[str]) -> Parts:
    """Parts of a model merged in one way are the whole model merged in that way."""
    if not isinstance(modules, Mapping) or not modules:
        problems.append(f"modules: must be a mapping of names to what they list, found {short(modules)}")
        return outer
    name, module = next(iter(modules.items()))
    where = f"modules.{name}"
    if any(other != module for other in modules.values()):
        problems.append(f"modules: {', '.join(map(str, modules))} are merged in different ways, {_UNSUPPORTED}")
        return outer
    if not isinstance(module, Mapping):
        problems.append(f"{where}: must be a mapping with `slices` or `models`, found {short(module)}")
        return outer
    _refuse_unknown(module, ("slices", "models", "parameters"), where, problems)
    listed = [key for key in ("models", "slices") if module.get(key) is not None]
    if len(listed) != 1:
        problems.append(f"{where}: needs one of `slices` and `models`")
        return outer
    inner = replace(outer, scopes=((f"{where}.parameters", module.get("parameters")), *outer.scopes))
    if listed == ["models"]:
        return replace(inner, sources=_models(module["models"], f"{where}.models", problems))
    return _slice(module["slices"], f"{where}.slices", inner, method, problems)


def _slice(slices: object, where: str, outer: Parts, method: object, problems: list[str]) -> Parts:
    """One slice whose sources take the same layers from the first on; whether these are all, the models tell."""
    if not isinstance(slices, (list, tuple)) or not slices:
        problems.append(f"{where}: must be a list of entries with a `sources` key, found {short(slices)}")
        return outer
    if len(slices) > 1:
        problems.append(f"{where}: {len(slices)} of them stack layers of models, {_UNSTACKED}")
        return outer
    at, one = f"{where}[0]", slices[0]
    if not isinstance(one, Mapping) or not isinstance(one.get("sources"), (list, tuple)):
        problems.append(f"{at}: must be a mapping with a list of `sources`, found {short(one)}")
        return outer
    _refuse_unknown(one, ("sources", "base_model", "parameters", "merge_method"), at, problems)
    if one.get("merge_method") not in (None, method):
        problems.append(f"{at}.merge_method: {short(one['merge_method'])} is not the recipe's; one method merges all")
    ranges = [_range(source, f"{at}.sources[{i}]", problems) for i, source in enumerate(one["sources"])]
    taken = {each for each in ranges if each is not None}
    if len(taken) > 1 or any(first != 0 for first, _ in taken):
        told = ", ".join(f"[{first}, {end}]" for first, end in sorted(taken))
        problems.append(f"{at}: layers {told} are a part of a model's, {_UNSTACKED}")
    entries = [
        {key: value for key, value in source.items() if key != "layer_range"} if isinstance(source, Mapping) else source
        for source in one["sources"]
    ]
    own_base = one.get("base_model")
    return replace(
        outer,
        sources=_models(entries, f"{at}.sources", problems),
        scopes=((f"{at}.parameters", one.get("parameters")), *outer.scopes),
        base=(f"{at}.base_model", own_base) if own_base is not None else outer.base,
        layers=next(iter(taken))[1] if len(taken) == 1 else None,
    )


def _range(source: object, where: str, problems: list[str]) -> tuple[int, int] | None:
    """First layer and end of a source's `layer_range`."""
    written = source.get("layer_range") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping):
        return None  # told with the models
    if isinstance(written, (list, tuple)) and len(written) == 2:
        first, end = written
        if isinstance(first, int) and isinstance(end, int) and 0 <= first < end:
            return first, end
    problems.append(f"{where}.layer_range: must be two whole numbers, first layer and end, found {short(written)}")
    return None


def _refuse_unknown(found: Mapping[object, object], known: Sequence[str], where: str, problems: list[str]) -> None:
    problems += [f"{where}.{key}: unknown key; {nearest(str(key), known)}" for key in found if key not in known]
