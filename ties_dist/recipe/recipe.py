"""The recipe: what is merged and how, as validated values; `load_recipe` is the only way user input gets in.

YAML in mergekit's dialect, because that is what users have (`dialect`), and ours in one block, `ties_dist:`
(`options`). Every problem of a recipe is reported in one RecipeError, before any model is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from ties_dist.errors import RecipeError
from ties_dist.messages import listing
from ties_dist.methods.outside import code_of
from ties_dist.methods.parameter import Parameter
from ties_dist.recipe.dialect import read_dialect
from ties_dist.recipe.document import read_document
from ties_dist.recipe.draft import Draft
from ties_dist.recipe.options import COMMON_OPTIONS, Options, default_semantics_note
from ties_dist.recipe.parameters import check_normalize, check_trim, drop_empty, read_parameters
from ties_dist.recipe.references import ADAPTER_CONFIG, Location, ModelReference, fetch, is_adapter, unique_name
from ties_dist.recipe.spec import MethodSpec, has_presets
from ties_dist.recipe.values import Setting, constant, layer_depths

__all__ = [
    "Expert",
    "MethodSpec",
    "ModelReference",
    "Options",
    "Parameter",
    "Recipe",
    "Setting",
    "layer_depths",
    "load_recipe",
]


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One model that is merged, with every per-model parameter of the method."""

    model: ModelReference
    parameters: Mapping[str, Setting]
    statistics: ModelReference | None = None
    """The store that the method needs of it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe: nothing in it needs to be checked again."""

    method: str
    spec: MethodSpec = field(repr=False)
    base: ModelReference | None
    experts: tuple[Expert, ...]
    """In recipe order, which is the order of summation."""
    parameters: Mapping[str, Setting]
    """Those that stand once for the whole merge."""
    options: Options
    elect_from: ModelReference | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    layers: int | None = None
    """How many every model must have, where the recipe says it by a slice."""
    notes: tuple[str, ...] = ()
    """Sentences for the user."""

    @property
    def output_dtype(self) -> str | None:
        """Float type of the output; None: each tensor keeps the base's."""
        return self.out_dtype or self.dtype

    @property
    def of_moved(self) -> tuple[bool, ...]:
        """By expert, whether its density is a share of the entries that differ from the base's.

        An adapter of the base moves a few modules: a share of the whole model would trim nothing of it. Where adapters
        are merged with each other d is their own already, as in the paper's experiments on (IA)3.
        """
        chosen, base = self.options.density_of, self.base.path if self.base is not None else None
        adapters = [e.model.adapter is not None and e.model.path == base for e in self.experts]
        return tuple(chosen == "moved" or (chosen == "auto" and adapter) for adapter in adapters)

    def canonical(self) -> dict[str, object]:
        """What can influence output bytes, JSON-able: no paths and no names, for the inputs identify themselves."""
        return {
            "method": self.method,
            **self._code(),
            "experts": [self._effective(expert.parameters) for expert in self.experts],
            "parameters": self._effective(self.parameters),
            "options": self._resolved_options(),
            "elect_from": self.elect_from is not None,
            "output_dtype": self.output_dtype,
        }

    def _code(self) -> dict[str, object]:
        """Of a method from outside: with another text it is another merge. Ours have SEMANTICS_VERSION."""
        return {"method_code": code_of(self.spec)} if isinstance(self.spec, type) and ":" in self.method else {}

    def to_yaml(self) -> str:
        """The resolved recipe: defaults and presets spelled out, models as they were written. Loads to the same."""
        document = {
            "merge_method": self.method,
            "base_model": self.base.text if self.base else None,
            "models": [
                {
                    "model": expert.model.text,
                    **({"statistics": expert.statistics.text} if expert.statistics else {}),
                    "parameters": self._effective(expert.parameters),
                }
                for expert in self.experts
            ],
            "parameters": self._effective(self.parameters),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "ties_dist": self._options()
            | ({"elect_from": self.elect_from.text} if self.elect_from else {})
            | {
                name: list(given)
                for name in ("exclude", "allow", "companions")
                if (given := getattr(self.options, name))
            },
        }
        given = {key: value for key, value in document.items() if value not in (None, {})}
        return yaml.safe_dump(given, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)

    def _resolved_options(self) -> dict[str, object]:
        options = self._options() | {"exclude": sorted(set(self.options.exclude)), "vocab": self._vocab()}
        options.pop("density_of", None)
        return options | (
            {"of_moved": self.of_moved} if "density_of" in self.spec.options and any(self.of_moved) else {}
        )

    def _options(self) -> dict[str, object]:
        """The options that this method understands and that are in force; `elect` is not beside `elect_from`."""
        apart = {"exclude", "allow", "companions", "elect_from"} | ({"elect"} if self.elect_from else set())
        # Fingerprints and copies of recipes as before there was a choice.
        new = ("output", "tie_word_embeddings", "density_of", "rescale_by")
        apart |= {name for name in new if name not in self.options.chosen}
        understood = (self.spec.options | COMMON_OPTIONS) - apart
        return {name: value for name, value in self.options.model_dump().items() if name in understood}

    def _vocab(self) -> str:
        """What `auto` allows it merges in one way, so that fingerprints are as when there was no such choice."""
        return "base" if self.options.vocab == "base" else "error"

    def allowing(self, words: Collection[str]) -> Recipe:
        """The same, with the words that the command line allows: the copy in OUT has them, too."""
        allow = tuple(dict.fromkeys((*self.options.allow, *words)))
        return replace(self, options=self.options.model_copy(update={"allow": allow}))

    def _effective(self, settings: Mapping[str, Setting]) -> dict[str, object]:
        """Without parameters that do nothing, and without `normalize` where `aggregate` says it."""
        silent = {p.name for p in self.spec.parameters if p.ignored}
        if "aggregate" in self.spec.options:
            silent.add("normalize")
        return {name: setting.canonical() for name, setting in settings.items() if name not in silent}


def load_recipe(
    source: Path | str | Mapping[str, object],
    *,
    methods: Mapping[str, MethodSpec],
    semantics: str | None = None,
    seed: int | None = None,
    root: Path | None = None,
    fetch: Callable[[Location], Path] = fetch,
) -> Recipe:
    """Read, check and resolve a recipe.

    source: a file (Path), YAML text (str) or the mapping itself. methods: by name; a mapping may resolve names like
    `package.module:Class` in its `get`. semantics: the command line's, overrides the recipe's own. root: where
    relative model paths start, before the working directory; by default the recipe's folder. fetch: finds a model.
    seed: the command line's, of random numbers.
    Raises RecipeError listing everything that is wrong. Models are downloaded only when nothing else is.
    """
    document, title, folder = read_document(source)
    draft = read_draft(document, methods=methods, semantics=semantics, roots=(root or folder, Path.cwd()))
    if seed is not None and not draft.problems:
        _reseed(draft, seed)
    _raise(draft.problems, title)

    paths: dict[Location, Path] = {}
    problems = []
    entries = [each for entry in draft.models for each in (entry.location, entry.statistics)]
    named = [each for each in (draft.base, *entries, draft.elect_from) if each]
    for location in dict.fromkeys([*named, *(each.adapter for each in named if each.adapter)]):
        try:
            paths[location] = fetch(location)
        except RecipeError as error:
            problems.append(str(error))
    _raise(problems, title)
    _raise([problem for location in named for problem in _misplaced(location, draft, paths)], title)
    return _build(draft, paths)


def read_draft(
    document: Mapping[str, object],
    *,
    methods: Mapping[str, MethodSpec],
    semantics: str | None,
    roots: tuple[Path, ...],
    here: bool = True,
) -> Draft:
    """Everything that can be checked without a model's files. Without problems, every location and `spec` is set."""
    draft = Draft(document=document, methods=methods, roots=roots, here=here)
    read_dialect(draft, semantics)
    if draft.spec is not None:
        read_parameters(draft, draft.spec)
        drop_empty(draft, draft.spec)
        if has_presets(draft.spec) and draft.options_valid:
            check_trim(draft)
            if semantics is None and "semantics" not in draft.given_options:
                draft.notes.append(default_semantics_note(draft.options, draft.given_options))
        check_normalize(draft, draft.spec)
    return draft


def _reseed(draft: Draft, seed: int) -> None:
    if "seed" in draft.parameters:
        draft.parameters["seed"] = constant(seed, "--random-seed")
    else:
        draft.notes.append(f"--random-seed has no effect: {draft.method} draws no random numbers.")


def _misplaced(location: Location, draft: Draft, paths: Mapping[Location, Path]) -> Iterator[str]:
    """Adapters where a model is needed, and the other way round: known once they are fetched."""
    said = f"{location.where}: '{location.text}'"
    adapter = is_adapter(paths[location])
    if location.adapter is not None:
        if not is_adapter(paths[location.adapter]):
            yield f"{said}: '{location.adapter.text}' is no PEFT adapter (no adapter_config.json)"
        if adapter:
            yield f"{said}: an adapter of an adapter; merge the first into its base"
    if location == draft.base and location.adapter is not None:
        yield (
            f"{said}: a base is a plain model. Write it first, with a recipe `merge_method: linear` whose one model it "
            "is (weight 1), and name its output here"
        )
    elif location == draft.base and adapter:
        yield f"{said} is an adapter; name the model that it adapts{_adapted_by(paths[location])}"
    elif draft.options.output == "adapter" and not adapter:
        yield f"{said} is no PEFT adapter (no adapter_config.json), and `output: adapter` merges nothing else"
    elif adapter and location.adapter is None and draft.base is None and draft.options.output == "model":
        yield f"{said} is an adapter; name its base_model, or write it as model+adapter"


def _adapted_by(adapter: Path) -> str:
    """Said where its config says it."""
    with suppress(OSError, ValueError, AttributeError):
        if name := json.loads((adapter / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path"):
            return f": '{name}', by its {ADAPTER_CONFIG}"
    return ""


def _raise(problems: list[str], title: str) -> None:
    distinct = list(dict.fromkeys(problems))
    if distinct:
        count = "1 problem" if len(distinct) == 1 else f"{len(distinct)} problems"
        raise RecipeError(listing(f"{count} in {title}:", distinct, limit=50))


def _build(draft: Draft, paths: Mapping[Location, Path]) -> Recipe:
    """Name the models and put the recipe together."""
    assert draft.spec is not None
    taken: set[str] = set()
    known: dict[Location, ModelReference] = {}

    def refer(location: Location, *, repeated: bool = False) -> ModelReference:
        """An expert listed twice gets two names; a base or oracle that is also an expert has the expert's."""
        if location in known and not repeated:
            return known[location]
        name, path = unique_name(location.short_name, taken), paths[location]
        adapter = paths[location.adapter] if location.adapter is not None else None
        if adapter is None and is_adapter(path) and draft.base is not None:
            path, adapter = paths[draft.base], path
        reference = ModelReference(
            text=location.text, name=name, path=path, adapter=adapter, revision=location.revision
        )
        return known.setdefault(location, reference) if not repeated else reference

    base = refer(draft.base) if draft.base else None
    experts: list[Expert] = []
    listed: set[Location] = set()
    for entry, parameters in zip(draft.models, draft.expert_parameters, strict=True):
        assert entry.location is not None
        model = refer(entry.location, repeated=entry.location in listed)
        statistics = (
            ModelReference(
                text=entry.statistics.text,
                name=f"{draft.spec.statistics} of {model.name}",
                path=paths[entry.statistics],
            )
            if entry.statistics
            else None
        )
        experts.append(Expert(model=model, parameters=parameters, statistics=statistics))
        listed.add(entry.location)
    return Recipe(
        method=draft.method,
        spec=draft.spec,
        base=base,
        experts=tuple(experts),
        parameters=draft.parameters,
        options=draft.options,
        elect_from=refer(draft.elect_from) if draft.elect_from else None,
        dtype=draft.dtype,
        out_dtype=draft.out_dtype,
        layers=draft.parts.layers,
        notes=tuple(draft.notes),
    )
