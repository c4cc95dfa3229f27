"""mergekit's dialect, read strictly: a document in, a checked `Draft` out, every problem collected with its key path.

What mergekit ignores silently (misspelt keys, `density: 20`, a parameter in the wrong place) is a problem here, and
what ties_dist cannot do yet is refused by name. Nothing is downloaded: a draft only knows where its models are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from reprlib import repr as short

from ties_dist.messages import nearest
from ties_dist.recipe.draft import TOP_LEVEL, Draft, ModelEntry
from ties_dist.recipe.mergekit import METHODS, STRAY_KEYS, UNSUPPORTED_KEYS
from ties_dist.recipe.options import COMMON_OPTIONS, Options, complete_options
from ties_dist.recipe.parts import Source, read_parts
from ties_dist.recipe.references import Location, anywhere, locate, spell
from ties_dist.recipe.spec import MethodSpec

_MOST_MODELS = 1000
_DTYPES = ("float32", "float16", "bfloat16")
_OTHER_DTYPE = re.compile(r"u?int\d+|float(8.*|64|128)|double|bool|complex\d+")
"""Meant as written: no guess stands in for it."""
_DTYPE_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def read_dialect(draft: Draft, semantics: str | None) -> None:
    """All but the numbers. semantics: the command line's."""
    draft.lenient = (semantics or draft.mapping(draft.document.get("ties_dist")).get("semantics")) == "mergekit"
    _read_top_level(draft)
    before = len(draft.problems)
    _read_options(draft, semantics)
    draft.options_valid = len(draft.problems) == before
    draft.parts = read_parts(draft.document, draft.problems)
    _read_models(draft)


def _read_top_level(draft: Draft) -> None:
    for key, value in draft.document.items():
        if key in ("tokenizer_source", "tokenizer") and _names_the_base(draft, value):
            draft.notes.append(f"{key}: the base's tokenizer is what the output has anyhow.")
        elif key in UNSUPPORTED_KEYS:
            if value is not None:
                draft.problems.append(f"{key}: a mergekit feature that ties_dist does not support yet")
        elif key in STRAY_KEYS:
            draft.notes.append(f"{key} has no effect: it says nothing of how models are merged.")
        elif key not in TOP_LEVEL:
            draft.unknown(str(key), key, TOP_LEVEL)

    method = draft.document.get("merge_method")
    if isinstance(method, str):
        draft.method, draft.spec = method, draft.methods.get(method)
    if method is None:
        draft.problems.append(f"merge_method: missing; known: {', '.join(draft.methods)}")
    elif draft.spec is None and method in METHODS:
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
    block = dict(draft.mapping(draft.document.get("ties_dist"), "ties_dist"))
    understood = COMMON_OPTIONS | (draft.spec.options if draft.spec else frozenset(Options.model_fields))
    for key in [key for key in block if key not in understood]:
        del block[key]
        if key in Options.model_fields:
            draft.problems.append(f"ties_dist.{key}: {draft.method} has no such option")
        else:
            known = [name for name in Options.model_fields if name in understood]
            draft.problems.append(f"ties_dist.{key}: unknown key; {draft.hint(key, known)}")
    if isinstance(path := block.get("elect_from"), os.PathLike):
        block["elect_from"] = os.fspath(path)

    draft.given_options = frozenset(block)
    draft.options = complete_options(block, semantics, draft.problems, draft.notes)
    if draft.options.elect_from is not None and "elect" in block:
        draft.notes.append("ties_dist.elect has no effect: elect_from gives the signs.")


def _read_models(draft: Draft) -> None:
    (where, base), into_adapter = draft.parts.base, draft.options.output == "adapter"
    if base is not None and into_adapter:
        draft.notes.append("base_model is not read: adapters are merged with each other, into an adapter.")
    elif base is not None:
        draft.base = _locate(draft, base, where)
    elif draft.on_base and not into_adapter:
        what = "merges differences to a base" if draft.spec and draft.spec.operand == "delta" else "merges with a base"
        draft.problems.append(f"base_model: missing; {draft.method} {what}")
    if draft.options.elect_from is not None:
        draft.elect_from = _locate(draft, draft.options.elect_from, "ties_dist.elect_from")
        if draft.elect_from and draft.base and draft.elect_from.identity == draft.base.identity:
            draft.problems.append("ties_dist.elect_from: the base has no signs to give; name a fine-tuned model")

    if draft.options.output == "adapter" and draft.spec and draft.spec.statistics:
        draft.problems.append(f"ties_dist.output: {draft.method} needs statistics of models; adapters have none")
    if draft.options.output == "adapter" and draft.spec and draft.spec.operand == "both":
        draft.problems.append(
            f"ties_dist.output: {draft.method} needs a base; adapters merged with each other have none"
        )
    if draft.options.output == "adapter" and draft.options.tie_word_embeddings is False:
        draft.problems.append("ties_dist.tie_word_embeddings: adapters that are merged with each other have no head")
    if len(draft.parts.sources) > _MOST_MODELS:
        listed = len(draft.parts.sources)
        draft.problems.append(f"models: {listed:,} entries; at most {_MOST_MODELS:,} are merged at once")
        return
    before = len(draft.problems)
    for source in draft.parts.sources:
        _read_model(draft, source)
    listed_elsewhere = any(draft.document.get(key) for key in ("slices", "modules"))
    if not draft.models and len(draft.problems) == before and not listed_elsewhere:
        draft.problems.append("models: no experts to merge; list at least one")
    elif draft.models and draft.spec:
        _count(draft, draft.spec)
    if draft.spec and not draft.on_base and draft.base:
        _place_base(draft, draft.spec, draft.base)


def _count(draft: Draft, spec: MethodSpec) -> None:
    found = len(draft.models)
    if found < spec.fewest or found > (spec.most or found):
        wanted = f"at least {spec.fewest}" if spec.most is None else f"{spec.fewest} to {spec.most}"
        wanted = str(spec.most) if spec.most == spec.fewest else wanted
        besides = " besides the base" if draft.on_base else ""
        draft.problems.append(f"models: {draft.method} merges {wanted}{besides}; {found} listed")


def _place_base(draft: Draft, spec: MethodSpec, base: Location) -> None:
    """What a base is to a method on weights. One outside of `models` mergekit merges, as the last model."""
    if any(entry.location == base for entry in draft.models):
        return
    said = f"base_model gives {draft.method} layout and dtypes only: it is not among `models`"
    weighs = any(draft.mapping(content).get("weight") is not None for _, content in draft.parts.scopes)
    weighs = weighs and any(p.name == "weight" for p in spec.parameters)
    if weighs and spec.statistics is None and draft.options.semantics == "mergekit":
        draft.models.append(ModelEntry(where="base_model", location=base, parameters={}))
        said = "base_model is merged, too, with the global weight, as mergekit does with one outside `models`"
    elif weighs and spec.statistics is None:
        said += "; `--semantics mergekit` merges it, too, with the global weight"
    draft.notes.append(f"{said}.")


def _read_model(draft: Draft, source: Source) -> None:
    where, entry = source.where, source.entry
    if not isinstance(entry, Mapping):
        draft.problems.append(f"{where}: must be a mapping with a `model` key, found {short(entry)}")
        return
    kind = draft.spec.statistics if draft.spec else None
    known = ("model", "parameters", "statistics")
    for key in entry:
        if key == "statistics" and draft.spec and not kind:
            draft.problems.append(f"{where}.{key}: {draft.method} needs no statistics; leave it out")
        elif key not in known:
            draft.unknown(f"{where}.{key}", key, known)
    parameters = draft.mapping(entry.get("parameters"), f"{where}.parameters")
    if entry.get("model") is None:
        draft.problems.append(f"{where}.model: missing; give a path or a hub id")
        return
    written = entry["model"]
    is_base = spell(written) is not None and spell(written) == spell(draft.parts.base[1])
    location = None if is_base and draft.options.output == "adapter" else _locate(draft, written, f"{where}.model")
    # A base that was not found is still the base: what it lacks as an expert is not worth a second problem.
    if draft.on_base and ((location and location == draft.base) or (location is None and is_base)):
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
    if found is not None and (found.path is None or not found.path.is_dir()) and (draft.here or found.path):
        draft.problems.append(
            f"{where}.statistics: no folder '{found.text}'; name a store that `ties-dist collect` made"
        )
        return None
    return found


def _locate(draft: Draft, value: object, where: str) -> Location | None:
    text = spell(value)
    if not text:
        draft.problems.append(f"{where}: must be a path or a hub id, as text; found {short(value)}")
        return None
    found = (locate if draft.here else anywhere)(text, draft.roots, where)
    if isinstance(found, Location):
        alone = draft.options.output == "adapter" and found.adapter is not None
        return replace(found.adapter, where=where) if alone and found.adapter else found
    draft.problems.append(f"{where}: {found}")
    return None
