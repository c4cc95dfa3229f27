"""The short form of `python -m tests.mutations`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.trials import SHARES, run


@pytest.mark.parametrize("kind", SHARES)
def test_a_mutated_document_is_refused_or_harmless(kind: str, tmp_path: Path) -> None:
    done, failures = run(tmp_path, count=1500, seed=20260, only=kind)
    assert done[kind] >= 30
    assert "\n".join(map(str, failures.values())) == ""
