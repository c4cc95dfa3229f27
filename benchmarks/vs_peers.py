"""ties_dist against mergekit on the same files in one run: whole commands, from start to exit, alternating.

Every merge goes into a fresh folder, with ties_dist's statistics cache empty: nothing is reused but compiled kernels,
and one run of each row with an empty compile cache comes first and is reported by itself. ties_dist's output is
synced when the command ends, mergekit's is not; it is synced before the next command starts, outside its time.

The results are checked: equal digests over repeats; `linear` and `task_arithmetic` within one unit in the last place
of mergekit's where that computes in float32, as ties_dist does. `dtype: bfloat16`, as many users write, makes mergekit
faster and round every intermediate: those are rows of their own, and their distance is only told.

    TIES_DIST_MERGEKIT=/path/to/mergekit-yaml python -m benchmarks.vs_peers build/bench --mergekit-repeats 1
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import ceiling, checkpoints
from benchmarks.checkpoints import Family
from benchmarks.measure import REPOSITORY, Run, bring_cache_to, cached_share, mib, run, spread, table, write_report
from ties_dist.cache import KERNELS

METHODS = ("ties", "linear", "task_arithmetic")
ALLOWED_ULPS = 1
LEAST_ULP = 2.0**-25
"""What weights of a few hundredths lose in a float32 sum: where they cancel, the result's own unit is far smaller."""
COMPARED_AT_ONCE = 1 << 20  # elements


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. variant: ties_dist's semantics, or mergekit's arithmetic."""

    tool: str
    method: str
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.tool} {self.method}" + (f" ({self.variant})" if self.variant else "")

    @property
    def folder(self) -> str:
        return "-".join(part.replace(" ", "-") for part in (self.tool, self.method, self.variant) if part)


@dataclass
class Bench:
    """Where everything lies, and how each command is made."""

    family: Family
    work: Path
    mergekit: Path | None
    options: argparse.Namespace
    runs: dict[Row, list[Run]] = field(default_factory=lambda: defaultdict(list))
    first: dict[Row, Run] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def rows(self, method: str) -> Iterator[Row]:
        if self.mergekit is not None:
            for dtype in self.options.mergekit_dtype:
                yield Row(tool="mergekit", method=method, variant=f"in {dtype}")
        for semantics in self.options.semantics if method == "ties" else [""]:
            yield Row(tool="ties_dist", method=method, variant=semantics)

    def out(self, row: Row) -> Path:
        return self.work / "out" / row.folder

    def measure(self, row: Row) -> Run:
        """Run a row once, into a folder that does not exist."""
        recipe = self.work / f"{row.folder}.yml"
        shutil.rmtree(self.out(row), ignore_errors=True)
        self.out(row).parent.mkdir(parents=True, exist_ok=True)
        bring_cache_to(self.options.cache, self.family.files)
        if row.tool == "mergekit":
            return self._mergekit(row, recipe)
        return self._ties_dist(row, recipe)

    def _mergekit(self, row: Row, recipe: Path) -> Run:
        assert self.mergekit is not None
        document = self.family.recipe(row.method, dtype=row.variant.removeprefix("in "), out_dtype=self.family.dtype)
        recipe.write_text(json.dumps(document, indent=2))  # JSON is YAML
        threads = ["--num-threads", str(self.options.threads)] if self.options.threads else []
        return run(
            [self.mergekit, "--no-copy-tokenizer", "--quiet", *threads, recipe, self.out(row)],
            environment={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def _ties_dist(self, row: Row, recipe: Path) -> Run:
        recipe.write_text(json.dumps(self.family.recipe(row.method), indent=2))
        cache = self.work / "cache" / row.folder  # empty at the row's first run; later its compiled kernels are kept
        cache.mkdir(parents=True, exist_ok=True)
        for path in cache.iterdir():
            if path.name != KERNELS:
                shutil.rmtree(path)
        given = ["--semantics", row.variant] if row.variant else []
        given += ["--threads", str(self.options.threads)] if self.options.threads else []
        return run(
            [
                *(
                    sys.executable,
                    "-m",
                    "ties_dist",
                    "merge",
                    recipe,
                    self.out(row),
                    "--json",
                    "--fresh",
                    "--overwrite",
                ),
                *("--memory-budget", self.options.memory_budget, *given),
            ],
            environment={
                "TIES_DIST_CACHE": str(cache),
                "NUMBA_CACHE_DIR": str(self.work / "numba" / row.folder),
                "CUDA_VISIBLE_DEVICES": "",
            },
        )


def find_mergekit() -> Path | None:
    """As tests/conformance/test_mergekit.py: TIES_DIST_MERGEKIT, else PATH, else .venv-mergekit in the repository."""
    candidates = [os.environ.get("TIES_DIST_MERGEKIT"), shutil.which("mergekit-yaml")]
    candidates.append(str(REPOSITORY / ".venv-mergekit" / "bin" / "mergekit-yaml"))
    return next((Path(found) for found in candidates if found and Path(found).is_file()), None)


def mergekit_versions(executable: Path) -> str:
    asked = "from importlib.metadata import version as v; print('mergekit', v('mergekit'), 'on torch', v('torch'))"
    python = executable.absolute().parent / "python"
    return subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


# --- the runs ---


def run_all(bench: Bench) -> None:
    """All methods, all repeats, tools alternating; then the checks, while the outputs are there."""
    for method in bench.options.methods:
        rows = list(bench.rows(method))
        for row in rows:
            if row.tool == "ties_dist":
                bench.first[row] = told(row, "empty compile cache", bench.measure(row))
        for repeat in range(bench.options.repeats):
            for row in rows:
                if row.tool == "ties_dist" or repeat < bench.options.mergekit_repeats:
                    bench.runs[row].append(told(row, f"repeat {repeat + 1}", bench.measure(row)))
        compare_repeats(bench, rows)
        compare_tools(bench, rows)
        if not bench.options.keep:
            for row in rows:
                shutil.rmtree(bench.out(row))


def told(row: Row, which: str, measured: Run) -> Run:
    """A line of progress: a long bench that says nothing looks dead."""
    print(f"{row}, {which}: {measured.wall_seconds:.1f} s, {mib(measured.peak_bytes)}", file=sys.stderr, flush=True)
    return measured


# --- the checks ---


def compare_repeats(bench: Bench, rows: Sequence[Row]) -> None:
    for row in (row for row in rows if row.tool == "ties_dist"):
        runs = [bench.first[row], *bench.runs[row]]
        digests = sorted({json.loads(each.stdout)["output_digest"] for each in runs})
        said = f"{row}: output digest {' and '.join(f'`{d}`' for d in digests)} in {len(runs)} runs"
        (bench.checked if len(digests) == 1 else bench.failed).append(said)


def compare_tools(bench: Bench, rows: Sequence[Row]) -> None:
    """How far the outputs of one method are from each other; of the semantics of `ties`, the one that is mergekit's."""
    for peer in (row for row in rows if row.tool == "mergekit"):
        for ours in (row for row in rows if row.tool == "ties_dist"):
            if ours.method == "ties" and ours.variant != "mergekit":
                continue  # another definition: nothing to compare
            left, right = mapped_tensors(bench.out(ours)), mapped_tensors(bench.out(peer))
            differing, beyond, furthest = distances(left, right)
            said = (
                f"{ours} against {peer}: {differing:.3%} of the elements differ, {beyond:.4%} by more than "
                f"{ALLOWED_ULPS} unit in the last place of {bench.family.dtype}, {furthest:,.1f} at most"
            )
            if ours.method == "ties":
                said += " (of entries equal to the threshold, mergekit keeps arbitrary ones)"
            if left.keys() != right.keys():
                # mergekit stacks a mixture's experts into one tensor, under a name of its own.
                said += f"; compared in the {len(left.keys() & right.keys())} of {len(left)} tensors that both have"
            must_agree = ours.method != "ties" and peer.variant == "in float32"
            (bench.failed if must_agree and beyond else bench.checked).append(said)


def distances(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> tuple[float, float, float]:
    """Share of elements that differ, share beyond ALLOWED_ULPS, largest distance in units in the last place.

    left, right: as `mapped_tensors` gives them; names that only one has are left out.
    """
    total = differing = beyond = 0
    furthest = 0.0
    for name in left.keys() & right.keys():
        one, other = left[name], right[name]
        assert one.size == other.size, name
        for start in range(0, one.size, COMPARED_AT_ONCE):
            a, b = one[start : start + COMPARED_AT_ONCE], other[start : start + COMPARED_AT_ONCE]
            places = np.flatnonzero(a.view(f"i{a.itemsize}") != b.view(f"i{b.itemsize}"))
            apart = ulps_apart(a[places], b[places])
            differing += places.size
            beyond += int(np.count_nonzero(~(apart <= ALLOWED_ULPS)))
            furthest = max(furthest, float(apart.max(initial=0.0)))
        total += one.size
    return differing / total, beyond / total, furthest


def ulps_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) of one stored type each, bfloat16 as uint16 -> (n,) in units of the larger one's last place."""
    digits = {"uint16": 8, "float16": 11, "float32": 24}[a.dtype.name]
    if a.dtype == np.uint16:
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    wide, other = a.astype(np.float64), b.astype(np.float64)
    _, exponent = np.frexp(np.maximum(np.abs(wide), np.abs(other)))  # larger = mantissa x 2^exponent, mantissa < 1
    apart: np.ndarray = np.abs(wide - other) / np.maximum(np.ldexp(1.0, exponent - digits), LEAST_ULP)
    return apart


def mapped_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, mapped flat: (numel,) float32, float16, or uint16 that holds bfloat16."""
    stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            start, stop = entry["data_offsets"]
            kind = np.dtype(stored[entry["dtype"]])
            count = (stop - start) // kind.itemsize
            tensors[name] = np.memmap(file, dtype=kind, mode="r", offset=8 + length + start, shape=(count,))
    return tensors


# --- the report ---


def costs_table(bench: Bench) -> str:
    rows = []
    for row, runs in bench.runs.items():
        rows.append(
            (
                row,
                len(runs),
                spread([r.wall_seconds for r in runs]),
                spread([r.cpu_seconds for r in runs]),
                mib(median(r.peak_bytes for r in runs)),
                mib(median(r.anonymous_bytes for r in runs)),
                mib(median(r.device_read_bytes for r in runs)),
                f"{bench.first[row].wall_seconds:.1f}" if row in bench.first else "",
            )
        )
    return table(
        [
            *("", "runs", "wall s", "CPU-s", "peak RSS", "of it not file pages", "read from the device"),
            "wall s, empty compile cache",
        ],
        rows,
    )


def ratios_table(bench: Bench, raw: ceiling.Ceiling | None) -> str:
    """Each row of ties_dist against each mergekit row of the same method; medians."""
    rows = []
    for ours in (row for row in bench.runs if row.tool == "ties_dist"):
        for peer in (row for row in bench.runs if row.tool == "mergekit" and row.method == ours.method):
            mine, its = bench.runs[ours], bench.runs[peer]
            rows.append(
                (
                    f"{ours} against {peer}",
                    f"{middle(its, 'wall_seconds') / middle(mine, 'wall_seconds'):.1f} x",
                    f"{middle(its, 'cpu_seconds') / middle(mine, 'cpu_seconds'):.1f} x",
                    f"{middle(mine, 'peak_bytes') / middle(its, 'peak_bytes'):.0%}",
                )
            )
    parts = [table(["", "faster", "fewer CPU-s", "of its peak RSS"], rows)] if rows else []
    if raw is not None:
        reached = []
        for row in (row for row in bench.runs if row.tool == "ties_dist"):
            unread = bench.family.base if row.method == "linear" else None
            needed = sum(f.stat().st_size for f in bench.family.files if f.parent != unread)
            seconds = (needed + bench.family.output_bytes) / raw.gigabytes_per_second / 1e9
            whole = middle(bench.runs[row], "wall_seconds")
            reached.append((row, f"{seconds / whole:.0%}", f"{seconds / in_phases(bench.runs[row]):.0%}"))
        parts.append(table(["share of the ceiling reached", "by the whole command", "by its phases"], reached))
    return "\n\n".join(parts)


def middle(runs: Sequence[Run], cost: str) -> float:
    return median(float(getattr(each, cost)) for each in runs)


def in_phases(runs: Sequence[Run]) -> float:
    """Median of the seconds that ties_dist reports for its work, without imports and exit."""
    return median(float(json.loads(each.stdout)["elapsed_seconds"]) for each in runs)


def inside_table(bench: Bench) -> str:
    """What ties_dist says of its own last run."""
    rows = []
    for row, runs in bench.runs.items():
        if row.tool == "ties_dist":
            report = json.loads(runs[-1].stdout)
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["phases"].items())
            rows.append(
                (
                    row,
                    report["kernel"],
                    f"{report['elapsed_seconds']:.1f}",
                    phases,
                    f"{report['bytes_read'] / bench.family.input_bytes:.2f}",
                    mib(report["projected_bytes"]),
                )
            )
    return table(["", "kernel", "inside s", "phases, s", "bytes read / inputs", "projected peak"], rows)


def verdict(word: str, sentences: Sequence[str]) -> str:
    return f"{word}:\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def main() -> None:
    parser = argparse.ArgumentParser(description="Merge the same checkpoints with ties_dist and with mergekit.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/bench"), help="models and outputs go here")
    checkpoints.add_arguments(parser)
    parser.add_argument("--methods", type=words, default=list(METHODS), help="comma-separated")
    parser.add_argument("--semantics", type=words, default=["paper", "mergekit"], help="of ties_dist's TIES")
    parser.add_argument("--mergekit-dtype", type=words, help="what it computes in", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mergekit-repeats", type=int, default=3)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm", help="page cache before every run")
    parser.add_argument("--memory-budget", default="1GiB")
    parser.add_argument("--threads", type=int, help="of both tools; default: their own")
    parser.add_argument("--no-ceiling", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the merged models")
    parser.add_argument("--report", action="store_true", help="write benchmarks/results/DATE-vs-peers.md")
    options = parser.parse_args()

    name = checkpoints.family_name(options)
    family = checkpoints.family_from(options, options.folder / name)
    mergekit = find_mergekit() if options.mergekit_repeats else None
    bench = Bench(family=family, work=(options.folder / "vs-peers").absolute(), mergekit=mergekit, options=options)
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir(parents=True)
    outputs = max(len(list(bench.rows(method))) for method in options.methods) * (
        len(options.methods) if options.keep else 1
    )
    needed, free = outputs * family.output_bytes, shutil.disk_usage(bench.work).free
    if needed > free:
        raise SystemExit(f"{bench.work} needs {needed / 1e9:.1f} GB for the outputs, {free / 1e9:.1f} GB are free.")
    bring_cache_to(options.cache, family.files)
    share = cached_share(family.files)

    run_all(bench)
    raw = None
    if not options.no_ceiling:
        raw = ceiling.measure(
            family.files, family.output_bytes, bench.work / "ceiling.bin", cache=options.cache, repeats=options.repeats
        )
    request = (
        f"{name}: base and {options.experts} experts of {family.parameters:,} parameters, "
        f"{family.input_bytes / 1e9:.2f} GB in, {family.output_bytes / 1e9:.2f} GB out; TIES at density 0.2. Page "
        f"cache {options.cache} before every run ({share:.0%} of the inputs in it before the first). ties_dist with "
        f"`--memory-budget {options.memory_budget}`, statistics cache empty, kernels compiled before but in the last "
        f"column. {mergekit_versions(mergekit) if mergekit else 'mergekit was not run'}. Medians, in brackets "
        "least-greatest; RSS counts pages of mapped files."
    )
    sections = [request, costs_table(bench), ratios_table(bench, raw), inside_table(bench)]
    sections += [verdict("Checked", bench.checked)] + ([verdict("FAILED", bench.failed)] if bench.failed else [])
    write_report(
        f"vs-peers-{name}-{options.cache}",
        "ties_dist against mergekit",
        options.folder,
        [*sections, *([raw.section()] if raw else [])],
        keep=options.report,
    )
    if not options.keep:
        shutil.rmtree(bench.work)
    if bench.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
