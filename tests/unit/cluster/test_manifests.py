"""The manifests of `cluster/`: valid, restricted, up to date, with command lines that our own command line takes."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from pydantic import ValidationError as SettingsError

from cluster import sizing
from cluster.kuberay import KUEUE_LABEL
from cluster.pods import APP, COMPONENT
from cluster.render import MANIFESTS, RENDERED, main, render
from cluster.settings import Settings
from tests.kubernetes import CRDS, ROOT, Object, check, check_core, check_custom, containers, pod_templates
from ties_dist.cli.commands import cli

FOLDER = ROOT / "cluster"
DEFAULTS = Settings()
KUBERNETES = sorted(name for name in MANIFESTS if name != "ray-up")
with_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no KubeRay CRDs at {CRDS} (TIES_DIST_KUBERAY_CRDS)")


def documents(name: str) -> list[Object]:
    """Of a manifest, and of the manifest inside a launcher's ConfigMap."""
    found = [d for d in yaml.safe_load_all((RENDERED / f"{name}.yaml").read_text())]
    inner = [d["data"]["rayjob.yaml"] for d in found if d["kind"] == "ConfigMap"]
    return found + [d for text in inner for d in yaml.safe_load_all(text)]


def every(kind: str) -> list[tuple[str, Object]]:
    return [(name, d) for name in KUBERNETES for d in documents(name) if d["kind"] == kind]


def ray_jobs() -> list[tuple[str, Object]]:
    """Names and specs of all RayJobs, those of a RayCronJob's template included."""
    jobs = [(name, d["spec"]) for name, d in every("RayJob")]
    return jobs + [(name, d["spec"]["jobTemplate"]) for name, d in every("RayCronJob")]


def jobs() -> list[tuple[str, Object]]:
    found = [(name, d["spec"]) for name, d in every("Job")]
    return found + [(name, d["spec"]["jobTemplate"]["spec"]) for name, d in every("CronJob")]


def pods() -> list[tuple[str, Object]]:
    return [(name, pod) for name in KUBERNETES for d in documents(name) for pod in pod_templates(d)]


# Rendering


def test_rendered_files_are_those_of_the_generator() -> None:
    assert sorted(p.stem for p in RENDERED.glob("*.yaml")) == sorted(MANIFESTS)
    for name in MANIFESTS:
        text = (RENDERED / f"{name}.yaml").read_text()
        assert text == render(name), f"{name} is out of date: python -m cluster.render all"


def test_options_reach_every_place_they_concern(capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch-gpu", "--image", "other:1", "--out", "/output/x", "--name", "night", "--namespace", "else"])
    text = capsys.readouterr().out
    assert not re.search(re.escape(DEFAULTS.image) + r"|/output/merged|ties-dist-merge|: merges$", text, re.MULTILINE)
    assert text.count("other:1-cuda") == 3  # submitter, head, workers
    assert len(re.findall(r"other:1$", text, re.MULTILINE)) == 2  # plan, launch
    assert text.count("/output/x") == 2  # plan, merge


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--recipe", "/inputs/a b.yml"], "recipe"),
        (["--recipe", "/inputs/$(id).yml"], "recipe"),
        (["--worker-memory", "8GB"], "worker_memory"),
        (["--name", "x" * 48], "name"),  # KubeRay's limit
        (["--kueue-queue", "a", "--autodelete", "true"], "deletion rules"),
    ],
)
def test_values_that_would_break_a_manifest_are_refused(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["rayjob-cpu", *arguments])
    assert problem in capsys.readouterr().err


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(SettingsError, match="extra_forbidden"):
        render("rayjob-cpu", {"wokers": 3})


# Schemas


@with_crds
@pytest.mark.parametrize("name", KUBERNETES)
def test_every_document_is_valid_with_unknown_fields_refused(name: str) -> None:
    for document in documents(name):
        check(document)


@pytest.mark.parametrize("name", KUBERNETES)
def test_every_core_document_and_pod_is_valid(name: str) -> None:
    """What can be said without the CRDs."""
    for document in documents(name):
        if not document["apiVersion"].startswith("ray.io/"):
            check_core(document)
        for template in pod_templates(document):
            head = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "each"}}
            check_core(head | {"template": template})


def objects(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all objects in a document, itself included."""
    if isinstance(node, dict):
        yield path
    for key, each in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from objects(each, (*path, key))


FREE = {"labels", "annotations", "matchLabels", "nodeSelector", "limits", "requests", "data", "rayStartParams"}
"""Maps of the user's own keys, in any schema."""


def planted(document: Object) -> Iterator[tuple[tuple[Any, ...], Object]]:
    """The document with an unknown field, once in each of its objects."""
    for path in objects(document):
        if path and path[-1] in FREE:
            continue
        changed = copy.deepcopy(document)
        at: Any = changed
        for key in path:
            at = at[key]
        at["replcias"] = 1
        yield path, changed


@with_crds
@pytest.mark.slow
@pytest.mark.parametrize("name", ["rayjob-gpu-autodelete", "raycronjob-cpu-alpha"])
def test_an_unknown_field_anywhere_in_a_ray_object_is_refused(name: str) -> None:
    depths = []
    for path, changed in planted(documents(name)[0]):
        with pytest.raises((ValidationError, kubernetes_validate.ValidationError), match="replcias"):
            check_custom(changed)
        depths.append(len(path))
    assert len(depths) > 100 and max(depths) >= 10


@pytest.mark.parametrize("name", ["job-local", "scheduled-gpu", "network", "storage", "namespace"])
def test_an_unknown_field_anywhere_in_a_core_object_is_refused(name: str) -> None:
    count = 0
    for document in yaml.safe_load_all((RENDERED / f"{name}.yaml").read_text()):
        for _, changed in planted(document):
            with pytest.raises(kubernetes_validate.ValidationError, match="replcias"):
                check_core(changed)
            count += 1
    assert count >= 2


@with_crds
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backoffLimit"), "none"),
        (("spec", "rayClusterSpec", "rayVersion"), 2.6),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "groupName"), None),
        (("spec", "deletionStrategy", "deletionRules", 0, "policy"), "DeleteAll"),
        (("spec", "submitterPodTemplate", "spec", "containers"), []),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "name"), None),
    ],
)
def test_wrong_values_in_a_ray_object_are_refused(path: tuple[Any, ...], value: Any) -> None:
    document = documents("rayjob-gpu-autodelete")[0]
    at: Any = document
    for key in path[:-1]:
        at = at[key]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    if path[-1] == "containers":  # both schemas take an empty list, the API server does not: caught by ours
        assert not all(containers(pod) for pod in pod_templates(document))
        return
    named = re.escape(str(path[-1] if value is None else value))
    with pytest.raises((ValidationError, kubernetes_validate.ValidationError), match=rf"^'?{named}'? is (a|no)"):
        check_custom(document)


def test_the_ray_up_file_fits_rays_own_schema() -> None:
    schema = json.loads(files("ray").joinpath("autoscaler/ray-schema.json").read_text())
    (document,) = yaml.safe_load_all((RENDERED / "ray-up.yaml").read_text())
    Draft202012Validator(schema).validate(document)
    with pytest.raises(ValidationError, match="wokers"):
        Draft202012Validator(schema).validate(document | {"wokers": 1})
    with pytest.raises(ValidationError, match="imgae"):
        Draft202012Validator(schema).validate(document | {"docker": document["docker"] | {"imgae": ""}})


# Command lines


def command_lines() -> list[tuple[str, list[str]]]:
    """Every `ties-dist ...` of a manifest: commands of containers, entrypoints, the first lines of a file."""
    found = [(name, c["command"]) for name, pod in pods() for c in containers(pod) if "command" in c]
    found += [(name, shlex.split(spec["entrypoint"])) for name, spec in ray_jobs()]
    for name in MANIFESTS:
        comments = [line[2:] for line in (RENDERED / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
        words = [word for line in comments if "ties-dist " in line for word in shlex.split(line)]
        found += [(name, shlex.split(word)) for word in words if word.startswith("ties-dist ")]
    return [(name, line) for name, line in found if line[0] == "ties-dist"]


def parse(line: list[str]) -> dict[str, Any]:
    """By our own command line, without running anything."""
    assert line[0] == "ties-dist"
    with click.Context(cli, **cli.context_settings) as above:
        command = cli.get_command(above, line[1])
        assert command is not None, line[1]
        return command.make_context(line[1], list(line[2:]), parent=above).params


def test_every_command_line_is_taken_by_our_own() -> None:
    lines = command_lines()
    assert {name for name, _ in lines} == set(MANIFESTS) - {"namespace", "storage", "network"}
    for name, line in lines:
        values = parse(line)
        assert str(values["recipe"]) == DEFAULTS.recipe, name
        assert str(values["out"]) == DEFAULTS.out, name
        if line[1] == "merge":
            assert values["wait"] and values["memory_budget"] == 2 << 30
            assert values["executor"] == ("local" if name == "job-local" else "ray")
            assert values["device"] == ("cuda" if "gpu" in name else "auto")
            assert values["overwrite"] == ("scheduled" in name or "cron" in name)


def test_a_command_line_that_ours_does_not_know_is_refused() -> None:
    with pytest.raises(click.UsageError, match="--memry-budget"):
        parse(["ties-dist", "merge", "a", "b", "--memry-budget", "2GiB"])
    with pytest.raises(click.MissingParameter, match="out"):
        parse(["ties-dist", "merge", "a"])


def test_an_entrypoint_is_one_plain_command() -> None:
    """KubeRay pastes it unquoted into the submitter's shell: what follows an `&&` would run there."""
    for name, spec in ray_jobs():
        assert re.fullmatch(r"ties-dist [\w./ -]+", spec["entrypoint"]), name


# Retries


def test_nothing_retries_a_ray_job_whatever_its_exit_status() -> None:
    assert len(ray_jobs()) >= 8
    for name, spec in ray_jobs():
        assert spec["backoffLimit"] == 0, name
        assert spec["submitterConfig"] == {"backoffLimit": 0}, name
        assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never", name


def outcome(policy: Object, status: int, *, disrupted: bool = False) -> str:
    """What the Job controller does with a pod that failed: the first rule that matches, else Count."""
    for rule in policy["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["operator"] == "In"
            if status in rule["onExitCodes"]["values"]:
                return str(rule["action"])
        elif disrupted and rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]:
            return str(rule["action"])
    return "Count"


def test_a_job_ends_at_a_users_error_and_goes_on_after_the_rest() -> None:
    assert {name for name, _ in jobs()} == {"job-local", "launch-cpu", "launch-gpu", "scheduled-cpu", "scheduled-gpu"}
    for name, spec in jobs():
        policy = spec["podFailurePolicy"]
        assert outcome(policy, 2) == outcome(policy, 2, disrupted=True) == "FailJob", name
        assert outcome(policy, 1) == "FailJob"
        assert outcome(policy, 75) == outcome(policy, 137) == "Count"
        assert outcome(policy, 75, disrupted=True) == "Ignore"
        assert spec["backoffLimit"] > 0
        assert spec["podReplacementPolicy"] == "Failed"
        assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else the kubelet retries, below any policy


def test_a_plan_on_a_cpu_comes_before_a_ray_job_exists() -> None:
    for name, spec in jobs():
        if name != "job-local":
            (plan,) = spec["template"]["spec"]["initContainers"]
            assert plan["command"][:2] == ["ties-dist", "plan"], name
            assert "nvidia.com/gpu" not in plan["resources"]["limits"]
            assert plan["image"] == DEFAULTS.image


# Overlays and KubeRay's own rules


def test_deletion_rules_and_shutdown_exclude_each_other() -> None:
    """What KubeRay's operator checks in code and CEL: the object would be created, and then stay ValidationFailed."""
    order = ["DeleteWorkers", "DeleteCluster", "DeleteSelf"]
    seen = 0
    for name, spec in ray_jobs():
        strategy = spec.get("deletionStrategy")
        assert spec["shutdownAfterJobFinishes"] == (strategy is None), name
        assert strategy is None or "ttlSecondsAfterFinished" not in spec
        after: dict[str, list[tuple[int, int]]] = {}
        for rule in strategy["deletionRules"] if strategy else ():
            assert set(rule["condition"]) == {"jobStatus", "ttlSeconds"}
            after.setdefault(rule["condition"]["jobStatus"], []).append(
                (order.index(rule["policy"]), rule["condition"]["ttlSeconds"])
            )
        for rules in after.values():
            assert len({policy for policy, _ in rules}) == len(rules)
            assert [ttl for _, ttl in sorted(rules)] == sorted(ttl for _, ttl in rules)
        seen += strategy is not None
    assert seen == 1


def test_kueue_starts_the_job_and_finds_its_queue() -> None:
    for name, job in every("RayJob"):
        queued = "kueue" in name
        assert job["spec"].get("suspend", False) == queued
        assert (KUEUE_LABEL in job["metadata"]["labels"]) == queued
        assert not queued or (job["spec"]["shutdownAfterJobFinishes"] and "deletionStrategy" not in job["spec"])


def test_spot_workers_have_a_head_on_demand() -> None:
    for name, spec in ray_jobs():
        cluster = spec["rayClusterSpec"]
        (workers,) = cluster["workerGroupSpecs"]
        chosen = [group["template"]["spec"].get("nodeSelector") for group in (cluster["headGroupSpec"], workers)]
        spot = "spot" in name
        assert chosen == ([DEFAULTS.on_demand_nodes, DEFAULTS.spot_nodes] if spot else [None, None]), name


def test_gpus_are_asked_for_by_workers_alone() -> None:
    for name, spec in ray_jobs():
        cluster = spec["rayClusterSpec"]
        gpu = "gpu" in name
        (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
        assert "nvidia.com/gpu" not in head["resources"]["limits"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert worker["resources"]["limits"].get("nvidia.com/gpu") == ("1" if gpu else None)
        assert head["image"] == worker["image"] == DEFAULTS.image + ("-cuda" if gpu else "")


# Security


def test_every_container_of_every_pod_is_restricted() -> None:
    """The restricted profile (kubernetes.io/docs/concepts/security/pod-security-standards), and a read-only root."""
    seen = 0
    for name, pod in pods():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec), name
        assert all(set(v) & {"emptyDir", "persistentVolumeClaim", "configMap"} for v in spec["volumes"])
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == DEFAULTS.uid != 0
        assert spec["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in containers(pod):
            assert each["securityContext"] == {
                "runAsNonRoot": True,
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
                "seccompProfile": {"type": "RuntimeDefault"},
            }, name
            assert "hostPort" not in str(each.get("ports"))
            seen += 1
    assert seen >= 30


def test_every_pod_writes_to_volumes_alone_and_inputs_are_read_only() -> None:
    for name, pod in pods():
        volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
        for each in containers(pod):
            mounts = {m["mountPath"]: m for m in each["volumeMounts"]}
            environment = {e["name"]: e["value"] for e in each["env"]}
            assert "emptyDir" in volumes[mounts[environment["HOME"]]["name"]], name
            assert "emptyDir" in volumes[mounts["/tmp"]["name"]]  # Ray's sessions
            for variable, value in environment.items():
                if variable.startswith(("XDG", "TIES", "NUMBA", "TORCHINDUCTOR", "CUDA")):
                    assert Path(value).is_relative_to(environment["HOME"]), variable
            if "/inputs" in mounts:
                assert mounts["/inputs"]["readOnly"] is True
                assert volumes["inputs"]["persistentVolumeClaim"]["readOnly"] is True
                assert "readOnly" not in mounts["/output"]


def test_only_a_launcher_has_a_token_and_only_for_its_ray_job() -> None:
    for name, pod in pods():
        launches = pod["metadata"]["labels"][COMPONENT] == "launch"
        assert pod["spec"]["automountServiceAccountToken"] is launches, name
    for _, role in every("Role"):
        assert role["rules"] == [
            {
                "apiGroups": ["ray.io"],
                "resources": ["rayjobs"],
                "resourceNames": [DEFAULTS.name],
                "verbs": ["get", "delete"],
            },
            {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]},
        ]
    script = (FOLDER / "launch.sh").read_text()
    assert set(re.findall(r"kubectl (\w+)", script)) == {"get", "delete", "create"}


def policies() -> dict[str, Object]:
    return {d["spec"]["podSelector"]["matchLabels"][COMPONENT]: d["spec"] for _, d in every("NetworkPolicy")}


def lets_in(policy: Object, port: int, *, namespace: str = "", component: str = "") -> bool:
    for rule in policy["ingress"]:
        namespaces = [f["namespaceSelector"]["matchLabels"] for f in rule["from"] if "namespaceSelector" in f]
        own = [f["podSelector"]["matchLabels"] for f in rule["from"] if "podSelector" in f]
        who = {"kubernetes.io/metadata.name": namespace} in namespaces or {
            APP: "ties-dist",
            COMPONENT: component,
        } in own
        if who and ("ports" not in rule or port in [p["port"] for p in rule["ports"]]):
            return True
    return False


def test_the_network_lets_through_what_a_merge_needs_and_nothing_else() -> None:
    found = policies()
    assert set(found) == {pod["metadata"]["labels"][COMPONENT] for _, pod in pods()}  # each pod has one
    ray = found["ray"]
    for port in (8265, 52365):
        assert lets_in(ray, port, namespace=DEFAULTS.operator_namespace)
    assert lets_in(ray, 8080, namespace=DEFAULTS.monitoring_namespace)
    for port in (6379, 8265, 10001, 33333):
        assert lets_in(ray, port, component="ray")  # workers, head and submitter, among themselves
    assert not lets_in(ray, 8265, namespace=DEFAULTS.monitoring_namespace)
    assert not lets_in(ray, 8265, namespace="default") and not lets_in(ray, 8265, component="launch")
    assert found["launch"]["ingress"] == found["local"]["ingress"] == []
    for component, policy in found.items():
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        ports = [(p["protocol"], p["port"]) for rule in policy["egress"] for p in rule.get("ports", ())]
        assert {("UDP", 53), ("TCP", 53), ("TCP", 2049)} <= set(ports), component  # names, storage
        assert (("TCP", 6443) in ports) == (component == "launch")  # the API server
    assert {"podSelector": {"matchLabels": {APP: "ties-dist", COMPONENT: "ray"}}} in ray["egress"][0]["to"]


def test_the_namespace_refuses_what_is_not_restricted() -> None:
    ((_, namespace),) = every("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name in KUBERNETES:
        for document in documents(name):
            assert document["metadata"].get("namespace", namespace["metadata"]["name"]) == namespace["metadata"]["name"]


def test_a_schedule_forbids_overlap_and_waits_in_the_job_that_is_forbidden_to() -> None:
    crons = every("CronJob")
    assert len(crons) == 2
    for name, cron in crons:
        assert cron["spec"]["concurrencyPolicy"] == "Forbid", name
        (launch,) = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
        assert launch["command"] == ["bash", "/launch/launch.sh", DEFAULTS.name, "/launch/rayjob.yaml"]
        (config,) = [d for d in documents(name) if d["kind"] == "ConfigMap"]
        assert config["data"]["launch.sh"] == (FOLDER / "launch.sh").read_text()
        (job,) = [d for d in documents(name) if d["kind"] == "RayJob"]
        assert job["metadata"]["name"] == DEFAULTS.name


# What is said twice, since nothing can share it


def test_the_image_agrees_with_the_settings() -> None:
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    assert re.findall(r"^ARG (\w+)", text, re.MULTILINE) == ["VARIANT"]
    (environment,) = re.findall(r"^ENV (.*)$", text, re.MULTILINE)
    assert DEFAULTS.home.items() <= dict(pair.split("=", 1) for pair in environment.split()).items()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == [f"{DEFAULTS.uid}:{DEFAULTS.uid}"]
    assert set(re.findall(r"--(?:uid|gid|owner|group) (\d+)", text)) == {str(DEFAULTS.uid)}
    assert f"{DEFAULTS.scratch} {DEFAULTS.inputs} {DEFAULTS.output}" in text
    assert "--constraint /build/constraints.txt" in text
    assert not re.search(r"\bg\+\+|build-essential|gcc", text)
    for copied in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in copied.split())


def test_versions_are_those_of_the_pins() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    assert DEFAULTS.ray_version == pins["ray"]
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None and DEFAULTS.image.endswith(f":{version[1]}")


def test_the_sizing_table_is_computed_from_what_was_measured() -> None:
    assert sizing.table() in (FOLDER / "README.md").read_text()
    report = (ROOT / "benchmarks" / "results" / sizing.REPORT).read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in report.splitlines() if "| llama-3-70b" in line]
    assert [row for row in rows if f"{sizing.RATE_GB:.2f}" in row and row[2] == "169.7"]
    assert [row for row in rows if row[2] == f"{sizing.READS:.3f}"]


def test_a_size_is_what_it_is_by_hand() -> None:
    """Base and three experts of 10 billion elements: 80 GB in, 20 GB out, on two workers."""
    found = sizing.size("10B", 10e9, 3, 2)
    assert (found.inputs, found.output) == (80.0, 20.0)
    assert found.computing_seconds == pytest.approx(80 / 6.66)
    assert found.storage_seconds[0] == pytest.approx((1.558 * 80 + 20) / 2)


def test_the_readme_names_every_manifest() -> None:
    text = (FOLDER / "README.md").read_text()
    for name in MANIFESTS:
        assert f"{name}.yaml" in text, name
