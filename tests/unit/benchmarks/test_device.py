"""`benchmarks.device`: its parts on the stand-in driver, its limits, its report, and what it does on a bare Python."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.device import conduct, packages
from benchmarks.device.gpu import Watched
from benchmarks.device.parts import PARTS, SCALES, Bench, Part, Teller
from benchmarks.device.report import Findings, Report
from benchmarks.measure import REPOSITORY
from tests import cuda_checks
from tests.cuda_driver import Driver

PYTHON = sys.executable


def device(out: Path, *options: str, **started: object) -> subprocess.CompletedProcess[str]:
    command = [PYTHON, "-m", "benchmarks.device", "--out", str(out), "--scratch", str(out / "scratch"), *options]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, **started)  # type: ignore[call-overload,no-any-return]


def found_in(out: Path) -> dict[str, dict[str, object]]:
    """The parts of a report, by name."""
    return {found["part"]["name"]: found for found in json.loads((out / "report.json").read_text())["parts"]}


# -- all of it ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.timeout(1800)  # a minute and a half; five on a machine with ten times the work it has cores for
def test_all_parts_run_on_the_stand_in(tmp_path: Path) -> None:
    done = device(tmp_path, "--stand-in", "--scale", "tiny", "--patience", "20", "--wheels", str(tmp_path))
    assert done.returncode == 0, done.stderr + (tmp_path / "log.txt").read_text()
    parts = found_in(tmp_path)
    assert {name: found["state"] for name, found in parts.items() if name != "mergekit"} == {
        part.name: "done" for part in PARTS if part.name != "mergekit"
    }
    checks = {name: len(found["checks"]) for name, found in parts.items()}  # type: ignore[arg-type]
    assert checks | {"mergekit": 0} == {
        "machine": 0, "bits": 2, "copies": 1, "files": 0, "merges": 3, "start": 1, "large": 1, "mergekit": 0,
    }  # fmt: skip
    text = (tmp_path / "report.md").read_text()
    assert text == done.stdout.removesuffix("\n")
    assert "**Stood in for**: the GPU and its driver." in text
    assert "GPU: a stand-in, no GPU" in text
    assert text.count("Holds: ") == sum(checks.values()) and "DOES NOT HOLD" not in text
    assert str(tmp_path) not in text, "a report names no folder of this machine"
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_without_a_gpu_the_processors_parts_run_and_the_others_say_why_not(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = device(
        tmp_path, "--scale", "tiny", "--parts", "machine,bits,copies,start", "--patience", "20", env=environment
    )
    assert done.returncode == 0, done.stderr
    parts = found_in(tmp_path)
    for name in ("bits", "copies"):
        assert parts[name]["state"] == "skipped"
        assert re.search("--device cuda (needs|found no)", str(parts[name]["reason"]))
    assert parts["start"]["skipped"] == ["starts on a GPU: no GPU"]
    rows = next(iter(parts["start"]["tables"].values()))  # type: ignore[attr-defined]
    assert [row["start"] for row in rows] == ["cpu, first", "cpu, second"]


# -- limits, and a report at any moment --------------------------------------------------------------------------------


def part(name: str, *, limit_seconds: float = 60.0, needs: tuple[str, ...] = ()) -> Part:
    return Part(name=name, title=f"The part {name}", proves="something", limit_seconds=limit_seconds, needs=needs)


def run_parts(
    tmp_path: Path, codes: dict[str, str], parts: Sequence[Part], *, limit_seconds: float = 60.0
) -> dict[str, Findings]:
    """Parts whose process runs a piece of Python instead. It may call `tell(kind=..., ...)`."""
    tell = "import json, sys\ndef tell(**what): print(json.dumps(what), flush=True)\n"
    report = Report(tmp_path, parts)
    bench = Bench(scratch=tmp_path, scale=SCALES["tiny"], driver="stand-in", limit_seconds=limit_seconds)
    command = lambda part, bench: [PYTHON, "-c", tell + f"bench = json.loads({bench.to_json()!r})\n" + codes[part.name]]  # noqa: E731
    conduct.conduct(report, bench, environment={}, command=command)
    return report.findings


HANGS = "import time, sys, subprocess\nprint('waiting for the moon', file=sys.stderr)\n"


def test_a_part_that_hangs_is_killed_at_its_limit_with_its_children_and_the_next_one_runs(tmp_path: Path) -> None:
    child = "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
    codes = {
        "one": HANGS + child + "tell(kind='figure', name='child', value=c.pid)\ntime.sleep(100)",
        "two": "tell(kind='check', what='it ran', said='', holds=True)",
    }
    found = run_parts(tmp_path, codes, [part("one", limit_seconds=2.0), part("two")])
    assert (found["one"].state, found["two"].state) == ("killed", "done")
    assert "at its limit of 2 s" in found["one"].reason and "waiting for the moon" in found["one"].reason
    assert 2.0 <= found["one"].seconds < 10.0
    wait_until(lambda: not is_alive(int(found["one"].figures["child"])))
    assert "| one  | killed |" in (tmp_path / "report.md").read_text()


def test_a_part_that_fails_is_named_with_its_last_words_and_what_needs_it_is_skipped(tmp_path: Path) -> None:
    codes = {"one": "raise ValueError('no moon')", "two": "", "three": ""}
    found = run_parts(tmp_path, codes, [part("one"), part("two", needs=("one",)), part("three")])
    assert [each.state for each in found.values()] == ["failed", "skipped", "done"]
    assert "exit status 1" in found["one"].reason and "ValueError: no moon" in found["one"].reason
    assert found["two"].reason == "it needs the part one"


def test_the_whole_run_has_a_limit_too(tmp_path: Path) -> None:
    codes = {"one": HANGS + "time.sleep(100)", "two": ""}
    found = run_parts(tmp_path, codes, [part("one"), part("two")], limit_seconds=conduct.LEAST_SECONDS + 1)
    assert [each.state for each in found.values()] == ["killed", "skipped"]
    assert found["two"].reason == "the 6 s of the whole run were over"


def test_a_part_is_given_what_earlier_parts_found(tmp_path: Path) -> None:
    codes = {"one": "tell(kind='figure', name='rate', value=51.5)", "two": "assert bench['figures'] == {'rate': 51.5}"}
    found = run_parts(tmp_path, codes, [part("one"), part("two")])
    assert found["two"].state == "done", found["two"].reason


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_report_survives_a_kill_and_no_process_is_left(number: signal.Signals, tmp_path: Path) -> None:
    command = [PYTHON, "-m", "benchmarks.device", "--out", str(tmp_path), "--scratch", str(tmp_path / "scratch")]
    options = ["--stand-in", "--scale", "tiny", "--parts", "machine,bits", "--patience", "20"]
    process = subprocess.Popen([*command, *options], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        told = tmp_path / "report.md"  # written after report.json
        wait_until(lambda: told.exists() and "Merges on both devices" in told.read_text())
        group = part_of(process.pid)
        process.send_signal(number)
        process.wait(20)
    finally:
        process.kill()
    wait_until(lambda: not is_alive(group))
    parts = found_in(tmp_path)
    assert parts["machine"]["state"] == "done"
    assert parts["bits"]["state"] == ("running" if number == signal.SIGKILL else "stopped")
    assert "Merges on both devices" in (tmp_path / "report.md").read_text()


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def part_of(process: int) -> int:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(children[0])


def is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except FileNotFoundError:
        return False


# -- the report --------------------------------------------------------------------------------------------------------


def test_what_is_told_stands_in_the_report_and_a_row_of_the_same_name_replaces_the_former(tmp_path: Path) -> None:
    found = Findings(part("one"))
    tell = Teller(lambda line: found.take(json.loads(line)))
    for runs in (1, 2):
        tell.row("Merges", where="cpu", runs=runs)
    tell.row("Merges", where="cuda", runs=1, share="80%")
    tell.check("one digest", holds=False, said="`a` and `b`")
    tell.skipped("eight threads", "two cores")
    report = Report(tmp_path, [part("one")])
    report.findings["one"] = found
    assert report.bad == ["one"]
    found.state = "done"
    report.write()
    assert (
        (tmp_path / "report.md")
        .read_text()
        .endswith(
            """## The part one

Proves: something.

Merges:

| where | runs | share |
| ----- | ---: | ----: |
| cpu   |    2 |       |
| cuda  |    1 |   80% |

- Skipped: eight threads: two cores
- **DOES NOT HOLD**: one digest (`a` and `b`)
"""
        )
    )
    tell.check("one digest", holds=True, said="`a`")
    assert report.bad == []


# -- a bare Python -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wheel", "fitting"),
    [
        ("zarr-3.1.6-py3-none-any.whl", True),
        ("six-1.17.0-py2.py3-none-any.whl", True),
        ("pydantic_core-2.50.4-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", True),
        ("pydantic_core-2.50.4-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl", False),
        ("pydantic_core-2.50.4-cp312-cp312-manylinux2014_aarch64.manylinux_2_17_aarch64.whl", False),
        ("psutil-7.2.2-cp36-abi3-manylinux2010_x86_64.manylinux_2_12_x86_64.manylinux_2_28_x86_64.whl", True),
        ("later-1.0-cp313-abi3-manylinux2014_x86_64.whl", False),
        ("build-1.0-1-py3-none-any.whl", True),
    ],
)
def test_only_wheels_of_this_python_and_machine_are_taken(wheel: str, fitting: bool) -> None:
    assert packages.fits(wheel, (3, 12)) is fitting


def test_what_is_missing_is_unpacked_from_wheels_and_the_rest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with zipfile.ZipFile(tmp_path / "Far_Away-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("far_away_module/__init__.py", "distance = 7\n")
    wanted = {"far-away": "far_away_module", "further": "further_module.inside", "numpy": "numpy"}
    assert packages.missing(wanted) == ["far-away", "further"]
    brought = packages.bring(["far-away", "further"], tmp_path, tmp_path / "site")
    assert brought == {"far-away": "Far_Away 1.0"}
    assert packages.missing(wanted) == ["further"]
    monkeypatch.delitem(sys.modules, "far_away_module", raising=False)
    assert __import__("far_away_module").distance == 7


def test_a_missing_package_ends_the_run_with_the_wheels_to_bring(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('zarr', 'pydantic_core') else find(name, *a)\n"
    )
    done = device(tmp_path, "--wheels", str(tmp_path), env=os.environ | {"PYTHONPATH": f"{hidden}:{REPOSITORY}"})
    assert done.returncode == 1
    assert "pydantic-core, zarr: not in this Python, and no wheel of it in the folder given by --wheels" in done.stderr
    assert "benchmarks/device.md says how to fill it" in done.stderr
    assert "pydantic-core, zarr" in (tmp_path / "report.md").read_text()


def test_a_python_without_torch_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [PYTHON, "-S", "-m", "benchmarks.device", "--out", str(tmp_path / "out")],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "lacks numpy, torch, numba, llvmlite: run this with a Python that has torch and numba" in done.stderr


def test_no_merge_imports_a_package_that_may_be_missing_and_is_not_listed(tmp_path: Path) -> None:
    code = f"""
import json, sys
from pathlib import Path
from tests import cuda_checks
from benchmarks.checkpoints import write_family
import benchmarks.vs_peers, benchmarks.rehearsal
from ties_dist.cli.commands import cli
family = write_family(Path({str(tmp_path)!r}) / "models", {{"a.weight": (64, 64)}}, experts=2, dtype="bfloat16")
for method in ("ties", "linear"):
    recipe = Path({str(tmp_path)!r}) / f"{{method}}.yml"
    recipe.write_text(json.dumps(family.recipe(method)))
    cli.main(["merge", str(recipe), {str(tmp_path)!r} + "/" + method, "--json"], standalone_mode=False)
for name, module in sorted(sys.modules.items()):
    if "site-packages" in (getattr(module, "__file__", None) or ""):
        print(name.partition(".")[0])
"""
    done = subprocess.run([PYTHON, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    of_torch_and_numba = {"mpmath", "sympy", "scipy", "tqdm", "torchgen", "networkx", "jinja2", "markupsafe", "fsspec"}
    # msgpack, cffi and what else numcodecs and their like take where it is there, and do without where it is not
    optional = {"msgpack", "cffi", "pycparser", "charset_normalizer", "requests", "urllib3", "idna", "certifi"}
    listed = {module.partition(".")[0] for module in packages.ENGINE.values()} | set(packages.OF_THE_PYTHON)
    found = {name for name in done.stdout.split("}")[-1].split() if not name.startswith("_")}
    assert found - listed - of_torch_and_numba - optional == set()
    assert {"pydantic", "zarr", "xxhash"} <= found, "the merges did run"


def test_requirements_are_pinned_as_the_project_pins_them() -> None:
    wanted = packages.requirements(REPOSITORY / "constraints.txt")
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][^ ]*", line) for line in wanted)
    assert {line.partition("==")[0] for line in wanted} >= {"pydantic-core", "cuda-bindings", "mergekit"}


# -- the checks on a GPU -----------------------------------------------------------------------------------------------


def test_a_watched_driver_tells_copies_and_waits_for_each(tmp_path: Path) -> None:
    real = Driver(devices=1)
    driver = Watched(real, tmp_path / "calls.json")
    driver.cuCtxPushCurrent("context")
    stream = driver.cuStreamCreate(1)[1]
    sent, there = np.arange(100, dtype=np.uint8), np.zeros(100, dtype=np.uint8)
    driver.cuMemcpyHtoDAsync(there.ctypes.data, sent.ctypes.data, 100, stream)
    assert there.tolist() == sent.tolist(), "the copy was waited for"
    driver.cuDevicePrimaryCtxRelease(0)
    told = json.loads((tmp_path / "calls.json").read_text())
    assert (told["cuMemcpyHtoDAsync"]["calls"], told["cuMemcpyHtoDAsync"]["bytes"]) == (1, 100)
    assert driver.CUdevice_attribute is real.CUdevice_attribute


def test_every_method_is_checked_in_every_type() -> None:
    from ties_dist.methods.known import METHODS

    checked = {(check.method, check.types) for check in cuda_checks.every_check()}
    assert checked == {(method, types) for method in METHODS for types in cuda_checks.TYPES}
