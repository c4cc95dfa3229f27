"""What is done with each mutated document, and what must not come of it."""

from __future__ import annotations

import faulthandler
import json
import logging
import random
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file

import ties_dist
from tests.conftest import random_models, write_checkpoint, write_job
from tests.mutations.mutate import as_json, as_text, by_byte, by_value
from ties_dist.checkpoints.catalogue import open_checkpoint
from ties_dist.engine.verify import verify
from ties_dist.errors import BugError, TiesDistError
from ties_dist.inputs.opening import open_input
from ties_dist.output.folder import OutFolder
from ties_dist.output.journal import Journal, read_journals
from ties_dist.output.lock import RunLock
from ties_dist.output.resume import usable
from ties_dist.output.status import status
from ties_dist.planning.options import RunOptions
from ties_dist.planning.prepare import Job, prepare
from ties_dist.progress import Silent
from ties_dist.storage.digests import digest
from ties_dist.storage.local_place import LocalPlace
from ties_dist.storage.readers import open_reader

HANG_SECONDS = 5
WHOLE_EVERY = 400
"""Trials of which one goes all the way through a merge."""
SHAPES = {"a.weight": (24, 16), "layers.0.b.weight": (16, 16), "layers.1.b.weight": (16, 16)}
SHARES = {"header": 40, "index": 20, "adapter": 10, "manifest": 10, "journal": 12, "lock": 3, "recipe": 5}
"""How often each kind comes, of 100."""

VICTIMS = ("victim", "outs/victim", "job/victim", "sharded/victim", "one/victim")

Trial = Callable[[random.Random, bool], bytes]
"""Writes a mutated document and has it read; gives the document. The flag: whether to go all the way."""


class HangError(Exception):
    """A document took longer than anybody waits."""


def run(
    root: Path, *, count: int, seed: int, only: str | None = None
) -> tuple[Mapping[str, int], Mapping[str, Failure]]:
    """As many trials; what was done, and the failures by where they arose."""
    ground = Ground(root)
    done: Counter[str] = Counter()
    failures: dict[str, Failure] = {}
    kinds = random.Random(seed).choices(list(SHARES), list(SHARES.values()), k=count)
    with quiet(), alarm():
        for number, kind in enumerate(kinds):
            if only is not None and kind != only:
                continue
            done[kind] += 1
            trial: Trial = getattr(ground, kind)
            failed = attempt(trial, random.Random(f"{seed} {number}"), ground, whole=number % WHOLE_EVERY == 0)
            if failed is not None:
                failures.setdefault(failed.where, failed).add(kind, number)
    return done, failures


@dataclass
class Failure:
    """where: of the innermost frame of ours."""

    where: str
    trace: str
    document: bytes
    times: int = 0
    first: str = ""

    def add(self, kind: str, number: int) -> None:
        self.times += 1
        self.first = self.first or f"{kind} {number}"

    def __str__(self) -> str:
        return f"--- {self.where}: {self.times} times, first {self.first}\n{self.trace}\n{self.document[:600]!r}\n"


def attempt(trial: Trial, draw: random.Random, ground: Ground, *, whole: bool) -> Failure | None:
    state = draw.getstate()
    try:
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        faulthandler.dump_traceback_later(3 * HANG_SECONDS, exit=True)  # a hang in C, which no handler ends
        document = trial(draw, whole)
    except BugError as error:
        return Failure(f"bug: {error.args[0]}", error.trace, b"")
    except TiesDistError as error:
        if (said := str(error)) != "".join(c for c in said if c.isprintable() or c in "\n\t"):
            return Failure(f"unprintable: {type(error).__name__}", repr(said[:2000]), b"")
        document = b""
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "ties_dist" in f.filename]
        where = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}" if frames else repr(error)
        return Failure(where, "".join(traceback.format_exception(error)[-12:]), repr(state[1][:2]).encode())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    if touched := ground.touched():
        return Failure(f"touched: {touched}", "", document)
    return None


class Ground:
    """Models, an adapter, a finished and a half-done OUT, and files outside of them that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        models = random_models(SHAPES, experts=2)
        self.recipe_file = write_job(root / "job", models, config={"model_type": "llama"})
        self.recipe_document = json.loads(self.recipe_file.read_text())
        write_checkpoint(root / "one", models[0])
        self.header_bytes = (root / "one" / "model.safetensors").read_bytes()
        write_checkpoint(root / "sharded", models[0], shards=2)
        self.index_document = json.loads((root / "sharded" / "model.safetensors.index.json").read_text())
        self.adapter_document = self._adapter(root / "adapter")
        self._outs()
        for name in VICTIMS:
            (root / name).write_text("precious")
        self.watched = self._watch()

    def _adapter(self, folder: Path) -> dict[str, Any]:
        folder.mkdir()
        module = "base_model.model.layers.0.b"
        factors = {f"{module}.lora_A.weight": torch.ones(2, 16), f"{module}.lora_B.weight": torch.ones(16, 2)}
        save_file(factors, folder / "adapter_model.safetensors")
        return {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["b"], "alpha_pattern": {"layers.0.b": 8},
            "rank_pattern": {}, "use_rslora": False, "fan_in_fan_out": False, "bias": "none", "init_lora_weights": True,
        }  # fmt: skip

    def _outs(self) -> None:
        """A finished OUT, and one that was stopped before anything got its name."""
        self.done, self.half = self.root / "outs" / "done", self.root / "outs" / "half"
        self.cache = str(self.root / "cache")
        ties_dist.merge(self.recipe_file, self.done, cache_dir=self.cache)
        self.job: Job = prepare(self.recipe_file, RunOptions())
        folder = OutFolder(place=LocalPlace(self.half), fingerprint=self.job.plan.fingerprint)
        shutil.copytree(self.done, self.half)
        manifest = json.loads((self.done / ".ties_dist" / "manifest.json").read_text())
        self.manifest_document = manifest
        (self.half / ".ties_dist" / "manifest.json").unlink()
        (self.half / ".ties_dist" / "report.json").unlink()
        (self.half / folder.parts).mkdir(parents=True)
        (self.half / "model.safetensors").rename(self.half / folder.partial("model.safetensors"))
        begun = {"recipe": self.job.recipe.canonical(), "stamps": self.job.stamps}
        (self.half / folder.run / "plan.json").write_text(json.dumps(begun))
        shard = manifest["shards"]["model.safetensors"]
        names = self.job.plan.counters.names
        self.journal_file = self.half / Journal(folder.place, folder.run, "0", names).name
        self.journal_lines = [
            {
                "kind": "merged", "ranges": [["model.safetensors", 0, shard["size"]]], "state": "", "majority": 1,
                "blocks": shard["blocks"], "counters": list(names), "dependent": 0,
                "counts": {t.source: [0] * len(names) for t in self.job.plan.counted},
            },
            {"kind": "thresholds", "cuts": manifest["origin"]["thresholds"]},
            {"kind": "cuts", "tensor": "a.weight", "cuts": [[0, 5], [1, 6]]},
            {"kind": "publishing"},
        ]  # fmt: skip
        self.lock_document = {
            "token": "0" * 16, "host": "h", "boot": "b", "namespace": "n", "pid": 77, "started": 1.0, "since": "then",
            "elsewhere": False,
        }  # fmt: skip

    def _watch(self) -> dict[str, tuple[int, int]]:
        kept = {}
        for name in (*VICTIMS, "job/base/model.safetensors"):
            found = (self.root / name).stat()
            kept[name] = found.st_mtime_ns, found.st_size
        for name in (".", "outs", "job"):
            kept[name] = len(list((self.root / name).iterdir())), 0
        return kept

    def touched(self) -> list[str]:
        """What changed of that which nobody may touch."""
        try:
            now = self._watch()
        except FileNotFoundError as error:
            return [str(error)]
        return [name for name, kept in self.watched.items() if now[name] != kept]

    # -- the trials ----------------------------------------------------------------------------------------------------

    def header(self, draw: random.Random, whole: bool) -> bytes:
        length = int.from_bytes(self.header_bytes[:8], "little")
        head, body = self.header_bytes[8 : 8 + length], self.header_bytes[8 + length :]
        if draw.random() < 0.8:
            head = as_json(json.loads(head), draw)
            raw = len(head).to_bytes(8, "little") + head + body
        else:
            raw = by_byte(self.header_bytes[: 8 + length], draw) + body
        (self.root / "one" / "model.safetensors").write_bytes(raw)
        open_input(self.root / "one", None, "one", "auto")
        return raw

    def index(self, draw: random.Random, whole: bool) -> bytes:
        raw = as_json(self.index_document, draw)
        (self.root / "sharded" / "model.safetensors.index.json").write_bytes(raw)
        open_checkpoint(self.root / "sharded", name="sharded", reader=open_reader)
        return raw

    def adapter(self, draw: random.Random, whole: bool) -> bytes:
        raw = as_json(self.adapter_document, draw)
        (self.root / "adapter" / "adapter_config.json").write_bytes(raw)
        open_input(self.root / "job" / "base", self.root / "adapter", "adapted", "auto")
        return raw

    def manifest(self, draw: random.Random, whole: bool) -> bytes:
        raw = as_json(self.manifest_document, draw)
        (self.done / ".ties_dist" / "manifest.json").write_bytes(raw)
        place = LocalPlace(self.done)
        folder = OutFolder(place=place, fingerprint="0" * 32)
        folder.holds()
        folder.of_older_models((), ())
        status(place, watched_seconds=0)
        if not whole:
            verify(place, RunOptions(), sample=0, progress=Silent())
            return raw
        try:
            verify(place, RunOptions(), sample=1, progress=Silent())
        finally:
            shutil.copytree(self.done, self.root / "outs" / "copy")
            try:
                other = self.recipe_document | {"parameters": {"density": 0.5}}
                (self.root / "job" / "recipe.yml").write_text(json.dumps(other))
                ties_dist.merge(self.recipe_file, self.root / "outs" / "copy", overwrite=True, cache_dir=self.cache)
            finally:
                self.recipe_file.write_text(json.dumps(self.recipe_document))
                shutil.rmtree(self.root / "outs" / "copy")
        return raw

    def journal(self, draw: random.Random, whole: bool) -> bytes:
        lines = [json.dumps(line).encode() for line in self.journal_lines]
        for i in {draw.randrange(len(lines)) for _ in range(draw.choice((1, 2)))}:
            lines[i] = as_json(self.journal_lines[i], draw)
        raw = b"".join(digest(line)[:16].encode() + b" " + line + b"\n" for line in lines)
        if draw.random() < 0.1:
            raw = by_byte(raw, draw)
        self.journal_file.write_bytes(raw)
        place, plan = LocalPlace(self.half), self.job.plan
        folder = OutFolder(place=place, fingerprint=plan.fingerprint)
        record = usable(read_journals(place, folder.run, plan.counters.names), plan)
        list(plan.items(r.item for r in record.covering(record.merged)))
        status(place, watched_seconds=0)
        if whole:
            shutil.copytree(self.half, self.root / "outs" / "copy")
            try:
                ties_dist.merge(self.recipe_file, self.root / "outs" / "copy", cache_dir=self.cache)
            finally:
                shutil.rmtree(self.root / "outs" / "copy")
        return raw

    def lock(self, draw: random.Random, whole: bool) -> bytes:
        raw = as_json(self.lock_document, draw)
        file = self.half / ".ties_dist" / "lock"
        file.write_bytes(raw)
        place = LocalPlace(self.half)
        try:
            lock = RunLock(place)
            if (holder := lock.holder()) is not None:
                str(holder), holder.is_dead(lock.me)
            status(place, watched_seconds=0)
            if whole:
                lock.lease_seconds = 0.05
                lock.acquire()
                lock.release()
        finally:
            file.unlink(missing_ok=True)
        return raw

    def recipe(self, draw: random.Random, whole: bool) -> bytes:
        document = by_value(self.recipe_document, draw) if draw.random() < 0.8 else self.recipe_document
        raw = as_text(document)
        if draw.random() < 0.4:
            raw = by_byte(raw, draw)
        text = raw.decode(errors="replace")
        prepare(text if "\n" in text else text + "\n", RunOptions(), root=self.root / "job")
        return raw


@contextmanager
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def alarm() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
