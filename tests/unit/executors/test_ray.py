"""What is said of a cluster that cannot be used, and how workers are sized: without any."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ties_dist.cache import cache_folder
from ties_dist.errors import ClusterError, PlanError, StoppedError
from ties_dist.executors.ray import RayFleet, connect, job_client
from ties_dist.planning.options import Cluster


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:8265", "127.0.0.1:port"])
def test_what_is_no_address_is_a_mistake(address: str) -> None:
    """Not something that another attempt may find mended."""
    with pytest.raises(PlanError, match=rf"--address {address} is not HOST:PORT, local or auto: "):
        connect(Cluster(address=address), threads=1)


def test_ray_client_is_refused_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(PlanError, match="ray://head:10001: a merge is not driven through Ray Client"):
        connect(Cluster(), threads=1)


def test_a_port_at_which_nobody_listens_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        began = time.monotonic()
        with pytest.raises(ClusterError, match=r"no Ray cluster answers at 127\.0\.0\.1:"):
            connect(Cluster(address=f"127.0.0.1:{taken.getsockname()[1]}"), threads=1)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:8265", "ray://127.0.0.1:10001", "auto"])
def test_jobs_are_sent_to_a_dashboard(address: str) -> None:
    with pytest.raises(PlanError, match=r"give its http://HEAD:8265"):
        job_client(address)


def test_without_ray_it_is_said_how_to_install_it() -> None:
    code = "import sys; sys.modules['ray'] = None; from ties_dist.cli.commands import main; main()"
    arguments = ["merge", "recipe.yml", "out", "--executor", "ray"]
    told = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert told.returncode == 2
    assert "pip install 'ties-dist[cluster]'" in told.stderr
    assert "Traceback" not in told.stderr


@pytest.mark.parametrize(
    ("workers", "cpus", "threads"),
    [(None, [16, 4], 4), (2, [2], 1), (2, [16], 8), (3, [16], 5), (3, [8, 8], 4), (50, [4, 4], 4)],
)
def test_as_many_workers_as_are_asked_for_find_room(workers: int | None, cpus: list[int], threads: int) -> None:
    fleet = RayFleet.__new__(RayFleet)
    fleet.cluster = Cluster(workers=workers)
    fleet._nodes = [{"Resources": {"CPU": float(count)}} for count in cpus]
    assert fleet._usual_threads() == threads


def test_workers_keep_kernels_where_the_driver_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They start in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    assert cache_folder(Path("cache")) == tmp_path / "cache"
    monkeypatch.setenv("TIES_DIST_CACHE", "kept")
    assert cache_folder(None) == tmp_path / "kept"


def test_a_signal_while_ray_starts_stops_resumably(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes SIGTERM as soon as it starts, and exits with its number: 15, which no scheduler takes for a resume."""
    before = signal.getsignal(signal.SIGTERM)

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(StoppedError, match="Run the same command again"):
        connect(Cluster(address="local"), threads=1)
    assert signal.getsignal(signal.SIGTERM) is before
