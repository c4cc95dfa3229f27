"""OUT as a folder: what may be merged into it, and how a finished merge gets its names.

The old model stays until all new bytes are durable; then old index and shards go, new ones are renamed, the folder is
synced, and the index (or the single file) comes last: it is the commit point. Every step can be killed and repeated.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ties_dist.errors import OutputError
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import INDEX_NAME, Layout, OutputShard
from ties_dist.recipe.recipe import Recipe
from ties_dist.recipe.references import ADAPTER_CONFIG, ModelReference
from ties_dist.storage.local import output_error, partial_name, sync_folder, write_durably

STATE = ".ties_dist"
CARD = "README.md"
RECIPE_COPY = "ties_dist_recipe.yml"
COMPANIONS = (
    r"config\.json|generation_config\.json|tokenizer.*|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json|"
    r".*\.tiktoken|sentencepiece.*|spiece\.model|chat_template.*|.*preprocessor_config\.json|processor_config\.json|"
    r".*\.py|(LICENSE|LICENCE|NOTICE|USE_POLICY).*"
)
"""Files copied from the base beside the weights, where it has them."""


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


def publish(
    out: OutFolder,
    layout: Layout,
    blocks: Mapping[str, Sequence[str]],
    report: MergeReport,
    companions: Mapping[str, bytes],
    origin: Mapping[str, object],
    check: Callable[[], None],
) -> None:
    """Give a finished merge its names.

    blocks: digests by shard. origin: what `verify` needs to merge a sample again. check: raises where another driver
    took over; called before every step, as what is done after that is done to the other's model.
    """
    check()
    if lost := [s.name for s in layout.shards if out.part(s, publishing=True) is None]:
        raise OutputError(f"{', '.join(lost)} vanished from {out.parts}. Run the same command again: it resumes.")
    manifest = {
        "fingerprint": out.fingerprint,
        "output_digest": report.output_digest,
        "companions": sorted(companions),
        "origin": origin,
        "shards": {s.name: {"size": s.size, "blocks": list(blocks[s.name])} for s in layout.shards},
    }
    pending = {s.name for s in layout.shards if out.partial(s.name).exists()}
    try:
        _remove_old(out, keep={s.name for s in layout.shards} - pending, companions=set(companions), check=check)
        # Before the companions: whoever replaces a half-published model has to know which files are its own.
        write_durably(out.state / "manifest.json", json.dumps(manifest), check)
        for name, content in companions.items():
            write_durably(out.path / name, content, check)
        write_durably(out.state / "report.json", report.to_json(), check)
        for shard in layout.shards:
            if shard.name in pending:
                check()
                out.partial(shard.name).replace(out.path / shard.name)
        sync_folder(out.path)
        if layout.index is not None:
            write_durably(out.path / INDEX_NAME, layout.index, check)
    except OSError as error:
        raise output_error(error, out.path) from error
    shutil.rmtree(out.run, ignore_errors=True)


def _remove_old(out: OutFolder, keep: set[str], companions: set[str], check: Callable[[], None]) -> None:
    """Remove what an older model left: its index first, so that it is no model from the first moment on."""
    shards = sorted([*out.path.glob("*.safetensors.index.json"), *out.path.glob("*.safetensors")])
    old = [out.path / INDEX_NAME, *(path for path in shards if path.name not in keep)]
    old += [out.path / name for name in sorted(out.companions() - companions)]
    retired = out.retire()
    for path in dict.fromkeys(old):
        if not (path.exists() or path.is_symlink()):
            continue
        check()
        with suppress(FileNotFoundError):  # we were replaced meanwhile, as the next check will say
            path.replace(retired / path.name).unlink()
    check()
    sync_folder(out.path)
    retired.rmdir()


def companion_files(base: Path, recipe: Recipe, card: str, made: Mapping[str, bytes]) -> dict[str, bytes]:
    """What stands beside the weights: the base's companions, the resolved recipe, the model card and what was made."""
    files: dict[str, bytes] = {}
    if base.is_dir():
        for path in sorted(base.iterdir()):
            if path.is_file() and re.fullmatch(COMPANIONS, path.name):
                files[path.name] = path.read_bytes()
    if recipe.output_dtype is not None and "config.json" in files:
        files["config.json"] = with_dtype(files["config.json"], recipe.output_dtype)
    note = "# The resolved recipe. Model paths are as they were written: relative to the folder of the original.\n"
    files[RECIPE_COPY] = (note + recipe.to_yaml()).encode()
    files[CARD] = card.encode()
    return {**files, **made}


def with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json byte for byte, but for the value of its dtype fields."""
    return re.sub(rb'("(?:torch_)?dtype"\s*:\s*)"(?:torch\.)?\w+"', rb'\1"' + dtype.encode() + b'"', config)


def model_card(recipe: Recipe, report: MergeReport) -> str:
    """README.md with Hugging Face front matter, the recipe and what the merge kept."""
    models = [*([recipe.base] if recipe.base else []), *(e.model for e in recipe.experts)]
    lines = ["---", "base_model:"]
    lines += [f"- {json.dumps(name)}" for name in dict.fromkeys(_public_name(m) for m in models)]
    library = "peft" if recipe.options.output == "adapter" else "transformers"
    lines += [f"library_name: {library}", "tags:", "- merge", "- ties_dist", f"- {recipe.method}", "---", ""]
    lines += [f"# Merged {recipe.options.output}", "", f"Merged with ties_dist by `{recipe.method}`", ""]
    lines[-2] += f" (semantics `{report.semantics}`)." if report.method == "ties" else "."
    if any(e.kept_fraction is not None for e in report.experts):
        lines += ["| expert | weight | density | kept | threshold |", "|---|---|---|---|---|"]
        for e in report.experts:
            threshold = "per tensor" if e.threshold is None else f"{e.threshold:.6g}"
            weight = "varies" if e.weight is None else f"{e.weight:g}"
            density = "varies" if e.density is None else f"{e.density:g}"
            lines.append(f"| {e.name} | {weight} | {density} | {e.kept_fraction or 0:.2%} | {threshold} |")
        lines.append("")
    lines += ["## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    lines += [f"Output digest `{report.output_digest}`.", ""]
    return "\n".join(lines)


def _public_name(model: ModelReference) -> str:
    """The hub id where there is one, else the folder's name: no path of this machine."""
    from_hub = any(part.startswith("models--") for part in model.path.parts)  # the hub's cache
    return model.text.partition("@")[0] if from_hub else model.name
