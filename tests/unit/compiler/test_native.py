"""What loops are compiled for, against numba's own reading of the same variables."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
from numba.core import codegen, config

from ties_dist.compiler.native import Processor, processor, runs_here

AVX2 = "+avx2,+f16c,-avx512f"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"):
        monkeypatch.delenv(name, raising=False)
    processor.cache_clear()
    yield
    monkeypatch.undo()
    processor.cache_clear()
    config.reload_config()


def named(monkeypatch: pytest.MonkeyPatch, name: str | None, features: str | None) -> Processor:
    for variable, value in (("NUMBA_CPU_NAME", name), ("NUMBA_CPU_FEATURES", features)):
        if value is not None:
            monkeypatch.setenv(variable, value)
    config.reload_config()
    return processor()


@pytest.mark.parametrize(
    ("name", "features"),
    [(None, None), ("x86-64-v2", None), ("x86-64-v2", ""), ("generic", None), ("Generic", "+avx2"), (None, AVX2)],
)
def test_it_is_what_numba_compiles_for(name: str | None, features: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found, numba = named(monkeypatch, name, features), codegen.JITCPUCodegen
    assert found == (numba._get_host_cpu_name(None), numba._get_host_cpu_features(None))


@pytest.mark.parametrize(
    ("name", "features", "lanes", "half"),
    [
        ("x86-64-v2", "", 4, False),
        ("x86-64-v3", "", 8, True),
        ("x86-64-v4", "", 16, True),
        ("x86-64-v4", "-avx512f", 8, True),
        ("x86-64-v2", AVX2, 8, True),
        ("generic", None, 4, False),
    ],
)
def test_lanes_follow_from_the_features_and_from_the_names_of_levels(
    name: str, features: str | None, lanes: int, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = named(monkeypatch, name, features)
    assert str(found) == f"{name}, {lanes} float32 at once"
    assert runs_here(["float32", "bfloat16"])
    assert runs_here(["float16"]) is half or platform.machine() != "x86_64"
