"""How a finished merge gets its names.

The old model stays until all new bytes are durable; then old index and shards go, new ones are renamed, the folder is
synced, and the index (or the single file) comes last: it is the commit point. Every step can be killed and repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ties_dist.errors import OutputError
from ties_dist.output.folder import MANIFEST, REPORT, OutFolder
from ties_dist.output.manifest import Manifest
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import INDEX_NAME, Layout
from ties_dist.storage.place import Check


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A merge whose shards are whole and durable, and what is published with them."""

    layout: Layout
    manifest: Manifest
    report: MergeReport
    companions: Mapping[str, bytes]


def give_names(out: OutFolder, finished: Finished, check: Check) -> None:
    """check: raises where another driver took over; called before every step, as what is done after that is done to
    the other's model. Raises OutputError."""
    check()
    place, shards = out.place, finished.layout.shards
    if lost := [s.name for s in shards if out.part(s, publishing=True) is None]:
        raise OutputError(
            f"{', '.join(lost)} vanished from {place}/{out.parts}. Run the same command again: it resumes."
        )
    pending = [s.name for s in shards if place.size(out.partial(s.name)) is not None]
    named = {s.name for s in shards} - set(pending)
    out.retire(out.of_older_models(named, finished.companions), check)
    # Before the companions: whoever replaces a half-published model has to know which files are its own.
    place.put(MANIFEST, finished.manifest.to_json(), check)
    for name, content in finished.companions.items():
        place.put(name, content, check)
    place.put(REPORT, finished.report.to_json().encode(), check)
    for name in pending:
        check()
        place.publish(out.partial(name), name)
    place.sync()
    if finished.layout.index is not None:
        place.put(INDEX_NAME, finished.layout.index.encode(), check)
    out.discard()
