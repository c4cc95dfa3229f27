"""Merge methods by name. A new one is a file beside these and a line here."""

from __future__ import annotations

from ties_dist.methods.base import Cut, Method, State, TrimRule
from ties_dist.methods.linear import Linear
from ties_dist.methods.task_arithmetic import TaskArithmetic
from ties_dist.methods.ties import Ties

METHODS: dict[str, type[Method]] = {m.name: m for m in (Linear, TaskArithmetic, Ties)}

__all__ = ["METHODS", "Cut", "Linear", "Method", "State", "TaskArithmetic", "Ties", "TrimRule"]
