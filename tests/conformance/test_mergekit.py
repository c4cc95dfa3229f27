"""mergekit 0.1.5 as the judge of `semantics: mergekit`, on a three-layer Llama of 8,000 parameters.

mergekit runs as a subprocess (it pins its own dependencies): every recipe once per session, in one process, through its
own command line. The executable is TIES_DIST_MERGEKIT, else `mergekit-yaml` on PATH, else `.venv-mergekit/bin` in the
repository. The same recipe file then goes through the NumPy oracle (which proves the preset's definition) and through
`ties-dist merge` (which proves the engine).

Deviations are allowed, counted and bounded: where a trim cut a group of equal magnitudes (mergekit's argsort keeps
arbitrary ones), from five experts on the rounding of torch's stacked sum, and in `linear` that of `addcmul`, which
fuses multiplication and addition where the processor can.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.conformance.agreement import Allowance, compare, ties_allowance
from tests.oracle import Array

REPOSITORY = Path(__file__).resolve().parents[2]
SUBJECTS = ("oracle", "engine")
# The command ignores this when it is imported; pytest restores the filters between tests.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
BY_SUMS = ("slerp", "model_stock")
"""mergekit sums over a tensor in float32, in an order of its own: the last bits of what follows differ."""
LAYERS = 3
HIDDEN, INNER, KEYS, VOCABULARY = 16, 24, 8, 48
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": KEYS // 4,
    "head_dim": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
# mergekit's own command line for every (recipe, out) pair on standard input: torch is imported once, not twenty times.
DRIVER = """
import json, sys
from mergekit.scripts.run_yaml import main
for recipe, out in json.load(sys.stdin):
    main(["--no-copy-tokenizer", "--quiet", recipe, out], standalone_mode=False)
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe both tools read, and the same request in the oracle's words."""

    experts: int
    method: str = "ties"
    # The recipe: parameters of each model, global parameters, other top-level keys.
    per_model: tuple[dict[str, Any], ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    base_listed: bool = False
    listed_in: Literal["models", "slices", "modules"] = "models"
    base_merged: bool = False  # a base that is named and not listed, as the last model
    # The oracle: keyword arguments of oracle.ties, task_arithmetic or linear.
    oracle: dict[str, Any] | None = field(default_factory=dict)  # None: nothing is equal element by element
    gain: float = 1.0  # upper bound of |lambda| / divisor
    stored: str = "float32"  # bfloat16 inputs take few distinct values, so trims cut tie groups
    out_dtype: str = "float32"


def weights(*values: Any) -> tuple[dict[str, Any], ...]:
    return tuple({"weight": value} for value in values)


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    named: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        for part, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (KEYS, HIDDEN),
            "self_attn.v_proj": (KEYS, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            named[f"model.layers.{layer}.{part}.weight"] = shape
    return named


def by_layer(start: float, middle: float, stop: float) -> dict[str, float]:
    """mergekit's gradient [start, middle, stop] by layer; tensors outside the layers, the last too, take `start`."""
    return {
        name: {"0": start, "1": middle, "2": stop}[name.split(".")[2]] if ".layers." in name else start
        for name in tensor_shapes()
    }


def by_filter(fragment: str, value: float, otherwise: float) -> dict[str, float]:
    return {name: value if fragment in name else otherwise for name in tensor_shapes()}


CASES = {
    "two experts": Case(
        experts=2,
        per_model=weights(0.5, 0.5),
        parameters={"density": 0.3},
        oracle={"density": 0.3, "weights": (0.5, 0.5)},
        gain=2.0,
    ),
    "one expert, density by default": Case(
        experts=1, per_model=weights(0.7), oracle={"density": 1.0, "weights": (0.7,)}, gain=2.0
    ),
    "three experts, a density and a weight each, base listed, int8_mask": Case(
        experts=3,
        per_model=(
            {"density": 0.5, "weight": 0.5},
            {"density": 0.2, "weight": 1.0},
            {"density": 0.9, "weight": 0.3},
        ),
        parameters={"normalize": True, "int8_mask": True},
        base_listed=True,
        oracle={"density": (0.5, 0.2, 0.9), "weights": (0.5, 1.0, 0.3)},
        gain=4.0,
    ),
    "four experts, not normalized, lambda": Case(
        experts=4,
        per_model=weights(0.3, 0.2, 0.4, 0.25),
        parameters={"density": 0.6, "normalize": False, "lambda": 1.7},
        oracle={"density": 0.6, "weights": (0.3, 0.2, 0.4, 0.25), "lam": 1.7, "aggregate": "sum"},
        gain=1.7,
    ),
    "four experts, normalized, lambda": Case(
        experts=4,
        per_model=weights(0.3, 1.2, 0.4, 0.25),
        parameters={"density": 0.35, "lambda": 0.4},
        oracle={"density": 0.35, "weights": (0.3, 1.2, 0.4, 0.25), "lam": 0.4},
        gain=2.0,
    ),
    "negative lambda": Case(
        experts=2,
        per_model=weights(1.0, 0.5),
        parameters={"density": 0.5, "lambda": -0.5},
        oracle={"density": 0.5, "weights": (1.0, 0.5), "lam": -0.5},
    ),
    "a density that keeps one entry of each tensor": Case(
        experts=3,
        per_model=weights(1.0, 1.0, 1.0),
        parameters={"density": 1e-4},
        oracle={"density": 1e-4, "weights": (1.0, 1.0, 1.0)},
    ),
    "signed weights whose sum is sometimes exactly zero": Case(
        experts=3,
        per_model=weights(1.0, -1.0, 0.5),
        parameters={"density": 0.7},
        oracle={"density": 0.7, "weights": (1.0, -1.0, 0.5)},
        gain=2.0,
    ),
    "a weight of zero": Case(
        experts=3,
        per_model=weights(1.0, 0.0, 0.5),
        parameters={"density": 0.7},
        oracle={"density": 0.7, "weights": (1.0, 0.0, 0.5)},
        gain=2.0,
    ),
    "filters and gradients": Case(
        experts=2,
        per_model=(
            {"density": [1.0, 0.7, 0.1], "weight": 1.0},
            {
                "density": [{"filter": "mlp", "value": 0.25}, {"value": 0.5}],
                "weight": [
                    {"filter": "self_attn", "value": 0.75},
                    {"filter": "mlp", "value": [0.2, 0.8]},
                    {"value": 1},
                ],
            },
        ),
        oracle={
            "density": (by_layer(1.0, 0.7, 0.1), by_filter("mlp", 0.25, 0.5)),
            "weights": (
                1.0,
                by_filter("self_attn", 0.75, 1.0) | {n: v for n, v in by_layer(0.2, 0.5, 0.8).items() if "mlp" in n},
            ),
        },
        gain=5.0,
    ),
    "five experts": Case(
        experts=5,
        per_model=weights(0.9, 0.2, 0.4, 1.1, 0.6),
        parameters={"density": 0.8},
        oracle={"density": 0.8, "weights": (0.9, 0.2, 0.4, 1.1, 0.6)},
        gain=5.0,
    ),
    "six experts, everything kept, lambda": Case(
        experts=6,
        per_model=weights(1, 1, 1, 1, 1, 1),
        parameters={"lambda": 1.5},
        oracle={"density": 1.0, "lam": 1.5},
        gain=1.5,
    ),
    "bfloat16 inputs that cancel exactly, everything kept": Case(
        experts=2,
        per_model=weights(1.0, 1.0),
        oracle={"density": 1.0},
        stored="bfloat16",
    ),
    "bfloat16 inputs full of ties": Case(
        experts=3,
        per_model=weights(0.5, 1.0, 0.3),
        parameters={"density": 0.3},
        oracle={"density": 0.3, "weights": (0.5, 1.0, 0.3)},
        stored="bfloat16",
        gain=4.0,
    ),
    "bfloat16 in and out, everything kept": Case(
        experts=4,
        per_model=weights(0.5, 1.0, 0.3, 0.8),
        top={"out_dtype": "bfloat16"},
        oracle={"density": 1.0, "weights": (0.5, 1.0, 0.3, 0.8)},
        stored="bfloat16",
        out_dtype="bfloat16",
    ),
    "float16 out": Case(
        experts=2,
        per_model=weights(0.5, 1.0),
        parameters={"density": 0.4},
        top={"out_dtype": "float16"},
        oracle={"density": 0.4, "weights": (0.5, 1.0)},
        out_dtype="float16",
    ),
    "task arithmetic, signed weights, lambda": Case(
        method="task_arithmetic",
        experts=3,
        per_model=weights(0.5, -1.0, 0.3),
        parameters={"lambda": 0.4},
        oracle={"weights": (0.5, -1.0, 0.3), "lam": 0.4},
    ),
    "task arithmetic, six experts": Case(
        method="task_arithmetic",
        experts=6,
        per_model=weights(0.4, 0.4, 0.4, -0.1, 0.7, 0.4),
        oracle={"weights": (0.4, 0.4, 0.4, -0.1, 0.7, 0.4)},
    ),
    "task arithmetic, one negated expert": Case(
        method="task_arithmetic", experts=1, per_model=weights(-1.0), oracle={"weights": (-1.0,)}
    ),
    "dare_linear with nothing dropped": Case(
        method="dare_linear",
        experts=3,
        per_model=weights(0.5, -1.0, 0.3),
        parameters={"density": 1.0, "lambda": 0.4},
        oracle={"weights": (0.5, -1.0, 0.3), "lam": 0.4},
    ),
    "dare_linear, density by default": Case(
        method="dare_linear",
        experts=2,
        per_model=weights(0.5, -1.0),
        oracle={"weights": (0.5, -1.0)},
    ),
    "ties, a gradient of density from 0": Case(
        experts=2,
        per_model=weights(0.5, 1.0),
        parameters={"density": [0, 0.3, 1]},
        oracle={"density": by_layer(0, 0.3, 1), "weights": (0.5, 1.0)},
        gain=2.0,
    ),
    "ties in a slice over all layers": Case(
        experts=2,
        per_model=weights(0.5, [0.2, 0.4, 1.5]),
        parameters={"density": 0.3},
        base_listed=True,
        listed_in="slices",
        oracle={"density": 0.3, "weights": (0.5, by_layer(0.2, 0.4, 1.5))},
        gain=4.0,
    ),
    "task arithmetic in a module": Case(
        method="task_arithmetic",
        experts=2,
        per_model=weights(0.5, -0.25),
        base_listed=True,
        listed_in="modules",
        oracle={"weights": (0.5, -0.25)},
    ),
    "nearswap": Case(method="nearswap", experts=1, per_model=({},), parameters={"t": 5e-4}, oracle={"t": 5e-4}),
    "nearswap, base listed, t by layer, negative and beyond all differences": Case(
        method="nearswap",
        experts=1,
        per_model=({},),
        parameters={"t": [-1, 1e-3, 7]},
        base_listed=True,
        oracle={"t": by_layer(-1, 1e-3, 7)},
    ),
    "passthrough": Case(method="passthrough", experts=1, per_model=({},)),
    "passthrough, scaled by filter": Case(
        method="passthrough",
        experts=1,
        per_model=({"scale": [{"filter": "mlp", "value": 0.3}, {"value": -2}]},),
        oracle={"scale": by_filter("mlp", 0.3, -2)},
        gain=2.0,
    ),
    "dare_ties with nothing dropped": Case(
        method="dare_ties",
        experts=4,
        per_model=weights(0.5, 1.0, 0.3, 0.7),
        parameters={"density": 1.0, "lambda": 0.8},
        oracle={"density": 1.0, "weights": (0.5, 1.0, 0.3, 0.7), "lam": 0.8, "aggregate": "sum"},
    ),
    "linear, equal weights": Case(
        method="linear", experts=3, per_model=weights(1.0, 1.0, 1.0), oracle={"weights": (1.0, 1.0, 1.0)}
    ),
    "linear, uneven weights, six models": Case(
        method="linear",
        experts=6,
        per_model=weights(0.9, 0.2, -0.4, 1.1, 0.6, 0.3),
        oracle={"weights": (0.9, 0.2, -0.4, 1.1, 0.6, 0.3)},
    ),
    "linear, a base outside of the models": Case(
        method="linear",
        experts=2,
        per_model=({"weight": 0.9}, {}),
        parameters={"weight": 0.35},
        base_merged=True,
        oracle={"weights": (0.9, 0.35, 0.35)},
    ),
    "linear, bfloat16 in and out": Case(
        method="linear",
        experts=3,
        per_model=weights(0.6, 0.3, 0.25),
        top={"out_dtype": "bfloat16"},
        oracle={"weights": (0.6, 0.3, 0.25)},
        stored="bfloat16",
        out_dtype="bfloat16",
    ),
}


CASES |= {
    f"{method} of one expert, half dropped": Case(
        method=method, experts=1, per_model=weights(1.0), parameters={"density": 0.5}, oracle=None
    )
    for method in ("dare_linear", "dare_ties")
}
CASES |= {
    "slerp, half way": Case(
        method="slerp", experts=1, per_model=({},), parameters={"t": 0.5}, base_listed=True, oracle={"t": 0.5}
    ),
    "slerp, filters and gradients, the base not listed": Case(
        method="slerp",
        experts=1,
        per_model=({},),
        parameters={
            "t": [{"filter": "self_attn", "value": [0, 0.3, 1]}, {"filter": "mlp", "value": 0.7}, {"value": 0.2}]
        },
        oracle={
            "t": by_filter("mlp", 0.7, 0.2) | {n: v for n, v in by_layer(0, 0.3, 1).items() if "self_attn" in n},
        },
    ),
    "slerp, bfloat16 in and out": Case(
        method="slerp",
        experts=1,
        per_model=({},),
        parameters={"t": 0.35},
        top={"out_dtype": "bfloat16"},
        oracle={"t": 0.35},
        stored="bfloat16",
        out_dtype="bfloat16",
    ),
    "model stock, two experts": Case(method="model_stock", experts=2, per_model=({}, {}), base_listed=True),
    "model stock, six experts": Case(method="model_stock", experts=6, per_model=({},) * 6, base_listed=True),
    "model stock, bfloat16 in and out": Case(
        method="model_stock",
        experts=4,
        per_model=({},) * 4,
        base_listed=True,
        top={"out_dtype": "bfloat16"},
        stored="bfloat16",
        out_dtype="bfloat16",
    ),
}


# --- inputs, both tools' outputs ---


def make_models(stored: str) -> tuple[dict[str, Array], list[dict[str, Array]]]:
    """A base and six experts: sigma 0.02 (norms near 1), updates of 1e-3 of which a tenth are exactly zero."""
    random = np.random.default_rng(20230602)
    dtype = oracle.DTYPES[stored]
    base = {}
    for name, shape in tensor_shapes().items():
        centre = 1.0 if "norm" in name else 0.0
        base[name] = oracle.narrow((centre + random.standard_normal(shape) * 0.02).astype(np.float32), dtype)
    experts = []
    for _ in range(6):
        expert = {}
        for name, values in base.items():
            update = random.standard_normal(values.shape) * 1e-3 * (random.random(values.shape) < 0.9)
            expert[name] = oracle.narrow(oracle.widen(values) + update.astype(np.float32), dtype)
        experts.append(expert)
    return base, experts


def write_model(folder: Path, model: dict[str, Array], dtype: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": dtype}, indent=2))
    save_file(
        {name: oracle.to_torch(array) for name, array in model.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def recipe_of(case: Case, root: Path) -> dict[str, Any]:
    folder = root / case.stored
    listed = [
        {"model": str(folder / f"expert{index}"), "parameters": given} for index, given in enumerate(case.per_model)
    ]
    if case.base_listed:
        listed = [{"model": str(folder / "base")}, *listed]
    recipe: dict[str, Any] = {"merge_method": case.method, **under(case.listed_in, listed), "dtype": "float32"}
    recipe |= case.top
    if case.method not in ("linear", "passthrough") or case.base_merged:
        recipe["base_model"] = str(folder / "base")
    if case.parameters:
        recipe["parameters"] = case.parameters
    return recipe


def under(key: str, listed: list[dict[str, Any]]) -> dict[str, Any]:
    """Models as a recipe lists them: by themselves, in a slice over all layers, or in one inside of a module."""
    if key == "models":
        return {key: listed}
    slices = [{"sources": [{**each, "layer_range": [0, LAYERS]} for each in listed]}]
    return {"slices": slices} if key == "slices" else {"modules": {"default": {"slices": slices}}}


def find_mergekit() -> Path | None:
    """The `mergekit-yaml` to run: TIES_DIST_MERGEKIT, else PATH, else the repository's own side environment."""
    candidates = [os.environ.get("TIES_DIST_MERGEKIT"), shutil.which("mergekit-yaml")]
    candidates.append(str(REPOSITORY / ".venv-mergekit" / "bin" / "mergekit-yaml"))
    return next((Path(found) for found in candidates if found and Path(found).is_file()), None)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every test needs: the models, each case's recipe file and mergekit's output for it."""

    root: Path
    recipes: dict[str, Path]
    outputs: dict[str, dict[str, Array]]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    executable = find_mergekit()
    if executable is None:
        pytest.skip(
            "mergekit is not installed: set TIES_DIST_MERGEKIT to a `mergekit-yaml`, or create one with "
            "`python -m venv .venv-mergekit && .venv-mergekit/bin/pip install mergekit==0.1.5`"
        )
    root = tmp_path_factory.mktemp("mergekit")
    for stored in ("float32", "bfloat16"):
        base, experts = make_models(stored)
        write_model(root / stored / "base", base, stored)
        for index, expert in enumerate(experts):
            write_model(root / stored / f"expert{index}", expert, stored)
    recipes, jobs = {}, []
    for number, (name, case) in enumerate(CASES.items()):
        recipes[name] = root / f"recipe{number}.yml"
        recipes[name].write_text(yaml.safe_dump(recipe_of(case, root)))
        jobs.append((str(recipes[name]), str(root / f"mergekit{number}")))

    # The interpreter beside the executable, where a virtual environment keeps it.
    python = executable.resolve().parent / "python"
    assert python.is_file(), f"{executable} has no `python` beside it"
    done = subprocess.run(
        [str(python), "-c", DRIVER], input=json.dumps(jobs), text=True, capture_output=True, env=os.environ | OFFLINE
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = {name: read_model(Path(out)) for name, (_, out) in zip(CASES, jobs, strict=True)}
    return Bench(root=root, recipes=recipes, outputs=outputs)


def read_model(folder: Path) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= {name: oracle.from_torch(tensor) for name, tensor in load_file(shard).items()}
    return tensors


def merge_with_oracle(case: Case) -> tuple[dict[str, Array], Allowance]:
    """The oracle's output and what may differ from it."""
    base, experts = make_models(case.stored)
    experts = [*experts[: case.experts], *([base] if case.base_merged else [])]
    if case.method == "linear":
        magnitude = {
            name: sum(
                abs(w) * np.abs(oracle.widen(e[name])) for w, e in zip(case.oracle["weights"], experts, strict=True)
            )
            for name in base
        }
        exact = all(weight == 1.0 for weight in case.oracle["weights"]) and case.experts < 5
        allowance = Allowance(magnitude=None if exact else magnitude, gain=case.gain)
        return oracle.linear(experts, out_dtype=case.out_dtype, **case.oracle), allowance
    if case.method in BY_SUMS:
        experts = experts[: case.experts]
        share = {name: sum(np.abs(oracle.widen(e[name])) for e in experts) / len(experts) for name in base}
        allowance = Allowance(magnitude={name: share[name] + np.abs(oracle.widen(base[name])) for name in base})
        if case.method == "slerp":
            return oracle.slerp(base, experts[0], out_dtype=case.out_dtype, **case.oracle), allowance
        return oracle.model_stock(base, experts, out_dtype=case.out_dtype), allowance
    if case.method == "nearswap":
        return oracle.nearswap(base, experts[0], out_dtype=case.out_dtype, **case.oracle), Allowance(gain=case.gain)
    if case.method == "passthrough":
        return oracle.passthrough(experts[0], out_dtype=case.out_dtype, **case.oracle), Allowance(gain=case.gain)
    if case.method in ("task_arithmetic", "dare_linear"):
        every_delta = oracle.ties(base, experts, density=1.0, weights=case.oracle["weights"]).statistics
        allowance = Allowance(magnitude=every_delta.magnitude if case.experts >= 5 else None, gain=case.gain)
        return oracle.task_arithmetic(base, experts, out_dtype=case.out_dtype, **case.oracle), allowance
    merged = oracle.ties(base, experts, semantics="mergekit", out_dtype=case.out_dtype, **case.oracle)
    return merged.tensors, ties_allowance(merged.statistics, case.gain)


def merge_with_engine(recipe: Path, out: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """`ties-dist merge RECIPE OUT --semantics mergekit --json` in this process; the merged tensors and the report."""
    cli = pytest.importorskip("ties_dist.cli.commands", exc_type=ImportError)
    stdout = io.StringIO()
    with redirect_stdout(stdout), pytest.raises(SystemExit, match=r"^0$"):
        cli.main(engine_arguments(recipe, out))
    return read_model(out), json.loads(stdout.getvalue())


def engine_arguments(recipe: Path, out: Path) -> list[str]:
    return ["merge", str(recipe), str(out), "--semantics", "mergekit", "--json"]


# --- the tests ---


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.oracle is not None])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_output_equals_mergekit_except_at_cut_ties_and_stacked_sums(
    subject: str, name: str, bench: Bench, tmp_path: Path
) -> None:
    case = CASES[name]
    ours, allowance = merge_with_oracle(case)
    if subject == "engine":
        ours, report = merge_with_engine(bench.recipes[name], tmp_path / "out")
        assert report["method"] == case.method
        assert report["semantics"] == "mergekit"
    comparison = compare(ours, bench.outputs[name], allowance)
    print(name, comparison.counts)

    assert comparison.unexplained == []
    if case.experts < 5 and case.stored == "float32" and case.method not in ("linear", *BY_SUMS):
        assert comparison.identical == comparison.elements
    assert comparison.tied <= 0.25 * comparison.elements
    assert comparison.rounded <= 0.5 * comparison.elements
    assert comparison.undecided <= 0.01 * comparison.elements


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_what_dare_leaves_has_the_norm_that_mergekit_gives_it(method: str, bench: Bench, tmp_path: Path) -> None:
    """The masks differ: what can be compared is the L1 norm of what one expert adds to each tensor."""
    name = f"{method} of one expert, half dropped"
    ours, _ = merge_with_engine(bench.recipes[name], tmp_path / "out")
    base, experts = make_models("float32")

    def norms(model: dict[str, Array]) -> list[float]:
        return [float(np.abs(model[n].astype(np.float64) - base[n]).sum()) for n in sorted(base)]

    assert norms(ours) == pytest.approx(norms(experts[0]), rel=1e-4)
    assert norms(bench.outputs[name]) == pytest.approx(norms(experts[0]), rel=1e-4)
    assert any((ours[n] != bench.outputs[name][n]).any() for n in base)


def test_the_cases_of_ties_and_cancellations_have_them() -> None:
    # Otherwise the comparison above would not show what either does.
    base, experts = make_models("bfloat16")
    cut = oracle.ties(base, experts[:3], semantics="mergekit", density=0.3, weights=(0.5, 1.0, 0.3)).statistics
    assert all(expert.ambiguous > 0 for expert in cut.experts)
    assert oracle.ties(base, experts[:2], semantics="mergekit", density=1.0).statistics.cancellations > 10


def test_mergekits_published_executable_writes_what_the_batch_wrote(bench: Bench, tmp_path: Path) -> None:
    # The batch calls the command's function; this is the command itself, once.
    executable, name = find_mergekit(), "two experts"
    assert executable is not None
    subprocess.run(
        [str(executable), "--no-copy-tokenizer", "--quiet", str(bench.recipes[name]), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        env=os.environ | OFFLINE,
    )
    assert oracle.same_bytes(read_model(tmp_path / "out"), bench.outputs[name]) == []


def test_python_dash_m_ties_dist_writes_what_mergekit_wrote(bench: Bench, tmp_path: Path) -> None:
    # The comparison above runs the command inside this process; this is the command itself, once.
    name = "three experts, a density and a weight each, base listed, int8_mask"
    arguments = engine_arguments(bench.recipes[name], tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "ties_dist", *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    report = json.loads(done.stdout)
    assert [expert["density"] for expert in report["experts"]] == [0.5, 0.2, 0.9]
    assert oracle.same_bytes(read_model(tmp_path / "out"), bench.outputs[name]) == []
