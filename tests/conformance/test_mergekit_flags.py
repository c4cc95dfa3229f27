"""Every flag that mergekit-yaml 0.1.5 has is one that `ties-dist merge` understands."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.conformance.test_mergekit import OFFLINE, find_mergekit
from tests.unit.cli.test_mergekit_flags import ALL
from ties_dist.cli.commands import merge_command

FLAGS = """
import json
from mergekit.scripts.run_yaml import main
options = [each for each in main.params if each.param_type_name == "option"]
print(json.dumps([flag for each in options for flag in (*each.opts, *each.secondary_opts)]))
"""


def test_mergekit_has_no_flag_that_is_unknown_here() -> None:
    executable = find_mergekit()
    if executable is None:
        pytest.skip("mergekit is not installed: see test_mergekit.py")
    python = executable.resolve().parent / "python"
    done = subprocess.run(
        [str(python), "-c", FLAGS], capture_output=True, text=True, env=os.environ | OFFLINE, check=True
    )
    theirs = set(json.loads(done.stdout.splitlines()[-1])) - {"--help"}
    ours = {flag for each in merge_command.params for flag in (*each.opts, *each.secondary_opts)}
    assert theirs - ours == set()
    assert theirs - {flags[0] for flags in ALL} == {"--no-safe-serialization"}, "tried there, but for what is refused"
