"""The flags of mergekit-yaml 0.1.5, as they stand in people's scripts: mapped, read over, or answered in words.

Those that `merge` has under the same name, `--device`, `--quiet` and `-v`, are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps

import click

from ties_dist.cli.options import Command, Decorator, together

_SIZES = {"k": 10**3, "m": 10**6, "b": 10**9}
"""Of `--out-shard-size`: bytes, though its help speaks of parameters."""

_SWITCHES = (
    *("cuda", "gpu_rich", "multi_gpu", "read_to_gpu", "low_cpu_memory"),
    *("lazy_unpickle", "clone_tensors", "async_write", "trust_remote_code", "allow_crimes"),
    *("unsafe_truncate_embeddings", "copy_tokenizer", "write_model_card", "safe_serialization"),
)
_VALUES = ("transformers_cache", "lora_merge_cache", "lora_merge_dtype", "write_threads")

_ANSWERS = {
    ("allow_crimes", True): "what does not fit together is refused with a word, and --allow WORD allows that alone",
    ("unsafe_truncate_embeddings", True): "rows that only an expert has are dropped where the tokenizers agree, and "
    "always with `ties_dist: {vocab: base}`",
    ("copy_tokenizer", False): "the base's tokenizer is copied with all that stands beside its weights",
    ("write_model_card", False): "OUT has a README.md",
}
"""What is said of a flag, on or off, that would have changed the output."""
_IDLE = (
    *("multi_gpu", "read_to_gpu", "low_cpu_memory", "lazy_unpickle", "clone_tensors", "async_write"),
    *("trust_remote_code", "lora_merge_cache", "lora_merge_dtype", "write_threads"),
)
"""All GPUs are used where one is, everything is read in slices, and no code of models is run."""


def _shard_bytes(text: str) -> int:
    digits, unit = (text[:-1], _SIZES.get(text[-1:].lower(), 0)) if not text.isdecimal() else (text, 1)
    if not (unit and digits.isdecimal() and int(digits)):
        raise click.BadParameter(f"'{text}' is not a size; write it like 500M or 5B, or as --max-shard-size 5GB.")
    return int(digits) * unit


def _switch(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _both(name: str) -> Decorator:
    """On and off; None where neither is given."""
    return click.option(f"{_switch(name)}/--no-{name.replace('_', '-')}", name, default=None, hidden=True)


_FLAGS = together(
    *(_both(name) for name in _SWITCHES),
    *(click.option(_switch(name), name, hidden=True) for name in _VALUES),
    click.option("--no-quiet", is_flag=True, hidden=True),
    click.option("--num-threads", "-j", type=click.IntRange(min=1), hidden=True),
    click.option("--out-shard-size", type=_shard_bytes, hidden=True),
)


def understands_mergekit(command: Command) -> Command:
    """For a command that takes `options`, `quiet` and `answers`: what the flags say is in these."""

    @wraps(command)
    def translating(*, options: dict[str, object], quiet: bool, **given: object) -> None:
        flags = {name: given.pop(name) for name in (*_SWITCHES, *_VALUES)}
        _set(options, "max_shard_size", given.pop("out_shard_size"), "--out-shard-size")
        _set(options, "threads", given.pop("num_threads"), "--num-threads")
        quiet = not given.pop("no_quiet") and quiet
        if flags["safe_serialization"] is False:
            raise click.UsageError("--no-safe-serialization: weights are written as safetensors, never as pickles.")
        if flags["cuda"] or flags["gpu_rich"]:
            options["device"] = "cuda"
        command(options=options, quiet=quiet, answers=_answers(flags), **given)

    return _FLAGS(translating)


def _set(options: dict[str, object], name: str, value: object, flag: str) -> None:
    if value is not None and options[name] is not None:
        raise click.UsageError(f"{flag} and {_switch(name)} are one option; give one of them.")
    if value is not None:
        options[name] = value


def _answers(flags: Mapping[str, object]) -> list[str]:
    """Notes on the flags that were given."""
    said = [
        f"{_switch(name) if on else _switch('no_' + name)} has no effect: {words}."
        for (name, on), words in _ANSWERS.items()
        if flags[name] is on
    ]
    if cache := flags["transformers_cache"]:
        said.append(f"--transformers-cache has no effect: the hub's cache is HF_HUB_CACHE={cache}.")
    if idle := [_switch(name) for name in _IDLE if flags[name]]:
        said.append(f"{', '.join(idle)}: not needed here.")
    return said
