"""What a type checker sees of the public functions: mypy reads this, nobody runs it.

An `ignore` that is not needed is an error (`warn_unused_ignores`): the checker must find what is wrong in those lines.
"""

from __future__ import annotations

from pathlib import Path

import ties_dist
from ties_dist.methods import Method


def right() -> str:
    report: ties_dist.MergeReport = ties_dist.merge("recipe.yml", "out", memory_budget=1 << 30, threads=4)
    ties_dist.merge(
        recipe={"merge_method": "ties"}, out=Path("out"), executor="ray", cluster=ties_dist.Cluster(workers=2)
    )
    planned: ties_dist.PlanReport = ties_dist.plan("recipe.yml", sample=True, semantics="mergekit")
    swept = ties_dist.sweep("recipe.yml", "out", lam=[1.0], cache_dir="kept", fresh=True)
    ties_dist.merge_state_dicts({}, [{}], method="ties", trim_scope="tensor", exclude=["*.bias"])
    found: ties_dist.Analysis = ties_dist.analyze("recipe.yml", density=0.2, read_backend="pread")
    return f"{report.output_digest} {planned.units} {swept[0].report.output_digest} {found.cosines}"


def wrong() -> None:
    ties_dist.merge("recipe.yml", "out", thread=4)  # type: ignore[call-arg]
    ties_dist.merge("recipe.yml", "out", threads="4")  # type: ignore[arg-type]
    ties_dist.merge("recipe.yml", "out", kernel="eagre")  # type: ignore[arg-type]
    ties_dist.merge("recipe.yml")  # type: ignore[call-arg]
    ties_dist.plan("recipe.yml", executor="ray")  # type: ignore[call-arg]
    ties_dist.sweep("recipe.yml", "out", device="cuda")  # type: ignore[call-arg]
    ties_dist.analyze("recipe.yml", overwrite=True)  # type: ignore[call-arg]
    ties_dist.merge_state_dicts({}, [{}], trim_scop="tensor")  # type: ignore[call-arg]
    ties_dist.merge_state_dicts({}, [{}], trim_scope="tensors")  # type: ignore[arg-type]
    ties_dist.mergee  # type: ignore[attr-defined]  # noqa: B018
    Method.mergee  # type: ignore[attr-defined]  # noqa: B018
