"""OUT as a folder: what may be merged into it, what stands there, and where the parts of a merge lie."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ties_dist.errors import OutputError
from ties_dist.output.companions import CARD, COMPANIONS, RECIPE_COPY
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import INDEX_NAME, OutputShard
from ties_dist.recipe.references import ADAPTER_CONFIG
from ties_dist.storage.local import output_error, partial_name

STATE = ".ties_dist"


@dataclass(frozen=True, kw_only=True)
class OutFolder:
    """OUT, and the state of one merge inside it."""

    path: Path
    fingerprint: str

    @property
    def state(self) -> Path:
        return self.path / STATE

    @property
    def run(self) -> Path:
        """Partial shards and journals of this merge."""
        return self.state / self.fingerprint

    @property
    def parts(self) -> Path:
        return self.run / "parts"

    def retire(self) -> Path:
        """A new folder into which an old model's files are moved on their way out, known to one driver alone."""
        return Path(tempfile.mkdtemp(prefix="retired-", dir=self.run))

    def fence(self) -> None:
        """Remove such folders of earlier drivers. One that was stopped inside a move, and goes on, then moves nothing.

        `unlink` would remove whatever has the name by then: the model of whoever took over. Raises OutputError.
        """
        for folder in self.run.glob("retired-*"):
            shutil.rmtree(folder, ignore_errors=True)  # fails where a move came in between: then once more
            try:
                if folder.exists():
                    shutil.rmtree(folder)
            except OSError as error:
                raise output_error(error, folder) from error

    def check(self, inputs: Sequence[Path]) -> None:
        """Raises OutputError where OUT cannot be merged into at all."""
        target = self.path.resolve()
        for model in (p.resolve() for p in inputs):
            if target == model or (model.is_dir() and model in target.parents):
                raise OutputError(f"OUT {self.path} lies inside the input {model}. Choose a folder of its own.")
            # A folder's shards may be links to another's.
            for file in (p.resolve() for p in (model.glob("*.safetensors") if model.is_dir() else [model])):
                if target == file.parent:
                    raise OutputError(f"the input {file} lies in OUT {self.path}. Choose a folder of its own.")
        if self.path.is_symlink() and not self.path.exists():
            raise OutputError(f"OUT {self.path} is a broken link. Choose a folder.")
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"OUT {self.path} is a file. Choose a folder.")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.state.is_dir():
            raise OutputError(
                f"OUT {self.path} is not empty and was not written by ties_dist. Choose another folder or empty it."
            )

    def other_runs(self) -> list[str]:
        """Fingerprints of unfinished merges of something else."""
        if not self.state.is_dir():
            return []
        return sorted(p.name for p in self.state.iterdir() if p.is_dir() and p.name != self.fingerprint)

    def finished(self) -> MergeReport | None:
        """The report of the finished model that stands here, whatever its recipe."""
        try:
            report = MergeReport.from_json((self.state / "report.json").read_text())
            manifest = self._manifest()
            shards = {name: shard["size"] for name, shard in manifest["shards"].items()}
            same = manifest["fingerprint"] == report.fingerprint
            whole = all((self.path / name).stat().st_size == size for name, size in shards.items())
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        indexed = len(shards) == 1 or (self.path / INDEX_NAME).is_file()
        return report if same and whole and indexed and not self.lost_companions() else None

    def lost_companions(self) -> list[str]:
        """Files that the model here was published with, and without which it may not load."""
        return sorted(name for name in self.companions() if not (self.path / name).is_file())

    def lacks_files(self) -> bool:
        """Whether all model files here are whole ones of this merge, so that merging again harms nothing."""
        manifest = self._manifest()
        try:
            sizes = {name: shard["size"] for name, shard in manifest["shards"].items()}
            ours = manifest["fingerprint"] == self.fingerprint
            return ours and all(p.stat().st_size == sizes[p.name] for p in self.path.glob("*.safetensors"))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return False

    def holds(self) -> str:
        """What stands here, in words."""
        done = self.finished()
        if done is not None:
            return "this merge, finished" if done.fingerprint == self.fingerprint else "another merge, finished"
        if self.run.exists():
            return "this merge, unfinished"
        if self.other_runs():
            return "another merge, unfinished"
        if not self.holds_model():
            return "nothing"
        return "this merge, with files missing" if self.lacks_files() else "model files that no finished merge left"

    def partial(self, shard: str) -> Path:
        return self.parts / partial_name(shard)

    def _manifest(self) -> dict[str, Any]:
        """The manifest of the model that stands here; empty where there is none, or none that can be read."""
        try:
            found = json.loads((self.state / "manifest.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def stamps(self) -> object:
        """Sizes and times of the inputs that the model here was merged from."""
        origin = self._manifest().get("origin")
        return origin.get("stamps") if isinstance(origin, dict) else None

    def companions(self) -> set[str]:
        """Files that the model here brought along. Nothing but the names that we give is believed."""
        listed = self._manifest().get("companions")
        ours = "|".join((COMPANIONS, *map(re.escape, (CARD, RECIPE_COPY, ADAPTER_CONFIG))))
        return (
            {n for n in listed if isinstance(n, str) and "/" not in n and re.fullmatch(ours, n)}
            if isinstance(listed, list)
            else set()
        )

    def holds_model(self) -> bool:
        return any(self.path.glob("*.safetensors")) or (self.path / INDEX_NAME).exists()

    def part(self, shard: OutputShard, *, publishing: bool) -> Path | None:
        """Where a shard's bytes are, if they are there at its full size: its partial file, or its final one.

        publishing: whether this merge has begun to rename; before that a final file is an older model's.
        """
        for path in (self.partial(shard.name), *([self.path / shard.name] if publishing else [])):
            if path.exists():
                return path if path.stat().st_size == shard.size else None
        return None
