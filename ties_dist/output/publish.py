"""How a finished merge gets its names.

The old model stays until all new bytes are durable, those of companions, manifest and index included; then old index
and shards go, new ones are renamed, the folder is synced, and the index (or the single file) comes last: it is the
commit point. Every step can be killed and repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ties_dist.errors import OutputError
from ties_dist.output.companions import Content
from ties_dist.output.folder import MANIFEST, REPORT, OutFolder
from ties_dist.output.lock import STATE
from ties_dist.output.manifest import Manifest
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import Layout, folder_of
from ties_dist.storage.place import Check, Place


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A merge whose shards are whole and durable, and what is published with them."""

    layout: Layout
    manifest: Manifest
    report: MergeReport
    companions: Mapping[str, Content]


def give_names(out: OutFolder, finished: Finished, check: Check) -> None:
    """check: raises where another driver took over; called before every step, as what is done after that is done to
    the other's model. Raises OutputError."""
    check()
    place, shards = out.place, finished.layout.shards
    if lost := [s.name for s in shards if out.part(s, publishing=True) is None]:
        raise OutputError(
            f"{', '.join(lost)} vanished from {place}/{out.parts}. Run the same command again: it resumes."
        )
    out.check_strays(finished.layout)
    staged = _stage(out, finished)
    pending = [s.name for s in shards if place.size(out.partial(s.name)) is not None]
    named = {s.name for s in shards} - set(pending)
    out.retire(out.of_older_models(named, finished.companions), check)

    def name_it(name: str) -> None:
        check()
        place.publish(staged.get(name) or out.partial(name), name)

    for folder in sorted({folder_of(name) for name in (*finished.companions, *pending)} - {""}):
        place.make(folder.rstrip("/"))
    # Before the companions: whoever replaces a half-published model has to know which files are its own.
    name_it(MANIFEST)
    place.sync(STATE)
    for name in (*finished.companions, REPORT):
        name_it(name)
    # Modules of the model first: what a loader looks for lies in the folder itself.
    for name in sorted(pending, key=lambda name: "/" not in name):
        name_it(name)
    _sync(place, [REPORT, *finished.companions, *pending])
    for name in sorted(finished.layout.indexes, key=lambda name: "/" not in name):
        name_it(name)
    _sync(place, finished.layout.indexes)
    out.discard()


def _stage(out: OutFolder, finished: Finished) -> dict[str, str]:
    """Write all but the shards, durably, where this driver alone looks. Returns where, by the name it will have."""
    place, aside = out.place, out.apart("staged")
    texts = {name: text.encode() for name, text in finished.layout.indexes.items()}
    own = {MANIFEST: finished.manifest.to_json(), REPORT: finished.report.to_json().encode()}
    staged = {}
    place.make(aside)
    for i, (name, content) in enumerate({**finished.companions, **own, **texts}.items()):
        staged[name] = f"{aside}/{i}"
        place.put(staged[name], content if isinstance(content, bytes) else content())
    return staged


def _sync(place: Place, names: Iterable[str]) -> None:
    for folder in dict.fromkeys(folder_of(name).rstrip("/") for name in names):
        place.sync(folder)
