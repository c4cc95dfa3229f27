"""The fleet of a Ray cluster: actors that hold a merge's inputs open, placed by Ray. Nothing else imports ray.

Ray gives processes, placement and messages; retries are the driver's (`fleet`), since Ray's own burn on transient
errors. No tensor travels: orders name units, answers are counts, and the object store stays small.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

from ties_dist.errors import ClusterError, PlanError, StoppedError, TiesDistError
from ties_dist.executors.faults import as_told

try:
    import ray
except ImportError as error:
    raise PlanError(f"Ray cannot be used here ({error}): pip install 'ties-dist[cluster]'.") from error
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from ray.util import metrics

from ties_dist.compiler.cuda import slots_of_each
from ties_dist.executors.base import Workplace
from ties_dist.executors.fleet import ORDERS_AT_ONCE
from ties_dist.executors.local import LocalExecutor
from ties_dist.executors.orders import Answer, Answered, AnyBench, Event, Joined, Lost, Order, perform
from ties_dist.messages import readable
from ties_dist.planning.options import Cluster
from ties_dist.values.machine import Machine

logger = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 << 20
"""Of a cluster that we start: only counts go through it; memory is worth more as page cache."""
PENDING_SECONDS = 300.0
"""How long a worker may wait for a place while others work."""
LOOK_SECONDS = 5.0
"""Between looks at the cluster's nodes."""
MOST_THREADS = 8
"""Of one worker, where not told: more do not make one process faster, and small ones find a place more easily."""
LONGEST_PAUSE = 30.0
"""Seconds between attempts to start workers that die before they are ready."""
REACH_SECONDS = 10.0
"""How long the head of a cluster is waited for to take a connection."""
NODE_LABEL = "ray.io/node-id"


class Worker:
    """What runs in an actor: one process with a job's inputs open, several orders at once."""

    def __init__(self, workplace: Workplace[AnyBench], gpu: bool) -> None:
        self.workplace = workplace
        self.gpu = gpu
        self.given_up = 0

    def ready(self) -> tuple[str, Machine]:
        """The node's id, and what was found there."""
        found = self.workplace.inspect(gpus=1 if self.gpu else 0)
        if not found.problems:
            try:
                self._open()
            except (TiesDistError, OSError) as error:
                found = replace(found, problems=(str(error),))
        return ray.get_runtime_context().get_node_id(), replace(found, text=f"process {os.getpid()}, {found.text}")

    def _open(self) -> None:
        gpus = None
        if self.gpu:
            from ties_dist.compiler import cuda

            gpus = cuda.Gpus(cuda.load_driver(), self.workplace.threads)
        self.step = self.workplace.open(gpus)
        self.local = LocalExecutor(self.workplace.threads, computing=len(gpus.slots) if gpus is not None else None)
        threading.Thread(target=self.step.warm_up, name="compile", daemon=True).start()

    def perform(self, order: Order) -> Answer:
        return perform(order, self.step, self.local.beside(GivenUp(self, order.number)))

    def give_up(self, number: int) -> None:
        """Begin nothing of the orders up to this one."""
        self.given_up = max(self.given_up, number)


def connect(cluster: Cluster, threads: int | None) -> bool:
    """Join a cluster or start one on this machine; returns whether the connection is ours to end.

    Raises PlanError, ClusterError.
    """
    address = cluster.address if cluster.address != "auto" else os.environ.get("RAY_ADDRESS") or "auto"
    if address.startswith("ray://"):
        raise PlanError(
            f"--address {address}: a merge is not driven through Ray Client, since it must outlive the "
            "connection. Send it to the cluster: `ties-dist submit RECIPE OUT --address http://HEAD:8265`."
        )
    if ray.is_initialized():
        logger.info("ray: this process is connected to %s", ray.get_runtime_context().gcs_address)
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else a warning about GPUs that nobody asked for
    known: dict[str, Any] = {"namespace": "ties_dist", "log_to_driver": False, "logging_level": logging.ERROR}
    with _our_signals():
        if address != "local":
            _reach(address)
            try:
                ray.init(address=address, **known)
                logger.info("ray: joined the cluster at %s", ray.get_runtime_context().gcs_address)
                return True
            except ValueError as error:
                raise PlanError(f"--address {address} is not HOST:PORT, local or auto: {error}") from error
            except (ConnectionError, RuntimeError) as error:
                if address != "auto":
                    raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cpus = max((cluster.workers or 1) * (threads or 1), len(os.sched_getaffinity(0)))
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **known,
        )
    logger.info("ray: started a cluster on this machine, with %d CPUs", cpus)
    return True


def _reach(address: str) -> None:
    """Raises ClusterError where nobody listens at HOST:PORT: Ray tries for minutes, without a word."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error


@contextmanager
def _our_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself and ends the process in the middle of things; ours stops at a safe place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemExit:  # of Ray's handler, while it starts
        ray.shutdown()
        raise StoppedError(
            "stopped before there was a cluster; nothing was done. Run the same command again."
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reason(error: Exception) -> str:
    """The first line of Ray's long explanations that says something; of a worker's error without its traceback."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        return f"{type(error.cause).__name__}: {error.cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"


@dataclass(frozen=True)
class GivenUp:
    """Stops an order once the driver has given it up."""

    worker: Worker
    number: int

    def is_set(self) -> bool:
        return self.number <= self.worker.given_up


@dataclass
class Asked:
    """An actor. ready: the answer that it is. since: when it was asked for."""

    handle: Any
    since: float
    node: str | None = None


class RayFleet:
    """One actor per worker; see `Fleet` for what is promised."""

    def __init__(self, cluster: Cluster, *, threads: int | None = None, gpu: bool = False) -> None:
        self.cluster = cluster
        self.gpu = gpu
        self._actors: dict[str, Asked] = {}
        self._waiting: dict[Any, tuple[str, int | None]] = {}
        """Of each reference not yet answered: the worker, and the order's number (None: that it is ready)."""
        self._asked_for = 0
        self._last = 0
        self._excluded: set[str] = set()
        self._nodes: list[dict[str, Any]] = []
        self._hosts: dict[str, str] = {}
        self._ids: dict[str, str] = {}
        self._looked = 0.0
        self._limit: int | None = None
        self._failed_starts = 0
        self._next_start = 0.0
        self._kind: str | None = None
        self._gauges: dict[str, metrics.Gauge] = {}
        self._connected_here = connect(cluster, threads)
        self._look()
        self.threads = threads or self._usual_threads()
        self.gpu_slots = slots_of_each(self.threads, 1) if gpu else 0

    def open(self, workplace: Workplace[object]) -> None:
        self._workplace, self._memory = ray.put(workplace.away()), workplace.projected_bytes
        self._fill()

    # Placement

    def _usual_threads(self) -> int:
        cpus = [int(n["Resources"]["CPU"]) for n in self._nodes if n["Resources"].get("CPU", 0) >= 1]
        most = min([MOST_THREADS, *cpus])
        fitting = (t for t in range(most, 0, -1) if sum(c // t for c in cpus) >= (self.cluster.workers or 1))
        return next(fitting, most)

    def _look(self) -> None:
        """See which nodes there are: workers start on new ones."""
        self._looked = time.monotonic()
        before = {n["NodeID"] for n in self._nodes}
        known = [n for n in cast(Any, ray).nodes() if n["Alive"]]
        self._hosts |= {n["NodeID"]: n["NodeManagerHostname"] for n in known}
        self._nodes = [n for n in known if self._is_wanted(n)]
        if {n["NodeID"] for n in self._nodes} - before:
            self._limit = None

    def _is_wanted(self, node: Mapping[str, Any]) -> bool:
        labels, has = node.get("Labels") or {}, node["Resources"]
        return (
            node["NodeID"] not in self._excluded
            and all(labels.get(k) == v for k, v in self.cluster.labels.items())
            and all(has.get(k, 0) >= v for k, v in self.cluster.resources.items())
        )

    @property
    def wanted(self) -> int:
        if self.cluster.workers is not None:
            asked = self.cluster.workers
        else:
            asked = max(1, sum(self._places(node["Resources"]) for node in self._nodes))
        return min(asked, self._limit) if self._limit is not None else asked

    def _places(self, has: Mapping[str, float]) -> int:
        """Workers that a node has room for."""
        rooms = [has.get("CPU", 0) // self.threads, has.get("memory", 0) // self._memory]
        rooms += [has.get("GPU", 0)] if self.gpu else []
        rooms += [has.get(name, 0) // amount for name, amount in self.cluster.resources.items() if amount]
        return int(min(rooms))

    def _fill(self) -> None:
        """Ask for as many workers as are wanted. Those that die at once are asked for more and more slowly."""
        now = time.monotonic()
        if now - self._looked > LOOK_SECONDS:
            self._look()
        self._end_pending(now)
        while len(self._actors) < self.wanted and now >= self._next_start:
            self._asked_for += 1
            name = f"worker-{self._asked_for}"
            labels = dict(self.cluster.labels)
            if self._excluded:
                labels[NODE_LABEL] = f"!in({','.join(sorted(self._excluded))})"
            try:
                actor = cast(Any, ray.remote(Worker)).options(
                    num_cpus=self.threads,
                    num_gpus=1 if self.gpu else 0,
                    memory=self._memory,
                    resources=dict(self.cluster.resources) or None,
                    label_selector=labels or None,
                    scheduling_strategy="SPREAD",
                    max_concurrency=ORDERS_AT_ONCE + 2,
                    max_restarts=0,
                    max_task_retries=0,
                )
            except (ValueError, OverflowError) as error:
                raise PlanError(f"Ray has no such workers (--worker-resource, --node-label): {error}") from error
            handle = actor.remote(self._workplace, self.gpu)
            self._actors[name] = Asked(handle, now)
            self._waiting[handle.ready.remote()] = (name, None)

    def _end_pending(self, now: float) -> None:
        """Ask no more for workers that find no place: until a node joins, those that work are all there are."""
        working = sum(a.node is not None for a in self._actors.values())
        late = [n for n, a in self._actors.items() if a.node is None and now - a.since > PENDING_SECONDS]
        if late and working:
            logger.warning("%d workers found no place and are not waited for: %s", len(late), self.shortage())
            for name in late:
                self.drop(name)
            self._limit = working

    def shortage(self) -> str:
        one = [f"{self.threads} CPUs", f"{readable(self._memory)} of memory"]
        one += ["a GPU"] if self.gpu else []
        one += [f"{amount:g} {name}" for name, amount in self.cluster.resources.items()]
        one += [f"label {name}={value}" for name, value in self.cluster.labels.items()]
        has = [
            f"{n['NodeManagerHostname']}: {n['Resources'].get('CPU', 0):g} CPUs, "
            f"{readable(int(n['Resources'].get('memory', 0)))}, {n['Resources'].get('GPU', 0):g} GPUs"
            for n in self._nodes
        ]
        return f"a worker needs {', '.join(one)}; nodes that are there: {'; '.join(has) or 'none that fits'}"

    # Messages

    def send(self, worker: str, order: Order) -> None:
        self._last = order.number
        self._waiting[self._actors[worker].handle.perform.remote(order)] = (worker, order.number)

    def give_up(self) -> None:
        for asked in self._actors.values():
            if asked.node is not None:
                asked.handle.give_up.remote(self._last)

    def drop(self, worker: str) -> None:
        asked = self._actors.pop(worker, None)
        if asked is not None:
            with suppress(RayError, ValueError):
                ray.kill(asked.handle, no_restart=True)
        self._waiting = {ref: place for ref, place in self._waiting.items() if place[0] != worker}

    def exclude(self, node: str) -> None:
        self._excluded.add(self._ids[node])
        self._look()

    def wait(self, seconds: float) -> list[Event]:
        self._fill()
        if not self._waiting:
            time.sleep(seconds)
            return []
        ready, _ = ray.wait(list(self._waiting), num_returns=1, timeout=seconds, fetch_local=False)
        if ready:
            ready, _ = ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=0, fetch_local=False)
        return [event for ref in ready if (event := self._event(ref)) is not None]

    def _event(self, ref: Any) -> Event | None:
        if ref not in self._waiting:  # of a worker that was lost with an earlier one of these
            return None
        worker, number = self._waiting.pop(ref)
        try:
            value = ray.get(ref)
        except RayTaskError as error:  # before the order was begun: it, or its answer, could not travel
            if number is None:
                return self._lost(worker, f"it could not start: {_reason(error)}", blameless=False)
            failed = Answer(error=as_told(error))
            return Answered(worker=worker, number=number, answer=failed)
        except RayError as error:
            return self._lost(worker, _reason(error), blameless=self._is_blameless(worker, error))
        if number is not None:
            return Answered(worker=worker, number=number, answer=value)
        node_id, machine = value
        node = f"{self._hosts.get(node_id, 'unknown')}/{node_id[:8]}"
        self._ids[node] = node_id
        self._failed_starts = 0
        self._actors[worker].node = node_id
        self._kind = self._kind or machine.kind
        problems = machine.problems
        if machine.kind != self._kind:
            other = f"it is of another kind ({machine.kind}) than the first ({self._kind}): bytes might differ"
            problems = (*problems, other)
        return Joined(worker=worker, node=node, problems=problems, facts=machine.text)

    def _lost(self, worker: str, reason: str, *, blameless: bool) -> Lost:
        if (asked := self._actors.get(worker)) is not None and asked.node is None:
            self._failed_starts += 1
            self._next_start = time.monotonic() + min(LONGEST_PAUSE, 0.1 * 2**self._failed_starts)
        self.drop(worker)
        return Lost(worker=worker, reason=reason, blameless=blameless)

    def _is_blameless(self, worker: str, error: Exception) -> bool:
        """Whether a worker went with its node, was taken away for something else, or just cannot be reached.

        The latter is how a killed node looks at first: Ray learns of it by heartbeats, seconds later.
        """
        self._look()
        asked = self._actors.get(worker)
        gone = asked is not None and asked.node is not None and asked.node not in {n["NodeID"] for n in self._nodes}
        return (
            gone or isinstance(error, ActorUnavailableError) or (isinstance(error, ActorDiedError) and error.preempted)
        )

    def now(self) -> float:
        return time.monotonic()

    def measure(self, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            if name not in self._gauges:
                self._gauges[name] = metrics.Gauge(f"ties_dist_{name}", description=name.replace("_", " "))
            self._gauges[name].set(value)

    def close(self) -> None:
        for worker in list(self._actors):
            self.drop(worker)
        if self._connected_here:
            ray.shutdown()


def job_client(address: str) -> Any:
    """Of the Jobs API at an address like `http://HEAD:8265`. Raises PlanError; ClusterError where nobody answers."""
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise PlanError(f"--address {address}: jobs are taken by the cluster's dashboard; give its http://HEAD:8265.")
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error}") from error
