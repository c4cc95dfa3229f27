"""Pods: what all of them share, so that none is without it: the restricted profile, caches, volumes.

https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

from __future__ import annotations

from typing import Any, Literal

from cluster.settings import Settings

Object = dict[str, Any]
Component = Literal["ray", "launch", "local"]
"""What a NetworkPolicy tells pods apart by. ray: heads, workers and submitters, which talk to each other."""

APP = "app.kubernetes.io/name"
COMPONENT = "app.kubernetes.io/component"
STAY = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
"""For pods whose loss costs more than their own work: not to be moved to save a node."""


def labels(component: Component | None = None) -> dict[str, str]:
    return {APP: "ties-dist"} | ({COMPONENT: component} if component else {})


def metadata(s: Settings, name: str, **more: Any) -> Object:
    return {"name": name, "namespace": s.namespace, "labels": labels() | more.pop("labels", {}), **more}


def resources(cpus: str, memory: str, **more: str) -> Object:
    """Requests equal limits: KubeRay reads limits, the kernel kills by limits, nodes are filled by requests."""
    amounts = {"cpu": cpus, "memory": memory, **more}
    return {"limits": amounts, "requests": dict(amounts)}


def container(
    s: Settings,
    name: str,
    amounts: Object,
    *,
    gpu: bool = False,
    command: list[str] | None = None,
    volumes: bool = True,
    ports: dict[str, int] | None = None,
) -> Object:
    """command: None where KubeRay puts its own. volumes: whether it sees inputs and output."""
    mounts: list[Object] = [
        {"name": "scratch", "mountPath": s.scratch},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if volumes:
        mounts += [
            {"name": "inputs", "mountPath": s.inputs, "readOnly": True},
            {"name": "output", "mountPath": s.output},
        ]
    return {
        "name": name,
        "image": s.image_of(gpu=gpu),
        **({"command": command} if command else {}),
        "env": [{"name": key, "value": value} for key, value in s.home.items()],
        **({"ports": [{"name": n, "containerPort": p} for n, p in ports.items()]} if ports else {}),
        "resources": amounts,
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": mounts,
    }


def pod(
    s: Settings,
    component: Component,
    containers: list[Object],
    *,
    init: list[Object] | None = None,
    volumes: bool = True,
    stay: bool = False,
    restart: str | None = None,
    account: str | None = None,
    nodes: dict[str, str] | None = None,
    tolerations: list[Object] | None = None,
    more_volumes: list[Object] | None = None,
    grace_seconds: int = 30,
) -> Object:
    """A pod template. volumes: claim inputs and output. account: the one service account that may talk to the API."""
    claimed: list[Object] = []
    if volumes:
        claimed = [
            {"name": "inputs", "persistentVolumeClaim": {"claimName": s.inputs_claim, "readOnly": True}},
            {"name": "output", "persistentVolumeClaim": {"claimName": s.output_claim}},
        ]
    spec: Object = {
        "automountServiceAccountToken": account is not None,
        **({"serviceAccountName": account} if account else {}),
        "enableServiceLinks": False,
        **({"restartPolicy": restart} if restart else {}),
        "terminationGracePeriodSeconds": grace_seconds,
        **({"nodeSelector": nodes} if nodes else {}),
        **({"tolerations": tolerations} if tolerations else {}),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": s.uid,
            "runAsGroup": s.uid,
            "fsGroup": s.uid,
            # Else every start walks the whole volume and changes the owner of each file.
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **({"initContainers": init} if init else {}),
        "containers": containers,
        "volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": s.scratch_size}},
            {"name": "tmp", "emptyDir": {"sizeLimit": s.scratch_size}},
            *claimed,
            *(more_volumes or []),
        ],
    }
    return {"metadata": {"labels": labels(component), **({"annotations": dict(STAY)} if stay else {})}, "spec": spec}
