"""A recipe on its way from YAML to validated values: what is understood so far, and every problem with its key path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short

from ties_dist.messages import nearest
from ties_dist.recipe.options import Options
from ties_dist.recipe.parts import Parts
from ties_dist.recipe.references import Location
from ties_dist.recipe.spec import MethodSpec
from ties_dist.recipe.values import Setting

TOP_LEVEL = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters"),
    *("dtype", "out_dtype", "ties_dist"),
)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model that is merged, as written but for its location (None where that was wrong)."""

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
    here: bool = True
    """Whether the models must be found; of a recipe of another machine they need not be."""
    lenient: bool = False
    """Whether keys that nobody knows are read over, and said, as mergekit does without a word."""
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
    parts: Parts = field(default_factory=Parts)
    base: Location | None = None
    elect_from: Location | None = None
    models: list[ModelEntry] = field(default_factory=list)
    expert_parameters: list[dict[str, Setting]] = field(default_factory=list)
    """One complete set for each of `models`."""
    parameters: dict[str, Setting] = field(default_factory=dict)

    @property
    def on_base(self) -> bool:
        """Whether the base is apart from what is merged."""
        return self.spec is not None and self.spec.operand != "weight"

    def mapping(self, value: object, where: str = "") -> Mapping[str, object]:
        """The value if it is a mapping; nothing given is an empty one. A problem at `where` otherwise."""
        if value is None or isinstance(value, Mapping):
            return value or {}
        if where:
            self.problems.append(f"{where}: must be a mapping of keys to values, found {short(value)}")
        return {}

    def unknown(self, where: str, key: object, known: Sequence[str]) -> None:
        hint = self.hint(key, known)
        if self.lenient:
            self.notes.append(f"{where} has no effect, nor has it in mergekit; {hint}")
        else:
            self.problems.append(f"{where}: unknown key; {hint}")

    def hint(self, key: object, known: Sequence[str]) -> str:
        """Where a key belongs if it is ours elsewhere, else the nearest one known here."""
        every = {p.name for spec in self.methods.values() for p in spec.parameters}
        mine = {p.name for p in self.spec.parameters} if self.spec else every
        if key in Options.model_fields:
            return "it belongs in the top-level block `ties_dist:`"
        if key in mine:
            return "it belongs under `parameters`"
        if key in TOP_LEVEL:
            return "it belongs at the top level"
        if key in every:
            return f"{self.method} has no such parameter, it has {', '.join(sorted(mine))}"
        return nearest(str(key), known)
