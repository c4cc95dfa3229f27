"""Everything that a machine with a GPU and many cores is asked, in one command and at most eight minutes: `device.md`.

    python -m benchmarks.device --out DIR

Standard library only until the missing packages are there; each part is a process of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.device.conduct import conduct
from benchmarks.device.packages import CUDA, ENGINE, MERGEKIT, OF_THE_PYTHON, bring, how_to_bring, missing, requirements
from benchmarks.device.parts import PARTS, SCALES, Bench, Part
from benchmarks.device.report import Report
from benchmarks.measure import REPOSITORY

LIMIT_SECONDS = 470.0
"""Eight minutes, less what starting and removing the files takes."""
STOOD_IN = (
    "**Stood in for**: the GPU and its driver. Merges by `cuda` ran against a stand-in over this machine's memory, "
    "their loops on its processor. Rates of copies and times of `cuda` mean nothing here; that the parts run, and that "
    "digests agree, is all they show."
)


def main() -> None:
    options = parse()
    if options.requirements:
        print("\n".join(requirements(REPOSITORY / "constraints.txt")))
        return
    if lacking := missing({name: name for name in OF_THE_PYTHON}):
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(lacking)}: run this with a Python that has torch and numba."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.out.mkdir(parents=True, exist_ok=True)
    options.scratch.mkdir(parents=True, exist_ok=True)
    (options.out / "log.txt").write_text("")
    with tempfile.TemporaryDirectory(prefix="device-", dir=options.scratch) as folder:
        scratch = Path(folder).absolute()
        site = scratch / "site"
        report = Report(options.out.absolute(), [patient(part, options.patience) for part in options.parts])
        report.head = [
            f"`python -m benchmarks.device {' '.join(shown(sys.argv[1:]))}`, {time.strftime('%Y-%m-%d')}, "
            f"Python {sys.version.split()[0]}, load average before the first part "
            f"{', '.join(f'{load:.2f}' for load in os.getloadavg())}.",
            *([STOOD_IN] if options.stand_in else []),
            packages(options.wheels, site),
        ]
        report.write()
        if lacking := missing(ENGINE):
            raise SystemExit(f"{how_to_bring(lacking)}. benchmarks/device.md says how to fill it.")
        bench = Bench(
            scratch=scratch,
            scale=SCALES[options.scale],
            driver="stand-in" if options.stand_in else "cuda",
            limit_seconds=options.limit_seconds * options.patience,
        )
        given = os.environ.get("PYTHONPATH", "")
        conduct(
            report,
            bench,
            environment={"PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), given, str(site))))},
        )
    print((options.out / "report.md").read_text())
    if report.bad:
        raise SystemExit(f"failed, killed, or with a check that does not hold: {', '.join(report.bad)}")


def packages(wheels: Path, site: Path) -> str:
    """Bring what is missing; a paragraph about it."""
    wanted = {**ENGINE, **CUDA, **MERGEKIT}
    lacking = missing(wanted)
    brought = bring(lacking, wheels, site)
    left = [package for package in lacking if package not in brought]
    said = f"Packages: {len(wanted) - len(lacking)} of {len(wanted)} were there"
    if brought:
        said += f"; unpacked from wheels: {', '.join(brought.values())}"
    if left:
        said += f"; {how_to_bring(left)}"
    return said + "."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "build" / "device", help="for report.md, report.json, log.txt"
    )
    parser.add_argument(
        "--wheels", type=Path, default=REPOSITORY / "build" / "wheels", help="packages that are missing"
    )
    parser.add_argument(
        "--scratch", type=Path, default=REPOSITORY / "build", help="for models and outputs, removed at the end"
    )
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument(
        "--parts", type=chosen, default=list(PARTS), help="comma-separated; all: " + ",".join(p.name for p in PARTS)
    )
    parser.add_argument("--limit-seconds", type=float, default=LIMIT_SECONDS, help="of all parts together")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies every limit, on slow machines")
    parser.add_argument("--stand-in", action="store_true", help="for the GPU's driver: rehearses where there is none")
    parser.add_argument("--requirements", action="store_true", help="print what may have to be brought, for pip")
    return parser.parse_args()


def chosen(text: str) -> Sequence[Part]:
    names = text.split(",")
    if unknown := set(names) - {part.name for part in PARTS}:
        raise argparse.ArgumentTypeError(f"no part is called {', '.join(sorted(unknown))}")
    return [part for part in PARTS if part.name in names]


def patient(part: Part, factor: float) -> Part:
    return replace(part, limit_seconds=part.limit_seconds * factor)


def shown(words: Sequence[str]) -> list[str]:
    """Without this machine's folders."""
    return [Path(word).name if "/" in word else word for word in words]


if __name__ == "__main__":
    main()
