"""mergekit-yaml's flags: each is mapped, read over, or answered, and none is unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import pytest

from ties_dist.cli.commands import cli, merge_command
from ties_dist.cli.mergekit import understands_mergekit

# Of `mergekit-yaml --help`, 0.1.5; tests/conformance/test_mergekit_flags.py asks the package itself.
SWITCHES = (
    *("allow-crimes", "unsafe-truncate-embeddings", "cuda", "low-cpu-memory", "copy-tokenizer", "clone-tensors"),
    *("trust-remote-code", "lazy-unpickle", "write-model-card", "quiet", "read-to-gpu", "multi-gpu", "async-write"),
)
VALUES = {
    **{"--transformers-cache": "dir", "--lora-merge-cache": "dir", "--lora-merge-dtype": "float16", "--device": "cpu"},
    **{"--out-shard-size": "5B", "--random-seed": "0", "--num-threads": "2", "-j": "2", "--write-threads": "3"},
}
ALL = [
    *([f"--{name}"] for name in SWITCHES),
    *([f"--no-{name}"] for name in SWITCHES),
    *([flag, value] for flag, value in VALUES.items()),
    *(["--gpu-rich"], ["-v"], ["-vv"], ["--safe-serialization"]),
]


def read(*flags: str) -> dict[str, Any]:
    """What `merge` is called with."""
    found: dict[str, Any] = {}
    command = click.Command("merge", params=merge_command.params, callback=merge_command.callback)
    with command.make_context("merge", ["recipe.yml", "out", *flags], parent=click.Context(cli)) as context:
        given = dict(context.params)
    translated = understands_mergekit(lambda **received: found.update(received))
    known = {"max_shard_size", "threads", "device", "random_seed"}
    options = {name: given.pop(name) for name in known}
    translated(options=options, **given)
    return found


@pytest.mark.parametrize("flags", ALL, ids=" ".join)
def test_every_flag_of_mergekit_yaml_is_understood(flags: Sequence[str]) -> None:
    assert "options" in read(*flags)


@pytest.mark.parametrize(
    ("flags", "option", "value"),
    [
        (["--cuda"], "device", "cuda"),
        (["--gpu-rich"], "device", "cuda"),
        (["--no-cuda"], "device", "auto"),
        (["--multi-gpu"], "device", "auto"),
        (["--device", "cpu"], "device", "cpu"),
        (["--random-seed", "17"], "random_seed", 17),
        (["--out-shard-size", "5B"], "max_shard_size", 5 * 10**9),
        (["--out-shard-size", "200m"], "max_shard_size", 200 * 10**6),
        (["--out-shard-size", "64K"], "max_shard_size", 64_000),
        (["--out-shard-size", "123"], "max_shard_size", 123),
        (["-j", "3"], "threads", 3),
        (["--num-threads", "3"], "threads", 3),
    ],
)
def test_what_has_its_like_here_is_mapped(flags: Sequence[str], option: str, value: object) -> None:
    assert read(*flags)["options"][option] == value


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        (["--copy-tokenizer", "--write-model-card", "--no-allow-crimes", "--no-low-cpu-memory"], ""),
        (["--low-cpu-memory", "--read-to-gpu"], "--read-to-gpu, --low-cpu-memory: not needed here."),
        (["--no-copy-tokenizer"], "--no-copy-tokenizer has no effect: the base's tokenizer is copied with "),
        (["--no-write-model-card"], "--no-write-model-card has no effect: OUT has a README.md."),
        (["--transformers-cache", "/c"], "--transformers-cache has no effect: the hub's cache is HF_HUB_CACHE=/c."),
        (["--allow-crimes"], "--allow-crimes has no effect: what does not fit together is refused with a word"),
        (["--unsafe-truncate-embeddings"], "--unsafe-truncate-embeddings has no effect: rows that only an expert"),
    ],
)
def test_what_has_no_effect_is_said_where_it_would_have_mattered(flags: Sequence[str], answer: str) -> None:
    answers = read(*flags)["answers"]
    assert len(answers) == (answer != "")
    assert "".join(answers).startswith(answer)


def test_quiet_may_be_taken_back() -> None:
    assert [read(*flags)["quiet"] for flags in ((), ("--quiet",), ("--no-quiet",))] == [False, True, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-safe-serialization"], "weights are written as safetensors, never as pickles"),
        (["--out-shard-size", "5B", "--max-shard-size", "1GB"], "--out-shard-size and --max-shard-size are one option"),
        (["-j", "2", "--threads", "3"], "--num-threads and --threads are one option"),
        (["--out-shard-size", "5GB"], "'5GB' is not a size; write it like 500M or 5B"),
        (["--out-shard-size", "0"], "'0' is not a size"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(flags: Sequence[str], message: str) -> None:
    with pytest.raises(click.UsageError, match=message):
        read(*flags)
