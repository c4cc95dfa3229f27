"""Exact, out-of-core, resumable merging of very large models.

    report = ties_dist.merge("recipe.yml", "merged/")

Names are imported at first use: `ties-dist --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ties_dist.errors import (
    CheckpointError,
    ClusterError,
    DamageError,
    LockedError,
    NumericError,
    OutputError,
    PlanError,
    ProofError,
    RecipeError,
    StoppedError,
    TiesDistError,
    UnitError,
)

if TYPE_CHECKING:
    from ties_dist.analysis.analyzing import analyze
    from ties_dist.analysis.figures import Analysis
    from ties_dist.api import merge, plan
    from ties_dist.collecting.collect import collect
    from ties_dist.engine.forecast import PlanReport
    from ties_dist.in_memory import merge_state_dicts
    from ties_dist.output.report import MergeReport
    from ties_dist.planning.options import Cluster
    from ties_dist.recipe.recipe import Recipe, load_recipe
    from ties_dist.statistics.collected import ExpertStatistics
    from ties_dist.sweeping.sweeping import sweep

__version__ = "0.2.0"

_WHERE = {
    "Analysis": "analysis.figures",
    "analyze": "analysis.analyzing",
    "Cluster": "planning.options",
    "ExpertStatistics": "statistics.collected",
    "collect": "collecting.collect",
    "merge": "api",
    "merge_state_dicts": "in_memory",
    "plan": "api",
    "sweep": "sweeping.sweeping",
    "PlanReport": "engine.forecast",
    "MergeReport": "output.report",
    "Recipe": "recipe.recipe",
    "load_recipe": "recipe.recipe",
}

__all__ = [
    "Analysis",
    "CheckpointError",
    "Cluster",
    "ClusterError",
    "DamageError",
    "ExpertStatistics",
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
    "UnitError",
    "analyze",
    "collect",
    "load_recipe",
    "merge",
    "merge_state_dicts",
    "plan",
    "sweep",
]

if not TYPE_CHECKING:  # a type checker that sees this takes every name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
