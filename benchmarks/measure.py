"""What a command costs, on which machine, with its inputs in the page cache or not.

A process inherits the peak memory of the one that starts it (Linux keeps the high-water mark over exec), so commands
are started by this module run as a bare interpreter: `run` measures from 20 MB up, whatever the caller has imported.
Standard library only, for the same reason. Also a better `time`:

    python -m benchmarks.measure -- ties-dist merge recipe.yml out
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
SAMPLE_SECONDS = 0.05
PIECE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """One command, from start to exit.

    cpu_seconds: user and system, with its children's. peak_bytes: resident set of its largest process; pages of mapped
    files count. anonymous_bytes: peak of what is not file pages, in the first process, sampled 20 times a second.
    device_read_bytes, device_written_bytes: what went to storage on its behalf; none is read when the cache is warm.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    anonymous_bytes: int
    device_read_bytes: int
    device_written_bytes: int
    status: int
    stdout: str = field(default="", repr=False)


def run(command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command in the repository and measure it. Raises SystemExit with the end of its stderr where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "run.json"
        bare = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), "--report", str(report), "--"]
        done = subprocess.run(
            [*bare, *map(str, command)],
            env=os.environ | dict(environment or {}),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        if not report.is_file():
            raise SystemExit(f"{command[0]} did not start:\n{done.stderr}")
        measured = Run(**{**json.loads(report.read_text()), "stdout": done.stdout})
    if measured.status != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\nended with {measured.status}:\n{done.stderr[-4000:]}")
    return measured


def start_and_wait(command: Sequence[str]) -> Run:
    """What the bare interpreter does."""
    anonymous, ended = [0], threading.Event()
    began = time.monotonic()
    process = subprocess.Popen(command)

    def sample() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            anonymous.append(_anonymous_bytes(process.pid))

    threading.Thread(target=sample, daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    elapsed = time.monotonic() - began
    ended.set()
    return Run(
        wall_seconds=elapsed,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        anonymous_bytes=max(anonymous),
        device_read_bytes=usage.ru_inblock * 512,
        device_written_bytes=usage.ru_oublock * 512,
        status=os.waitstatus_to_exitcode(status),
    )


def _anonymous_bytes(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon:")), 0)


# --- the page cache ---


def warm(files: Iterable[Path]) -> None:
    """Read every file once, so that what fits is in the page cache."""
    buffer = bytearray(PIECE)
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def evict(files: Iterable[Path]) -> None:
    """Drop every file from the page cache; needs no privileges, but the pages must be clean."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bring_cache_to(state: str, files: Sequence[Path]) -> None:
    """`warm` or `cold`; first waits until no earlier command's output is still being written back."""
    os.sync()
    if state == "warm":
        warm(files)
    else:
        evict(files)


def cached_share(files: Iterable[Path]) -> float:
    """Share of the files' bytes that lie in the page cache, [0, 1], by mincore(2)."""
    import ctypes

    import numpy as np

    libc = ctypes.CDLL(None, use_errno=True)
    resident = pages = 0
    for file in files:
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            flags = np.zeros(count, dtype=np.uint8)
            view = np.frombuffer(mapped, dtype=np.uint8)
            address, length = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(mapped))
            if libc.mincore(address, length, ctypes.c_void_p(flags.ctypes.data)) != 0:
                raise OSError(ctypes.get_errno(), "mincore", str(file))
            del view
            resident, pages = resident + int((flags & 1).sum()), pages + count
    return resident / pages if pages else 1.0


# --- words for reports ---


def machine(folder: Path) -> dict[str, str]:
    """Hardware, system and versions; the file system is that of `folder`."""
    cpu = Path("/proc/cpuinfo").read_text()
    model = next((line.split(":")[1].strip() for line in cpu.splitlines() if line.startswith("model name")), "unknown")
    flags = set(next((line for line in cpu.splitlines() if line.startswith("flags")), "").split())
    widest = next((name for name in ("avx512f", "avx2") if name in flags), "no AVX2")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "processor": f"{model}, {len(os.sched_getaffinity(0))} cores, {widest}",
        "memory": f"{memory / 2**30:.1f} GiB",
        "file system": _file_system(folder),
        "kernel": f"{platform.system()} {platform.release()}",
        "load average": ", ".join(f"{load:.2f}" for load in os.getloadavg()) + " (1, 5, 15 minutes, at the end)",
        "Python": platform.python_version(),
    }
    for package in ("torch", "numpy", "numba", "safetensors", "ties-dist"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found | {"commit": _commit()}


def _commit() -> str:
    """As git names it; of files without a repository, the first digits of their SHA-256."""
    try:
        asked = ["git", "describe", "--always", "--dirty"]
        found = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        found = ""
    if found:
        return found
    content = hashlib.sha256()
    for file in sorted((REPOSITORY / "ties_dist").rglob("*.py")):
        content.update(file.read_bytes())
    return f"unknown; SHA-256 of the package's files begins with {content.hexdigest()[:12]}"


def available_bytes() -> int:
    """Memory that is free or can be freed."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _file_system(folder: Path) -> str:
    target = folder.resolve()
    mounts = [line.split()[:3] for line in Path("/proc/mounts").read_text().splitlines()]
    covering = [(point, kind) for _, point, kind in mounts if target.is_relative_to(point)]
    return max(covering, key=lambda found: len(found[0]))[1] if covering else "unknown"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown, readable in a terminal too: first column to the left, numbers to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (aligned[0], rule, *aligned[1:]))


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and in brackets the least and the greatest where there are several."""
    middle = f"{median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def write_report(topic: str, title: str, folder: Path, sections: Sequence[str], *, keep: bool) -> None:
    """Print a report; with `keep`, also write it to benchmarks/results/DATE-topic.md. folder: where the data lay.

    The command is given without this machine's paths.
    """
    described = "\n".join(f"- {name}: {value}" for name, value in machine(folder).items())
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(words)}".strip()
    text = "\n\n".join([f"# {title}", f"`{command}`, {time.strftime('%Y-%m-%d')}", described, *sections]) + "\n"
    print(text)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{time.strftime('%Y-%m-%d')}-{topic}.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a command; print what it cost as JSON.")
    parser.add_argument("--report", type=Path, help="write the JSON here instead of to stderr")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    cost = asdict(start_and_wait(arguments.command))
    cost.pop("stdout")
    if arguments.report:
        arguments.report.write_text(json.dumps(cost))
    else:
        print(json.dumps(cost, indent=2), file=sys.stderr)
        sys.exit(cost["status"])


if __name__ == "__main__":
    main()
