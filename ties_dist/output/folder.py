"""OUT as a folder: what may be merged into it, what stands there, and where the parts of a merge lie."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ties_dist.errors import OutputError
from ties_dist.output.companions import CARD, COMPANIONS, RECIPE_COPY
from ties_dist.output.documents import load_document
from ties_dist.output.lock import STATE
from ties_dist.output.manifest import Manifest
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import INDEX_NAME, OutputShard
from ties_dist.recipe.references import ADAPTER_CONFIG
from ties_dist.storage.place import Check, Place, partial_name

MANIFEST, REPORT = f"{STATE}/manifest.json", f"{STATE}/report.json"
BEGUN = "plan.json"
"""In the folder of an unfinished merge, from its first moment on."""
WEIGHTS = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class OutFolder:
    """OUT, and the state of one merge inside it. All names are as `place` takes them."""

    place: Place
    fingerprint: str

    @property
    def run(self) -> str:
        """Partial shards and journals of this merge."""
        return f"{STATE}/{self.fingerprint}"

    @property
    def parts(self) -> str:
        return f"{self.run}/parts"

    @property
    def matrices(self) -> str:
        return f"{self.run}/matrices"

    def partial(self, shard: str) -> str:
        return f"{self.parts}/{partial_name(shard)}"

    def retire(self, names: Sequence[str], check: Check) -> None:
        """Remove files of an old model, through a folder that this driver alone knows."""
        self.place.retire(names, f"{self.run}/retired-{uuid.uuid4().hex}", check)

    def fence(self) -> None:
        """Remove such folders of earlier drivers. One that was stopped inside a move, and goes on, then moves nothing.

        Raises OutputError.
        """
        for entry in self.place.list(self.run):
            if entry.name.startswith("retired-"):
                self.place.clear(f"{self.run}/{entry.name}")

    def discard(self, run: str | None = None) -> None:
        """Remove all of this merge, or of another; what cannot be removed does no harm."""
        with suppress(OutputError):
            self.place.clear(f"{STATE}/{run}" if run is not None else self.run)

    def check(self, inputs: Sequence[str]) -> None:
        """Raises OutputError where OUT cannot be merged into at all. inputs: paths of models."""
        self.place.check(inputs)
        found = self.place.list()
        if found and not any(entry.name == STATE and entry.size is None for entry in found):
            raise OutputError(
                f"OUT {self.place} is not empty and was not written by ties_dist. Choose another folder or empty it."
            )

    def runs(self) -> list[str]:
        """Fingerprints of unfinished merges, this one's and others'."""
        return [entry.name for entry in self.place.list(STATE) if entry.size is None]

    def other_runs(self) -> list[str]:
        return [run for run in self.runs() if run != self.fingerprint]

    def is_begun(self) -> bool:
        return self.fingerprint in self.runs()

    def manifest(self) -> Manifest | None:
        """Of the model that stands here; None where there is none, or none that can be read."""
        with suppress(OutputError):
            return load_document(self.place, MANIFEST, Manifest)
        return None

    def finished(self) -> MergeReport | None:
        """The report of the finished model that stands here, whatever its recipe."""
        report, manifest = None, self.manifest()
        with suppress(OutputError):
            report = load_document(self.place, REPORT, MergeReport)
        if report is None or manifest is None or manifest.fingerprint != report.fingerprint:
            return None
        sizes = self._sizes()
        whole = all(sizes.get(name) == shard.size for name, shard in manifest.shards.items())
        indexed = len(manifest.shards) == 1 or INDEX_NAME in sizes
        return report if whole and indexed and companions_of(manifest) <= sizes.keys() else None

    def _sizes(self) -> dict[str, int]:
        """Of the files beside the state."""
        return {entry.name: entry.size for entry in self.place.list() if entry.size is not None}

    def lacks_files(self) -> bool:
        """Whether all model files here are whole ones of this merge, so that merging again harms nothing."""
        manifest = self.manifest()
        if manifest is None or manifest.fingerprint != self.fingerprint:
            return False
        sizes = {name: shard.size for name, shard in manifest.shards.items()}
        return all(
            e.size is not None and sizes.get(e.name) == e.size for e in self.place.list() if e.name.endswith(WEIGHTS)
        )

    def lost_companions(self) -> list[str]:
        """Files that the model here was published with, and without which it may not load."""
        return sorted(companions_of(self.manifest()) - self._sizes().keys())

    def holds(self) -> str:
        """What stands here, in words."""
        done = self.finished()
        if done is not None:
            return "this merge, finished" if done.fingerprint == self.fingerprint else "another merge, finished"
        if self.is_begun():
            return "this merge, unfinished"
        if self.other_runs():
            return "another merge, unfinished"
        if not self.holds_model():
            return "nothing"
        return "this merge, with files missing" if self.lacks_files() else "model files that no finished merge left"

    def holds_model(self) -> bool:
        return any(e.name.endswith(WEIGHTS) or e.name == INDEX_NAME for e in self.place.list())

    def of_older_models(self, keep: Collection[str], companions: Collection[str]) -> list[str]:
        """What is to go before a new model gets its names: the index first, so that it is no model from there on.

        keep: shards of the new one that have theirs. companions: files that it brings along, and replaces.
        """
        found = [entry.name for entry in self.place.list()]
        shards = [name for name in found if name.endswith((WEIGHTS, f"{WEIGHTS}.index.json")) and name not in keep]
        return list(dict.fromkeys([INDEX_NAME, *shards, *sorted(companions_of(self.manifest()) - set(companions))]))

    def part(self, shard: OutputShard, *, publishing: bool) -> str | None:
        """Where a shard's bytes are, if they are there at its full size: its partial file, or its final one.

        publishing: whether this merge has begun to rename; before that a final file is an older model's.
        """
        partial = self.partial(shard.name)
        if (size := self.place.size(partial)) is not None:
            return partial if size == shard.size else None
        return shard.name if publishing and self.place.size(shard.name) == shard.size else None

    def resumable(self, shard: OutputShard, *, publishing: bool) -> str | None:
        """The same, but only where what an interrupted run has written there can be read back."""
        part = self.part(shard, publishing=publishing)
        return part if self.place.reads_parts or part == shard.name else None


def companions_of(manifest: Manifest | None) -> set[str]:
    """Files that a model brought along. Nothing but the names that we give is believed."""
    ours = "|".join((COMPANIONS, *map(re.escape, (CARD, RECIPE_COPY, ADAPTER_CONFIG))))
    listed = manifest.companions if manifest is not None else ()
    return {name for name in listed if "/" not in name and re.fullmatch(ours, name)}
