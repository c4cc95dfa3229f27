"""Kubernetes' own judgement of a manifest, without a cluster: core schemas of `kubernetes-validate`, KubeRay's CRDs.

The API server drops fields it does not know, silently unless asked; here they are refused. What a CRD says in CEL rules
or KubeRay's operator in code is not in its schema: tests check by hand what of that concerns us.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[1]
CRDS = Path(os.environ.get("TIES_DIST_KUBERAY_CRDS", ROOT / ".." / "shared" / "kuberay")).resolve()
VERSIONS = ("1.31", "1.36")
"""Of Kubernetes: podFailurePolicy is stable since the first."""

Object = dict[str, Any]


def closed(schema: Mapping[str, Any]) -> Object:
    """A CRD's openAPIV3Schema as a JSON schema that refuses unknown fields.

    The server fills in defaults before it validates: a required field that has one may be left out.
    """
    if schema.get("x-kubernetes-int-or-string"):
        return {k: v for k, v in schema.items() if k == "pattern"} | {"type": ["integer", "string"]}
    found: Object = {k: v for k, v in schema.items() if not k.startswith("x-kubernetes-") and k != "default"}
    if "properties" in schema:
        found["properties"] = {name: closed(each) for name, each in schema["properties"].items()}
        known = schema["properties"]
        found["required"] = [n for n in schema.get("required", ()) if "default" not in known.get(n, {})]
    for key in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(key), Mapping):
            found[key] = closed(schema[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            found[key] = [closed(each) for each in schema[key]]
    if schema.get("nullable"):
        found["type"] = [schema["type"], "null"]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and not is_open:
        found["additionalProperties"] = False
    return found


@cache
def custom_validator(kind: str, version: str) -> Draft202012Validator:
    crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=yaml.CSafeLoader)
    served = {v["name"]: v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["served"]}
    schema = closed(served[version])
    schema["properties"]["metadata"] = {"type": "object"}  # the server's own type, checked with the core schemas
    schema["required"] = [*schema.get("required", ()), "apiVersion", "kind", "metadata", "spec"]
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def check_core(document: Object) -> None:
    """Raises kubernetes_validate.ValidationError, SchemaNotFoundError."""
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def check_custom(document: Object) -> None:
    """Raises jsonschema.ValidationError; kubernetes_validate.ValidationError for metadata and pod templates."""
    group, version = document["apiVersion"].split("/")
    assert group == "ray.io"
    custom_validator(document["kind"], version).validate(document)
    check_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    for template in pod_templates(document):
        named = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "each"}}
        check_core(named | {"template": template})


def check(document: Object) -> None:
    (check_custom if document["apiVersion"].startswith("ray.io/") else check_core)(document)


def pod_templates(node: Any) -> Iterator[Object]:
    """Every pod template, however deep: whatever has a `spec` with containers."""
    if isinstance(node, dict):
        if isinstance(node.get("spec"), dict) and "containers" in node["spec"]:
            yield node
        for each in node.values():
            yield from pod_templates(each)
    elif isinstance(node, list):
        for each in node:
            yield from pod_templates(each)


def containers(template: Object) -> list[Object]:
    spec = template["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]
