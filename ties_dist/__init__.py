"""Exact, out-of-core, resumable merging of very large models.

    report = ties_dist.merge("recipe.yml", "merged/")

Names are imported at first use: `ties-dist --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ties_dist.errors import (
    CheckpointError,
    DamageError,
    LockedError,
    NumericError,
    OutputError,
    PlanError,
    ProofError,
    RecipeError,
    StoppedError,
    TiesDistError,
)

if TYPE_CHECKING:
    from ties_dist.api import PlanReport, merge, merge_state_dicts, plan
    from ties_dist.recipe import Recipe, load_recipe
    from ties_dist.report import MergeReport

__version__ = "0.1.0"

_WHERE = {
    "merge": "api",
    "merge_state_dicts": "api",
    "plan": "api",
    "PlanReport": "api",
    "MergeReport": "report",
    "Recipe": "recipe",
    "load_recipe": "recipe",
}

__all__ = [
    "CheckpointError",
    "DamageError",
    "LockedError",
    "MergeReport",
    "NumericError",
    "OutputError",
    "PlanError",
    "PlanReport",
    "ProofError",
    "Recipe",
    "RecipeError",
    "StoppedError",
    "TiesDistError",
    "load_recipe",
    "merge",
    "merge_state_dicts",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ties_dist.{_WHERE[name]}"), name)
