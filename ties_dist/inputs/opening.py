"""The models and statistics that a plan reads: opened, and named by their content."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ties_dist.adapters.merging import open_alone
from ties_dist.adapters.peft import Adapter, adapt, read_adapter
from ties_dist.checkpoints.catalogue import Checkpoint, FileHeader, open_checkpoint
from ties_dist.checkpoints.parameters import OpenFiles
from ties_dist.errors import CheckpointError
from ties_dist.inputs.aliases import lone_embedding, with_every_name
from ties_dist.inputs.stamps import files_of
from ties_dist.inputs.tokenizers import FILES as TOKENIZER_FILES
from ties_dist.inputs.tokenizers import Tokenizer
from ties_dist.inputs.vocabulary import Prolonged, beside_base
from ties_dist.messages import show
from ties_dist.recipe.references import ModelReference, is_adapter
from ties_dist.statistics.collected import ExpertStatistics, is_statistics
from ties_dist.storage.backends import SMALL_MODEL, choose, file_sizes, look
from ties_dist.storage.base import Backend, Reader
from ties_dist.storage.digests import digest
from ties_dist.storage.readers import open_reader
from ties_dist.values.inputs import Input
from ties_dist.values.views import Piece

logger = logging.getLogger(__name__)

SAMPLED_PAGES = 16
"""Pages of each file that go into its identity, beside header and size."""
PAGE_BYTES = 4096


OpenReader = Callable[[Path, Backend], Reader]


def open_all(
    references: Sequence[ModelReference], backend: Backend, reader: OpenReader = open_reader
) -> tuple[list[Checkpoint], list[str]]:
    """Checkpoints in the order of the references, each path opened once; all their problems in one error."""
    known: dict[tuple[Path, Path | None], tuple[Checkpoint, str] | None] = {}
    problems = []
    for reference in references:
        key = reference.path, reference.adapter
        if key in known:
            continue
        try:
            known[key] = open_input(reference.path, reference.adapter, reference.name, backend, reader)
        except CheckpointError as error:
            known[key] = None
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))
    found = [pair for r in references if (pair := known[r.path, r.adapter]) is not None]
    return [checkpoint for checkpoint, _ in found], [identity for _, identity in found]


def open_input(
    path: Path, adapter: Path | None, name: str, backend: Backend, reader: OpenReader = open_reader
) -> tuple[Checkpoint, str]:
    """The catalogue and the identity of a model, adapted or not, of an adapter or of statistics.

    Raises CheckpointError.
    """
    if is_statistics(path):
        store = ExpertStatistics.open(path)
        return store.as_checkpoint(name), store.identity
    if adapter is None and is_adapter(path):
        alone = read_adapter(path, name, lambda place: reader(place, "auto"))
        return open_alone(alone, name), digest(repr([identify(alone.tensors), sorted(alone.config.items())]).encode())
    if adapter is None:
        checkpoint = open_checkpoint(path, name=name, reader=lambda place: reader(place, backend))
        return checkpoint, identify(checkpoint)
    base, found = _open_adapted(path, adapter, name, backend, reader)
    parts = [identify(base), identify(found.tensors), sorted(found.config.items())]
    named = with_every_name(base, found.targets, found.classes)
    if (lone := lone_embedding(named, found.targets, found.classes)) is not None:
        raise CheckpointError(
            f"adapter '{name}' ({adapter}) changes {show(lone)}, which its base ties to a head of unknown name. Merge "
            "it into its base with peft (`merge_and_unload`), which changes both, and name the result instead."
        )
    return adapt(named, found, name), digest(repr(parts).encode())


def _open_adapted(
    path: Path, adapter: Path, name: str, backend: Backend, reader: OpenReader
) -> tuple[Checkpoint, Adapter]:
    base = open_checkpoint(path, name=path.stem, reader=lambda place: reader(place, backend))
    return base, read_adapter(adapter, name, lambda place: reader(place, "auto"))


def identify(checkpoint: Checkpoint) -> str:
    """Names a checkpoint's content without reading it: header digests, sizes and some pages of each file."""
    parts = []
    for file in sorted(checkpoint.files):
        header = checkpoint.files[file]
        sampled = []
        for start, stop in pages_of(header):
            span = checkpoint.opened.read(Piece(0, file, start, stop))
            sampled.append(digest(span.view))
            span.release()
        parts.append([header.identity, sampled])
    return digest(repr(parts).encode())


def pages_of(header: FileHeader) -> list[tuple[int, int]]:
    """The ranges of a file that go into its identity."""
    draw = random.Random(f"{header.header_digest}{header.size}")
    count = SAMPLED_PAGES if header.size > header.data_start else 0
    starts = [draw.randrange(header.data_start, header.size) for _ in range(count)]
    return [(start, min(start + PAGE_BYTES, header.size)) for start in starts]


def contents_of(references: Sequence[ModelReference], identities: Sequence[str]) -> list[str]:
    """Names of what the files of models hold today: more than identities, which sample, for what no merge proves."""
    found = []
    for reference, identity in zip(references, identities, strict=True):
        folders = [each for each in (reference.path, reference.adapter) if each is not None]
        files = [file for each in folders for file in (each.glob("*.safetensors") if each.is_dir() else [each])]
        stats = [(file.name, file.stat()) for file in sorted(files) if file.is_file()]
        found.append(repr([identity, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]))
    return found


def opener(inputs: Sequence[Input], backend: Backend, *, reread_bytes: int | None) -> Callable[[Input], OpenFiles]:
    """Opens the models of a plan, the base first, each as it is read best: `auto` goes by what is cached, and says so.

    reread_bytes: read between the first and the second read of a byte (`MergePlan.reread_bytes`).
    """
    models = {m.path: m for m in reversed(inputs) if m.adapter is None and _is_model(Path(m.path))}
    chosen: dict[str, Backend] = dict.fromkeys(models, backend)
    if backend == "auto":
        files = {path: files_of(m) for path, m in models.items()}
        mapped = sum(sum(file_sizes(listed).values()) for listed in files.values())
        for path, m in reversed(models.items()):
            facts = look(files[path], mapped=mapped, reread_bytes=reread_bytes)
            choice = choose(facts)
            logger.log(logging.DEBUG if facts.size < SMALL_MODEL else logging.INFO, "reads: '%s' %s", m.name, choice)
            chosen[path] = choice.backend

    def open_one(model: Input) -> OpenFiles:
        path = Path(model.path)
        if is_statistics(path):
            return OpenFiles((ExpertStatistics.open(path).reader(),))
        if model.adapter is None and is_adapter(path):
            return read_adapter(path, model.name, open_reader).tensors.opened
        best = chosen.get(model.path, "auto")
        # The base's pages were read a moment ago, for the base: the page cache has them, direct I/O would ask the disk.
        again: Backend = "pread" if best == "direct" else best
        if model.adapter is None:
            files = OpenFiles((open_reader(path, best),))
        else:
            files = OpenFiles((open_reader(path, again), open_reader(Path(model.adapter))))
        if any(isinstance(view, Prolonged) for view in model.views.values()):
            base = Path(inputs[0].path)
            return beside_base(files, OpenFiles((open_reader(base, "auto" if again == best else again),)))
        return files

    return open_one


def _is_model(path: Path) -> bool:
    return not (is_statistics(path) or is_adapter(path))


def files_beside(path: Path, pattern: str) -> dict[str, bytes]:
    """Small files of a model's folder, by name: those whose whole name a pattern fits. None of a single file."""
    found = path.iterdir() if path.is_dir() else ()
    return {p.name: p.read_bytes() for p in found if p.is_file() and re.fullmatch(pattern, p.name)}


def tokenizer_of(reference: ModelReference) -> Tokenizer:
    """The adapter's own, where one lies beside it; else the model's."""
    folders = [each for each in (reference.adapter, reference.path) if each is not None]
    found = (files_beside(folder, TOKENIZER_FILES) for folder in folders)
    return Tokenizer(next((files for files in found if files.keys() - {"tokenizer_config.json"}), {}))
