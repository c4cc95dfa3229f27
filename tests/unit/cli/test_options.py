"""Options are said once: the command line, Python and its type hints all follow from `RunOptions`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import get_type_hints

import click
import pytest
from click.testing import CliRunner

import ties_dist
from ties_dist.cli.commands import cli
from ties_dist.errors import PlanError
from ties_dist.planning.keywords import AnalyzeKeywords, MergeKeywords, PlanKeywords, SweepKeywords
from ties_dist.planning.options import Cluster, Resources, RunOptions

HELP = Path(__file__).parent / "help.txt"
"""Of every command at a width of 110, from before options were made from one place."""


def test_the_help_is_what_it_was() -> None:
    said = []
    for command in (None, *sorted(cli.commands)):
        arguments = [command, "--help"] if command else ["--help"]
        told = CliRunner().invoke(cli, arguments, prog_name="ties-dist", terminal_width=110)
        said.append(f"$ ties-dist {' '.join(arguments)}\n{told.output}")
    assert "\n".join(said).rstrip() == HELP.read_text().rstrip()


@pytest.mark.parametrize(
    ("function", "keywords"),
    [
        (ties_dist.plan, PlanKeywords),
        (ties_dist.analyze, AnalyzeKeywords),
        (ties_dist.sweep, SweepKeywords),
        (ties_dist.merge, MergeKeywords),
    ],
)
def test_keywords_have_the_names_types_and_defaults_of_the_options(function: object, keywords: type) -> None:
    hints, known = get_type_hints(RunOptions), inspect.signature(function).parameters  # type: ignore[arg-type]
    for name, hint in get_type_hints(keywords).items():
        assert hints[name] == hint, name
        assert known[name].default == getattr(RunOptions, name), name
        assert f"{name}:" in (inspect.getdoc(function) or "")


def test_merge_takes_all_options() -> None:
    assert get_type_hints(MergeKeywords).keys() == get_type_hints(RunOptions).keys()


def test_a_wrong_name_is_a_type_error_that_names_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"merge\(\) got an unexpected keyword argument 'memory_bugdet'.*memory_budget"):
        ties_dist.merge("recipe.yml", "out", memory_bugdet=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel": "eagre"}, "kernel: no value 'eagre'; did you mean 'eager'"),
        ({"kernel": None}, "kernel: no value None; known: "),
        ({"threads": 0}, "threads: 0 is too"),
        ({"threads": "2"}, "threads: '2' is not a whole number"),
        ({"threads": 1.5}, "threads: 1.5 is not a whole number"),
        ({"threads": True}, "threads: True is not a whole number"),
        ({"threads": float("nan")}, "threads: nan is not a whole number"),
        ({"memory_budget": "2G"}, "memory_budget: '2G' is not a whole number, in bytes"),
        ({"memory_budget": None}, "memory_budget: None is not a whole number, in bytes"),
        ({"fresh": "no"}, "fresh: 'no' is not True or False"),
        ({"fresh": 0}, "fresh: 0 is not True or False"),
        ({"semantics": 3}, "semantics: 3 is not text"),
        ({"cache_dir": 3}, "cache_dir: 3 is not Path"),
        ({"cluster": {}}, "cluster: {} is not Cluster"),
    ],
)
def test_a_wrong_value_does_not_do_what_auto_does(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        RunOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"address": 3}, "address: 3 is not text"),
        ({"start_seconds": float("nan")}, "start_seconds: nan is not a number, in seconds"),
        ({"start_seconds": 0.5}, "start_seconds: 0.5 is too small"),
        ({"resources": "GPU"}, "resources: 'GPU' is no mapping"),
        ({"resources": {"GPU": "one"}}, "resources: 'one' is not a number"),
        ({"labels": {"zone": 3}}, "labels: 3 is not text"),
    ],
)
def test_a_wrong_value_of_a_cluster_is_told(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Cluster(**wrong)  # type: ignore[arg-type]


def test_a_whole_number_is_a_number() -> None:
    assert Cluster(start_seconds=30, resources={"GPU": 1}).start_seconds == 30


def test_what_travels_is_made_from_the_options() -> None:
    assert RunOptions(threads=3, memory_budget=1 << 30).resources().memory_budget == 1 << 30
    assert Resources().memory_budget == RunOptions().memory_budget
    assert Cluster().start_seconds == 300.0


def test_every_option_of_merge_is_a_switch() -> None:
    merge = cli.commands["merge"]
    assert isinstance(merge, click.Command)
    switches = {name for parameter in merge.params for name in parameter.opts}
    spelt = {f"--{name.replace('_', '-')}" for name in get_type_hints(RunOptions) if name != "cluster"}
    assert spelt <= switches
