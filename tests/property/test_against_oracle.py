"""`merge_state_dicts` against the NumPy oracle: the same bytes, for every option, storage type and awkward size.

Hypothesis draws the structure (shapes, storage types, number of experts, options); the numbers come from a seeded
generator of one of four kinds, chosen for what breaks merges: grids on which magnitudes tie and sums cancel exactly,
plain normals, deltas that are mostly zero, and magnitudes from denormal to large. Models this small run eagerly; the
last test takes larger ones through the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import oracle
from tests.oracle import Array
from ties_dist.errors import NumericError

ties_dist = pytest.importorskip("ties_dist", exc_type=ImportError)

NAMES = ("layers.0.weight", "layers.1.weight", "layers.10.weight", "layers.2.weight", "Norm", "bias", "a.skip")
SHAPES = ((), (0,), (1,), (2,), (3, 0), (7,), (5, 3), (2, 3, 4), (33,))
STORED = ("float32", "float16", "bfloat16")
ROUNDS = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

Draw = Callable[[np.random.Generator, tuple[int, ...]], tuple[Array, Array]]


# --- numbers: (base, update) of a shape ---


def grid(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Multiples of 1/64 below 2, exact in every storage type: few magnitudes, exact cancellations."""
    return random.integers(-64, 65, shape) / 64, random.integers(-3, 4, shape) / 64


def normal(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    return random.standard_normal(shape) * 0.02, random.standard_normal(shape) * 1e-3


def sparse(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Four of five updates are zero, and bases are often a zero of either sign."""
    base = np.where(random.random(shape) < 0.5, random.choice([0.0, -0.0], shape), random.standard_normal(shape))
    return base, random.standard_normal(shape) * (random.random(shape) < 0.2)


def wild(random: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Exponents from below float32's denormals to 2^12 (float16 holds the models); zero bases keep tiny deltas tiny."""
    base = np.where(random.random(shape) < 0.5, 0.0, np.ldexp(random.standard_normal(shape), random.integers(-30, 13)))
    return base, np.ldexp(random.standard_normal(shape), random.integers(-152, 13, shape))


KINDS: tuple[Draw, ...] = (grid, grid, normal, sparse, wild)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A base and its experts; `spare` is one more model of the same shapes."""

    base: dict[str, Array]
    experts: list[dict[str, Array]]
    spare: dict[str, Array]

    def __repr__(self) -> str:
        tensors = {name: (array.shape, str(array.dtype)) for name, array in self.base.items()}
        return f"Drawn({len(self.experts)} experts of {tensors})"


@st.composite
def models(draw: st.DrawFn) -> Drawn:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    experts = draw(st.integers(1, 8))
    kind = draw(st.sampled_from(KINDS))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    one_type = draw(st.sampled_from((*STORED, None)))  # None: each tensor of each model its own
    shapes = {name: draw(st.sampled_from(SHAPES)) for name in names}

    def store(values: dict[str, Array]) -> dict[str, Array]:
        model = {}
        for name, array in values.items():
            stored = one_type or STORED[int(random.integers(len(STORED)))]
            single = np.asarray(array, dtype=np.float64).astype(np.float32).reshape(shapes[name])
            model[name] = oracle.narrow(single, oracle.DTYPES[stored])
        return model

    origin = {name: kind(random, shape)[0] for name, shape in shapes.items()}
    tuned = [
        {name: origin[name] + kind(random, shape)[1] for name, shape in shapes.items()} for _ in range(experts + 1)
    ]
    base, *others = [store(values) for values in [origin, *tuned]]
    if draw(st.booleans()):
        for model in (base, *others):
            model["position_ids"] = np.arange(5)
    return Drawn(base=base, experts=others[:-1], spare=others[-1])


# --- options ---

DENSITIES = st.one_of(st.sampled_from((0.2, 0.5, 1.0, 1e-6, 0.29)), st.floats(0.01, 1.0))
POSITIVE = st.one_of(st.sampled_from((1.0, 0.5, 2.0)), st.floats(0.05, 4.0))
SIGNED = st.one_of(POSITIVE, POSITIVE.map(lambda weight: -weight), st.sampled_from((1.0, -1.0, 0.0)))
LAMBDAS = st.one_of(st.sampled_from((1.0, 0.4, 1.7)), st.floats(0.05, 3.0))


@st.composite
def ties_options(draw: st.DrawFn) -> dict[str, Any]:
    """Keyword arguments both sides understand; an option that is not drawn is the preset's."""
    choices: dict[str, Any] = {
        "trim_scope": ("model", "tensor"),
        "tie_policy": ("keep_all", "exact_k"),
        "density_of": ("all", "moved"),
        "elect": ("mass", "count", "none"),
        "zero_sign": ("majority", "positive", "drop"),
        "weight_before_elect": (True, False),
        "aggregate": ("mean", "sum", "max", "average"),
    }
    given_names = draw(st.sets(st.sampled_from(sorted(choices))))
    options = {name: draw(st.sampled_from(choices[name])) for name in sorted(given_names)}
    return {"semantics": draw(st.sampled_from(("paper", "mergekit", "peft")))} | options


def draw_weights(data: st.DataObject, experts: int, *, signed: bool) -> list[float]:
    """One weight per expert: any sign, or positive with a zero among them."""
    weights = data.draw(st.lists(SIGNED if signed else POSITIVE, min_size=experts, max_size=experts), label="weights")
    if not signed and experts > 1 and data.draw(st.booleans(), label="one weight is zero"):
        weights[0] = 0.0
    return weights


# --- the comparison ---


def tensors(model: dict[str, Array]) -> dict[str, Any]:
    return {name: oracle.to_torch(array) for name, array in model.items()}


def assert_same_bytes(expected: dict[str, Array], merge: Callable[[], dict[str, Any]]) -> None:
    """The engine gives the oracle's bytes, or refuses where the oracle's values overflow the output type."""
    finite = all(np.isfinite(oracle.widen(array)).all() for array in expected.values() if oracle.is_float(array))
    if not finite:
        with pytest.raises(NumericError, match="out_dtype"):
            merge()
        return
    merged = {name: oracle.from_torch(tensor) for name, tensor in merge().items()}
    for name in oracle.same_bytes(merged, expected):
        pytest.fail(f"{name}: merged {merged.get(name)!r}, expected {expected.get(name)!r}")


@ROUNDS
@given(drawn=models(), options=ties_options(), data=st.data())
def test_ties_gives_the_oracles_bytes(drawn: Drawn, options: dict[str, Any], data: st.DataObject) -> None:
    experts = len(drawn.experts)
    densities = data.draw(st.lists(DENSITIES, min_size=experts, max_size=experts), label="densities")
    weights = draw_weights(data, experts, signed=options["semantics"] == "mergekit")
    lam = data.draw(LAMBDAS, label="lambda")
    out_dtype = data.draw(st.sampled_from((None, *STORED)), label="out_dtype")
    patterns = st.sampled_from([name[:5] + "*" for name in drawn.base])  # an error if a pattern matches no tensor
    exclude = data.draw(st.one_of(st.just([]), st.lists(patterns, max_size=2)), label="exclude")
    chosen = data.draw(st.sampled_from((None, None, None, drawn.spare)), label="elect_from")

    expected = oracle.ties(
        drawn.base,
        drawn.experts,
        density=densities,
        weights=weights,
        lam=lam,
        elect_from=chosen,
        exclude=exclude,
        out_dtype=out_dtype,
        **options,
    )
    more = {} if chosen is None else {"elect_from": tensors(chosen)}
    assert_same_bytes(
        expected.tensors,
        lambda: ties_dist.merge_state_dicts(
            tensors(drawn.base),
            [tensors(expert) for expert in drawn.experts],
            method="ties",
            out_dtype=out_dtype,
            parameters={"lambda": lam},
            expert_parameters=[
                {"density": density, "weight": weight} for density, weight in zip(densities, weights, strict=True)
            ],
            exclude=exclude,
            **options,
            **more,
        ),
    )


@settings(ROUNDS, max_examples=80)
@given(drawn=models(), data=st.data())
def test_task_arithmetic_gives_the_oracles_bytes(drawn: Drawn, data: st.DataObject) -> None:
    weights = draw_weights(data, len(drawn.experts), signed=True)
    lam = data.draw(LAMBDAS, label="lambda")
    out_dtype = data.draw(st.sampled_from((None, *STORED)), label="out_dtype")
    assert_same_bytes(
        oracle.task_arithmetic(drawn.base, drawn.experts, weights=weights, lam=lam, out_dtype=out_dtype),
        lambda: ties_dist.merge_state_dicts(
            tensors(drawn.base),
            [tensors(expert) for expert in drawn.experts],
            method="task_arithmetic",
            out_dtype=out_dtype,
            parameters={"lambda": lam},
            expert_parameters=[{"weight": weight} for weight in weights],
        ),
    )


@settings(ROUNDS, max_examples=80)
@given(drawn=models(), data=st.data())
def test_linear_gives_the_oracles_bytes(drawn: Drawn, data: st.DataObject) -> None:
    # The base is a model like the others where its values are wanted; here it supplies dtypes and what is not merged.
    weights = draw_weights(data, len(drawn.experts), signed=False)
    out_dtype = data.draw(st.sampled_from((None, *STORED)), label="out_dtype")
    first, *others = drawn.experts
    assert_same_bytes(
        oracle.linear([first, *others], weights=weights, out_dtype=out_dtype),
        lambda: ties_dist.merge_state_dicts(
            tensors(first),
            [tensors(expert) for expert in drawn.experts],
            method="linear",
            out_dtype=out_dtype,
            expert_parameters=[{"weight": weight} for weight in weights],
        ),
    )


COMPILED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "paper, float32": (3, "float32", {"semantics": "paper"}),
    "paper, bfloat16, exact_k, count, max": (
        4,
        "bfloat16",
        {"semantics": "paper", "tie_policy": "exact_k", "elect": "count", "aggregate": "max", "zero_sign": "drop"},
    ),
    "mergekit, bfloat16": (5, "bfloat16", {"semantics": "mergekit"}),
    "peft, float16": (8, "float16", {"semantics": "peft"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [grid, normal, wild], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_give_the_oracles_bytes(name: str, kind: Draw) -> None:
    # Products and sums that a contracted (fused) instruction would round otherwise, on slices that end inside a vector.
    experts, stored, options = COMPILED[name]
    random = np.random.default_rng(experts)
    shapes = {"a": (131, 67), "b": (1,), "c": (2,), "d": (40_001,), "e": (0,)}
    origin = {name: kind(random, shape)[0] for name, shape in shapes.items()}
    models = [
        {name: origin[name] + update * kind(random, shape)[1] for name, shape in shapes.items()}
        for update in [0, *[1] * experts]
    ]
    dtype = oracle.DTYPES[stored]
    base, *tuned = [{n: oracle.narrow(np.float32(v), dtype) for n, v in model.items()} for model in models]
    weights = [round(0.3 + 0.17 * index, 2) for index in range(experts)]
    expected = oracle.ties(base, tuned, density=0.3, weights=weights, lam=0.7, out_dtype="float32", **options)
    assert_same_bytes(
        expected.tensors,
        lambda: ties_dist.merge_state_dicts(
            tensors(base),
            [tensors(expert) for expert in tuned],
            kernel="compiled",
            out_dtype="float32",
            parameters={"lambda": 0.7, "density": 0.3},
            expert_parameters=[{"weight": weight} for weight in weights],
            **options,
        ),
    )
