"""Merges on a GPU against the same merges on the processor, bit for bit: for pytest, and for `benchmarks.device`, on a
real driver or its stand-in, where what the tests need may be missing.

Models are small and nasty: sizes around those of warps, blocks and units, denormals, both zeros, deltas that tie,
vanish or cancel exactly. Only the public interface is called, and a check gives back what differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ties_dist
from benchmarks.shapes import header
from ties_dist.checkpoints.catalogue import open_checkpoint
from ties_dist.inputs.opening import identify
from ties_dist.statistics.collected import Kind, Origin
from ties_dist.storage.readers import open_reader

SHAPES: Mapping[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "three": (3,),
    "under_a_warp": (31,),
    "over_a_block": (257,),
    "odd.weight": (513, 7),
    "long.weight": (2053, 1021),
}
MATRIX = "odd.weight"
"""What `regmean` solves for."""
EXPERTS = 3
UNIT_BYTES = 1 << 20
THREADS = 12
"""More than there are slots for."""
TYPES: Mapping[str, tuple[str, ...]] = {
    "bfloat16": ("BF16",) * 4,
    "float16": ("F16",) * 4,
    "float32": ("F32",) * 4,
    "mixed": ("BF16", "F32", "BF16", "F16"),
}
"""Of base and experts."""
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LARGE = {"BF16": 1e30, "F16": 1e4, "F32": 1e30}
DENORMAL = {"BF16": 1e-39, "F16": 3e-6, "F32": 1e-41}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One merge. types: a name of TYPES. parameters, options: of the recipe."""

    name: str
    types: str = "bfloat16"
    method: str = "ties"
    parameters: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    weights: Sequence[float] = (0.5, 1.25, 0.75)
    unit_bytes: int = UNIT_BYTES
    threads: int = THREADS

    def __str__(self) -> str:
        return f"{self.name}, {self.types}"


def _methods() -> Iterator[Check]:
    density = {"density": 0.2, "lambda": 0.7}
    yield Check(name="ties", parameters=density)
    yield Check(name="task_arithmetic", method="task_arithmetic", weights=(0.5, -0.25, 0.75))
    yield Check(name="linear", method="linear")
    yield Check(name="dare_linear", method="dare_linear", parameters={**density, "seed": 3})
    yield Check(name="dare_ties", method="dare_ties", parameters=density)
    yield Check(name="nearswap", method="nearswap", parameters={"t": 0.01}, weights=(1.0,))
    yield Check(name="passthrough", method="passthrough", parameters={"scale": 0.5}, weights=(1.0,))
    yield Check(name="slerp", method="slerp", parameters={"t": 0.3}, weights=(1.0,))
    yield Check(name="model_stock", method="model_stock")
    yield Check(name="fisher", method="fisher")
    yield Check(name="regmean", method="regmean")


def _variants() -> Iterator[Check]:
    density = {"density": 0.2, "lambda": 0.7}
    for semantics in ("mergekit", "peft"):
        yield Check(name=f"ties as {semantics}", parameters=density, options={"semantics": semantics})
    for option, value in (
        ("trim_scope", "tensor"),
        ("tie_policy", "exact_k"),
        ("elect", "count"),
        ("elect", "none"),
        ("elect_from", "expert-1"),
        ("zero_sign", "positive"),
        ("zero_sign", "drop"),
        ("weight_before_elect", False),
        ("aggregate", "sum"),
        ("aggregate", "max"),
        ("aggregate", "average"),
    ):
        yield Check(name=f"ties, {option}: {value}", parameters=density, options={option: value})
    yield Check(name="task_arithmetic, normalized", method="task_arithmetic", parameters={"normalize": True})
    yield Check(name="linear, sum", method="linear", parameters={"normalize": False})
    yield Check(name="dare_linear, unscaled", method="dare_linear", parameters={**density, "rescale": False})
    yield Check(name="dare_ties, normalized", method="dare_ties", parameters={**density, "normalize": True})


def _with(check: Check, **changed: object) -> Check:
    return Check(**{**{name: getattr(check, name) for name in check.__dataclass_fields__}, **changed})  # type: ignore[arg-type]


def every_check() -> list[Check]:
    """All methods in all types; all options in bfloat16; few slots and many, units of several sizes."""
    methods = [_with(check, types=types) for types in TYPES for check in _methods()]
    ties = methods[0]
    return [
        *methods,
        *_variants(),
        _with(ties, name="ties, one thread", threads=1),
        _with(ties, name="ties, units of 3 MiB", unit_bytes=3 << 20),
        _with(ties, name="ties, one unit", unit_bytes=16 << 20, types="float32"),
    ]


def differences(check: Check, folder: Path) -> list[str]:
    """What of a merge by CUDA is not as by the processor, in words; models and outputs go into `folder`."""
    recipe = _recipe(check, _models(check.types, folder / check.types))
    if check.method in ("fisher", "regmean"):
        _add_statistics(recipe, "fisher" if check.method == "fisher" else "gram")
    found = {}
    for device in ("cpu", "cuda"):
        report = ties_dist.merge(
            recipe,
            folder / device,
            device=device,  # type: ignore[arg-type]
            unit_size=check.unit_bytes,
            threads=check.threads,
            cache_dir=folder / f"cache-{device}",
            fresh=True,
            overwrite=True,
        )
        found[device] = {
            "digest": report.output_digest,
            "experts": [asdict(each) for each in report.experts],
            "conflicts": report.conflict_fraction,
            "majority sign": report.majority_sign,
            "kernel": report.kernel,
        }
    kernels = found["cpu"].pop("kernel"), found["cuda"].pop("kernel")
    wrong = [] if kernels == ("compiled", "cuda") else [f"ran as {kernels[0]} and {kernels[1]}"]
    return wrong + [
        f"{name}: cpu {of_cpu}, cuda {found['cuda'][name]}"
        for name, of_cpu in found["cpu"].items()
        if of_cpu != found["cuda"][name]
    ]


def refusals(folder: Path) -> list[str]:
    """What of the error about a NaN, and about a result beyond float16, is not the same on both devices."""
    said = {}
    for device in ("cpu", "cuda"):
        for kind in ("nan", "beyond"):
            models = _models("float16", folder / kind, spoilt=kind)
            recipe = _recipe(Check(name=kind, method="task_arithmetic"), models)
            try:
                ties_dist.merge(recipe, folder / f"{kind}-{device}", device=device)  # type: ignore[arg-type]
                said[device, kind] = "no error"
            except ties_dist.NumericError as error:
                said[device, kind] = str(error).replace(f"-{device}", "")
    return [
        f"{kind}: cpu '{said['cpu', kind]}', cuda '{said['cuda', kind]}'"
        for kind in ("nan", "beyond")
        if said["cpu", kind] != said["cuda", kind] or said["cpu", kind] == "no error"
    ]


# -- the models --------------------------------------------------------------------------------------------------------


def _models(types: str, folder: Path, *, spoilt: str = "") -> list[Path]:
    """Base and experts, written once. spoilt: 'nan' puts one in, 'beyond' has a sum that float16 cannot hold."""
    names = ["base", *(f"expert-{i}" for i in range(EXPERTS))]
    if not (folder / "done").is_file():
        draw = torch.Generator().manual_seed(len(types))
        models: list[dict[str, Tensor]] = [{} for _ in names]
        for number, (tensor, shape) in enumerate(SHAPES.items()):
            theta = torch.randn(math.prod(shape), generator=draw) * 0.02
            deltas = [torch.randn(theta.shape, generator=draw) * 1e-3 * (1 + number) for _ in range(EXPERTS)]
            values = [theta, *(theta + delta for delta in deltas)]
            if tensor == "long.weight":
                _make_nasty(values, TYPES[types])
                if spoilt:
                    values[0][77_777] = 6e4
                    values[1][77_777] = math.nan if spoilt == "nan" else 6.5e4
                    values[2][77_777] = values[3][77_777] = 6.5e4
            for model, flat in zip(models, values, strict=True):
                model[tensor] = flat
        for name, model, kind in zip(names, models, TYPES[types], strict=True):
            _write(folder / name, model, kind)
        (folder / "done").touch()
    return [folder / name for name in names]


def _make_nasty(values: Sequence[Tensor], types: Sequence[str]) -> None:
    """values: of base and experts, (n,) float32 each, changed in stretches of 1,000."""
    base, first, second, third = values
    least, large = max(DENORMAL[t] for t in types), min(LARGE[t] for t in types)
    signs = torch.where(torch.arange(1000) % 2 == 0, 1.0, -1.0)
    base[:6000] = 0
    for expert in values[1:]:
        expert[:1000] = base[:1000]  # no delta
        expert[1000:2000] = signs * 2.0**-6  # ties, and no conflict
        expert[2000:3000] = signs * least * torch.arange(1000)  # deltas that are denormal
        expert[3000:4000] = -0.0
    first[4000:5000], second[4000:5000], third[4000:5000] = signs * 0.0625, signs * -0.0625, 0  # cancel exactly
    base[5000:6000] = torch.where(signs > 0, 0.0, -0.0)
    base[6000:7000] = signs * large
    for i, expert in enumerate(values[1:]):
        expert[5000:6000] = signs * 0.0
        expert[6000:7000] = signs * large * (1 + (i - 1) / 8)


def _write(folder: Path, model: Mapping[str, Tensor], kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: model[name].to(TORCH[kind]) for name in sorted(model)}
    head = header({name: SHAPES[name] for name in stored}, kind, TORCH[kind].itemsize)
    content = b"".join(values.view(torch.uint8).numpy().tobytes() for values in stored.values())
    (folder / "model.safetensors").write_bytes(head + content)


def _recipe(check: Check, models: Sequence[Path]) -> dict[str, object]:
    base, *experts = models
    listed = [
        {"model": str(expert), "parameters": {"weight": weight}}
        for expert, weight in zip(experts, check.weights, strict=False)
    ]
    options = {**check.options}
    if "elect_from" in options:
        options["elect_from"] = str(base.parent / str(options["elect_from"]))
    recipe: dict[str, object] = {
        "merge_method": check.method,
        "base_model": str(base),
        "models": listed,
        "parameters": dict(check.parameters),
    }
    return {**recipe, "ties_dist": options} if options else recipe


def _add_statistics(recipe: dict[str, object], kind: Kind) -> None:
    """Give every expert of a recipe a store of made-up statistics, written once."""
    draw = np.random.default_rng(7)
    for entry in recipe["models"]:  # type: ignore[attr-defined]
        model = Path(entry["model"])
        store = model.with_name(f"{model.name}.{kind}")
        entry["statistics"] = str(store)
        if store.is_dir():
            continue
        identity = identify(open_checkpoint(model, name="it", reader=open_reader))
        statistics = ties_dist.ExpertStatistics(
            store, Origin(kind=kind, checkpoint=identity, calibration="made up", examples=1)
        )
        statistics.create()
        if kind == "fisher":
            for name, shape in SHAPES.items():
                statistics.add(name, draw.standard_normal(shape).astype(np.float32) ** 2 * np.float32(1e-6))
        else:
            inputs = draw.standard_normal((64, SHAPES[MATRIX][1]))
            statistics.add(MATRIX, (inputs.T @ inputs).astype(np.float32))
        statistics.finish()
