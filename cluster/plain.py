"""Plain Kubernetes: a merge on one node without Ray, the Job that starts a RayJob, its schedule, storage, network.

Exit statuses decide: 1 and 2 end a Job at once, an eviction costs no attempt, 75 and kills are tried again and resume.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.kuberay import AGENT, DASHBOARD, METRICS, ray_job
from cluster.pods import APP, COMPONENT, Object, container, labels, metadata, pod, resources
from cluster.settings import Settings

FOLDER = Path(__file__).parent
LAUNCH, MANIFEST = "launch.sh", "rayjob.yaml"
KEEP_SECONDS = 7 * 86400
AUTOSCALER_METRICS, DASHBOARD_METRICS = 44217, 44227


def dump(document: Object) -> str:
    """YAML in the order in which it was built; texts of several lines as blocks."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def namespace(s: Settings) -> Object:
    """Refuses whatever is not restricted, so that a pod someone adds later is held to it, too."""
    profile = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": s.namespace, "labels": labels() | profile}}


def claims(s: Settings) -> list[Object]:
    """Mounted by all nodes at once. Inputs are filled by someone else; merges mount them read-only."""
    sizes = {s.inputs_claim: s.inputs_size, s.output_claim: s.output_size}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": metadata(s, name),
            "spec": {
                "accessModes": ["ReadWriteMany"],
                "storageClassName": s.storage_class,
                "resources": {"requests": {"storage": size}},
            },
        }
        for name, size in sizes.items()
    ]


# Jobs


def job_spec(s: Settings, template: Object, *, retries: int) -> Object:
    return {
        "backoffLimit": retries,
        # Only once the pod before has ended: two drivers would wait for each other's lock.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}},
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "Count", "onExitCodes": {"operator": "In", "values": [75]}},
            ]
        },
        "ttlSecondsAfterFinished": KEEP_SECONDS,
        "template": template,
    }


def local_job(s: Settings) -> Object:
    """The merge plans before it works, in this same cheap pod: no step of its own for that."""
    merge = container(s, "merge", resources(str(s.local_cpus), s.local_memory), command=s.merge_local())
    template = pod(s, "local", [merge], restart="Never", stay=True)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(s, f"{s.name}-local"),
        "spec": job_spec(s, template, retries=s.retries),
    }


def launcher_name(s: Settings) -> str:
    return f"{s.name}-launch"


def launcher(s: Settings) -> Object:
    """The plan runs first, on a CPU that is there: a RayJob asks for its GPU nodes together with its head."""
    name = launcher_name(s)
    plan = container(s, "plan", resources("1", "2Gi"), command=s.plan())
    launch = container(
        s,
        "launch",
        resources("100m", "256Mi"),
        command=["bash", f"/launch/{LAUNCH}", s.name, f"/launch/{MANIFEST}"],
        volumes=False,
    )
    launch["volumeMounts"].append({"name": "launch", "mountPath": "/launch", "readOnly": True})
    template = pod(
        s,
        "launch",
        [launch],
        init=[plan],
        restart="Never",
        stay=True,
        account=name,
        more_volumes=[{"name": "launch", "configMap": {"name": name}}],
    )
    return job_spec(s, template, retries=s.retries)


def launch_support(s: Settings, *, gpu: bool) -> list[Object]:
    """What a launcher needs. Its rights end at the one RayJob; `create` cannot be tied to a name."""
    name = launcher_name(s)
    rayjobs = {"apiGroups": ["ray.io"], "resources": ["rayjobs"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(s, name),
            "data": {LAUNCH: (FOLDER / LAUNCH).read_text(), MANIFEST: dump(ray_job(s, gpu=gpu))},
        },
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata(s, name),
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": metadata(s, name),
            "rules": [
                rayjobs | {"resourceNames": [s.name], "verbs": ["get", "delete"]},
                rayjobs | {"verbs": ["create"]},
            ],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": metadata(s, name),
            "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": s.namespace}],
        },
    ]


def launch(s: Settings, *, gpu: bool) -> list[Object]:
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(s, launcher_name(s)),
        "spec": launcher(s),
    }
    return [*launch_support(s, gpu=gpu), job]


def scheduled(s: Settings, *, gpu: bool) -> list[Object]:
    """`Forbid` guards the launcher only, and so the launcher lasts as long as its RayJob."""
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata(s, launcher_name(s)),
        "spec": {
            "schedule": s.schedule,
            "timeZone": s.time_zone,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 7,
            "jobTemplate": {"metadata": {"labels": labels()}, "spec": launcher(s)},
        },
    }
    return [*launch_support(s, gpu=gpu), cron]


# Network


def network(s: Settings) -> list[Object]:
    """Ray runs whatever reaches its dashboard. Each policy names both directions, so what is not listed is refused."""
    dns = {"ports": _ports(53, protocols=("UDP", "TCP"))}
    storage = {"to": [{"ipBlock": {"cidr": c}} for c in s.storage_cidrs], "ports": _ports(*s.storage_ports)}
    # Reached under addresses that differ by cluster and network plugin: by port alone.
    api_server = {"ports": _ports(443, 6443)}
    cluster = [{"podSelector": {"matchLabels": labels("ray")}}]
    ray = _policy(
        s,
        "ray",
        ingress=[
            {"from": cluster},  # Ray's processes choose their ports at random
            {"from": _namespace(s.operator_namespace), "ports": _ports(DASHBOARD, AGENT)},
            {
                "from": _namespace(s.monitoring_namespace),
                "ports": _ports(METRICS, AUTOSCALER_METRICS, DASHBOARD_METRICS),
            },
        ],
        egress=[{"to": cluster}, dns, storage],
    )
    return [
        ray,
        _policy(s, "launch", ingress=[], egress=[dns, storage, api_server]),
        _policy(s, "local", ingress=[], egress=[dns, storage]),
    ]


def _policy(s: Settings, component: Any, *, ingress: list[Object], egress: list[Object]) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(s, f"ties-dist-{component}"),
        "spec": {
            "podSelector": {"matchLabels": {APP: "ties-dist", COMPONENT: component}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    }


def _namespace(name: str) -> list[Object]:
    return [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}]


def _ports(*numbers: int, protocols: tuple[str, ...] = ("TCP",)) -> list[Object]:
    return [{"protocol": protocol, "port": number} for number in numbers for protocol in protocols]
