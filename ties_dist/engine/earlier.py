"""What a finished model may have wrong because an earlier version merged it, as far as its manifest tells."""

from __future__ import annotations

from collections.abc import Iterator

from ties_dist.output.manifest import Manifest


def doubts(manifest: Manifest) -> tuple[str, ...]:
    """Sentences, each with whom it concerns; empty for a model of this version, or one that none of it can concern."""
    return tuple(_of_first(manifest)) if manifest.semantics_version < 2 else ()


def _of_first(manifest: Manifest) -> Iterator[str]:
    if manifest.origin.thresholds:
        yield (
            "Thresholds of whole models counted a parameter that is stored under several names (a tied head, the "
            "embeddings of T5 and BART) several times, where config.json does not say tie_word_embeddings: merge such "
            "models again."
        )
    adapted = [written for written, places in manifest.origin.models.items() if len(places) > 1]
    if adapted:
        yield (
            "An adapter on the embedding or head of a base that ties them moved both "
            f"({', '.join(adapted)}): if one of these is such an adapter, merge again."
        )
