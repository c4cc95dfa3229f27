"""Phases: what a log says of one that was finished, and of one that was not."""

from __future__ import annotations

import pytest

from ties_dist.progress import LogProgress, Noted, Silent, phase


def test_a_finished_phase_says_its_bytes(caplog: pytest.LogCaptureFixture) -> None:
    progress = LogProgress()
    with caplog.at_level("INFO", logger="ties_dist"), phase(progress, "merge", 3 << 20):
        progress.advance(1 << 20)
        progress.advance(2 << 20)
    assert caplog.messages[0].startswith("merge: 3MiB, ")
    assert caplog.records[0].numbers.items() >= {"done_bytes": 3 << 20, "total_bytes": 3 << 20}.items()  # type: ignore[attr-defined]


def test_a_phase_that_fails_ends_and_says_how_far_it_came(caplog: pytest.LogCaptureFixture) -> None:
    progress = LogProgress()
    with (
        caplog.at_level("INFO", logger="ties_dist"),
        pytest.raises(ValueError, match="no more"),
        phase(progress, "scan", 3 << 20),
    ):
        progress.advance(1 << 20)
        raise ValueError("no more")
    assert caplog.messages[0].startswith("scan: 1MiB of 3MiB, ")


def test_whoever_passes_progress_on_knows_how_far_it_is() -> None:
    noted = Noted(Silent())
    with phase(noted, "merge", 10):
        noted.advance(3)
        noted.advance(4)
    assert noted.now.items() >= {"phase": "merge", "done_bytes": 7, "total_bytes": 10}.items()
