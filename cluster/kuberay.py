"""Merges on Ray clusters that KubeRay builds: RayJob, and RayCronJob, which is alpha.

What a user has to correct must never be tried again, least of all on a new cluster: no retries here at any level. What
may be tried again is tried by whoever started the RayJob (`launch.sh`), who knows the exit status.
"""

from __future__ import annotations

from cluster.pods import Object, container, metadata, pod, resources
from cluster.settings import Settings

DASHBOARD, AGENT, METRICS, GCS, CLIENT = 8265, 52365, 8080, 6379, 10001
KUEUE_LABEL = "kueue.x-k8s.io/queue-name"
HOUR, DAY = 3600, 86400


def ray_job(s: Settings, *, gpu: bool) -> Object:
    queued = {KUEUE_LABEL: s.kueue_queue} if s.kueue_queue else {}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(s, s.name, labels=queued),
        "spec": ray_job_spec(s, gpu=gpu) | ({"suspend": True} if s.kueue_queue else {}),
    }


def ray_job_spec(s: Settings, *, gpu: bool) -> Object:
    return {
        # Pasted unquoted into the submitter's shell: one plain command, no `&&`.
        "entrypoint": s.entrypoint(gpu=gpu),
        "submissionMode": "K8sJobMode",
        "backoffLimit": 0,  # else a new cluster for every attempt, whatever the exit status
        "submitterConfig": {"backoffLimit": 0},
        "preRunningDeadlineSeconds": s.start_seconds,
        **_end(s),
        "submitterPodTemplate": pod(
            s,
            "ray",
            [container(s, "ray-job-submitter", resources("500m", "1Gi"), gpu=gpu, volumes=False)],
            volumes=False,
            restart="Never",
            stay=True,
        ),
        "rayClusterSpec": {
            "rayVersion": s.ray_version,
            "headGroupSpec": _head(s, gpu=gpu),
            "workerGroupSpecs": [_workers(s, gpu=gpu)],
        },
    }


def _end(s: Settings) -> Object:
    """What becomes of the cluster in the end. KubeRay refuses deletion rules beside the other two."""
    if not s.autodelete:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": s.keep_seconds}
    after = [("DeleteWorkers", 0), ("DeleteCluster", HOUR), ("DeleteSelf", 7 * DAY)]
    rules = [
        {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 0}},
        {"policy": "DeleteSelf", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": DAY}},
        # Workers are paid for at once; the head keeps the logs for an hour.
        *({"policy": policy, "condition": {"jobStatus": "FAILED", "ttlSeconds": ttl}} for policy, ttl in after),
    ]
    return {"shutdownAfterJobFinishes": False, "deletionStrategy": {"deletionRules": rules}}


def _head(s: Settings, *, gpu: bool) -> Object:
    ports = {"gcs": GCS, "dashboard": DASHBOARD, "client": CLIENT, "metrics": METRICS}
    head = container(s, "ray-head", resources(str(s.head_cpus), s.head_memory), gpu=gpu, ports=ports)
    return {
        "rayStartParams": {
            "dashboard-host": "0.0.0.0",
            "num-cpus": "0",  # the driver runs here, no worker
            "object-store-memory": str(s.object_store_bytes),
        },
        "template": pod(s, "ray", [head], stay=True, nodes=s.on_demand_nodes if s.spot else None),
    }


def _workers(s: Settings, *, gpu: bool) -> Object:
    amounts = resources(
        str(s.worker_cpus), s.gpu_worker_memory if gpu else s.worker_memory, **({s.gpu_resource: "1"} if gpu else {})
    )
    worker = container(s, "ray-worker", amounts, gpu=gpu, ports={"metrics": METRICS})
    tolerations: list[Object] = [{"key": s.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}] if gpu else []
    if s.spot:
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in s.spot_nodes.items()
        ]
    template = pod(s, "ray", [worker], tolerations=tolerations, nodes=s.spot_nodes if s.spot else None)
    return {
        "groupName": "spot" if s.spot else "workers",
        "replicas": s.workers,
        "minReplicas": s.workers,
        "maxReplicas": s.workers,
        "rayStartParams": {"object-store-memory": str(s.object_store_bytes)},
        "template": template,
    }


def ray_cron_job(s: Settings, *, gpu: bool) -> Object:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": metadata(s, s.name),
        "spec": {"schedule": s.schedule, "timeZone": s.time_zone, "jobTemplate": ray_job_spec(s, gpu=gpu)},
    }
