"""A method from a package outside of ties_dist: only where that is allowed, and then like one of ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ties_dist
from tests.conftest import Checkpoints, random_models
from tests.integration.command import run
from ties_dist.errors import RecipeError

CODE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from safetensors.torch import load_file
from ties_dist.methods import Method, TrimRule
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


def test_the_example_of_the_docs_is_a_method(
    merge_job: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    (code,) = (part.partition("```")[0] for part in text.split("```python\n")[1:] if "(Method)" in part)
    (tmp_path / "documented_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    models = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([1.5, 0.0])}, {"w": torch.tensor([0.75, 1.25])}]
    recipe = merge_job(models, method="documented_method:Largest", parameters={"lambda": 2.0})
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
