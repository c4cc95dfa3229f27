"""Which saved models the families are: six in `saved`, as `save.py` wrote them, or all, made by `make families`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.families.save import FAMILIES

PINNED = Path(__file__).parent / "saved"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--families", type=Path, default=None, help="folder with 4/ and 5/ of `tests.families.save`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "saved" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--families", default=None) or PINNED
        found = [folder / version / family for family in FAMILIES for version in ("4", "5")]
        there = [path for path in found if path.is_dir()]
        metafunc.parametrize("saved", there, ids=[f"{path.name}-{path.parent.name}" for path in there])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """transformers warns of what it would like to have, and draws bars."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="pip install 'ties-dist[test]'")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        yield
