"""PEFT adapters as experts: what an adapter's folder says of which tensor of its base, from headers alone.

LoRA (with rank and alpha patterns, rsLoRA, DoRA, fan-in-fan-out, embeddings, `modules_to_save`, biases) and (IA)3. The
adapted model is a catalogue like any other: tensors that the adapter leaves alone lie in the base's files, the others
are computed where they are read (`adapted`), in float32, and never stored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal, cast

from ties_dist.adapters.expressions import matches
from ties_dist.adapters.low_rank import Factor, LowRank, Scaled
from ties_dist.checkpoints.catalogue import Checkpoint, open_checkpoint
from ties_dist.checkpoints.forms import plain
from ties_dist.checkpoints.parameters import OpenFiles, Parameter
from ties_dist.dtypes import TYPES
from ties_dist.errors import CheckpointError
from ties_dist.messages import listing, show
from ties_dist.recipe.references import ADAPTER_CONFIG as CONFIG
from ties_dist.recipe.references import ADAPTER_WEIGHTS as WEIGHTS
from ties_dist.recipe.values import FLOAT32_MAX
from ties_dist.storage.base import Reader
from ties_dist.storage.links import followed

PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(?:\.(?P<rest>weight|bias))?"
)
LORA_A, LORA_B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
_UNSUPPORTED = {
    "lora_bias": "a bias of its own in lora_B",
    "use_qalora": "QALoRA",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "single trained tokens",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "a router",
    "alora_invocation_tokens": "LoRA that acts on some tokens only",
    "megatron_config": "Megatron's layers",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
"""Fields of adapter_config.json that, where set, change what an adapter does in ways that are not known here."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of which peft replaces the base by what is left of it, when it loads the adapter."""


Change = LowRank | Scaled


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter's folder, read. kind: of PEFT. tensors: its own, by PEFT's names."""

    path: Path
    kind: Literal["LORA", "IA3"]
    config: Mapping[str, Any]
    tensors: Checkpoint

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """Its own, as they are read beside a base."""
        return {name: plain.parameter(entry, place=1) for name, entry in self.tensors.tensors.items()}

    @property
    def targets(self) -> set[str]:
        """Names of the model's parameters that it has something for, as the model in memory has them."""
        return {_target(entry.name) for entry in self.tensors.parameters.values()}

    @property
    def classes(self) -> list[str]:
        """Of the model that it was made for, or of its task, where it says so."""
        mapping = self.config.get("auto_mapping")
        named = mapping.get("base_model_class") if isinstance(mapping, dict) else self.config.get("task_type")
        return [named] if isinstance(named, str) else []

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.config.get("fan_in_fan_out", False))


def read_adapter(path: Path, name: str, reader: Callable[[Path], Reader]) -> Adapter:
    """Raises CheckpointError with all that is wrong with the folder by itself."""
    problems: list[str] = []
    try:
        config = json.loads(followed(path, CONFIG).read_text())
        kind = config["peft_type"] if isinstance(config, dict) else None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"adapter '{name}' ({path}): {CONFIG} cannot be read: {error}") from error
    if kind not in ("LORA", "IA3"):
        problems.append(f"{CONFIG}: peft_type {kind!r}: LoRA and (IA)3 are supported; merge it into its base with peft")
    problems += [
        f"{CONFIG}: {key}: {what} is not supported; merge it into its base with peft (`merge_and_unload`)"
        for key, what in _UNSUPPORTED.items()
        if isinstance(config, dict) and config.get(key)
    ]
    if isinstance(config, dict):
        problems += [f"{CONFIG}: {problem}" for problem in _wrong_values(config)]
    if not (path / WEIGHTS).is_file():
        other = "adapter_model.bin" if (path / "adapter_model.bin").is_file() else "no weights"
        problems.append(f"{WEIGHTS}: missing (found {other}): save the adapter with safetensors")
    try:
        followed(path, WEIGHTS)
    except CheckpointError as error:
        problems.append(str(error))
    if problems:
        raise CheckpointError(listing(f"adapter '{name}' ({path}) cannot be used:", problems))
    weights = open_checkpoint(path / WEIGHTS, name=name, reader=reader)
    return Adapter(path=path, kind=cast(Literal["LORA", "IA3"], kind), config=config, tensors=weights)


def _wrong_values(config: Mapping[str, Any]) -> Iterator[str]:
    """What peft could not have written, or what changes the base itself."""
    patterns = [config.get(key) or {} for key in ("alpha_pattern", "rank_pattern")]
    alphas = [config.get("lora_alpha", 8)]
    for pattern in patterns:
        if isinstance(pattern, dict):
            alphas += pattern.values()
        else:
            yield f"a pattern must be a mapping of names to numbers, found {short(pattern)}"
    for alpha in alphas:
        if not isinstance(alpha, int | float) or not abs(alpha) <= FLOAT32_MAX:
            yield f"alpha {short(alpha)} is no number"
    for key in ("target_modules", "feedforward_modules", "exclude_modules"):
        listed = config.get(key) or []
        if not isinstance(listed, str) and not (isinstance(listed, list) and all(isinstance(n, str) for n in listed)):
            yield f"{key}: must be names, or a pattern; found {short(listed)}"
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        yield (
            f"init_lora_weights: {init!r} changes the base that the adapter is added to; convert it with peft "
            "(`save_pretrained(..., path_initial_model_for_weight_conversion=...)`)"
        )


@dataclass
class _Parts:
    """What an adapter has for one tensor of the base: entries by part, and a replacement of it."""

    parts: dict[str, Parameter] = field(default_factory=dict)
    replaced: Parameter | None = None
    module: str = ""


def adapt(base: Checkpoint, adapter: Adapter, name: str) -> Checkpoint:
    """The catalogue of the adapted model. Raises CheckpointError with everything that does not fit the base."""
    problems: list[str] = []
    found: dict[str, _Parts] = {}
    for entry in adapter.parameters.values():
        _sort(entry, base, found, problems)
    parameters = dict(base.parameters)
    changes: dict[str, Change] = {}
    for tensor, parts in sorted(found.items()):
        target = base.parameters[tensor]
        if parts.replaced is not None:
            if parts.replaced.shape != target.shape:
                problems.append(
                    f"{show(tensor)}: saved with shape {parts.replaced.shape}, the base's is {target.shape}"
                )
                continue
            target = replace(parts.replaced, name=tensor)
            parameters[tensor] = target
        if parts.parts:
            change = _change(adapter, target, parts, problems)
            if change is not None:
                changes[tensor] = change
                parameters[tensor] = replace(target, dtype=change.dtype, view=change)
    if adapter.kind == "IA3":
        _scale_biases(base, parameters, changes)
    if problems:
        title = f"adapter '{name}' ({adapter.path}) does not fit its base '{base.name}':"
        raise CheckpointError(listing(title, problems))
    if not found:
        raise CheckpointError(f"adapter '{name}' ({adapter.path}) changes nothing: {WEIGHTS} has no tensors.")
    said = f"'{name}': {adapter.kind} applied to {len(changes)} tensors of '{base.name}', in float32"
    whole = sum(parts.replaced is not None and not parts.parts for parts in found.values())
    return replace(
        base,
        name=name,
        opened=OpenFiles((*base.opened.readers, *adapter.tensors.opened.readers)),
        parameters=parameters,
        notes=(*base.notes, said + (f"; {whole} more are the adapter's own" if whole else "")),
    )


def _target(name: str) -> str:
    inner = name.removeprefix(PREFIX)
    match = _PART.fullmatch(inner)
    return (
        f"{match['module']}.weight" if match else inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
    )


def _sort(entry: Parameter, base: Checkpoint, found: dict[str, _Parts], problems: list[str]) -> None:
    """Which tensor of the base one of the adapter's belongs to."""
    wanted, match = _target(entry.name), _PART.fullmatch(entry.name.removeprefix(PREFIX))
    target = base.find(wanted)
    if target is None:
        problems.append(f"{show(entry.name)}: the base has no tensor {show(wanted)}")
    elif match is None:
        found.setdefault(target, _Parts()).replaced = entry
    elif match["rest"] == "bias":
        problems.append(f"{show(entry.name)}: a bias of lora_B is not supported; merge it with peft")
    else:
        parts = found.setdefault(target, _Parts())
        parts.parts[match["part"]] = entry
        parts.module = match["module"]


def _change(adapter: Adapter, target: Parameter, parts: _Parts, problems: list[str]) -> Change | None:
    if odd := sorted({entry.dtype for entry in (target, *parts.parts.values())} - TYPES.keys()):
        problems.append(
            f"{show(target.name)}: {', '.join(odd)} in it or its adapter; only F32, F16 and BF16 are merged"
        )
        return None
    if len(target.shape) != 2:
        problems.append(f"{show(target.name)}: adapts a tensor of shape {target.shape}; only matrices are supported")
        return None
    if adapter.kind == "IA3":
        return _scaled(adapter, target, parts, problems)
    embedding = "lora_embedding_A" in parts.parts or "lora_embedding_B" in parts.parts
    a, b = (parts.parts.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    magnitude = parts.parts.get("lora_magnitude_vector")
    if a is None or b is None:
        problems.append(f"{show(target.name)}: half of a pair is missing: {', '.join(parts.parts)}")
        return None
    if embedding and magnitude is not None:
        problems.append(f"{show(target.name)}: DoRA of an embedding is not supported; merge it with peft")
        return None
    # Stored (out, in), W + B A; by inputs (fan-in-fan-out, embeddings) its transpose, A^T B^T.
    turned = embedding or adapter.fan_in_fan_out
    outputs, inputs = reversed(target.shape) if turned else target.shape
    rank = a.shape[0] if len(a.shape) == 2 and a.shape[0] else -1
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        problems.append(
            f"{show(target.name)} {target.shape}: A has shape {a.shape} and B {b.shape}, which do not multiply to it"
        )
        return None
    if magnitude is not None and magnitude.numel != outputs:
        problems.append(f"{show(target.name)}: DoRA has {magnitude.numel} magnitudes for {outputs} outputs")
        return None
    return LowRank(
        target=target.view,
        shape=(target.shape[0], target.shape[1]),
        a=_factor(a),
        b=_factor(b),
        turned=turned,
        scaling=scaling(adapter.config, owner(parts.module), rank),
        magnitude=_factor(magnitude) if magnitude is not None else None,
    )


def part_of(name: str) -> tuple[str, str] | None:
    """The module that one of an adapter's tensors belongs to, and as what; None for a weight of the model itself."""
    match = _PART.fullmatch(name.removeprefix(PREFIX))
    return (match["module"], match["part"]) if match and match["rest"] != "bias" else None


def owner(module: str) -> str:
    """The module that patterns speak of: peft wraps some layers in two."""
    return module.partition(".base_layer.")[0]


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r). The rank is the tensors' own; the pattern's alpha wins."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if _matches(k, module)), config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matches(pattern: str, module: str) -> bool:
    """As peft matches the keys of its patterns: whole, or behind a dot."""
    return matches(rf"(.*\.)?({pattern})", module)


def _scaled(adapter: Adapter, target: Parameter, parts: _Parts, problems: list[str]) -> Change | None:
    """(IA)3's l is (out, 1), or (1, in) where a module is one of `feedforward_modules`."""
    factors = parts.parts.get("ia3_l")
    if factors is None:
        problems.append(f"{show(target.name)}: is adapted by {', '.join(parts.parts)}, but peft_type is IA3")
        return None
    rows, columns = target.shape
    outputs, inputs = (columns, rows) if adapter.fan_in_fan_out else (rows, columns)
    if factors.shape not in ((outputs, 1), (1, inputs)):
        problems.append(f"{show(target.name)} {target.shape}: l has shape {factors.shape}")
        return None
    by_output = factors.shape == (outputs, 1) and not (outputs == inputs == 1)
    return Scaled(
        target=target.view,
        columns=columns,
        factors=_factor(factors),
        by_row=by_output != adapter.fan_in_fan_out,
        by_output=by_output,
    )


def _factor(parameter: Parameter) -> Factor:
    return Factor(view=parameter.view, shape=parameter.shape)


def _scale_biases(base: Checkpoint, parameters: dict[str, Parameter], changes: Mapping[str, Change]) -> None:
    """A layer whose outputs are scaled has its bias scaled, too."""
    for tensor, change in changes.items():
        bias = f"{tensor.removesuffix('.weight')}.bias"
        if isinstance(change, Scaled) and change.by_output and bias in base.parameters:
            target = parameters[bias]
            view = Scaled(
                target=target.view, columns=target.shape[-1], factors=change.factors, by_row=False, by_output=True
            )
            parameters[bias] = replace(target, dtype=view.dtype, view=view)
