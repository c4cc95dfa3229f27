"""The command line as a test runs it: in this process, or as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ties_dist.cli.commands import main

SHAPES: Mapping[str, Sequence[int]] = {
    "embed.weight": (40, 16),
    "layers.0.weight": (32, 32),
    "layers.1.weight": (32, 32),
    "norm.weight": (16,),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind. out, err: standard output and standard error."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as the one JSON document that `--json` promises."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """Run `ties-dist` in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^\d+$") as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return Outcome(status=int(str(ended.value)), out=out, err=err)


def start(*arguments: object, code: str = "", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `ties-dist` as a process of its own, after some `code` that may bend it."""
    program = f"{code}\nfrom ties_dist.cli.commands import main\nmain()\n"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=120)
    return Outcome(status=process.returncode, out=out, err=err)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def readable_files(out: Path) -> list[str]:
    """Files by which a loader would take OUT for a model."""
    return sorted(p.name for p in out.glob("*") if ".safetensors" in p.name)
