"""Validation of Kubernetes objects: the API's own schemas, and those of custom resources.

Custom resources are checked as an API server does it, but strictly: a key that a schema does not
name is refused, and the rules in CEL are evaluated.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import pytest
import yaml
from celpy.adapter import json_to_cel
from kubernetes_validate import utils

VERSION = "1.37"
# Where definitions of custom resources are, in files of any number of them.
FOLDERS = [
    Path(__file__).resolve().parents[3] / "shared" / "data" / "crd",
    *map(Path, os.environ.get("MILLRACE_CRDS", "").split()),
]
# Kinds that are rendered -> where their definitions come from.
CUSTOM = {
    "ScaledObject": "kedacore/keda",
    "TriggerAuthentication": "kedacore/keda",
    "LeaderWorkerSet": "kubernetes-sigs/lws",
    "InferencePool": "kubernetes-sigs/gateway-api-inference-extension",
    "Gateway": "kubernetes-sigs/gateway-api",
    "HTTPRoute": "kubernetes-sigs/gateway-api",
    "PodMonitor": "prometheus-operator/prometheus-operator",
    "PrometheusRule": "prometheus-operator/prometheus-operator",
    "PodMonitoring": "GoogleCloudPlatform/prometheus-engine",
    "Rules": "GoogleCloudPlatform/prometheus-engine",
    "VolumeSnapshot": "kubernetes-csi/external-snapshotter",
    "VolumeSnapshotClass": "kubernetes-csi/external-snapshotter",
    "ComputeClass": "a GKE cluster",
}


@functools.cache
def _content(path: str) -> Any:
    return utils.schema_contents(path, VERSION)


@functools.cache
def _validator(kind: str, api: str) -> Any:
    """Of one kind of the API, strict: built once, as its definitions are large."""
    import referencing

    folder = f"kubernetes-json-schema/v{_closest()}-local-strict"
    group = api.split("/")[0].split(".")[0] + "-" + api.split("/")[1] if "/" in api else api
    schema = _content(f"{folder}/{kind.lower()}-{group}.json")
    resource = referencing.Resource.from_contents(schema)
    definitions = referencing.Resource.from_contents(_content(f"{folder}/_definitions.json"))
    registry = definitions @ (resource @ referencing.Registry())
    return jsonschema.validators.Draft202012Validator(schema, registry=registry)


@functools.cache
def _closest() -> str:
    return str([v for v in utils.all_versions() if utils.major_minor(v) == VERSION][-1])


def check_core(thing: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError."""
    _validator(thing["kind"], thing["apiVersion"]).validate(thing)


# --- custom resources --------------------------------------------------------------------------


@functools.cache
def custom_schema(kind: str) -> dict[str, Any]:
    """The schema of a kind, with unknown keys refused. Skips the test where it is not there."""
    text = _definitions().get(kind)
    if text is None:
        pytest.skip(f"no definition of {kind}: put that of {CUSTOM[kind]} into a folder of "
                    "MILLRACE_CRDS")  # fmt: skip
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in definition["spec"]["versions"] if v["storage"])
    return _closed(version["schema"]["openAPIV3Schema"])


@functools.cache
def _definitions() -> dict[str, str]:
    """Kind -> its definition, as it is written."""
    found = {}
    for folder in FOLDERS:
        for path in sorted(folder.glob("*.yaml")):
            for text in re.split(r"^---$", path.read_text(), flags=re.MULTILINE):
                kind = re.search(r"^  names:\n(?:    .*\n)*?    kind: (\w+)$", text, re.MULTILINE)
                if kind and "kind: CustomResourceDefinition" in text:
                    found.setdefault(kind[1], text)
    return found


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as JSON Schema, in which every object has only the keys that it names."""
    found = dict(schema)
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    if "properties" in found:
        found["properties"] = {k: _closed(v) for k, v in found["properties"].items()}
        if not found.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(found.get(key), dict):
            found[key] = _closed(found[key])
    return found


@functools.cache
def _custom_validator(kind: str) -> Any:
    return jsonschema.validators.Draft202012Validator(custom_schema(kind))


def check_custom(thing: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError, or ValueError for a rule that does not hold."""
    kind = thing["kind"]
    body = {k: v for k, v in thing.items() if k != "metadata"}
    schema = custom_schema(kind)
    _custom_validator(kind).validate(body)
    for where, rule, value in _rules(schema, _with_defaults(schema, body), kind):
        if not _holds(rule["rule"], json.dumps(value)):
            raise ValueError(f"{where}: {rule['message']}")


def _with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """What an API server adds before it evaluates rules."""
    if isinstance(value, dict) and "properties" in schema:
        found = dict(value)
        for name, inner in schema["properties"].items():
            if name not in found and "default" in inner:
                found[name] = inner["default"]
            if name in found:
                found[name] = _with_defaults(inner, found[name])
        return found
    if isinstance(value, list) and "items" in schema:
        return [_with_defaults(schema["items"], one) for one in value]
    return value


def _rules(
    schema: dict[str, Any], value: Any, where: str
) -> Iterator[tuple[str, dict[str, str], Any]]:
    text = isinstance(value, str) and isinstance(schema.get("type"), list)
    for rule in schema.get("x-kubernetes-validations", ()) if not text else ():  # those of numbers
        if "oldSelf" not in rule["rule"]:  # those are of changes, and objects are new here
            yield where, rule, value
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                yield from _rules(inner, value[name], f"{where}.{name}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for at, one in enumerate(value):
            yield from _rules(schema["items"], one, f"{where}[{at}]")


@functools.cache
def _holds(rule: str, value: str) -> bool:
    environment = celpy.Environment()
    program = environment.program(environment.compile(rule))
    return bool(program.evaluate({"self": json_to_cel(json.loads(value))}))
