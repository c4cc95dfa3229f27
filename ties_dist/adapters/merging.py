"""Adapters merged with each other into an adapter: their own tensors are the parameters, a constant is the base.

(IA)3's vectors differ from ones (Yadav et al. 2023, section 5), LoRA's A and B from zeros, each merged by itself as
peft's `add_weighted_adapter` does. What stands once for a whole delta there, W + scaling * B A, has its square root on
A and on B: weight, lambda and scaling.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ties_dist.adapters.expressions import matches
from ties_dist.adapters.low_rank import Constant, Multiple
from ties_dist.adapters.peft import LORA_A, LORA_B, PREFIX, Adapter, owner, part_of, scaling
from ties_dist.checkpoints.catalogue import Checkpoint
from ties_dist.checkpoints.parameters import Parameter
from ties_dist.dtypes import TYPES
from ties_dist.errors import CheckpointError
from ties_dist.messages import listing, show
from ties_dist.values.numbers import TensorNumbers

ROOTED = ("weight", "lambda")
"""Parameters that multiply a delta."""
_MATRICES = (*LORA_A, *LORA_B)
_PARTNER = dict(zip(_MATRICES, (*LORA_B, *LORA_A), strict=True))
_WHICH = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules")
_HOW = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def open_alone(adapter: Adapter, name: str) -> Checkpoint:
    """An adapter as the catalogue of its own tensors, by the names that peft gives them today.

    Raises CheckpointError where it cannot be merged by itself.
    """
    problems = ["it is a DoRA: magnitudes are no deltas"] if adapter.config.get("use_dora") else []
    parameters: dict[str, Parameter] = {}
    for entry in adapter.tensors.parameters.values():
        known = part_of(entry.name)
        if known is None:
            problems.append(f"{show(entry.name)} is a weight of the model (modules_to_save, bias)")
            continue
        module, part = known
        if part == "lora_magnitude_vector":
            problems.append(f"{show(entry.name)} is of a DoRA: magnitudes are no deltas")
        elif (part == "ia3_l") != (adapter.kind == "IA3"):
            problems.append(f"{show(entry.name)}: peft_type is {adapter.kind}")
        elif len(entry.shape) < 2:
            problems.append(f"{show(entry.name)} has shape {entry.shape}")
        if entry.dtype not in TYPES:
            problems.append(f"{show(entry.name)} is {entry.dtype}; only F32, F16 and BF16 are merged")
        today = f"{PREFIX}{module}.{part}" + (".weight" if part in ("lora_A", "lora_B") else "")
        if today in parameters:
            problems.append(f"{show(entry.name)}: there are two of it")
        parameters[today] = replace(entry, name=today)
    there = {part_of(name) for name in parameters}
    for module, part in sorted(filter(None, there)):
        if part in _PARTNER and (module, _PARTNER[part]) not in there:
            problems.append(f"{show(module)} has {part} and no {_PARTNER[part]}")
    if not parameters and not problems:
        problems.append("it has no tensors")
    if problems:
        advice = "Merge it into a model instead: name a `base_model` and leave out `output: adapter`."
        title = f"adapter '{name}' ({adapter.path}) cannot be merged into an adapter:"
        raise CheckpointError(listing(title, problems, advice))
    return replace(adapter.tensors, name=name, parameters=parameters, config=dict(adapter.config), notes=())


def align(opened: Sequence[Checkpoint], experts: int) -> list[Checkpoint]:
    """A base of constants and the adapters as deltas to it: one set of tensors, brought to one scaling.

    opened: by `open_alone`; behind the experts, a model whose signs are taken, of which the experts' tensors are used.
    Raises CheckpointError with everything that speaks against merging them.
    """
    merged = opened[:experts]
    _refuse(opened)
    constant = 1.0 if _config(opened[0])["peft_type"] == "IA3" else 0.0
    scaled = _common_scaling(merged) is None
    found: dict[str, list[Parameter]] = {}
    for one in merged:
        for name, parameter in one.parameters.items():
            found.setdefault(name, []).append(parameter)
    base: dict[str, Parameter] = {}
    for name, entries in found.items():
        dtypes = {entry.dtype for entry in entries}
        base[name] = _constant(entries[0], dtypes.pop() if len(dtypes) == 1 else "F32", constant)
    aligned = []
    for one in opened:
        own = one.parameters
        whole = {n: _brought(_config(one), own[n], scaled) if n in own else base[n] for n in base}
        lacking = sum(n not in own for n in base)
        notes = [f"'{one.name}' has nothing for {lacking} of {len(base)} tensors; it changes nothing there"]
        aligned.append(replace(one, parameters=whole, notes=tuple(notes if lacking else ())))
    bases = sorted({str(_config(one).get("base_model_name_or_path")) for one in merged})
    said = [f"the adapters name different bases: {', '.join(bases)}; merge only adapters of one"]
    # What the counts of a cache belong to, whose thresholds are of scaled tensors or of stored ones.
    name = f"{constant:g}" + (", adapters scaled" if scaled else "")
    first = replace(opened[0], name=name, parameters=base, notes=tuple(said if len(bases) > 1 else ()))
    return [first, *aligned]


def on_factors(numbers: TensorNumbers, tensor: str) -> TensorNumbers:
    """The recipe's numbers for one of A or B: square roots, of which A's has the sign. Others stay as they are."""
    _, part = part_of(tensor) or ("", "")
    if part not in _MATRICES:
        return numbers

    def rooted(values: Mapping[str, float]) -> dict[str, float]:
        return {k: _root(v, signed=part in LORA_A) if k in ROOTED else v for k, v in values.items()}

    return TensorNumbers(parameters=rooted(numbers.parameters), experts=tuple(rooted(e) for e in numbers.experts))


def merged_config(opened: Sequence[Checkpoint]) -> bytes:
    """The output's adapter_config.json: the one that all have, else the first with all that differs said by module."""
    config = dict(_config(opened[0])) | {"inference_mode": True, "modules_to_save": None}
    lora = config["peft_type"] == "LORA"
    common = _common_scaling(opened)
    if common is None or any(_settings(one) != _settings(opened[0]) for one in opened):
        modules = {owner(module) for _, module, _ in _parts(opened)}
        config |= {key: None for key in _WHICH if key in config} | {"target_modules": _exactly(modules)}
        if lora:
            ranks = {owner(module): _rank(entry, part) for entry, module, part in _parts(opened)}
            usual = Counter(ranks.values()).most_common(1)[0][0]
            others = {f"^{re.escape(m)}": rank for m, rank in sorted(ranks.items()) if rank != usual}
            # Without a common scaling it is in A and B, and 1 here.
            alphas = {m: _whole(rank * (common or 1.0)) for m, rank in others.items()}
            config |= {"r": usual, "lora_alpha": _whole(usual * (common or 1.0)), "use_rslora": False}
            config |= {"rank_pattern": others, "alpha_pattern": alphas}
        else:
            inputs = {owner(m) for one in opened for _, m, _ in _parts([one]) if _scales_inputs(one, m)}
            config |= {"feedforward_modules": _exactly(inputs) if inputs else []}
    if lora:
        config |= {"bias": "none", "init_lora_weights": True}
    return (json.dumps(config, indent=2) + "\n").encode()


def _refuse(opened: Sequence[Checkpoint]) -> None:
    problems = []
    kinds = {one.name: _config(one)["peft_type"] for one in opened}
    if len(set(kinds.values())) > 1:
        problems.append(f"different kinds: {', '.join(f'{name} is {kind}' for name, kind in kinds.items())}")
    shapes: dict[str, tuple[Checkpoint, Parameter]] = {}
    for one in opened:
        for entry, module, part in _parts([one]):
            first, other = shapes.setdefault(entry.name, (one, entry))
            if other.shape != entry.shape:
                problems.append(f"{show(entry.name)}: {other.shape} in '{first.name}', {entry.shape} in '{one.name}'")
            elif part == "ia3_l" and _scales_inputs(first, module) != _scales_inputs(one, module):
                problems.append(f"{show(module)}: a feed-forward module in one of '{first.name}' and '{one.name}' only")
    if problems:
        advice = "Merge them into models instead: name a `base_model` and leave out `output: adapter`."
        raise CheckpointError(listing("these adapters cannot be merged into one adapter:", problems, advice))


def _parts(opened: Sequence[Checkpoint]) -> Iterator[tuple[Parameter, str, str]]:
    """Each tensor with its module and part."""
    for one in opened:
        for entry in one.parameters.values():
            if (known := part_of(entry.name)) is not None:
                yield entry, *known


def _common_scaling(opened: Sequence[Checkpoint]) -> float | None:
    """The one that all modules of all adapters have, (IA)3's is 1; None where they differ, or turn the sign."""
    found = {
        scaling(_config(one), owner(module), _rank(entry, part)) if part in _MATRICES else 1.0
        for one in opened
        for entry, module, part in _parts([one])
    }
    return found.pop() if len(found) == 1 and min(found) > 0 else None


def _settings(one: Checkpoint) -> list[object]:
    """What says which modules an adapter has, of which rank and scaling. Order counts in patterns, not in lists."""
    found: list[object] = []
    for key in (*_WHICH, *_HOW):
        value = _config(one).get(key) or None
        is_set = isinstance(value, list) and key != "layers_to_transform"
        found.append(sorted(map(str, value)) if is_set and isinstance(value, list) else value)
        found.append(list(value) if isinstance(value, dict) else None)
    return found


def _constant(parameter: Parameter, dtype: str, value: float) -> Parameter:
    return replace(parameter, dtype=dtype, view=Constant(value=value, dtype=dtype))


def _brought(config: Mapping[str, object], parameter: Parameter, scaled: bool) -> Parameter:
    """An adapter's own tensor, times what its scaling gives each where the adapters' scalings differ."""
    if not scaled:
        return parameter
    view = Multiple(target=parameter.view, factor=_factor(config, parameter))
    return replace(parameter, dtype=view.dtype, view=view)


def _factor(config: Mapping[str, object], entry: Parameter) -> float:
    module, part = part_of(entry.name) or ("", "")
    if part not in _MATRICES:
        return 1.0
    return _root(scaling(config, owner(module), _rank(entry, part)), signed=part in LORA_A)


def _scales_inputs(one: Checkpoint, module: str) -> bool:
    """Whether peft takes a module of an (IA)3 for a feed-forward one."""
    listed = _config(one).get("feedforward_modules") or []
    if isinstance(listed, str):
        return matches(listed, module)
    return isinstance(listed, list) and any(f".{module}".endswith(f".{each}") for each in listed)


def _exactly(modules: set[str]) -> str:
    """A pattern of just these: peft takes a text as one, and the names of a list for endings of names."""
    return "|".join(re.escape(module) for module in sorted(modules))


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _rank(entry: Parameter, part: str) -> int:
    """A is (r, in, ...), B is (out, r, ...)."""
    return max(1, entry.shape[0] if part in LORA_A else entry.shape[1])


def _root(value: float, *, signed: bool) -> float:
    return math.copysign(math.sqrt(abs(value)), value if signed else 1.0)


def _config(one: Checkpoint) -> Mapping[str, object]:
    assert one.config is not None
    return one.config
