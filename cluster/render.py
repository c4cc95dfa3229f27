"""Writes the manifests: `python -m cluster.render NAME [--FIELD VALUE ...]` to stdout, `... all` into `rendered/`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.kuberay import ray_cron_job, ray_job
from cluster.plain import claims, dump, launch, launcher_name, local_job, namespace, network, scheduled
from cluster.pods import Object
from cluster.ray_up import ray_up
from cluster.settings import Settings

RENDERED = Path(__file__).parent / "rendered"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """build: its documents. changes: settings that differ from the defaults. usage: for its first lines."""

    build: Callable[[Settings], Sequence[Object]]
    usage: Callable[[Settings], str]
    changes: dict[str, Any] = field(default_factory=dict)


def _create(name: str) -> Callable[[Settings], str]:
    return lambda s: f"kubectl create -f cluster/rendered/{name}.yaml"


def _apply(name: str) -> Callable[[Settings], str]:
    return lambda s: f"kubectl apply -f cluster/rendered/{name}.yaml"


def _launch(name: str) -> Callable[[Settings], str]:
    """A Job is not run again by applying it again."""
    return lambda s: f"kubectl -n {s.namespace} delete job {launcher_name(s)} --ignore-not-found\n{_apply(name)(s)}"


def _use_ray_up(s: Settings) -> str:
    inside = " ".join(s.merge_ray(gpu=False))
    return f"ray up cluster/rendered/ray-up.yaml\nray exec --tmux cluster/rendered/ray-up.yaml {shlex.quote(inside)}"


def _rayjob(gpu: bool) -> Callable[[Settings], list[Object]]:
    return lambda s: [ray_job(s, gpu=gpu)]


MANIFESTS: dict[str, Manifest] = {
    "namespace": Manifest(build=lambda s: [namespace(s)], usage=_apply("namespace")),
    "storage": Manifest(build=claims, usage=_apply("storage")),
    "network": Manifest(build=network, usage=_apply("network")),
    "job-local": Manifest(build=lambda s: [local_job(s)], usage=_create("job-local")),
    "rayjob-cpu": Manifest(build=_rayjob(False), usage=_create("rayjob-cpu")),
    "rayjob-cpu-spot": Manifest(build=_rayjob(False), usage=_create("rayjob-cpu-spot"), changes={"spot": True}),
    "rayjob-gpu": Manifest(build=_rayjob(True), usage=_create("rayjob-gpu")),
    "rayjob-gpu-spot": Manifest(build=_rayjob(True), usage=_create("rayjob-gpu-spot"), changes={"spot": True}),
    "rayjob-gpu-kueue": Manifest(
        build=_rayjob(True), usage=_create("rayjob-gpu-kueue"), changes={"kueue_queue": "merges"}
    ),
    "rayjob-gpu-autodelete": Manifest(
        build=_rayjob(True), usage=_create("rayjob-gpu-autodelete"), changes={"autodelete": True}
    ),
    "launch-cpu": Manifest(build=lambda s: launch(s, gpu=False), usage=_launch("launch-cpu")),
    "launch-gpu": Manifest(build=lambda s: launch(s, gpu=True), usage=_launch("launch-gpu")),
    "scheduled-cpu": Manifest(
        build=lambda s: scheduled(s, gpu=False), usage=_apply("scheduled-cpu"), changes={"overwrite": True}
    ),
    "scheduled-gpu": Manifest(
        build=lambda s: scheduled(s, gpu=True), usage=_apply("scheduled-gpu"), changes={"overwrite": True}
    ),
    "raycronjob-cpu-alpha": Manifest(
        build=lambda s: [ray_cron_job(s, gpu=False)],
        usage=lambda s: (
            "ALPHA: off by default in KubeRay, and nothing in it keeps one run from overlapping the next (the second\n"
            "then holds its nodes, waiting for the lock). Take scheduled-cpu.yaml unless you have to take this.\n"
            "kubectl apply -f cluster/rendered/raycronjob-cpu-alpha.yaml"
        ),
        changes={"overwrite": True},
    ),
    "ray-up": Manifest(build=lambda s: [ray_up(s)], usage=_use_ray_up),
}


def render(name: str, changed: dict[str, Any] | None = None) -> str:
    manifest = MANIFESTS[name]
    s = Settings(**(manifest.changes | (changed or {})))
    head = [
        "Made by `python -m cluster.render`; change cluster/*.py or give it options.",
        *manifest.usage(s).split("\n"),
    ]
    comment = "".join(f"# {line}\n" for line in head)
    return comment + "---\n".join(dump(document) for document in manifest.build(s))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.render", description=__doc__)
    parser.add_argument("manifest", choices=[*MANIFESTS, "all"])
    for name, of in Settings.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=f"[default: {of.default}]")
    given = vars(parser.parse_args(arguments))
    chosen = given.pop("manifest")
    # Lists and maps are given as YAML; pydantic reads the rest.
    changed = {n: yaml.safe_load(v) if v[:1] in ("[", "{") else v for n, v in given.items() if v is not None}
    try:
        if chosen != "all":
            sys.stdout.write(render(chosen, changed))
            return
        RENDERED.mkdir(exist_ok=True)
        for name in MANIFESTS:
            (RENDERED / f"{name}.yaml").write_text(render(name, changed))
    except ValidationError as error:
        parser.error("; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))


if __name__ == "__main__":
    main()
