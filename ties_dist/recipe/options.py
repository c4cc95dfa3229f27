"""The `ties_dist:` block: where the public TIES codes disagree, each difference is an option.

Presets name the code they reproduce and fill what the recipe leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as short
from typing import Annotated, Literal, TypedDict, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ties_dist.messages import nearest

Semantics = Literal["paper", "mergekit", "peft"]


class Options(BaseModel):
    """The block after presets. The defaults here are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    semantics: Semantics = "paper"
    trim_scope: Literal["model", "tensor"] = "model"
    tie_policy: Literal["keep_all", "exact_k"] = "keep_all"
    density_of: Literal["auto", "all", "moved"] = "auto"
    """`auto`: of what an adapter moves, of all entries of a model; `Recipe.of_moved` says it by expert."""
    elect: Literal["mass", "count", "none"] = "mass"
    elect_from: str | None = None
    """The model as written; `Recipe.elect_from` says where it is."""
    zero_sign: Literal["majority", "positive", "drop"] = "majority"
    weight_before_elect: bool = True
    aggregate: Literal["mean", "sum", "max", "average"] = "mean"
    exclude: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    vocab: Literal["auto", "base", "error"] = "auto"
    allow: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Words of refusals that are no obstacle."""
    non_float: Literal["error", "base"] = "error"
    output: Literal["model", "adapter"] = "model"
    gram: Literal["mean", "sum"] = "mean"
    rescale_by: Literal["density", "l1"] = "density"
    """`l1`: to the norm that a delta had in its tensor."""
    companions: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Files of the base that go beside the merged weights, too; not in the fingerprint."""
    tie_word_embeddings: Literal["as stored", False] = "as stored"
    """false: the output head is a parameter of its own, though the base ties it to the embedding."""

    @property
    def chosen(self) -> set[str]:
        """Names of those that are not what they are by default, or would be another under these semantics."""
        preset = PRESETS[self.semantics]
        return {
            name
            for name, field in type(self).model_fields.items()
            if not getattr(self, name) == field.default == preset.get(name, field.default)
        }


class OptionKeywords(TypedDict, total=False):
    """The block as keywords, of a function that takes `semantics` and `elect_from` by themselves. No type checker can
    make them of `Options`: a test holds them equal."""

    trim_scope: Literal["model", "tensor"]
    tie_policy: Literal["keep_all", "exact_k"]
    density_of: Literal["auto", "all", "moved"]
    elect: Literal["mass", "count", "none"]
    zero_sign: Literal["majority", "positive", "drop"]
    weight_before_elect: bool
    aggregate: Literal["mean", "sum", "max", "average"]
    exclude: Sequence[str]
    vocab: Literal["auto", "base", "error"]
    allow: Sequence[str]
    non_float: Literal["error", "base"]
    output: Literal["model", "adapter"]
    gram: Literal["mean", "sum"]
    rescale_by: Literal["density", "l1"]
    companions: Sequence[str]
    tie_word_embeddings: Literal["as stored", False]


COMMON_OPTIONS = frozenset(
    ("semantics", "exclude", "vocab", "non_float", "output", "allow", "companions", "tie_word_embeddings")
)
"""Those that every method understands."""

PRESETS: Mapping[Semantics, Mapping[str, object]] = {
    "paper": {},
    "mergekit": {
        "trim_scope": "tensor",
        "tie_policy": "exact_k",
        "density_of": "all",
        "zero_sign": "positive",
        "rescale_by": "l1",
    },
    "peft": {
        "trim_scope": "tensor",
        "tie_policy": "exact_k",
        "density_of": "all",
        "zero_sign": "positive",
        "weight_before_elect": False,
    },
}

PRESET_DEFAULTS: Mapping[Semantics, Mapping[str, float | None]] = {
    "paper": {},
    "mergekit": {"density": 1.0, "weight": None},
    "peft": {},
}
"""Parameters whose default differs from the method's own; None: the recipe must give it."""

MERGEKIT_WOULD = {
    "trim_scope": "trim every tensor by itself instead of the whole model at once",
    "tie_policy": "keep exactly the share asked for, cutting through equal values",
    "zero_sign": "elect + where the experts cancel exactly",
    "elect": "elect the sign of the sum",
    "elect_from": "elect signs from the experts' own deltas",
    "weight_before_elect": "weigh the deltas before the election",
}
"""What its preset means, option by option, where a recipe has it otherwise."""


def complete_options(
    block: Mapping[str, object], override: str | None, problems: list[str], notes: list[str]
) -> Options:
    """The block (known keys only) completed by the preset it names, or by `override`, the command line's."""
    given = dict(block)
    for name in ("exclude", "allow", "companions"):
        if isinstance(given.get(name), list):
            given[name] = tuple(cast("list[object]", given[name]))
    if given.get("vocab") == "truncate":
        given["vocab"] = "base"
        notes.append("`vocab: truncate` is called `base` now, and serves experts with fewer rows, too.")
    if override is not None:
        if override not in PRESETS:
            problems.append(f"--semantics: no semantics '{override}'; {nearest(override, list(PRESETS))}")
            override = "paper"
        elif given.get("semantics", override) != override:
            notes.append(f"--semantics {override} overrides `semantics: {given['semantics']}` of the recipe.")
        given["semantics"] = override
    named = given.get("semantics", "paper")
    preset = PRESETS[cast(Semantics, named)] if isinstance(named, str) and named in PRESETS else {}
    try:
        return Options.model_validate({**preset, **given})
    except ValidationError as error:
        problems += [_problem(e["loc"], e["type"], e["input"], e["msg"]) for e in error.errors()]
        return Options()


def default_semantics_note(options: Options, given: frozenset[str]) -> str:
    """What a recipe that names no semantics gets, and what mergekit's would do differently."""
    would = [
        words
        for name, words in MERGEKIT_WOULD.items()
        if name in PRESETS["mergekit"] and name not in given and getattr(options, name) != PRESETS["mergekit"][name]
    ]
    would.append("require a weight for every expert and take density 1 where none is given")
    return f"No semantics named, so `paper`; `--semantics mergekit` would {'; '.join(would)}."


def _problem(location: tuple[str | int, ...], kind: str, value: object, message: str) -> str:
    """One line from one of pydantic's errors."""
    name = str(location[0])
    where = f"ties_dist.{name}" + "".join(f"[{part}]" for part in location[1:])
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(Options.model_fields[name].annotation)]
        return (
            f"{where}: no value {short(value)}; {nearest(value if isinstance(value, str) else short(value), choices)}"
        )
    expected = {"bool_type": "true or false", "tuple_type": "a list of name patterns", "string_type": "text"}
    if kind in expected:
        return f"{where}: must be {expected[kind]}, found {short(value)}"
    return f"{where}: {message}"
