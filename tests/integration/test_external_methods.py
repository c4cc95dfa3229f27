"""A method from a package outside of ties_dist: only where that is allowed, and then like one of ours."""

from __future__ import annotations

import importlib
import json
import os
import py_compile
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.integration.command import run
from ties_dist.errors import RecipeError

Saying = Callable[..., tuple[int, str]]

CODE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from safetensors.torch import load_file
from ties_dist.methods import Method, Sums, TrimRule
from ties_dist.methods.base import LAMBDA, count, density, float32

@dataclass(frozen=True, kw_only=True)
class Largest(Method):
    """Of all deltas the one of the largest magnitude."""
    name: ClassVar[str] = "largest"
    summary: ClassVar[str] = "the largest delta wins"
    operand: ClassVar[str] = "delta"
    parameters: ClassVar[tuple] = (LAMBDA,)

    def state(self, parameters, experts, cuts, majority):
        return {"lambda": float32(parameters["lambda"])}

    def merge(self, base, operands, extras, state, position):
        best = torch.zeros_like(base)
        for delta in operands:
            best = torch.where(delta.abs() > best.abs(), delta, best)
        return base + best * state["lambda"], []

@dataclass(frozen=True, kw_only=True)
class Trimmed(Method):
    """Adds up what is left of each delta, and counts nothing."""
    name: ClassVar[str] = "trimmed"
    summary: ClassVar[str] = "trim, then add up"
    operand: ClassVar[str] = "delta"
    parameters: ClassVar[tuple] = (LAMBDA, density("share kept"))

    @property
    def trim(self):
        return TrimRule(scope="model", tie_policy="keep_all")

    def state(self, parameters, experts, cuts, majority):
        return {"keep": float32([c.keep for c in cuts]), "least": float32([c.threshold for c in cuts])}

    def trimmed(self, operands, state):
        return [torch.where(d.abs() >= state["keep"][i], d, 0.0) for i, d in enumerate(operands)]

    def counted(self, operands, state):
        return []

    def merge(self, base, operands, extras, state, position):
        total = torch.zeros_like(base)
        for delta in self.trimmed(operands, state):
            total = total + delta
        return base + total, self.counted(operands, state)

class ByHand(Trimmed):
    """Counts what proves the thresholds itself, as a method had to."""

    def counters(self, experts):
        return tuple(f"{what}[{i}]" for i in range(experts) for what in ("above", "equal"))

    def counted(self, operands, state):
        pairs = [(d.abs(), state["least"][i]) for i, d in enumerate(operands)]
        return [c for m, t in pairs for c in (count(m > t), count(m == t))]

class InFront(ByHand):
    """Has a counter of its own before those."""

    def counters(self, experts):
        return ("positive", *super().counters(experts))

    def counted(self, operands, state):
        return [count(operands[0] > 0), *super().counted(operands, state)]

class Conflicting(Trimmed):
    """Counts conflicts, for the report, and nothing else."""

    def counters(self, experts):
        return ("conflicts",)

    def counted(self, operands, state):
        left = self.trimmed(operands, state)
        return [count((left[0] > 0) & (left[1] < 0) | (left[0] < 0) & (left[1] > 0))]

class OneTooMany(Trimmed):
    def counters(self, experts):
        return ("positive", "negative")

    def counted(self, operands, state):
        return [count(operands[0] > 0), count(operands[0] < 0), count(operands[0] == 0)]

@dataclass(frozen=True, kw_only=True)
class Units(Method):
    """Adds up the deltas, each divided by its norm."""
    name: ClassVar[str] = "units"
    summary: ClassVar[str] = "deltas of length one"
    operand: ClassVar[str] = "delta"
    parameters: ClassVar[tuple] = ()

    @property
    def sums(self):
        return Sums()

    def products(self, experts):
        return tuple((i, i) for i in range(experts))

    def scalars(self, parameters, experts, sums):
        return {"norm": [s ** 0.5 for s in sums]}

    def state(self, parameters, experts, cuts, majority):
        return {}

    def merge(self, base, operands, extras, state, position):
        for i, delta in enumerate(operands):
            base = base + delta / state["norm"][i]
        return base, []

class Neighbours(Units):
    def factors(self, base, operands, extras, state, position):
        return [delta.roll(1) for delta in operands]

class Alone(Units):
    def products(self, experts):
        return ((0,),)

class Fewer(Units):
    def factors(self, base, operands, extras, state, position):
        return []

class NoMethod:
    pass

class Half(Method):
    operand: ClassVar[str] = "delta"

    def merge(self, base, operands, extras, state, position):
        return base, []
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"outside_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_it_merges_as_its_code_says(package: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    base = {"w": torch.tensor([1.0, 1.0, 1.0])}
    experts = [{"w": torch.tensor([1.5, 0.0, 1.0])}, {"w": torch.tensor([0.75, 1.25, 1.0])}]
    recipe = merge_job([base, *experts], method=f"{package}:Largest", parameters={"lambda": 2.0})
    ties_dist.merge(recipe, tmp_path / "out", allow_external_methods=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [2.0, -1.0, 1.0]


def test_one_that_takes_sums_merges_as_its_code_says(package: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    base = {"v": torch.tensor([1.0]), "w": torch.tensor([1.0, 1.0])}
    experts = [
        {"v": torch.tensor([9.0]), "w": torch.tensor([4.0, 5.0])},
        {"v": torch.tensor([-1.0]), "w": torch.tensor([1.0, 3.0])},
    ]
    recipe = merge_job([base, *experts], method=f"{package}:Units")
    ties_dist.merge(recipe, tmp_path / "out", allow_external_methods=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["v"].tolist() == [1.0]
    assert found["w"].tolist() == pytest.approx([1 + 0.6, 1 + 0.8 + 1.0])


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("Neighbours", "`units` cannot merge slice by slice: .*an element of the result may follow only"),
        ("Fewer", r"`units`: its `factors` returns .*, not a list of at least 1 factors, as `products` names them"),
        ("Alone", r"`units`: its `products` gives no pairs of factors: \(0,\) is none"),
    ],
)
def test_one_whose_sums_cannot_be_taken_is_refused_while_planning(
    method: str, words: str, package: str, merge_job: Checkpoints
) -> None:
    models = random_models({"w": (3, 4)}, experts=2)
    with pytest.raises(RecipeError, match=words):
        ties_dist.plan(merge_job(models, method=f"{package}:{method}"), allow_external_methods=True)


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with the methods that the docs show."""
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    shown = [part.partition("```")[0] for part in text.split("```python\n")[1:] if "(Method)" in part]
    name = f"documented_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("\n".join(shown))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_the_trim_of_the_docs_is_a_method_and_its_counter_is_reported(
    documented: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job([TEN, ONE, TWO], method=f"{documented}:Trimmed", parameters={"density": 0.2})
    ended = run(capsys, "merge", recipe, tmp_path / "out", "--allow-external-methods", "--json")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [10.0, 9, 8, 0, 0, 0, 0, -8, 9, -10]
    assert json.loads(ended.out)["counters"] == {"moved": 6}


def test_the_example_of_the_docs_is_a_method(documented: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    models = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.5, 0.0])}, {"w": torch.tensor([0.75, 1.25])}]
    recipe = merge_job(models, method=f"{documented}:Largest", parameters={"lambda": 2.0})
    ties_dist.merge(recipe, tmp_path / "out", allow_external_methods=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [2.0, -1.0]


def test_it_is_compiled_to_the_bytes_it_gives_eagerly(package: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models({"w": (300, 70)}, experts=3, dtype=torch.bfloat16), method=f"{package}:Largest")
    made = {
        kernel: ties_dist.merge(recipe, tmp_path / kernel, kernel=kernel, allow_external_methods=True)  # type: ignore[arg-type]
        for kernel in ("compiled", "eager")
    }
    assert made["compiled"].output_digest == made["eager"].output_digest
    assert made["compiled"].kernel == "compiled"


def test_without_leave_it_is_refused_before_it_is_imported(
    package: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    recipe = merge_job(random_models({"w": (4, 4)}, experts=1), method=f"{package}:Largest")
    ended = run(capsys, "merge", recipe, tmp_path / "out")
    assert ended.status == 2
    assert "allow that with --allow-external-methods" in ended.err


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("{}:Missing", "has no attribute 'Missing'"),
        ("{}:NoMethod", "is no subclass of ties_dist.methods.Method"),
        ("{}:Half", "lacks name, summary, parameters, state; docs/recipe.md has an example"),
        ("no_such_package.module:Largest", "No module named 'no_such_package'"),
    ],
)
def test_what_is_no_method_is_told(
    method: str, words: str, package: str, merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job(random_models({"w": (4, 4)}, experts=1), method=method.format(package))
    with pytest.raises(RecipeError, match=words):
        ties_dist.merge(recipe, tmp_path / "out", allow_external_methods=True)


def test_other_code_is_another_merge(package: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job(random_models({"w": (4, 4)}, experts=1), method=f"{package}:Largest")
    first = ties_dist.plan(recipe, allow_external_methods=True).fingerprint
    other = f"{package}_other"
    (tmp_path / f"{other}.py").write_text(CODE.replace("delta.abs() > best", "delta.abs() >= best"))
    recipe.write_text(recipe.read_text().replace(f"{package}:", f"{other}:"))
    assert ties_dist.plan(recipe, allow_external_methods=True).fingerprint != first


DERIVED = """
from {} import Largest

class Larger(Largest):
    pass
"""
PRINTED = """
import ties_dist, sys
print(ties_dist.plan(sys.argv[1], allow_external_methods=True).fingerprint)
"""


def test_code_that_it_follows_from_is_another_merge_too(package: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / f"{package}_larger.py").write_text(DERIVED.format(package))
    recipe = merge_job(random_models({"w": (4, 4)}, experts=1), method=f"{package}_larger:Larger")

    def fingerprint() -> str:
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(ties_dist.__file__).parents[1]}"}
        command = [sys.executable, "-c", PRINTED, str(recipe)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / f"{package}.py").write_text(CODE.replace("delta.abs() > best", "delta.abs() >= best"))
    assert fingerprint() != first


def test_a_compiled_module_is_known_by_its_bytes(
    package: str, merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, name = set(), f"{package}_compiled"
    for text in (CODE, CODE.replace("delta.abs() > best", "delta.abs() >= best")):
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        (tmp_path / "source.py").write_text(text)
        py_compile.compile(
            str(tmp_path / "source.py"), cfile=str(tmp_path / f"{name}.pyc"), dfile="lost.py", doraise=True
        )
        recipe = merge_job(random_models({"w": (4, 4)}, experts=1), method=f"{name}:Largest")
        found.add(ties_dist.plan(recipe, allow_external_methods=True).fingerprint)
    assert len(found) == 2


def test_the_command_line_lists_every_method_with_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    found = {m["name"]: m for m in json.loads(run(capsys, "methods", "--json").out)}
    assert {"ties", "task_arithmetic", "linear", "dare_linear", "dare_ties"} <= set(found)
    parameters = {p["name"]: p for p in found["ties"]["parameters"]}
    assert parameters["density"]["required"]
    assert (parameters["weight"]["default"], parameters["lambda"]["default"]) == (1.0, 1.0)
    table = run(capsys, "methods").out
    assert "required" in table and "negative weights welcome" in table


# -- what the engine counts --------------------------------------------------------------------------------------------

TEN = {"w": torch.zeros(10)}
ONE = {"w": torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0])}
TWO = {"w": torch.tensor([10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])}
"""Trimmed at density 0.2 to the three largest, as `keep_all` does: 8, 9 and 10 of each."""


@pytest.mark.parametrize("kernel", ["compiled", "eager"])
@pytest.mark.parametrize(
    ("method", "conflicts"), [("Trimmed", None), ("ByHand", None), ("InFront", None), ("Conflicting", 0.0)]
)
def test_the_engine_counts_what_a_trim_keeps_whatever_the_method_counts(
    method: str, conflicts: float | None, kernel: str, package: str, merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job([TEN, ONE, TWO], method=f"{package}:{method}", parameters={"density": 0.2})
    report = ties_dist.merge(recipe, tmp_path / "out", kernel=kernel, allow_external_methods=True)  # type: ignore[arg-type]
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"].tolist()
    assert merged == [10.0, 9.0, 8.0, 0.0, 0.0, 0.0, 0.0, -8.0, 9.0, -10.0]
    assert [(e.threshold, e.kept_fraction) for e in report.experts] == [(8.0, 0.3)] * 2
    assert report.conflict_fraction == conflicts
    assert report.tensors["w"]["kept_fraction"] == [0.3, 0.3]


def test_a_report_without_conflicts_has_no_such_column(
    package: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job([TEN, ONE, TWO], method=f"{package}:Trimmed", parameters={"density": 0.2})
    ended = run(capsys, "merge", recipe, tmp_path / "out", "--allow-external-methods", "-v")
    assert ended.status == 0
    assert "30.0%, 30.0%" in ended.out
    assert "conflicts" not in ended.out


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_more_counters_than_were_declared_are_refused_before_any_work(
    command: str, package: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = merge_job([TEN, ONE, TWO], method=f"{package}:OneTooMany", parameters={"density": 0.2})
    ended = run(capsys, command, recipe, tmp_path / "out", "--allow-external-methods")
    assert ended.status == 2
    assert "merge_method `trimmed` declares 2 counters (positive, negative), its `merge` returns 3" in ended.err
    assert not (tmp_path / "out").exists()


# -- what a method may do ----------------------------------------------------------------------------------------------

MORE = '''
class Centred(Largest):
    def merge(self, base, operands, extras, state, position):
        d = operands[0]
        return base + (d - d.mean()), []  # of the slice

class Soft(Largest):
    """Elementwise, but torch has to be asked: there is no loop for a power."""
    def merge(self, base, operands, extras, state, position):
        return operands[0].abs() ** 1.7, []

class Halved(Largest):
    """In a type that no loop computes in."""
    def merge(self, base, operands, extras, state, position):
        return (base.bfloat16() + operands[0].bfloat16()).float(), []

class Twice(Conflicting):
    def counters(self, experts):
        return ("conflicts", "conflicts")

class Weighing(Trimmed):
    operand: ClassVar[str] = "weight"

class Failing(Largest):
    def merge(self, base, operands, extras, state, position):
        return base * state["missing"], []

class Signless(Largest):
    asks_majority = True

class ByStages(Trimmed):
    """Says what it needs as stages, not in short."""
    trim = None

    @property
    def needs(self):
        rule = TrimRule(scope="model", tie_policy="keep_all")
        return Needs((Stage(of="magnitudes", asks=(rule,)), Stage(of="merge")))

class Undecided(Ties):
    """Takes the majority sign, and does not count where."""
    parameters: ClassVar[tuple] = (density("share kept"), LAMBDA, WEIGHT)

    @classmethod
    def from_options(cls, options, parameters):
        return cls()

    def counters(self, experts):
        return ("sign_sum",)

    def merge(self, base, operands, extras, state, position):
        merged, counts = super().merge(base, operands, extras, state, position)
        return merged, counts[-1:]
'''
IMPORTS = """
from ties_dist.methods import Ties
from ties_dist.methods.base import WEIGHT
from ties_dist.methods.needs import Needs, Stage
"""


@pytest.fixture
def more(package: str, tmp_path: Path) -> str:
    file = tmp_path / f"{package}.py"
    file.write_text(file.read_text() + IMPORTS + MORE)
    return package


@pytest.mark.parametrize("command", ["plan", "merge"])
@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "Centred",
            "cannot merge slice by slice: torch's `mean` needs more than the element it is at ({file}.py, line ",
        ),
        ("Twice", "declares the counter conflicts twice; each needs its own name"),
        ("Weighing", 'trims, but takes weights: give it `operand = "delta"`'),
        ("Failing", "fails on a slice of a few numbers: KeyError: 'missing' ({file}.py, line "),
        ("Signless", "asks for the majority sign, but has no counter `sign_sum` to sum up"),
    ],
)
def test_what_cannot_be_merged_by_is_refused_before_any_work(
    command: str, method: str, words: str, more: str, merge_job: Checkpoints, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trims = {"density": 0.2} if method in ("Twice", "Weighing") else None
    recipe = merge_job([TEN, ONE, TWO], method=f"{more}:{method}", parameters=trims)
    ended = run(capsys, command, recipe, tmp_path / "out", "--allow-external-methods")
    assert ended.status == 2
    assert words.format(file=more) in ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_what_has_no_loop_runs_eagerly_says_so_and_does_not_follow_the_cut(
    more: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Units of 1 MiB end within vectors of units of 8 MiB: there torch computes the last elements one by one.
    models = random_models({"a": (3,), "b": (999, 1237)}, experts=2)
    recipe = merge_job(models, method=f"{more}:Soft")
    planned = run(capsys, "plan", recipe, "--allow-external-methods")
    assert "runs eagerly, about 20 times slower: there is no loop for torch's `pow`." in planned.err
    reports = [
        ties_dist.merge(recipe, tmp_path / str(size), unit_size=size << 20, allow_external_methods=True)
        for size in (1, 8)
    ]
    assert [r.kernel for r in reports] == ["eager", "eager"]
    assert reports[0].output_digest == reports[1].output_digest


def test_what_a_loop_would_compute_otherwise_runs_eagerly(more: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    models = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0078125, 2.5])}]
    recipe = merge_job(models, method=f"{more}:Halved")
    report = ties_dist.merge(recipe, tmp_path / "out", allow_external_methods=True)
    assert report.kernel == "eager"
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [1.0078125, 2.5]


def test_needs_may_be_given_as_stages(more: str, merge_job: Checkpoints, tmp_path: Path) -> None:
    recipe = merge_job([TEN, ONE, TWO], method=f"{more}:ByStages", parameters={"density": 0.2})
    report = ties_dist.merge(recipe, tmp_path / "out", allow_external_methods=True)
    assert [(e.threshold, e.kept_fraction) for e in report.experts] == [(8.0, 0.3)] * 2


def test_all_may_depend_on_a_majority_where_nobody_counts_what_does(
    more: str, merge_job: Checkpoints, tmp_path: Path
) -> None:
    # Most deltas are negative, in one place they cancel: -2 wins there.
    base = {"w": torch.zeros(6)}
    experts = [{"w": torch.tensor([2.0, -1.0, -1.0, -3.0, -1.0, -1.0])}, {"w": torch.tensor([-2.0, -1, -1, 0, 1, 0])}]
    recipe = merge_job([base, *experts], method=f"{more}:Undecided", parameters={"density": 1.0})
    report = ties_dist.merge(recipe, tmp_path / "out", allow_external_methods=True)
    assert (report.majority_sign, report.redone_units) == (-1, 1)
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"].tolist()
    assert merged == [-2.0, -1.0, -1.0, -3.0, -1.0, -1.0]


# -- what a method says of itself --------------------------------------------------------------------------------------

FACES = """
import random
import time
from ties_dist.methods.needs import DataStatistics, MajoritySign, Needs, Stage

class Plain(Largest):
    def merge(self, base, operands, extras, state, position):
        return base + operands[0] * state["lambda"], []

class Trim(Trimmed):
    pass

RULE = TrimRule(scope="model", tie_policy="keep_all")
calls = []
"""


@pytest.fixture
def saying(package: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Saying:
    """What the command line says of a class with these lines, over `Plain` or `Trim`; where it is is in {brackets}."""

    def said(lines: str, over: str = "Plain", *, parameters: dict[str, object] | None = None) -> tuple[int, str]:
        file = tmp_path / f"{package}.py"
        body = "\n".join(f"    {line}" for line in lines.splitlines())
        file.write_text(CODE + FACES + f"class Tried({over}):\n{body}\n")
        recipe = merge_job([TEN, ONE, TWO], method=f"{package}:Tried", parameters=parameters or {})
        ended = run(capsys, "merge", recipe, tmp_path / "out", "--allow-external-methods")
        assert "Traceback" not in ended.err
        assert (tmp_path / "out").exists() == (ended.status == 0)
        return ended.status, re.sub(rf"\({package}\.py, line \d+\)", "(line)", ended.err)

    return said


DIVIDED = "ZeroDivisionError: division by zero (line)."
AGAIN = "gives other numbers when it is asked again (time, chance, a count of calls?)"


def merging(expression: str) -> str:
    return f"def merge(self, base, operands, extras, state, position):\n    return {expression}"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        # misspelt, or of another type
        ('operand = "deltas"', "operand: no value 'deltas'; did you mean 'delta'?"),
        ('statistics = "fischer"', "statistics: no value 'fischer'; did you mean 'fisher'?"),
        ("parameters = (LAMBDA)", "is no tuple"),
        ('parameters = ("lambda",)', "parameters: 'lambda' is not Parameter"),
        ("name = 7", "name: 7 is not text"),
        ("def from_options(cls, options, parameters):\n    return cls()", "from_options lacks @classmethod"),
        ("@classmethod\ndef from_options(cls, o, p):\n    pass", "its `from_options` gives no method: None"),
        ("@classmethod\ndef from_options(cls, o, p):\n    return 1 / 0", f"fails in `from_options`: {DIVIDED}"),
        ("def asks_majority(self):\n    return True", "its `asks_majority` lacks @property (line)."),
        ("def needs(self):\n    return Needs()", "its `needs` lacks @property (line)."),
        ("@property\ndef needs(self):\n    return 1 / 0", f"fails in `needs`: {DIVIDED}"),
        (
            'needs = property(lambda self: Needs((Stage(of="magnitudes"),)))',
            "fails in `needs`: ValueError: the last stage of a method merges, and no other (line).",
        ),
        (
            'needs = property(lambda self: Needs((Stage(of="merge", asks=(DataStatistics(kind="fisher"),)),)))',
            "its `needs` asks for fisher, `statistics` is None (line).",
        ),
        (
            'needs = property(lambda self: Needs((Stage(of="merg"),)))',
            "fails in `needs`: ValueError: Stage: of: no value 'merg'; did you mean 'merge'? (line).",
        ),
        ("def counters(self, experts):\n    return 1 / 0", f"fails in `counters`: {DIVIDED}"),
        ("def counters(self, experts):\n    pass", "its `counters` gives no names: None is no tuple (line)."),
        ('def counters(self, experts):\n    return "abc"', "its `counters` gives no names: 'abc' is no tuple (line)."),
        ("def counters(self, experts):\n    return (1, 2)", "its `counters` gives no names: 1 is not text (line)."),
        ('counters = ("a",)', "fails in `counters`: TypeError: 'tuple' object is not callable."),
        ('def check(self, experts):\n    return experts[0]["nope"]', "fails in `check`: KeyError: 'nope' (line)."),
        ('def check(self, experts):\n    raise ValueError("weights no good")', "  weights no good"),
        # numbers
        ("def state(self, *given):\n    return 1 / 0", f"fails in `state`: {DIVIDED}"),
        ("def state(self, *given):\n    pass", "'NoneType' object has no attribute 'items' (line)."),
        ("def state(self, parameters):\n    pass", "takes 2 positional arguments but 5 were given (line)."),
        ('def state(self, *given):\n    return {"lambda": float("nan")}', "its `state` gives NaN as `lambda` (line)."),
        ('def state(self, *given):\n    return {"lambda": random.random()}', f"its `state` {AGAIN}"),
        ('def state(self, *given):\n    return {"lambda": time.time() % 1 * 1e-3}', AGAIN),
        (
            'def state(self, *given):\n    calls.append(1)\n    return {"lambda": 1.0, f"n{len(calls)}": 1.0}',
            f"its `state` {AGAIN} (line).",
        ),
        # what is returned
        (merging("base + operands[0]"), "its `merge` returns float32 of shape (7,), not the merged weights and a list"),
        (
            merging("(base, torch.stack([(base > 0).sum()]))"),
            "its `merge` returns (float32 of shape (7,), int64 of shape (1,)), not the merged weights and a list",
        ),
        (merging("None"), "its `merge` returns NoneType, not the merged weights and a list of counters"),
        (merging("(base.double() * 1e60, [])"), "its `merge` returns float64 of shape (7,) as merged weights"),
        (merging("((base + operands[0]).long(), [])"), "its `merge` returns int64 of shape (7,) as merged weights"),
        (merging("((base + operands[0]).bfloat16(), [])"), "not one float32 for every element of `base` (line)."),
        (merging("(base > 0, [])"), "its `merge` returns bool of shape (7,) as merged weights"),
        (merging('(state["lambda"], [])'), "its `merge` returns float32 of shape () as merged weights"),
        (
            'def counters(self, experts):\n    return ("a",)\n' + merging("(base + operands[0], [3])"),
            "its `merge` returns int as a counter, not the `count` of a mask (line).",
        ),
        (
            'def counters(self, experts):\n    return ("a",)\n' + merging("(base + operands[0], [operands[0] > 0])"),
            "its `merge` returns bool of shape (7,) as a counter",
        ),
        ("def merge(self, base, operands):\n    pass", "takes 3 positional arguments but 6 were given (line)."),
        # what is looked at
        (merging("(base + (operands[0] - float(operands[0].numpy().mean())), [])"), "torch's `numpy` looks at values"),
        (merging("(base + sum(operands[0].tolist()), [])"), "torch's `tolist` looks at values"),
        (merging("(base * 2 if len(base) % 2 == 0 else base + operands[0].exp(), [])"), "past torch"),
        (merging("(base * 2 if len(base) > 31000 else base + operands[0].exp(), [])"), "past torch"),
    ],
)  # fmt: skip
def test_a_mistake_of_a_methods_author_is_one_line_with_its_place(lines: str, words: str, saying: Saying) -> None:
    status, err = saying(lines)
    assert status == 2
    assert words in err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("parameters = (LAMBDA,)", "trims, but models have no density: give it `density(...)`"),
        ("def trim(self):\n    return RULE", "its `trim` lacks @property (line)."),
        ("trim = property(lambda self: 1 / 0)", f"fails in `trim`: {DIVIDED}"),
        ("trim = property(lambda self: 0.2)", "its `trim` is wrong: 0.2 is not TrimRule (line)."),
        (
            'trim = property(lambda self: TrimRule(scope="models", tie_policy="keep_all"))',
            "fails in `trim`: ValueError: TrimRule: scope: no value 'models'; did you mean 'model'? (line).",
        ),
        (
            'trim = property(lambda self: TrimRule(scope="model", tie_policy="exactk"))',
            "fails in `trim`: ValueError: TrimRule: tie_policy: no value 'exactk'; did you mean 'exact_k'? (line).",
        ),
        (
            'trim = property(lambda self: TrimRule(scope="model", tie_policy="keep_all", at_least=0.5))',
            "fails in `trim`: ValueError: TrimRule: at_least: 0.5 is not a whole number (line).",
        ),
        (
            'trim = property(lambda self: TrimRule(scope="model", tie_policy="keep_all", of_moved=(True,)))',
            "its `trim` has 1 `of_moved` for 2 experts (line).",
        ),
        (
            'needs = property(lambda self: Needs((Stage(of="magnitudes", asks=(RULE,)),) * 2 + (Stage(of="merge"),)))',
            "fails in `needs`: ValueError: two of TrimRule are asked for; there can be one (line).",
        ),
        (
            'needs = property(lambda self: Needs((Stage(of="magnitudes", asks=(RULE, RULE)), Stage(of="merge"))))',
            "fails in `needs`: ValueError: two of TrimRule are asked for; there can be one (line).",
        ),
        (
            'SIGN = MajoritySign(dependent="cancelations")\n'
            'needs = property(lambda self: Needs((Stage(of="merge", asks=(self.SIGN,)),)))\n'
            'def counters(self, experts):\n    return ("sign_sum", "cancellations")',
            "has no counter `cancelations` of what depends on it; did you mean 'cancellations'?",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_what_is_asked_for_is_one_line_with_its_place(lines: str, words: str, saying: Saying) -> None:
    status, err = saying(lines, "Trim", parameters={"density": 0.2})
    assert status == 2
    assert words in err


def test_a_threshold_for_a_whole_model_has_one_density(
    package: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    density = {"density": [{"filter": "a", "value": 0.5}, {"value": 0.2}]}
    recipe = merge_job(
        random_models({"a": (9,), "b": (9,)}, experts=2), method=f"{package}:Trimmed", parameters=density
    )
    ended = run(capsys, "plan", recipe, "--allow-external-methods")
    assert ended.status == 2
    assert "has one threshold for a whole model, but the recipe's density varies inside of it" in ended.err


def test_code_that_fails_when_it_is_imported_is_told_in_one_line(
    package: str, merge_job: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{package}.py").write_text("\n1 / 0\n")
    recipe = merge_job([TEN, ONE], method=f"{package}:Tried")
    ended = run(capsys, "plan", recipe, "--allow-external-methods")
    assert ended.status == 2
    assert f"fails when it is imported: ZeroDivisionError: division by zero ({package}.py, line 2)." in ended.err


VARYING = """
from ties_dist.methods.base import WEIGHT

@dataclass(frozen=True, kw_only=True)
class Sparing(Largest):
    # Leaves out experts without a weight: other numbers for another tensor.
    parameters: ClassVar[tuple] = (WEIGHT,)

    def state(self, parameters, experts, cuts, majority):
        return {f"w{i}": float32(e["weight"]) for i, e in enumerate(experts) if e["weight"] != 0}

    def merge(self, base, operands, extras, state, position):
        result = base
        for i, delta in enumerate(operands):
            if f"w{i}" in state:
                result = result + delta * state[f"w{i}"]
        return result, []
"""


@pytest.mark.parametrize("kernel", ["compiled", "eager"])
def test_tensors_with_other_numbers_have_a_loop_of_their_own(
    kernel: str, package: str, merge_job: Checkpoints, tmp_path: Path
) -> None:
    (tmp_path / f"{package}.py").write_text(CODE + VARYING)
    models = [{"a": torch.full((4,), n), "b": torch.full((4,), n)} for n in (0.0, 1.0, 10.0)]
    weights: list[dict[str, object]] = [{"weight": [{"filter": "a", "value": 0}, {"value": 3}]}, {"weight": 5}]
    recipe = merge_job(models, method=f"{package}:Sparing", expert_parameters=weights)
    report = ties_dist.merge(recipe, tmp_path / "out", kernel=kernel, allow_external_methods=True)  # type: ignore[arg-type]
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert (merged["a"].tolist(), merged["b"].tolist()) == ([50.0] * 4, [53.0] * 4)
    assert report.kernel == kernel
