"""Models of the hub: a plan asks for headers and a few pages, a merge downloads, and both come to the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import random_models, write_checkpoint
from tests.hub import Hub, serve
from tests.integration.command import Outcome, finish, start

SHAPES = {f"layers.{i}.weight": (512, 1024) for i in range(6)}
"""12 MiB a model."""
PAGES = 16 * 4096
HEAD = 100_000

pytestmark = pytest.mark.slow


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    models = random_models(SHAPES, experts=2)
    for name, model in zip(("base", "math", "code"), models, strict=True):
        model["position_ids"] = torch.arange(9)
        write_checkpoint(tmp_path / "hub" / "org" / name, model, shards=2, config={"model_type": "llama"})
    with serve(tmp_path / "hub") as served:
        yield served


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_text(
        "{merge_method: ties, base_model: org/base, parameters: {density: 0.2}, "
        f"models: [{{model: org/math}}, {{model: org/code@{'c' * 40}}}]}}"
    )
    return path


def call(hub: Hub, tmp_path: Path, *arguments: object, code: str = "") -> Outcome:
    (tmp_path / "tmp").mkdir(exist_ok=True)
    env = os.environ | hub.env(tmp_path / "home") | {"TMPDIR": str(tmp_path / "tmp")}
    env.pop("HF_HUB_OFFLINE", None)
    return finish(start(*arguments, code=code, env=env))


def test_a_plan_downloads_no_weights_and_comes_to_the_merges_fingerprint(
    hub: Hub, recipe: Path, tmp_path: Path
) -> None:
    planned = call(hub, tmp_path, "plan", recipe, tmp_path / "out", "--json")
    assert planned.status == 0, planned.err
    weights = sum(p.stat().st_size for p in hub.root.rglob("*.safetensors"))
    assert hub.weights_sent() <= 6 * (HEAD + PAGES + 3 * 72)  # files; and position ids, which must be equal
    assert planned.document["download_bytes"] == weights
    beside = sum(planned.document["companions"].values())
    assert planned.document["disk_needed_bytes"] == planned.document["write_bytes"] + weights + beside
    assert list((tmp_path / "home").rglob("*.safetensors")) == []
    assert list((tmp_path / "tmp").iterdir()) == []
    assert hub.tokens_elsewhere == 0

    merged = call(hub, tmp_path, "merge", recipe, tmp_path / "out", "--json")
    assert merged.status == 0, merged.err
    assert merged.document["fingerprint"] == planned.document["fingerprint"]
    assert merged.document["bytes_written"] == planned.document["write_bytes"]

    hub.sent.clear()
    again = call(hub, tmp_path, "plan", recipe, tmp_path / "out", "--json").document
    assert (again["out_holds"], again["download_bytes"], hub.weights_sent()) == ("this merge, finished", 0, 0)


def test_a_plan_knows_its_merge_before_the_models_are_here_again(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    assert call(hub, tmp_path, "merge", recipe, tmp_path / "out").status == 0
    (tmp_path / "home").rename(tmp_path / "old-home")
    planned = call(hub, tmp_path, "plan", recipe, tmp_path / "out", "--json")
    assert planned.status == 0, planned.err
    assert planned.document["out_holds"] == "this merge, finished"


def test_what_does_not_fit_together_is_found_without_a_download(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    other = random_models({**SHAPES, "layers.0.weight": (512, 512)}, experts=0)[0]
    write_checkpoint(hub.root / "org" / "math", other, shards=2)
    refused = call(hub, tmp_path, "plan", recipe, tmp_path / "out")
    assert refused.status == 2
    assert "layers.0.weight" in refused.err and "(512, 512)" in refused.err
    assert hub.weights_sent() <= 6 * (HEAD + PAGES + 3 * 72)


NO_ROOM = """
import shutil
from collections import namedtuple
usage = namedtuple("usage", "total used free")
shutil.disk_usage = lambda _: usage(1 << 40, 0, {free})
"""


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_a_full_disk_of_the_hubs_cache_is_refused_before_anything_is_downloaded(
    command: str, hub: Hub, recipe: Path, tmp_path: Path
) -> None:
    refused = call(hub, tmp_path, command, recipe, tmp_path / "out", code=NO_ROOM.format(free=5 << 20))
    assert refused.status == 2
    assert "PlanError: the disk of the hub's cache" in refused.err and "are to be downloaded" in refused.err
    assert list((tmp_path / "home").rglob("*.safetensors")) == []


def test_a_disk_with_room_for_the_downloads_alone_is_refused(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    weights = sum(p.stat().st_size for p in hub.root.rglob("*.safetensors"))
    refused = call(hub, tmp_path, "plan", recipe, tmp_path / "out", code=NO_ROOM.format(free=weights + (70 << 20)))
    assert refused.status == 2
    assert "inputs that are to be downloaded there" in refused.err


def test_a_hub_that_gives_no_ranges_is_said_and_nothing_is_taken(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    hub.ranges = False
    refused = call(hub, tmp_path, "plan", recipe)
    assert refused.status == 2
    assert "the hub does not give bytes 0 to" in refused.err and "Traceback" not in refused.err


def test_a_sample_of_what_is_not_here_is_refused(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    refused = call(hub, tmp_path, "plan", recipe, "--sample")
    assert (refused.status, "a sample needs weights" in refused.err) == (2, True)


def test_a_model_that_the_hub_does_not_have_is_said(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("org/math", "org/nowhere"))
    refused = call(hub, tmp_path, "plan", recipe)
    assert (refused.status, "could 'org/nowhere' be fetched" in refused.err) == (2, True)
    assert "RepositoryNotFoundError" in refused.err


def test_names_that_leave_the_folder_are_not_taken(hub: Hub, recipe: Path, tmp_path: Path) -> None:
    import tests.hub as fake

    listed = fake.listing

    def evil(folder: Path, name: str) -> dict[str, object]:
        found = listed(folder, name)
        siblings = found["siblings"]
        assert isinstance(siblings, list)
        return {**found, "siblings": [*siblings, {"rfilename": "../../evil.json", "size": 2, "blobId": "e" * 40}]}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fake, "listing", evil)
        assert call(hub, tmp_path, "plan", recipe).status == 0
    assert list(tmp_path.rglob("evil.json")) == []
