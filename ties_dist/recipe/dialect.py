"""mergekit's dialect, read strictly: a document in, a checked `Draft` out, every problem collected with its key path.

What mergekit ignores silently (misspelt keys, `density: 20`, a parameter in the wrong place) is a problem here, and
what ties_dist cannot do yet is refused by name. Nothing is downloaded: a draft only knows where its models are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short

from ties_dist.messages import nearest
from ties_dist.methods.parameter import Parameter
from ties_dist.recipe.options import COMMON_OPTIONS, PRESET_DEFAULTS, Options, complete_options, default_semantics_note
from ties_dist.recipe.references import Location, locate
from ties_dist.recipe.spec import MethodSpec, has_presets
from ties_dist.recipe.values import Setting, constant, read_setting

_TOP_LEVEL = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "ties_dist")
_MOST_MODELS = 1000
_DTYPES = ("float32", "float16", "bfloat16")
_OTHER_DTYPE = re.compile(r"u?int\d+|float(8.*|64|128)|double|bool|complex\d+")
"""Meant as written: no guess stands in for it."""
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# mergekit 0.1.5: config.MergeConfiguration, merge_methods/registry.py and the methods' own parameters.
_UNSUPPORTED_KEYS = ("slices", "modules", "tokenizer_source", "tokenizer", "chat_template")
_UNSUPPORTED_METHODS = (
    *("nuslerp", "multislerp", "nearswap", "passthrough", "arcee_fusion", "karcher", "sce", "breadcrumbs"),
    *("breadcrumbs_ties", "della", "della_linear", "ram", "ramplus_tl"),
)
_MERGEKIT_PARAMETERS = ("gamma", "epsilon", "select_topk", "scale")
_STRAY_KEYS = (
    *("name", "description", "output", "output_dir", "output_name", "output_path", "out_dir", "out_path"),
    *("hub_repo", "license", "author", "tags"),
)
"""Written by other tools beside what is merged; mergekit, too, reads over them."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One entry of `models`, as written but for its location (None where that was wrong)."""

    where: str
    location: Location | None
    parameters: Mapping[str, object]
    statistics: Location | None = None


@dataclass(kw_only=True)
class Draft:
    """A recipe on its way: what is understood so far, and everything that was wrong."""

    document: Mapping[str, object]
    methods: Mapping[str, MethodSpec]
    roots: tuple[Path, ...]
    """Where relative model paths start, in order."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    method: str = ""
    spec: MethodSpec | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    options: Options = field(default_factory=Options)
    given_options: frozenset[str] = frozenset()
    options_valid: bool = True
    """False: `options` is not what the user meant, so nothing is concluded from it."""
    base: Location | None = None
    elect_from: Location | None = None
    models: list[ModelEntry] = field(default_factory=list)
    expert_parameters: list[dict[str, Setting]] = field(default_factory=list)
    """One complete set for each of `models`."""
    parameters: dict[str, Setting] = field(default_factory=dict)


def read_draft(
    document: Mapping[str, object],
    *,
    methods: Mapping[str, MethodSpec],
    semantics: str | None,
    roots: tuple[Path, ...],
) -> Draft:
    """Everything that can be checked without a model's files. Without problems, every location and `spec` is set."""
    draft = Draft(document=document, methods=methods, roots=roots)
    _read_top_level(draft)
    before = len(draft.problems)
    _read_options(draft, semantics)
    draft.options_valid = len(draft.problems) == before
    _read_models(draft)
    if draft.spec is not None:
        _read_parameters(draft, draft.spec)
        if has_presets(draft.spec) and draft.options_valid:
            _check_trim(draft)
        _check_normalize(draft, draft.spec)
    return draft


def _read_top_level(draft: Draft) -> None:
    for key, value in draft.document.items():
        if key in ("tokenizer_source", "tokenizer") and _names_the_base(draft, value):
            draft.notes.append(f"{key}: the base's tokenizer is what the output has anyhow.")
        elif key in _UNSUPPORTED_KEYS:
            if value is not None:
                draft.problems.append(f"{key}: a mergekit feature that ties_dist does not support yet")
        elif key in _STRAY_KEYS:
            draft.notes.append(f"{key} has no effect: it says nothing of how models are merged.")
        elif key not in _TOP_LEVEL:
            draft.problems.append(f"{key}: unknown key; {_hint(draft, key, _TOP_LEVEL)}")

    method = draft.document.get("merge_method")
    if isinstance(method, str):
        draft.method, draft.spec = method, draft.methods.get(method)
    if method is None:
        draft.problems.append(f"merge_method: missing; known: {', '.join(draft.methods)}")
    elif draft.spec is None and method in _UNSUPPORTED_METHODS:
        draft.problems.append(f'merge_method "{method}" is a mergekit method that ties_dist does not support yet')
    elif draft.spec is None and isinstance(method, str) and ":" in method:
        draft.problems.append(
            f"merge_method {short(method)} is code from outside of ties_dist, which merging would run; allow that with "
            "--allow-external-methods"
        )
    elif draft.spec is None:
        draft.problems.append(f"merge_method: no method {short(method)}; {nearest(draft.method, list(draft.methods))}")

    draft.dtype, draft.out_dtype = _read_dtype(draft, "dtype"), _read_dtype(draft, "out_dtype")
    if draft.dtype in ("float16", "bfloat16"):
        draft.notes.append(f"dtype {draft.dtype} is the output's type only: arithmetic stays float32.")


def _names_the_base(draft: Draft, tokenizer: object) -> bool:
    """`base`, or `{source: base}` and nothing else; only a base in the recipe has one."""
    said = tokenizer.get("source") if isinstance(tokenizer, Mapping) and len(tokenizer) == 1 else tokenizer
    return said == "base" and draft.document.get("base_model") is not None


def _read_dtype(draft: Draft, key: str) -> str | None:
    value = draft.document.get(key)
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    name = _DTYPE_ALIASES.get(name, name)
    if name in _DTYPES:
        return name
    hint = f"known: {', '.join(_DTYPES)}" if _OTHER_DTYPE.fullmatch(name) else nearest(name, _DTYPES)
    draft.problems.append(f"{key}: no dtype {short(value)}; {hint}")
    return None


def _read_options(draft: Draft, semantics: str | None) -> None:
    block = dict(_mapping(draft, draft.document.get("ties_dist"), "ties_dist"))
    understood = COMMON_OPTIONS | (draft.spec.options if draft.spec else frozenset(Options.model_fields))
    for key in [key for key in block if key not in understood]:
        del block[key]
        if key in Options.model_fields:
            draft.problems.append(f"ties_dist.{key}: {draft.method} has no such option")
        else:
            known = [name for name in Options.model_fields if name in understood]
            draft.problems.append(f"ties_dist.{key}: unknown key; {_hint(draft, key, known)}")
    if isinstance(path := block.get("elect_from"), os.PathLike):
        block["elect_from"] = os.fspath(path)

    draft.given_options = frozenset(block)
    draft.options = complete_options(block, semantics, draft.problems, draft.notes)
    if semantics is None and "semantics" not in block and draft.spec is not None and has_presets(draft.spec):
        draft.notes.append(default_semantics_note(draft.options, draft.given_options))
    if draft.options.elect_from is not None and "elect" in block:
        draft.notes.append("ties_dist.elect has no effect: elect_from gives the signs.")


def _read_models(draft: Draft) -> None:
    on_base = draft.spec is not None and draft.spec.operand != "weight"
    base, into_adapter = draft.document.get("base_model"), draft.options.output == "adapter"
    if base is not None and into_adapter:
        draft.notes.append("base_model is not read: adapters are merged with each other, into an adapter.")
    elif base is not None:
        draft.base = _locate(draft, base, "base_model")
    elif on_base and not into_adapter:
        what = "merges differences to a base" if draft.spec and draft.spec.operand == "delta" else "merges with a base"
        draft.problems.append(f"base_model: missing; {draft.method} {what}")
    if draft.options.elect_from is not None:
        draft.elect_from = _locate(draft, draft.options.elect_from, "ties_dist.elect_from")
        if draft.elect_from and draft.base and draft.elect_from.identity == draft.base.identity:
            draft.problems.append("ties_dist.elect_from: the base has no signs to give; name a fine-tuned model")

    entries = draft.document.get("models")
    if entries is not None and not isinstance(entries, (list, tuple)):
        draft.problems.append(f"models: must be a list of entries with a `model` key, found {short(entries)}")
        return
    if draft.options.output == "adapter" and draft.spec and draft.spec.statistics:
        draft.problems.append(f"ties_dist.output: {draft.method} needs statistics of models; adapters have none")
    if draft.options.output == "adapter" and draft.spec and draft.spec.operand == "both":
        draft.problems.append(
            f"ties_dist.output: {draft.method} needs a base; adapters merged with each other have none"
        )
    if draft.options.output == "adapter" and draft.options.tie_word_embeddings is False:
        draft.problems.append("ties_dist.tie_word_embeddings: adapters that are merged with each other have no head")
    before = len(draft.problems)
    if len(entries or ()) > _MOST_MODELS:
        draft.problems.append(f"models: {len(entries or ()):,} entries; at most {_MOST_MODELS:,} are merged at once")
        return
    for i, entry in enumerate(entries or ()):
        _read_model(draft, entry, f"models[{i}]", drop_base=on_base)
    otherwise_said = len(draft.problems) > before or any(draft.document.get(k) for k in ("slices", "modules"))
    if not draft.models and not otherwise_said:
        draft.problems.append("models: no experts to merge; list at least one")
    listed = any(entry.location and draft.base == entry.location for entry in draft.models)
    if draft.spec and draft.models and not otherwise_said:
        _check_number(draft, draft.spec)
    if draft.spec and not on_base and draft.base and not listed:
        _place_base(draft, draft.spec, draft.base)


def _check_number(draft: Draft, spec: MethodSpec) -> None:
    count = len(draft.models)
    if count < spec.fewest or count > (spec.most or count):
        wanted = f"at least {spec.fewest}" if spec.most is None else f"{spec.fewest}"
        draft.problems.append(f"models: {draft.method} merges {wanted} besides the base; {count} listed")


def _place_base(draft: Draft, spec: MethodSpec, base: Location) -> None:
    """What a base outside `models` is to a method on weights: mergekit merges it, as the last model."""
    said = f"base_model gives {draft.method} layout and dtypes only: it is not among `models`"
    weighs = _mapping(draft, draft.document.get("parameters")).get("weight") is not None
    if weighs and spec.statistics is None and draft.options.semantics == "mergekit":
        draft.models.append(ModelEntry(where="base_model", location=base, parameters={}))
        said = "base_model is merged, too, with the global weight, as mergekit does with one outside `models`"
    elif weighs and spec.statistics is None:
        said += "; `--semantics mergekit` merges it, too, with the global weight"
    draft.notes.append(f"{said}.")


def _read_model(draft: Draft, entry: object, where: str, *, drop_base: bool) -> None:
    if not isinstance(entry, Mapping):
        draft.problems.append(f"{where}: must be a mapping with a `model` key, found {short(entry)}")
        return
    kind = draft.spec.statistics if draft.spec else None
    known = ("model", "parameters", "statistics")
    for key in entry:
        if key == "statistics" and draft.spec and not kind:
            draft.problems.append(f"{where}.{key}: {draft.method} needs no statistics; leave it out")
        elif key not in known:
            draft.problems.append(f"{where}.{key}: unknown key; {_hint(draft, key, known)}")
    parameters = _mapping(draft, entry.get("parameters"), f"{where}.parameters")
    if entry.get("model") is None:
        draft.problems.append(f"{where}.model: missing; give a path or a hub id")
        return
    written = entry["model"]
    is_base = isinstance(written, str) and written == draft.document.get("base_model")
    location = None if is_base and draft.options.output == "adapter" else _locate(draft, written, f"{where}.model")
    # A base that was not found is still the base: what it lacks as an expert is not worth a second problem.
    if drop_base and ((location and location == draft.base) or (location is None and is_base)):
        if draft.spec and draft.spec.operand == "delta":
            too = " and its parameters" if parameters else ""
            draft.notes.append(f"{where}: the base has no difference to itself; the entry{too} is left out.")
        elif parameters:
            draft.notes.append(f"{where}: the base's own parameters have no effect.")
        return
    earlier = [e.where for e in draft.models if location and e.location == location]
    if earlier:
        draft.notes.append(f"{where}: the same expert as {earlier[0]}; it counts once more.")
    statistics = _locate_statistics(draft, entry, where, kind) if kind else None
    draft.models.append(ModelEntry(where=where, location=location, parameters=parameters, statistics=statistics))


def _locate_statistics(draft: Draft, entry: Mapping[str, object], where: str, kind: str) -> Location | None:
    """The store of one model; a local folder, since no hub has such."""
    if entry.get("statistics") is None:
        collect = f"ties-dist collect {kind} {entry['model']} --data FILE.jsonl --out STORE"
        draft.problems.append(f"{where}.statistics: missing; {draft.method} needs a store made by `{collect}`")
        return None
    found = _locate(draft, entry["statistics"], f"{where}.statistics")
    if found is not None and (found.path is None or not found.path.is_dir()):
        draft.problems.append(
            f"{where}.statistics: no folder '{found.text}'; name a store that `ties-dist collect` made"
        )
        return None
    return found


def _locate(draft: Draft, value: object, where: str) -> Location | None:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text:
        draft.problems.append(f"{where}: must be a path or a hub id, as text; found {short(value)}")
        return None
    found = locate(text, draft.roots, where)
    if isinstance(found, Location):
        alone = draft.options.output == "adapter" and found.adapter is not None
        return replace(found.adapter, where=where) if alone and found.adapter else found
    draft.problems.append(f"{where}: {found}")
    return None


def _read_parameters(draft: Draft, spec: MethodSpec) -> None:
    """A complete set for every expert, and the parameters that stand once for the whole merge."""
    raw = _mapping(draft, draft.document.get("parameters"), "parameters")
    shared = _read_settings(draft, raw, "parameters", spec, per_model=False)
    own = [_read_settings(draft, e.parameters, f"{e.where}.parameters", spec, per_model=True) for e in draft.models]
    draft.expert_parameters = [{} for _ in draft.models]

    for parameter in spec.parameters:
        name = parameter.name
        default = _default(draft, spec, parameter)
        fallback = shared.get(name, Setting(cases=())).or_else(None if default is None else constant(default))
        places = [("parameters", raw, fallback, draft.parameters)]
        if parameter.per_model:
            places = [
                (f"{e.where}.parameters", e.parameters, settings[name].or_else(fallback), target)
                if name in settings
                else (f"{e.where}.parameters", e.parameters, fallback, target)
                for e, settings, target in zip(draft.models, own, draft.expert_parameters, strict=True)
            ]
        missing = []
        for where, written, setting, target in places:
            if setting.cases:
                target[name] = replace(setting, where=setting.where or f"{where}.{name}")
            elif name not in written and name not in raw and draft.options_valid:  # given but wrong was reported
                missing.append(f"{where}.{name}")
        if len(missing) > 1 and len(missing) == len(places):
            missing = [f"parameters.{name}"]
        draft.problems += [f"{where}: missing; {_why_required(draft, spec, parameter)}" for where in missing]


def _read_settings(
    draft: Draft, raw: Mapping[str, object], where: str, spec: MethodSpec, *, per_model: bool
) -> dict[str, Setting]:
    by_name = {p.name: p for p in spec.parameters}
    elsewhere = {p.name for each in draft.methods.values() for p in each.parameters}.union(_MERGEKIT_PARAMETERS)
    settings = {}
    for key, value in raw.items():
        at = f"{where}.{key}"
        parameter = by_name.get(key)
        if parameter is None and key in elsewhere:
            draft.notes.append(f"{at} has no effect: {draft.method} has no such parameter, other methods have.")
        elif parameter is None:
            known = [p.name for p in spec.parameters if p.per_model or not per_model]
            draft.problems.append(f"{at}: unknown key; {_hint(draft, key, known)}")
        elif per_model and not parameter.per_model:
            draft.problems.append(f"{at}: {key} cannot differ between models; move it to the top-level `parameters`")
        elif setting := read_setting(value, parameter, at, draft.problems):
            settings[key] = setting
            if parameter.ignored:
                draft.notes.append(f"{at} has no effect{f': {parameter.note}' if parameter.note else ''}.")
    return settings


def _default(draft: Draft, spec: MethodSpec, parameter: Parameter) -> float | None:
    default = parameter.default
    if has_presets(spec):
        default = PRESET_DEFAULTS[draft.options.semantics].get(parameter.name, default)
    return float(default) if default is not None and parameter.kind == "float" else default


def _why_required(draft: Draft, spec: MethodSpec, parameter: Parameter) -> str:
    semantics = draft.options.semantics
    if has_presets(spec) and parameter.name in PRESET_DEFAULTS[semantics]:
        return f"semantics '{semantics}' requires it for every expert"
    return f"{draft.method} requires it ({parameter.note})" if parameter.note else f"{draft.method} requires it"


def _check_trim(draft: Draft) -> None:
    """Rules that tie a parameter to an option."""
    semantics = draft.options.semantics
    for settings in draft.expert_parameters:
        density, weight = settings.get("density"), settings.get("weight")
        if density and density.constant is None and draft.options.trim_scope == "model":
            draft.problems.append(
                f"{density.where}: varies inside the model, but a whole-model trim has one threshold per expert; "
                "give one number, or set `ties_dist: {trim_scope: tensor}`"
            )
        negative = [value for value in weight.values if value < 0] if weight else []
        if weight and negative and semantics != "mergekit":
            draft.problems.append(
                f"{weight.where}: {negative[0]:g} is negative, which semantics '{semantics}' refuses; "
                "to subtract an expert use `merge_method: task_arithmetic`"
            )


def _check_normalize(draft: Draft, spec: MethodSpec) -> None:
    """`normalize: false` is mergekit's word for `aggregate: sum`; a mean needs weights that do not cancel."""
    if "normalize" not in draft.parameters:
        return
    normalize = bool(draft.parameters["normalize"].constant)
    if "aggregate" in spec.options:
        given = "normalize" in _mapping(draft, draft.document.get("parameters"))
        aggregate = draft.options.aggregate
        if given and normalize and aggregate == "sum":
            draft.problems.append("parameters.normalize: true contradicts `aggregate: sum`; give one of them")
        elif given and not normalize and "aggregate" in draft.given_options and aggregate != "sum":
            draft.problems.append(f"parameters.normalize: false means `aggregate: sum`, not '{aggregate}'")
        elif given and not normalize:
            draft.options = draft.options.model_copy(update={"aggregate": "sum"})
        draft.parameters["normalize"] = constant(draft.options.aggregate != "sum", "parameters.normalize")
    elif normalize and spec.operand == "weight":
        weights = [settings["weight"].constant for settings in draft.expert_parameters if "weight" in settings]
        fixed = [weight for weight in weights if weight is not None]
        if fixed and len(fixed) == len(draft.models) and abs(sum(fixed)) < 1e-8:
            draft.problems.append(
                f"models: the weights sum to {sum(fixed):g}; a weighted mean needs a sum away from 0 "
                "(`normalize: false` takes the plain sum)"
            )


def _mapping(draft: Draft, value: object, where: str = "") -> Mapping[str, object]:
    """The value if it is a mapping; nothing given is an empty one. A problem at `where` otherwise."""
    if value is None or isinstance(value, Mapping):
        return value or {}
    if where:
        draft.problems.append(f"{where}: must be a mapping of keys to values, found {short(value)}")
    return {}


def _hint(draft: Draft, key: object, known: Sequence[str]) -> str:
    """Where a key belongs if it is ours elsewhere, else the nearest one known here."""
    every = {p.name for spec in draft.methods.values() for p in spec.parameters}
    mine = {p.name for p in draft.spec.parameters} if draft.spec else every
    if key in Options.model_fields:
        return "it belongs in the top-level block `ties_dist:`"
    if key in mine:
        return "it belongs under `parameters`"
    if key in _TOP_LEVEL:
        return "it belongs at the top level"
    if key in every:
        return f"{draft.method} has no such parameter, it has {', '.join(sorted(mine))}"
    return nearest(str(key), known)
