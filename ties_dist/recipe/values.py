"""Values that may differ between the tensors of one model: scalars, layer gradients, {filter, value} lists.

mergekit looks a number up per model, then globally, then in the method's default; here that search is flattened once
into `Setting.cases`. Matching and interpolation repeat mergekit 0.1.5 (config.evaluate_setting, plan.plan_slice)
operation by operation, so that densities and weights have the same bits; its per-architecture tables are replaced by
the layer index that stands in the tensor's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from reprlib import repr as short

from ties_dist.errors import RecipeError
from ties_dist.messages import nearest
from ties_dist.methods.parameter import Parameter

_LEAST_PERCENT = 2
"""1.2 is a slip of a share, or of a weight; nobody keeps 0.012 of a delta."""

Case = tuple[str | None, tuple[float, ...]]
"""A filter (None: every tensor) and its value: one number, or the points of a gradient from first to last layer."""

FLOAT32_MAX = 3.4028234663852886e38

# YAML 1.1 leaves `1e-4` (no dot) and `1.0e5` (no sign) as text; everything else in quotes is a mistake.
_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")

# `model.layers.12.`, `transformer.h.3.`, `visual.blocks.7.`, `encoder.layer.0.`: the leftmost is the model's own stack
# (T5 nests `block.3.layer.0.`); what stands before it tells an encoder from a decoder, each with its own depth.
_LAYER = re.compile(r"(?:^|\.)(?:\w*layers?|\w*blocks?|h)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One parameter's value, for every tensor of a model."""

    cases: tuple[Case, ...]
    """The first whose filter is part of the tensor's name wins; nothing follows one without a filter."""
    where: str = field(default="", compare=False)
    """Key path in the recipe, for messages."""
    origins: tuple[str, ...] = field(default=(), compare=False)
    """Of each case its own key path, or which default it is."""

    def at(self, tensor: str, depth: float) -> float:
        """The value for one tensor; depth in [0, 1] as `layer_depths` gives it. Raises RecipeError if no case fits."""
        return _interpolate(self.cases[self.case_of(tensor)][1], depth)

    def case_of(self, tensor: str) -> int:
        """Which of the cases gives a tensor its value. Raises RecipeError if none fits."""
        for i, (pattern, _) in enumerate(self.cases):
            if pattern is None or pattern in tensor:
                return i
        raise RecipeError(
            f"{self.where}: no filter matches '{tensor}' and there is no default; end the list with a bare `value`"
        )

    @property
    def constant(self) -> float | None:
        """The one number if it does not vary inside a model, else None."""
        first = self.cases[0][1] if self.covers_all else ()
        return first[0] if len(first) == 1 and all(points == first for _, points in self.cases) else None

    @property
    def covers_all(self) -> bool:
        """Whether every tensor has a value."""
        return bool(self.cases) and self.cases[-1][0] is None

    @property
    def values(self) -> tuple[float, ...]:
        """Every number written; interpolated ones lie between them."""
        return tuple(value for _, points in self.cases for value in points)

    def or_else(self, other: Setting | None) -> Setting:
        """This setting, and the other where no filter of this one matches."""
        if other is None or self.covers_all:
            return self
        return Setting(
            cases=self.cases + other.cases, where=self.where or other.where, origins=self.origins + other.origins
        )

    def unmatched(self, tensors: Iterable[str]) -> tuple[str, ...]:
        """Filters that are part of no tensor's name: nearly always a misspelling."""
        names = tuple(tensors)
        return tuple(f for f, _ in self.cases if f is not None and not any(f in name for name in names))

    def canonical(self) -> object:
        """The value as a recipe would write it: a number, a list of numbers, or a list of {filter, value}."""
        if self.constant is not None:
            return self.constant
        written = [(pattern, points[0] if len(points) == 1 else list(points)) for pattern, points in self.cases]
        if written[0][0] is None:
            return written[0][1]
        return [{"value": value} if f is None else {"filter": f, "value": value} for f, value in written]


def constant(value: float, where: str = "") -> Setting:
    """The same value for every tensor."""
    return Setting(cases=((None, (value,)),), where=where, origins=(where,))


def _interpolate(points: tuple[float, ...], depth: float) -> float:
    if len(points) == 1:
        return points[0]
    scaled = depth * (len(points) - 1)
    i0 = int(scaled)
    i1 = min(len(points) - 1, i0 + 1)
    frac = scaled - i0
    return (1 - frac) * points[i0] + frac * points[i1]


def layer_depths(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor stands in its stack of layers: index / (layers - 1), 1 in a stack of one layer.

    Embeddings, final norms and heads belong to no layer and get 0, as mergekit has it, whichever end they are at.
    """
    found: dict[str, tuple[str, int]] = {}
    last: dict[str, int] = {}
    depths = dict.fromkeys(names, 0.0)
    for name in depths:
        if match := _LAYER.search(name):
            stack, index = name[: match.start(1)], int(match[1])
            found[name] = stack, index
            last[stack] = max(last.get(stack, 0), index)
    for name, (stack, index) in found.items():
        depths[name] = index / last[stack] if last[stack] else 1.0
    return depths


def find_layer(tensor: str) -> tuple[str, str]:
    """A name as its layer, with the stack's name and the index, and the rest; outside of layers the first is empty."""
    match = _LAYER.search(tensor)
    return (tensor[: match.end(1)], tensor[match.end() :]) if match else ("", tensor)


def read_setting(raw: object, parameter: Parameter, where: str, problems: list[str]) -> Setting | None:
    """A value as written in the recipe. What is wrong goes to `problems`, and None comes back."""
    before = len(problems)
    entries = list(raw) if isinstance(raw, (list, tuple)) else [raw]
    mappings = [isinstance(entry, Mapping) for entry in entries]
    if isinstance(raw, (list, tuple, Mapping)) and not parameter.per_tensor:
        problems.append(f"{where}: {parameter.name} is one value for the whole merge, not a gradient or a filter list")
    elif not entries:
        problems.append(f"{where}: an empty list; give at least one value")
    elif all(mappings):
        cases = _read_cases(raw, parameter, where, problems)
        listed = isinstance(raw, (list, tuple))
        origins = tuple(f"{where}[{i}]" for i in range(len(cases))) if listed else (where,)
        return Setting(cases=cases, where=where, origins=origins) if len(problems) == before else None
    elif any(mappings):
        problems.append(f"{where}: mixes numbers and {{filter, value}} entries; use one or the other")
    else:
        points = _read_points(raw, parameter, where, problems)
        return Setting(cases=((None, points),), where=where, origins=(where,)) if points else None
    return None


def _read_cases(raw: object, parameter: Parameter, where: str, problems: list[str]) -> tuple[Case, ...]:
    cases: list[Case] = []
    for i, entry in enumerate(raw if isinstance(raw, (list, tuple)) else [raw]):
        at = f"{where}[{i}]" if isinstance(raw, (list, tuple)) else where
        if cases and cases[-1][0] is None:
            problems.append(f"{at}: never reached, the entry before it has no filter")
        for key in entry:
            if key not in ("filter", "value"):
                problems.append(f"{at}.{key}: unknown key; {nearest(str(key), ('filter', 'value'))}")
        pattern = entry.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            problems.append(f"{at}.filter: must be part of a tensor's name, as text; found {short(pattern)}")
            pattern = None
        if "value" not in entry:
            problems.append(f"{at}: has no `value`")
            continue
        points = _read_points(entry["value"], parameter, f"{at}.value", problems)
        cases.append((None if pattern in ("*", "") else pattern, points))
    return tuple(cases)


def _read_points(raw: object, parameter: Parameter, where: str, problems: list[str]) -> tuple[float, ...]:
    """One number or the points of a gradient; empty if something was wrong."""
    points: list[float] = []
    gradient = list(raw) if isinstance(raw, (list, tuple)) else None
    if gradient is not None and (parameter.kind != "float" or not gradient):
        problems.append(f"{where}: {_expected(parameter)}, not a list" if gradient else f"{where}: an empty list")
        return ()
    for i, value in enumerate([raw] if gradient is None else gradient):
        at = where if gradient is None else f"{where}[{i}]"
        number = _read_number(value, parameter)
        if isinstance(number, str):
            problems.append(f"{at}: {number}")
        else:
            points.append(number)
    return tuple(points) if len(points) == (1 if gradient is None else len(gradient)) else ()


def _read_number(raw: object, parameter: Parameter) -> float | str:
    """The number, or what is wrong with it. Strict: true is not 1, "0.5" in quotes is not 0.5; but 1 is true."""
    if parameter.kind == "bool" and isinstance(raw, (int, float)) and raw in (0, 1):  # as mergekit reads them
        if parameter.only_default and bool(raw) != parameter.default:
            return f"a mergekit feature that ties_dist does not support yet ({parameter.note})"
        return bool(raw)
    if isinstance(raw, str) and _SCIENTIFIC.fullmatch(raw) and parameter.kind == "float":
        raw = float(raw)
    right_type = {
        "bool": False,
        "int": isinstance(raw, int) and not isinstance(raw, bool),
        "float": isinstance(raw, (int, float)) and not isinstance(raw, bool),
    }[parameter.kind]
    if raw is None:
        return f"has no value; {_expected(parameter)}"
    if not right_type or not isinstance(raw, (int, float)):
        hint = " (a number in quotes is text: drop the quotes)" if isinstance(raw, str) and _is_number(raw) else ""
        return f"{_expected(parameter)}, found {short(raw)}{hint}"
    if not _is_finite(raw):
        return f"must be finite (and fit float32), found {short(raw)}"
    low, high = parameter.minimum, parameter.maximum
    too_low = low is not None and (raw < low or (parameter.minimum_exclusive and raw == low))
    if too_low or (high is not None and raw > high):
        found = f"{short(raw)} is out of range: {parameter.name} is {_range(parameter)}"
        is_percentage = low == 0 and high == 1 and _LEAST_PERCENT <= raw <= 100
        return f"{found}, not a percentage; did you mean {raw / 100:g}?" if is_percentage else found
    return float(raw) if parameter.kind == "float" else raw


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value) and abs(float(value)) <= FLOAT32_MAX
    except OverflowError:
        return False


def _expected(parameter: Parameter) -> str:
    return {"bool": "must be true or false", "int": "must be a whole number", "float": "must be a number"}[
        parameter.kind
    ]


def _range(parameter: Parameter) -> str:
    low, high = parameter.minimum, parameter.maximum
    if low is None:
        return f"at most {high:g}"
    if high is None:
        return f"above {low:g}" if parameter.minimum_exclusive else f"at least {low:g}"
    noun = "a share" if (low, high) == (0, 1) else "a number"
    return f"{noun} in {'(' if parameter.minimum_exclusive else '['}{low:g}, {high:g}]"
