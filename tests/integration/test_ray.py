"""Merges on a real Ray cluster of several nodes on this machine: the same bytes, whoever dies on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster
from ray.exceptions import RayTaskError

import ties_dist
from tests.conftest import random_models, write_job
from tests.integration.command import finish, start
from tests.integration.test_statistics_methods import write_recipe
from ties_dist.errors import ClusterError, PlanError
from ties_dist.executors import ray as ray_executor
from ties_dist.planning.options import Cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own files, when a node is removed
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
UNIT = 1 << 20
STORE = 80 << 20
QUICK_TO_NOTICE = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayCluster]:
    """A head that does no work, and three nodes that do."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    cluster = RayCluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "object_store_memory": STORE,
            "include_dashboard": False,
            "_system_config": QUICK_TO_NOTICE,
        },
    )
    for _ in range(3):
        add_node(cluster)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def add_node(cluster: RayCluster) -> Any:
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE)
    cluster.wait_for_nodes()
    return node


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = {f"layers.{i}.weight": (1024, 1024) for i in range(24)}
    models = random_models(shapes, experts=2, dtype=torch.bfloat16)
    parameters = {"density": 0.2, "weight": 1.0}
    return write_job(tmp_path_factory.mktemp("ray"), models, shards=3, parameters=parameters)


@pytest.fixture(scope="module")
def expected(recipe: Path) -> str:
    return ties_dist.merge(recipe, recipe.parent / "local", cache_dir=recipe.parent / "cache").output_digest


@pytest.fixture
def merge(recipe: Path, tmp_path: Path) -> Callable[..., ties_dist.MergeReport]:
    def merge(**options: Any) -> ties_dist.MergeReport:
        return ties_dist.merge(
            recipe,
            tmp_path / "out",
            executor="ray",
            unit_size=UNIT,
            cache_dir=tmp_path / "cache",
            **{"threads": 1, "cluster": Cluster(workers=2), **options},
        )

    return merge


@pytest.mark.parametrize("threshold_pass", ["scan", "speculate"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_digest_is_the_local_executors(
    workers: int, threshold_pass: Any, nodes: RayCluster, merge: Callable[..., ties_dist.MergeReport], expected: str
) -> None:
    report = merge(cluster=Cluster(workers=workers), threshold_pass=threshold_pass)
    assert report.output_digest == expected
    assert report.executor == "ray"
    assert report.bytes_read > 2 * 24 * 1024 * 1024 * 2  # by the workers


@pytest.mark.parametrize("semantics", ["mergekit"])
def test_thresholds_of_single_tensors_are_selected_by_the_workers(
    semantics: str, nodes: RayCluster, merge: Callable[..., ties_dist.MergeReport], recipe: Path, tmp_path: Path
) -> None:
    local = ties_dist.merge(recipe, tmp_path / "local", semantics=semantics, cache_dir=tmp_path / "cache")
    assert merge(semantics=semantics).output_digest == local.output_digest


def test_sums_are_taken_by_the_workers(nodes: RayCluster, tmp_path: Path) -> None:
    models = random_models({"a.weight": (1200, 901), "b.weight": (700,)}, experts=2, dtype=torch.bfloat16)
    recipe = write_job(tmp_path, models, method="model_stock")
    local = ties_dist.merge(recipe, tmp_path / "local")
    away = ties_dist.merge(recipe, tmp_path / "out", executor="ray", threads=1, cluster=Cluster(workers=2))
    assert away.output_digest == local.output_digest
    assert away.bytes_read == local.bytes_read


def test_matrices_are_merged_by_the_workers(nodes: RayCluster, tmp_path: Path) -> None:
    shapes = {f"layers.{i}.weight": (300, 200) for i in range(6)} | {"norm.weight": (200,)}
    draw = np.random.default_rng(0)
    inputs = [draw.normal(size=(500, 200)).astype(np.float32) for _ in range(2)]
    stores = [{name: x.T @ x for name in shapes if name != "norm.weight"} for x in inputs]
    recipe = write_recipe(tmp_path, "regmean", random_models(shapes, experts=2)[1:], stores)
    local = ties_dist.merge(recipe, tmp_path / "local", cache_dir=tmp_path / "cache")
    away = ties_dist.merge(
        recipe, tmp_path / "out", executor="ray", threads=1, cluster=Cluster(workers=2), cache_dir=tmp_path / "cache"
    )
    assert away.output_digest == local.output_digest
    assert away.bytes_read >= 2 * 6 * 4 * (300 * 200 + 200 * 200)  # by the workers


class Slow(ray_executor.Worker):
    """Takes its time, one order after another, so that a test can strike while it works."""

    turn = None

    def perform(self, order: Any) -> Any:
        if self.turn is None:
            self.turn = threading.Lock()  # cannot travel
        with self.turn:
            time.sleep(0.5)
        return super().perform(order)


ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor, "Worker", Slow)
    monkeypatch.setattr("ties_dist.executors.fleet.ORDER_SECONDS", {"merge": 0.0, "fold": 0.0, "call": 0.0})
    monkeypatch.setattr("ties_dist.executors.fleet.MESSAGE_SECONDS", 0.0)
    monkeypatch.setattr("ties_dist.executors.fleet.FIRST_BYTES", 0)


@dataclass
class Strike:
    """A progress that does things once so many units are merged."""

    actions: Mapping[int, Callable[[], object]]
    phase: str = ""
    merged: int = 0

    def begin(self, phase: str, total_bytes: int) -> None:
        self.phase = phase

    def advance(self, done_bytes: int) -> None:
        self.merged += self.phase == "merge"
        self.actions.get(self.merged, lambda: None)()

    def end(self) -> None: ...


def test_a_killed_worker_is_replaced(
    nodes: RayCluster, slowly: None, merge: Callable[..., ties_dist.MergeReport], expected: str, caplog: Any
) -> None:
    caplog.set_level("INFO")

    report = merge(progress=Strike({5: lambda: os.kill(processes_of("Slow")[0], signal.SIGKILL)}))
    assert report.output_digest == expected
    assert "was lost" in caplog.text


def processes_of(actor: str) -> list[int]:
    """Ray names its processes after the actors they run."""
    return [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if p.info["cmdline"] and p.info["cmdline"][0].startswith(f"ray::{actor}")
    ]


def test_a_killed_node_is_survived_and_a_new_one_is_used(
    nodes: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
    slowly: None,
    merge: Callable[..., ties_dist.MergeReport],
    expected: str,
    caplog: Any,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(ray_executor, "LOOK_SECONDS", 0.2)
    doomed = add_node(nodes)

    def die() -> None:
        """As a machine does: everything at once, without a word."""
        raylet = psutil.Process(doomed.all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)):
            process.kill()
        nodes.worker_nodes.discard(doomed)  # nobody waits for it any more

    report = merge(cluster=Cluster(), progress=Strike({2: lambda: add_node(nodes), 5: die}))
    assert report.output_digest == expected
    assert "was lost" in caplog.text
    assert caplog.text.count("is ready on node") >= 4


def test_ray_client_addresses_are_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"ties-dist submit RECIPE OUT --address http://HEAD:8265"):
        ties_dist.merge(recipe, tmp_path / "out", executor="ray", cluster=Cluster(address="ray://head:10001"))


def test_more_than_the_cluster_has_is_waited_for_and_then_told(
    nodes: RayCluster, merge: Callable[..., ties_dist.MergeReport]
) -> None:
    with pytest.raises(ClusterError, match=r"no worker was ready within 2 s: a worker needs 64 CPUs.*nodes that are"):
        merge(threads=64, cluster=Cluster(workers=1, start_seconds=2.0))


def test_a_workers_error_is_told_without_its_traceback() -> None:
    error = RayTaskError("perform", "Traceback (most recent call last):\n  File ...", OSError("no way"))
    assert ray_executor._reason(error) == "OSError: no way"


@pytest.mark.parametrize(
    "asked", [{"resources": {"x": -1.0}}, {"resources": {"x": float("inf")}}, {"labels": {"zone": "a/b"}}]
)
def test_what_ray_cannot_place_is_a_mistake(
    asked: dict[str, Any], nodes: RayCluster, merge: Callable[..., ties_dist.MergeReport]
) -> None:
    with pytest.raises(PlanError, match=r"Ray has no such workers \(--worker-resource, --node-label\): "):
        merge(cluster=Cluster(workers=1, **asked))


def test_a_node_whose_gpu_cannot_be_used_is_told_with_the_reason(
    nodes: RayCluster, merge: Callable[..., ties_dist.MergeReport]
) -> None:
    """It was asked again and again, and in the end said to have no room."""
    node = nodes.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE)  # so it says
    nodes.wait_for_nodes()
    try:
        with pytest.raises(PlanError, match=r"(?s)some nodes cannot do this merge:\n  node .*: --device cuda"):
            merge(device="cuda", cluster=Cluster(workers=1, start_seconds=60.0))
    finally:
        nodes.remove_node(node)


def command(recipe: Path, out: Path, address: str, *more: str) -> list[str]:
    options = ["--executor", "ray", "--address", address, "--threads", "1", "--unit-size", "1MiB", *more]
    return [sys.executable, "-m", "ties_dist", "merge", str(recipe), str(out), *options]


def test_a_terminated_driver_exits_75_within_three_seconds_and_is_resumed(
    nodes: RayCluster, recipe: Path, tmp_path: Path, expected: str
) -> None:
    environment = {**os.environ, "TIES_DIST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = command(recipe, tmp_path / "out", nodes.address, "--threshold-pass", "scan", "--workers", "1")
    driver = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)
    assert driver.stderr is not None
    for line in driver.stderr:
        if "is ready on node" in line:
            break
    time.sleep(0.2)
    driver.send_signal(signal.SIGTERM)
    began = time.monotonic()
    status = driver.wait(20)
    assert time.monotonic() - began < 3.0
    assert status == 75, driver.stderr.read()
    again = subprocess.run([*arguments, "--json"], env=environment, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert ties_dist.MergeReport.from_json(again.stdout).output_digest == expected


STUMBLING = """
from ties_dist.executors import ray as away

class Stumbling(away.Worker):
    def _open(self):
        super()._open()
        self.step.compute = self.stumble

    def stumble(self, task, loaded):
        return {}["no such number"]

away.Worker = Stumbling
"""


def test_a_bug_in_a_worker_ends_with_status_1_its_traceback_and_where_it_was(
    nodes: RayCluster, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told to give a smaller memory budget, and of the traceback nothing."""
    monkeypatch.setenv("TIES_DIST_CACHE", str(tmp_path / "cache"))
    told = finish(start(*command(recipe, tmp_path / "out", nodes.address, "--workers", "2")[3:], code=STUMBLING))
    assert told.status == 1, told.err
    assert told.err.count("Traceback") == told.err.count("in stumble") == 1
    last = told.err.splitlines()[-1]
    assert re.match(r"BugError: KeyError: 'no such number', at model-\S+, bytes [\d,]+ to [\d,]+ on node \S+\. ", last)
    assert "--memory-budget" not in told.err


def test_a_connection_is_ended_by_who_made_it(
    nodes: RayCluster, merge: Callable[..., ties_dist.MergeReport], expected: str
) -> None:
    """A process that merges on one cluster and then on another must not stay on the first."""
    assert merge().output_digest == expected
    assert ray.is_initialized()  # by the fixture
    ray.shutdown()
    try:
        merge(cluster=Cluster(address=nodes.address, workers=1))
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
