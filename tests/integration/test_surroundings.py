"""A machine that refuses this or that: one message, no traceback, and what was done is done."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Checkpoints, random_models
from tests.integration.command import SHAPES, run
from ties_dist.messages import reason

needs_root = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="becomes another user")
AS_NOBODY = 'setpriv --reuid 12345 --clear-groups "$@"'
"""A user without an entry in the password file."""


@pytest.fixture
def recipe(merge_job: Checkpoints) -> Path:
    return merge_job(random_models(SHAPES, experts=2))


def command(*arguments: object, before: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """`ties-dist` from a shell. before: what the shell does first; `$@` is the command, to be redirected at will."""
    return subprocess.run(
        ["bash", "-c", before or '"$@"', "bash", sys.executable, "-m", "ties_dist", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


# -- nobody to tell ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "redirected",
    [
        '"$@" > /dev/full',
        '"$@" >&-',
        '"$@" 2>&-',
        '"$@" > /dev/full 2> /dev/full',
        '"$@" | true; exit ${PIPESTATUS[0]}',
    ],
)
def test_a_published_model_is_a_success_whoever_is_told(redirected: str, recipe: Path, tmp_path: Path) -> None:
    ended = command("merge", recipe, tmp_path / "out", before=redirected)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    verified = command("verify", tmp_path / "out", "--sample", "0")
    assert (verified.returncode, "are what was written" in verified.stdout) == (0, True)


def test_a_closed_stream_does_not_give_its_number_to_a_file_of_the_model(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ties_dist.cli.commands import main\n"
        "from ties_dist.worker.merging import MergeStep\nimport os\nstore = MergeStep.store\n"
        "def noisy(self, task, computed):\n    os.write(1, b'noise' * 999); return store(self, task, computed)\n"
        "MergeStep.store = noisy\nmain(sys.argv[1:])"
    )
    run = ["bash", "-c", '"$@" >&- 2>&- <&-', "bash", sys.executable, "-c", code, "merge", recipe, tmp_path / "out"]
    assert subprocess.run(run, check=False).returncode == 0
    assert command("verify", tmp_path / "out", "--sample", "0").returncode == 0


def test_a_plan_that_cannot_be_printed_is_no_success(recipe: Path) -> None:
    ended = command("plan", recipe, "-q", before='"$@" > /dev/full')
    assert (ended.returncode, ended.stderr) == (2, "OSError: No space left on device.\n")


def test_a_reader_that_has_seen_enough_ends_the_command_as_sigpipe_would(recipe: Path) -> None:
    ended = command("plan", recipe, "-q", before='(sleep 0.1; "$@"; echo $? >&2) | true')
    assert ended.stderr == "141\n"


# -- nowhere to be -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", ["merge RECIPE OUT", "merge recipe.yml out", "plan RECIPE", "sweep RECIPE OUT --lambda 1"]
)
def test_a_working_directory_that_is_gone_is_named(words: str, recipe: Path, tmp_path: Path) -> None:
    named = words.replace("RECIPE", str(recipe)).replace("OUT", str(tmp_path / "out")).split()
    (tmp_path / "gone").mkdir()
    ended = command(*named, before=f'cd {tmp_path}/gone; rmdir {tmp_path}/gone; "$@"')
    assert ended.returncode == 2
    assert ended.stderr == (
        "FileNotFoundError: the working directory is gone. Change into one that is there and run again.\n"
    )


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """Where anybody may write; all above it may be entered."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    return tmp_path / "open"


def homeless(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "TIES_DIST_CACHE")}
    return {**kept, **more}


@needs_root
def test_a_user_without_a_home_is_told_what_to_set(recipe: Path, open_folder: Path) -> None:
    ended = command("merge", recipe, open_folder / "out", env=homeless(), before=AS_NOBODY)
    assert ended.returncode == 2
    assert "PlanError: there is no home directory to keep a cache in. Set HOME or TIES_DIST_CACHE." in ended.stderr


@needs_root
@pytest.mark.parametrize("writable", [True, False])
def test_a_user_without_a_home_leaves_nothing_in_the_working_directory(
    writable: bool, recipe: Path, open_folder: Path
) -> None:
    subprocess.run(["chmod", "-R", "a+rX", recipe.parent], check=True)
    (open_folder / "cwd").mkdir(mode=0o700)
    if writable:
        (open_folder / "cwd").chmod(0o777)
    ended = command(
        *("merge", recipe, open_folder / "out", "--threshold-pass", "scan", "-q"),
        before=f"cd {open_folder}{'/cwd' if writable else ''}; " + AS_NOBODY,
        env=homeless(TIES_DIST_CACHE=str(open_folder / "cache")),
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list((open_folder / "cwd").iterdir()) == []
    assert sorted(p.name for p in open_folder.iterdir()) == ["cache", "cwd", "out"]


@needs_root
def test_a_folder_that_may_not_be_read_is_named_with_its_place_in_the_recipe(recipe: Path, open_folder: Path) -> None:
    (recipe.parent / "expert-0").chmod(0)
    ended = command(
        "merge", recipe, open_folder / "out", env=homeless(TIES_DIST_CACHE=str(open_folder)), before=AS_NOBODY
    )
    assert ended.returncode == 2
    assert "models[0].model: 'expert-0' cannot be read: permission denied" in ended.stderr


# -- shortages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [5, 8, 11, 14, 20])
def test_too_many_open_files_is_one_message_at_any_point(files: int, recipe: Path, tmp_path: Path) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    ended = command("merge", recipe, tmp_path / "out", "-q", preexec_fn=few)
    assert "Traceback" not in ended.stderr and "Restore the file" not in ended.stderr
    assert ended.returncode in (0, 2)
    if ended.returncode:
        assert "oo many open files" in ended.stderr
    again = command("merge", recipe, tmp_path / "out", "-q")
    assert again.returncode == 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "no memory left. Free some, or lower --memory-budget or --threads"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "no memory left"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "too many open files. Raise the limit (`ulimit -n`)"),
        (OSError(errno.EIO, "Input/output error", "a"), "Input/output error: a."),
    ],
)
def test_a_shortage_is_told_with_its_remedy(error: OSError | MemoryError, words: str) -> None:
    assert words in reason(error)


@pytest.mark.parametrize("kind", ["MemoryError()", "OSError(12, 'Cannot allocate memory')"])
def test_no_memory_in_the_middle_of_a_merge_is_one_message_and_resumes(kind: str, recipe: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ties_dist.cli.commands import main\nfrom ties_dist.storage.buffers import Buffers\n"
        f"def none(self, size): raise {kind}\nBuffers.take = none\nmain(sys.argv[1:])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "merge", recipe, tmp_path / "out", "-q"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "no memory left. Free some, or lower --memory-budget or --threads, and run again." in ended.stderr
    assert "Traceback" not in ended.stderr and "Restore the file" not in ended.stderr
    assert command("merge", recipe, tmp_path / "out", "-q").returncode == 0


# -- documents of OUT that somebody changed ----------------------------------------------------------------------------

DAMAGED = [
    lambda m: [],
    lambda m: None,
    lambda m: m | {"shards": {"../model.safetensors": m["shards"]["model.safetensors"]}},
    lambda m: m | {"shards": {"model.safetensors": {"size": "large", "blocks": []}}},
    lambda m: m | {"shards": {"model.safetensors": m["shards"]["model.safetensors"] | {"blocks": []}}},
    lambda m: m | {"shards": {"model.safetensors": m["shards"]["model.safetensors"] | {"size": -1}}},
    lambda m: m | {"shards": ["model.safetensors"]},
    lambda m: m | {"fingerprint": "../.."},
    lambda m: m | {"fingerprint": 7},
    lambda m: {k: v for k, v in m.items() if k != "origin"},
    lambda m: m | {"origin": m["origin"] | {"thresholds": [[[1 << 40, 0, 0], None, 0]] * 2}},
    lambda m: m | {"origin": m["origin"] | {"thresholds": [["much", 0, 0]]}},
    lambda m: m | {"origin": m["origin"] | {"max_shard_bytes": "much"}},
    lambda m: m | {"origin": m["origin"] | {"models": 3}},
    lambda m: m | {"companions": 3},
]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_manifest_is_one_message(
    damage: Callable[[dict[str, object]], object], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "merge", recipe, tmp_path / "out", "-q").status == 0
    manifest = tmp_path / "out" / ".ties_dist" / "manifest.json"
    manifest.write_text(json.dumps(damage(json.loads(manifest.read_text()))))
    ended = run(capsys, "verify", tmp_path / "out", "-q")
    assert ended.status == 2
    assert ended.err.startswith("OutputError: ") and "manifest.json is damaged: " in ended.err


@pytest.mark.parametrize(
    "origin",
    [
        {"thresholds": []},
        {"thresholds": [[[0, 0, 0], None, 0]]},
        {"thresholds": [[[0x7FC00000, 0, 0], None, 0]] * 2},
        {"max_shard_bytes": 0},
        {"max_shard_bytes": -5},
        {"models": {}},
        {"models": {"base": ["/nowhere"], "expert-0": []}},
        {"models": {"base": ["\u0000"]}},
        {"majority": 10**30},
    ],
)
def test_an_origin_that_makes_no_sense_is_one_message(
    origin: dict[str, object], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "merge", recipe, tmp_path / "out", "-q").status == 0
    manifest = tmp_path / "out" / ".ties_dist" / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(found | {"origin": found["origin"] | origin}))
    ended = run(capsys, "verify", tmp_path / "out", "-q", "--sample", "1")
    assert (ended.status, len(ended.err) > 0) in ((2, True), (0, False))


# -- a mapped file that somebody cuts ----------------------------------------------------------------------------------

CUT = """
import os, shutil, sys
from pathlib import Path
from ties_dist.cli.commands import main
from ties_dist.storage.readers import MappedReader
from ties_dist.worker.merging import MergeStep
file = Path({file!r})
compute, done = MergeStep.compute, []
def cutting(self, task, loaded):
    done.append(task)
    if len(done) == 3:
        os.truncate(file, 4096)
    return compute(self, task, loaded)
MergeStep.compute = cutting
main(sys.argv[1:])
"""


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_an_input_cut_while_it_is_read_ends_with_a_line_and_resumes_once_it_is_back(
    backend: str, merge_job: Checkpoints, tmp_path: Path
) -> None:
    recipe = merge_job(random_models({f"{c}.weight": (512, 1024) for c in "abcdefgh"}, experts=2), method="linear")
    expected = command("merge", recipe, tmp_path / "whole", "--json", "-q")
    file = tmp_path / "expert-0" / "model.safetensors"
    shutil.copy2(file, tmp_path / "kept")
    options = ("-q", "--read-backend", backend, "--threads", "1", "--unit-size", "2MiB")
    code = [sys.executable, "-c", CUT.format(file=str(file)), "merge", recipe, tmp_path / "out", *options]
    ended = subprocess.run(code, capture_output=True, text=True, check=False)
    if backend == "mmap":
        assert ended.returncode == 75
        assert ended.stderr == (
            "CheckpointError: a file became shorter while it was read: another process writes it. Put it back as it "
            "was and run the same command again: it resumes.\n"
        )
    else:
        assert (ended.returncode, "it is truncated, or was replaced while it was read" in ended.stderr) == (2, True)
    cut = command("merge", recipe, tmp_path / "out", *options)
    assert (cut.returncode, "truncated" in cut.stderr) == (2, True)
    shutil.copy2(tmp_path / "kept", file)
    again = command("merge", recipe, tmp_path / "out", *options, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["output_digest"] == json.loads(expected.stdout)["output_digest"]
