"""A merge as a job of a real head with its dashboard: it finishes, fails as failing, and resumes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster as RayCluster

import ties_dist
from tests.conftest import random_models, write_job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def free_ports(count: int) -> list[int]:
    """Ray's own are fixed: another cluster on this machine would have them."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a dashboard; its jobs find `ties-dist` where this Python's is."""
    port, agent_port = free_ports(2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patched.setenv("PYTHONPATH", str(Path(ties_dist.__file__).parents[1]))
        patched.setenv("TIES_DIST_CACHE", str(tmp_path_factory.mktemp("cache")))
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": True, "dashboard_port": port,
                "dashboard_agent_listen_port": agent_port,
            },
        )  # fmt: skip
        yield f"http://127.0.0.1:{port}"
        cluster.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shared")
    write_job(root, random_models({f"{i}.weight": (512, 512) for i in range(8)}, experts=2, dtype=torch.bfloat16))
    return root


def submit(head: str, root: Path, out: str, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["submit", "recipe.yml", out, "--address", head, "--root", str(root), *more]
    return subprocess.run(
        [sys.executable, "-m", "ties_dist", *arguments, "--threads", "1"], capture_output=True, text=True, timeout=150
    )


def test_a_job_finishes_with_the_local_digest_and_the_same_again_is_already_done(head: str, root: Path) -> None:
    expected = ties_dist.merge(root / "recipe.yml", root / "local", cache_dir=root / "cache").output_digest
    done = submit(head, root, "out", "--wait")
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert ties_dist.plan(root / "recipe.yml", root / "out").fingerprint
    again = submit(head, root, "out", "--wait")
    assert again.returncode == 0, again.stderr
    assert "already done" in again.stdout
    assert "-2" in again.stderr


def test_a_job_that_fails_is_told_as_failing_and_submitted_again_it_resumes(head: str, root: Path) -> None:
    moved = root / "expert-1.moved"
    (root / "expert-1").rename(moved)
    failed = submit(head, root, "out2", "--wait")
    assert failed.returncode == 2, failed.stderr
    assert "RecipeError: 1 problem in recipe" in failed.stdout
    moved.rename(root / "expert-1")
    done = submit(head, root, "out2", "--wait")
    assert done.returncode == 0, done.stdout
    assert "-2" in done.stderr


def test_a_misspelt_option_never_reaches_the_cluster(head: str, root: Path) -> None:
    refused = submit(head, root, "out3", "--treads", "2")
    assert refused.returncode == 2
    assert "--treads" in refused.stderr
    assert "submitted" not in refused.stderr


def test_a_head_that_is_not_there_is_told(root: Path) -> None:
    told = submit("http://127.0.0.1:9", root, "out4")
    assert told.returncode == 75
    assert "no Ray cluster answers at http://127.0.0.1:9" in told.stderr
