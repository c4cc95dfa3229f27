"""Adapters merged with each other into an adapter: their own tensors are the parameters, a constant is the base.

(IA)3's vectors differ from ones (Yadav et al. 2023, section 5), LoRA's A and B from zeros, each merged by itself as
peft's `add_weighted_adapter` does. What stands once for a whole delta there, W + scaling * B A, has its square root on
A and on B: weight, lambda and scaling.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ties_dist.adapted import CONSTANT, SCALED, AdaptedReader, Multiple
from ties_dist.adapters import LORA_A, LORA_B, Adapter, part_of, scaling
from ties_dist.checkpoint import Checkpoint
from ties_dist.errors import CheckpointError, listing
from ties_dist.header import TensorEntry, show
from ties_dist.kernels.values import TYPES
from ties_dist.planning import TensorNumbers

ROOTED = ("weight", "lambda")
"""Parameters that multiply a delta."""
_SHAPING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
_CHOOSING = ("layers_to_transform", "layers_pattern", "exclude_modules")
_MATRICES = (*LORA_A, *LORA_B)


def open_alone(adapter: Adapter, name: str) -> Checkpoint:
    """An adapter as the catalogue of its own tensors; its reader computes `SCALED` + tensor, too."""
    factors = {}
    for entry in adapter.tensors.tensors.values():
        module, part = part_of(entry.name) or ("", "")
        if part in _MATRICES:
            product = scaling(adapter.config, module, _rank(entry, part))
            factors[entry.name] = math.sqrt(abs(product)) * (-1 if product < 0 and part in LORA_A else 1)
    changes = {t: Multiple(target=adapter.tensors.tensors[t], factor=factor) for t, factor in factors.items()}
    stored = adapter.tensors.reader
    reader = AdaptedReader(stored, stored, changes)
    return replace(adapter.tensors, name=name, reader=reader, config=dict(adapter.config), notes=())


def align(opened: Sequence[Checkpoint]) -> list[Checkpoint]:
    """A base of constants and the adapters as deltas to it: one set of tensors, brought to one scaling.

    opened: by `open_alone`. Raises CheckpointError with everything that speaks against merging them.
    """
    _refuse(opened)
    kind = _config(opened[0])["peft_type"]
    constant = 1.0 if kind == "IA3" else 0.0
    alike = _is_one_setting(opened)
    tensors: dict[str, list[TensorEntry]] = {}
    for one in opened:
        for name, entry in one.tensors.items():
            tensors.setdefault(name, []).append(entry)
    base: dict[str, TensorEntry] = {}
    for name, entries in tensors.items():
        dtypes = {entry.dtype for entry in entries}
        base[name] = _constant(entries[0], dtypes.pop() if len(dtypes) == 1 else "F32", constant)
    found = []
    for one in opened:
        whole = {name: _brought(one.tensors[name], alike) if name in one.tensors else base[name] for name in base}
        lacking = len(base) - len(one.tensors)
        notes = [f"'{one.name}' has nothing for {lacking} of {len(base)} tensors; it changes nothing there"]
        found.append(replace(one, tensors=whole, notes=tuple(notes if lacking else ())))
    bases = sorted({str(_config(one).get("base_model_name_or_path")) for one in opened})
    said = [f"the adapters name different bases: {', '.join(bases)}; merge only adapters of one"]
    first = replace(opened[0], name=f"{constant:g}", tensors=base, notes=tuple(said if len(bases) > 1 else ()))
    return [first, *found]


def on_factors(numbers: TensorNumbers, tensor: str) -> TensorNumbers:
    """The recipe's numbers for one of A or B: square roots, of which A's has the sign. Others stay as they are."""
    _, part = part_of(tensor) or ("", "")
    if part not in _MATRICES:
        return numbers

    def rooted(values: Mapping[str, float]) -> dict[str, float]:
        return {k: _root(v, signed=part in LORA_A) if k in ROOTED else v for k, v in values.items()}

    return TensorNumbers(parameters=rooted(numbers.parameters), experts=tuple(rooted(e) for e in numbers.experts))


def merged_config(opened: Sequence[Checkpoint]) -> bytes:
    """The output's adapter_config.json: the first adapter's, and where they differ one that says all by module."""
    config = dict(_config(opened[0])) | {"inference_mode": True}
    if config["peft_type"] == "IA3":
        for key in ("target_modules", "feedforward_modules"):
            if any(_config(one).get(key) != config.get(key) for one in opened):
                config[key] = _modules(opened, inputs_only=key == "feedforward_modules")
    elif not _is_one_setting(opened):
        ranks = {
            module: _rank(entry, part)
            for one in opened
            for entry in one.tensors.values()
            for module, part in [part_of(entry.name) or ("", "")]
        }
        common = Counter(ranks.values()).most_common(1)[0][0]
        # Alpha like the rank: a scaling of 1, the adapters' own is in A and B.
        others = {module: rank for module, rank in sorted(ranks.items()) if rank != common}
        config |= {"r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": dict(others)}
        config |= {"use_rslora": False, "target_modules": sorted(ranks), **dict.fromkeys(_CHOOSING)}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _refuse(opened: Sequence[Checkpoint]) -> None:
    problems = []
    kinds = {one.name: _config(one)["peft_type"] for one in opened}
    if len(set(kinds.values())) > 1:
        problems.append(f"different kinds: {', '.join(f'{name} is {kind}' for name, kind in kinds.items())}")
    shapes: dict[str, tuple[str, TensorEntry]] = {}
    for one in opened:
        if _config(one).get("use_dora"):
            problems.append(f"'{one.name}' is a DoRA: its magnitudes are no deltas")
        for entry in one.tensors.values():
            if entry.dtype not in TYPES:
                problems.append(f"'{one.name}': {show(entry.name)} is {entry.dtype}; only F32, F16 and BF16 are merged")
            if part_of(entry.name) is None:
                problems.append(f"'{one.name}': {show(entry.name)} is a weight of the model (modules_to_save, bias)")
            first, other = shapes.setdefault(entry.name, (one.name, entry))
            if other.shape != entry.shape:
                problems.append(f"{show(entry.name)}: {other.shape} in '{first}', {entry.shape} in '{one.name}'")
    if problems:
        advice = "Merge them into models instead: name a `base_model` and leave out `output: adapter`."
        raise CheckpointError(listing("these adapters cannot be merged into one adapter:", problems, advice))


def _is_one_setting(opened: Sequence[Checkpoint]) -> bool:
    """Whether one adapter_config.json holds for all, (IA)3's always does."""
    settings = [{key: _config(one).get(key) or None for key in _SHAPING} for one in opened]
    for each in settings:
        if isinstance(each["target_modules"], list):
            each["target_modules"] = sorted(each["target_modules"])
    return _config(opened[0])["peft_type"] == "IA3" or all(each == settings[0] for each in settings)


def _constant(entry: TensorEntry, dtype: str, value: float) -> TensorEntry:
    nbytes = entry.numel * (4 if dtype == "F32" else 2)
    return replace(entry, dtype=dtype, file=f"{CONSTANT}{dtype}/{value}", start=0, stop=nbytes)


def _brought(entry: TensorEntry, alike: bool) -> TensorEntry:
    if alike:
        return entry
    return replace(entry, dtype="F32", file=SCALED + entry.name, start=0, stop=4 * entry.numel)


def _modules(opened: Sequence[Checkpoint], *, inputs_only: bool) -> list[str]:
    """Full names, which peft takes as they are. (IA)3 scales a feed-forward module's inputs: l is (1, in)."""
    found = set()
    for one in opened:
        for entry in one.tensors.values():
            if not inputs_only or entry.shape[0] == 1:
                found.add((part_of(entry.name) or ("", ""))[0])
    return sorted(found)


def _rank(entry: TensorEntry, part: str) -> int:
    """A is (r, in, ...), B is (out, r, ...)."""
    shape = (*entry.shape, 1, 1)
    return max(1, shape[0] if part in LORA_A else shape[1])


def _root(value: float, *, signed: bool) -> float:
    return math.copysign(math.sqrt(abs(value)), value if signed else 1.0)


def _config(one: Checkpoint) -> Mapping[str, object]:
    assert one.config is not None
    return one.config
