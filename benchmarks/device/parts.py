"""The parts of a run, in their order, and what each is given. Standard library only.

A part is a function `run(bench, tell)` in the module of its name; what it finds it tells at once, one value a line, so
that a kill costs what was not yet found.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Part:
    """proves: what its checks are. limit_seconds: then it is killed. needs: parts that must have ended well before."""

    name: str
    title: str
    proves: str
    limit_seconds: float
    needs: tuple[str, ...] = ()


PARTS = (
    Part(name="machine", title="The machine", proves="nothing; it is described", limit_seconds=40),
    Part(
        name="bits",
        title="Merges by CUDA, bit for bit",
        proves="digest, counts and kept shares of every method and type are the processor's; a NaN and an overflow are "
        "refused with the same words",
        limit_seconds=100,
    ),
    Part(
        name="copies",
        title="Copies between memory and GPU",
        proves="what comes back is what went over",
        limit_seconds=40,
    ),
    Part(name="files", title="Model files", proves="nothing; the merges' inputs are written", limit_seconds=75),
    Part(
        name="merges",
        title="Merges of 1.1B shapes, from files",
        proves="one digest a method over all devices, numbers of threads and repeats",
        limit_seconds=150,
        needs=("files",),
    ),
    Part(
        name="start",
        title="The first start and the second",
        proves="one digest over all devices and starts",
        limit_seconds=60,
    ),
    Part(
        name="large",
        title="Merges of 8B shapes, from bytes made up as they are read",
        proves="one digest a size over devices",
        limit_seconds=90,
    ),
    Part(
        name="mergekit",
        title="mergekit on the same files",
        proves="`linear` and `task_arithmetic` within one unit in the last place of ours, in float32",
        limit_seconds=75,
        needs=("files",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is done. layers, divide: of the 1.1B model (`Shapes.scaled`). large: growing merges, as options of
    `benchmarks.rehearsal`. copy_bytes: of the largest copy."""

    layers: int | None = None
    divide: int = 1
    large: tuple[str, ...] = ("--layers 4", "")
    threads: tuple[int, ...] = (16, 8, 4, 2, 1)
    repeats: int = 3
    copy_bytes: int = 1 << 28


SCALES: Mapping[str, Scale] = {
    "full": Scale(),
    "small": Scale(layers=2, large=("--layers 1", "--layers 2"), repeats=2, copy_bytes=1 << 26),
    "tiny": Scale(layers=1, divide=8, large=("--tensors 40",), threads=(2, 1), repeats=1, copy_bytes=1 << 20),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a part is given. driver: 'cuda' is the machine's own. figures: what earlier parts found, by name."""

    scratch: Path
    scale: Scale
    driver: Literal["cuda", "stand-in"]
    limit_seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def stood_in(self) -> bool:
        return self.driver == "stand-in"

    @property
    def has_gpu(self) -> bool:
        return bool(self.figures.get("gpus"))

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    @property
    def threads(self) -> tuple[int, ...]:
        """To merge by: no more than there are cores."""
        return tuple(n for n in self.scale.threads if n <= self.cores)

    @property
    def seconds_left(self) -> float:
        return self.limit_seconds - (time.monotonic() - self.began)

    def to_json(self) -> str:
        values = {name: value for name, value in asdict(self).items() if name != "began"}
        return json.dumps(values | {"scratch": str(self.scratch)})

    @classmethod
    def from_json(cls, text: str) -> Bench:
        values = json.loads(text)
        lists = {name: tuple(v) if isinstance(v, list) else v for name, v in values.pop("scale").items()}
        return cls(**{**values, "scratch": Path(values["scratch"]), "scale": Scale(**lists)})


class Skip(Exception):
    """This part, or what follows of it, cannot be done here; says why."""


@dataclass
class Teller:
    """Passes on what a part finds. send: a line of JSON."""

    send: Callable[[str], None]

    def _tell(self, kind: str, **values: Any) -> None:
        self.send(json.dumps({"kind": kind, **values}))

    def note(self, text: str) -> None:
        self._tell("note", text=text)

    def row(self, table: str, **cells: object) -> None:
        """A row of a table, by its columns' names; the first names it, and a later one of that name replaces it."""
        self._tell("row", table=table, cells={name: str(value) for name, value in cells.items()})

    def check(self, what: str, *, holds: bool, said: str = "") -> None:
        """what: names it; told again, it replaces what was said of it before."""
        self._tell("check", what=what, said=said, holds=holds)

    def figure(self, name: str, value: float) -> None:
        """A number for parts that follow."""
        self._tell("figure", name=name, value=value)

    def skipped(self, what: str, why: str) -> None:
        self._tell("skipped", text=f"{what}: {why}")

    def stop(self, why: str) -> None:
        """The part, or what follows of it, is skipped."""
        self._tell("stop", text=why)


def say(text: str) -> None:
    """Progress, into the log."""
    print(text, file=sys.stderr, flush=True)
