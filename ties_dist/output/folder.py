"""OUT as a folder: what may be merged into it, what stands there, and where the parts of a merge lie."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ties_dist.errors import OutputError
from ties_dist.output.documents import load_document
from ties_dist.output.lock import STATE
from ties_dist.output.manifest import Manifest
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import INDEX_NAME, Layout, OutputShard, folder_of
from ties_dist.recipe.references import ADAPTER_CONFIG
from ties_dist.storage.place import Check, Place, is_inside, is_plain, partial_name
from ties_dist.storage.rehearsal import PROBE
from ties_dist.values.inputs import Input

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

    def apart(self, what: str) -> str:
        """Name of a new folder that this driver alone knows."""
        return f"{self.run}/{what}-{uuid.uuid4().hex}"

    def retire(self, names: Sequence[str], check: Check) -> None:
        """Remove files of an old model."""
        self.place.retire(names, self.apart("retired"), check)

    def fence(self) -> None:
        """Remove folders `apart` of earlier drivers. One that was stopped inside a move, and goes on, moves nothing.

        And probes of those that were killed with one.

        Raises OutputError.
        """
        for entry in self.place.list(self.run):
            if entry.name.startswith(("retired-", "staged-")):
                self.place.clear(f"{self.run}/{entry.name}")
        for entry in self.place.list(STATE):
            if entry.name.startswith(PROBE):
                self.place.remove(f"{STATE}/{entry.name}")

    def discard(self, run: str | None = None) -> None:
        """Remove all of this merge, or of another; what cannot be removed does no harm."""
        with suppress(OutputError):
            self.place.clear(f"{STATE}/{run}" if run is not None else self.run)

    def check(self, models: Sequence[Input]) -> None:
        """Raises OutputError where OUT cannot be merged into at all. models: what is read."""
        self.place.check([path for model in models for path in (model.path, model.adapter) if path is not None])
        found = [entry for entry in self.place.list() if not entry.name.startswith(PROBE)]
        if found and not any(entry.name == STATE and entry.size is None for entry in found):
            raise OutputError(
                f"OUT {self.place} is not empty and was not written by ties_dist. Choose another folder or empty it."
            )

    def runs(self) -> list[str]:
        """Fingerprints of unfinished merges, this one's and others'."""
        return [entry.name for entry in self.place.list(STATE) if entry.size is None]

    def other_runs(self) -> list[str]:
        return [run for run in self.runs() if run != self.fingerprint]

    def used(self, run: str) -> int:
        """Bytes of the disk that the partial shards of an unfinished merge take."""
        return sum(entry.used for entry in self.place.list(f"{STATE}/{run}/parts"))

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
        whole = all(self.place.size(name) == shard.size for name, shard in manifest.shards.items())
        return report if whole and not self._lost(manifest, [*_indexes(manifest), *manifest.companions]) else None

    def _lost(self, manifest: Manifest, names: Sequence[str]) -> list[str]:
        """Those of a model's files that are not there."""
        return sorted(name for name in names if not is_inside(name) or self.place.size(name) is None)

    def lacks_files(self) -> bool:
        """Whether all model files here are whole ones of this merge, so that merging again harms nothing."""
        manifest = self.manifest()
        if manifest is None or manifest.fingerprint != self.fingerprint:
            return False
        sizes = {name: shard.size for name, shard in manifest.shards.items()}
        found = self._listed({"", *map(folder_of, sizes)})
        return all(sizes.get(name) == size for name, size in found.items() if name.endswith(WEIGHTS))

    def _listed(self, folders: Collection[str]) -> dict[str, int | None]:
        """Names and sizes of what lies in folders of OUT, each given with a slash at its end."""
        return {f"{at}{e.name}": e.size for at in sorted(folders) for e in self.place.list(at.rstrip("/"))}

    def lost_companions(self) -> list[str]:
        """Files that the model here was published with, and without which it may not load."""
        manifest = self.manifest()
        return [] if manifest is None else self._lost(manifest, manifest.companions)

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
        return [name for name in self._own() if name not in keep and name not in companions]

    def _own(self) -> list[str]:
        """Files of the model that stands here, whole or not: what its manifest and its index name, and nothing else."""
        manifest = self.manifest()
        shards = list(manifest.shards) if manifest is not None else []
        indexes = [f"{at}{INDEX_NAME}" for at in sorted({"", *map(folder_of, shards)})]
        indexed = [name for index in indexes for name in self._indexed(index)]
        companions = sorted(manifest.companions) if manifest is not None else []
        return [n for n in dict.fromkeys([*indexes, *shards, *indexed, *companions]) if _is_removable(n)]

    def _indexed(self, index: str) -> Iterator[str]:
        """Shards that an index names, in its own folder."""
        with suppress(OutputError, ValueError, RecursionError):
            found = json.loads(self.place.read(index) or b"{}")
            named = found.get("weight_map") if isinstance(found, Mapping) else None
            files = {str(file) for file in named.values()} if isinstance(named, Mapping) else set()
            yield from (f"{folder_of(index)}{file}" for file in sorted(files) if is_plain(file))

    def check_strays(self, layout: Layout) -> None:
        """Raises OutputError where weights lie here of no merge of ours, which loaders would read beside the result.

        Nothing removes them: whoever put them there may have them nowhere else.
        """
        named = {shard.name for shard in layout.shards}
        ours = {*self._own(), *named, *layout.indexes}
        found = self._listed({"", *map(folder_of, named)})
        strays = [n for n, size in found.items() if size is not None and n not in ours and _is_loaded(n)]
        if strays:
            raise OutputError(
                f"OUT {self.place} holds {', '.join(strays)}, of no merge of ties_dist, and loaders would read that "
                "beside the result. Move it away, or choose another OUT."
            )

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


def _indexes(manifest: Manifest) -> list[str]:
    """Index files of a model: in each folder that has several of its shards."""
    folders = [folder_of(name) for name in manifest.shards]
    return [f"{folder}{INDEX_NAME}" for folder in sorted(set(folders)) if folders.count(folder) > 1]


def _is_removable(name: str) -> bool:
    """Whether a name that was read from a file is one in OUT, and not in our own folder."""
    return is_inside(name) and name.partition("/")[0] != STATE


def _is_loaded(name: str) -> bool:
    """Whether loaders take a file for weights: transformers has an order, others read all that there are."""
    return name.endswith((WEIGHTS, f"{WEIGHTS}.index.json")) or name == ADAPTER_CONFIG
