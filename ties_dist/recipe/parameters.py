"""The numbers of a draft: looked up per model, then in slice, module and recipe, then in what is the default.

mergekit's search, flattened once: a complete `Setting` for every expert and for the whole merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ties_dist.methods.parameter import Parameter
from ties_dist.recipe.draft import Draft
from ties_dist.recipe.mergekit import MERGEKIT_DENSITY, PARAMETERS
from ties_dist.recipe.options import PRESET_DEFAULTS
from ties_dist.recipe.spec import MethodSpec, has_presets
from ties_dist.recipe.values import Setting, constant, read_setting

NOTHING = Setting(cases=())


def read_parameters(draft: Draft, spec: MethodSpec) -> None:
    """A complete set for every expert, and the parameters that stand once for the whole merge."""
    written, shared = _read_scopes(draft, spec)
    own = [_read_settings(draft, e.parameters, f"{e.where}.parameters", spec, per_model=True) for e in draft.models]
    draft.expert_parameters = [{} for _ in draft.models]

    for parameter in spec.parameters:
        name = parameter.name
        fallback = shared.get(name, NOTHING).or_else(_default(draft, spec, parameter))
        places = [("parameters", written, fallback, draft.parameters)]
        if parameter.per_model:
            places = [
                (f"{e.where}.parameters", {*e.parameters, *written}, settings.get(name, NOTHING).or_else(fallback), t)
                for e, settings, t in zip(draft.models, own, draft.expert_parameters, strict=True)
            ]
        missing = []
        for where, given, setting, target in places:
            if setting.cases:
                target[name] = replace(setting, where=setting.where or f"{where}.{name}")
            elif name not in given and draft.options_valid:  # given but wrong was reported
                missing.append(f"{where}.{name}")
        if len(missing) > 1 and len(missing) == len(places):
            missing = [f"parameters.{name}"]
        draft.problems += [f"{where}: missing; {_why_required(draft, spec, parameter)}" for where in missing]


def _read_scopes(draft: Draft, spec: MethodSpec) -> tuple[set[str], dict[str, Setting]]:
    """What slice, module and recipe say, inner ones first: the names that stand there, and their settings."""
    written: set[str] = set()
    shared: dict[str, Setting] = {}
    for where, content in draft.parts.scopes:
        raw = draft.mapping(content, where)
        written |= raw.keys()
        for name, setting in _read_settings(draft, raw, where, spec, per_model=False).items():
            shared[name] = shared.get(name, NOTHING).or_else(setting)
    return written, shared


def _read_settings(
    draft: Draft, raw: Mapping[str, object], where: str, spec: MethodSpec, *, per_model: bool
) -> dict[str, Setting]:
    by_name = {p.name: p for p in spec.parameters}
    elsewhere = {p.name for each in draft.methods.values() for p in each.parameters}.union(PARAMETERS)
    settings = {}
    for key, value in raw.items():
        at = f"{where}.{key}"
        parameter = by_name.get(key)
        if parameter is None and key in elsewhere:
            draft.notes.append(f"{at} has no effect: {draft.method} has no such parameter, other methods have.")
        elif parameter is None:
            known = [p.name for p in spec.parameters if p.per_model or not per_model]
            draft.unknown(at, key, known)
        elif per_model and not parameter.per_model:
            draft.problems.append(f"{at}: {key} cannot differ between models; move it to the top-level `parameters`")
        elif setting := read_setting(value, parameter, at, draft.problems):
            settings[key] = setting
            if parameter.ignored:
                draft.notes.append(f"{at} has no effect{f': {parameter.note}' if parameter.note else ''}.")
    return settings


def _default(draft: Draft, spec: MethodSpec, parameter: Parameter) -> Setting | None:
    semantics, default = draft.options.semantics, parameter.default
    origin = f"default of {draft.method}"
    if has_presets(spec) and parameter.name in PRESET_DEFAULTS[semantics]:
        default, origin = PRESET_DEFAULTS[semantics][parameter.name], f"default of semantics {semantics}"
    elif default is None and parameter.name == "density" and semantics == "mergekit":
        default, origin = MERGEKIT_DENSITY, f"default of semantics {semantics}"
    if default is None:
        return None
    value = float(default) if parameter.kind == "float" else default
    return Setting(cases=((None, (value,)),), origins=(origin,))


def _why_required(draft: Draft, spec: MethodSpec, parameter: Parameter) -> str:
    semantics = draft.options.semantics
    if has_presets(spec) and parameter.name in PRESET_DEFAULTS[semantics]:
        return f"semantics '{semantics}' requires it for every expert"
    return f"{draft.method} requires it ({parameter.note})" if parameter.note else f"{draft.method} requires it"


def drop_empty(draft: Draft, spec: MethodSpec) -> None:
    """Leave out experts of which nothing is kept, density 0 throughout.

    But where mergekit's DARE divides by the sum of all weights: there such an expert has one.
    """
    if draft.options.semantics == "mergekit" and not has_presets(spec):
        return
    kept = []
    for entry, settings in zip(draft.models, draft.expert_parameters, strict=True):
        density = settings.get("density")
        if density is None or density.constant != 0:
            kept.append((entry, settings))
        else:
            draft.notes.append(f"{entry.where}: density 0 keeps nothing of it; the entry is left out.")
    if not kept and draft.models:
        draft.problems.append("parameters.density: 0 for every expert, so that nothing is left to merge")
    draft.models, draft.expert_parameters = [entry for entry, _ in kept], [settings for _, settings in kept]


def check_trim(draft: Draft) -> None:
    """What an option says of a parameter, and the other way round."""
    semantics = draft.options.semantics
    if draft.options.trim_scope == "model":
        _trim_by_tensor(draft)
    for settings in draft.expert_parameters:
        weight = settings.get("weight")
        negative = [value for value in weight.values if value < 0] if weight else []
        if weight and negative and semantics != "mergekit":
            draft.problems.append(
                f"{weight.where}: {negative[0]:g} is negative, which semantics '{semantics}' refuses; "
                "to subtract an expert use `merge_method: task_arithmetic`"
            )


def _trim_by_tensor(draft: Draft) -> None:
    """A threshold of the whole model has one density; where one varies, each tensor gets its own threshold."""
    densities = [settings["density"] for settings in draft.expert_parameters if "density" in settings]
    varying = [density.where for density in densities if density.constant is None]
    if varying and "trim_scope" in draft.given_options:
        draft.problems += [
            f"{where}: varies inside the model, but `trim_scope: model` has one threshold per expert; "
            "give one number, or set `ties_dist: {trim_scope: tensor}`"
            for where in varying
        ]
    elif varying:
        draft.options = draft.options.model_copy(update={"trim_scope": "tensor"})
        draft.notes.append(
            f"{varying[0]} varies inside the model, so every tensor is trimmed by itself (`trim_scope: tensor`): a "
            "threshold of the whole model has one density."
        )


def check_normalize(draft: Draft, spec: MethodSpec) -> None:
    """`normalize: false` is mergekit's word for `aggregate: sum`; a mean needs weights that do not cancel."""
    if "normalize" not in draft.parameters:
        return
    normalize = bool(draft.parameters["normalize"].constant)
    if "aggregate" in spec.options:
        given = any("normalize" in draft.mapping(content) for _, content in draft.parts.scopes)
        aggregate = draft.options.aggregate
        if given and normalize and aggregate == "sum":
            draft.problems.append("parameters.normalize: true contradicts `aggregate: sum`; give one of them")
        elif given and not normalize and "aggregate" in draft.given_options and aggregate != "sum":
            draft.problems.append(f"parameters.normalize: false means `aggregate: sum`, not '{aggregate}'")
        elif given and not normalize:
            draft.options = draft.options.model_copy(update={"aggregate": "sum"})
        draft.parameters["normalize"] = replace(
            draft.parameters["normalize"], cases=constant(draft.options.aggregate != "sum").cases
        )
    elif normalize and spec.operand == "weight":
        weights = [settings["weight"].constant for settings in draft.expert_parameters if "weight" in settings]
        fixed = [weight for weight in weights if weight is not None]
        if fixed and len(fixed) == len(draft.models) and abs(sum(fixed)) < 1e-8:
            draft.problems.append(
                f"models: the weights sum to {sum(fixed):g}; a weighted mean needs a sum away from 0 "
                "(`normalize: false` takes the plain sum)"
            )
