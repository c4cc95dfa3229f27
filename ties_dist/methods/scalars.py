"""Numbers that follow from the sums over a tensor, as they travel from the driver to whoever merges."""

from __future__ import annotations

Scalars = tuple[tuple[str, float | tuple[float, ...]], ...]
"""By name, rounded to float32: of a state."""
