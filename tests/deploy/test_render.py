"""What is rendered: valid for the API and for Kustomize, and safe, whatever the deploy file."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from millrace.cli import run
from millrace.deploy.bundle import write
from millrace.errors import ConfigError
from tests.deploy.kustomize import build
from tests.deploy.schemas import CUSTOM, check_core, check_custom
from tests.deploy.variants import VARIANTS, find, layout, objects, rendered

GOLDEN = Path(__file__).parent / "golden"


def every(kinds: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """Each different object of all variants once."""
    return {
        json.dumps(one, sort_keys=True): one
        for name in VARIANTS
        for _, one in objects(name)
        if kinds is None or one["kind"] in kinds
    }


def test_every_object_of_the_api_is_valid_and_names_nothing_unknown() -> None:
    checked = Counter(one["kind"] for one in every().values() if one["kind"] not in CUSTOM)
    for one in every().values():
        if one["kind"] not in CUSTOM:
            check_core(one)
    assert set(checked) == {
        "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy", "Namespace", "Job", "Pod",
        "PersistentVolumeClaim", "StorageClass",
    }  # fmt: skip


@pytest.mark.parametrize("kind", CUSTOM)
def test_every_custom_resource_is_valid(kind: str) -> None:
    found = every({kind})
    assert found
    for one in found.values():
        check_custom(one)


def test_the_checks_can_fail() -> None:
    """Of the API, of a custom resource's schema, and of its rules."""
    deployment = json.loads(json.dumps(find("single", "Deployment")))
    deployment["spec"]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check_core(deployment)
    scaled = json.loads(json.dumps(find("scaled", "ScaledObject")))
    scaled["spec"]["minReplicas"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check_custom(scaled)
    del scaled["spec"]["minReplicas"]
    scaled["spec"]["minReplicaCount"] = 13
    with pytest.raises(ValueError, match="less than or equal to maxReplicaCount"):
        check_custom(scaled)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What Kustomize makes of every folder of every variant but `cluster`, all in one call: each
    variant has a namespace of its own."""
    root, folders = tmp_path_factory.mktemp("variants"), []
    for name in VARIANTS:
        write(rendered(name), root / name)
        kept = ("overlays/" + layout(name).file.platform, "model", "model/publish", "bench")
        folders += [f"{name}/{folder}" for folder in kept if (root / name / folder).is_dir()]
    (root / "kustomization.yaml").write_text(yaml.safe_dump({"resources": folders}))
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return list(yaml.load_all(build(root), Loader=loader))


def test_kustomize_builds_every_folder(built: list[dict[str, Any]]) -> None:
    def names(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return sorted((one["kind"], one["metadata"]["name"]) for one in found)

    for name in VARIANTS:
        made = [one for one in built if one["metadata"]["namespace"] == name]
        expected = [one for folder, one in objects(name) if folder != "cluster"]
        assert names(made) == names(expected)


def test_what_belongs_to_the_cluster_has_no_namespace(tmp_path: Path) -> None:
    write(rendered("scaled"), tmp_path / "out")
    made = list(yaml.safe_load_all(build(tmp_path / "out" / "cluster")))
    assert {one["kind"] for one in made} == {
        "Namespace", "StorageClass", "VolumeSnapshotClass", "ComputeClass",
    }  # fmt: skip
    assert {one["metadata"].get("namespace") for one in made} == {None}


def test_an_overlay_places_what_the_base_leaves_open(built: list[dict[str, Any]]) -> None:
    for name, selector in (
        ("scaled", {"cloud.google.com/compute-class": "millrace"}),
        ("hosts", {"node.kubernetes.io/instance-type": "p6-b200.48xlarge"}),
    ):
        (found,) = [one for one in built
                    if one["metadata"]["namespace"] == name
                    and one["metadata"]["name"] == "millrace-replica"
                    and one["kind"] in ("Deployment", "LeaderWorkerSet")]  # fmt: skip
        for spec in pod_specs(found):
            assert spec["nodeSelector"] == selector
            assert spec["tolerations"]
            assert spec["containers"][0]["command"], "the patch leaves the rest as it was"


def test_other_platforms_have_no_word_of_google() -> None:
    for name in [name for name in VARIANTS if not layout(name).file.on_google]:
        text = "".join(rendered(name).values()).lower()
        assert not [word for word in ("gke", "google", "gcloud", "hyperdisk") if word in text]


def test_traces_reach_their_collector() -> None:
    """Gateway and replicas send them, and may; those of others may not."""
    url, labels = (
        "http://collector.observe:4318/v1/traces", {"kubernetes.io/metadata.name": "observe"},
    )  # fmt: skip
    way = {
        "ports": [{"protocol": "TCP", "port": 4318}],
        "to": [{"namespaceSelector": {"matchLabels": labels}}],
    }
    for part in ("replica", "gateway"):
        (spec,) = pod_specs(find("gateway", "Deployment", part))
        command = shlex.join(spec["containers"][0]["command"])
        assert f"--otlp-traces-endpoint {url}" in command
        assert way in find("gateway", "NetworkPolicy", part)["spec"]["egress"]
        assert "otlp" not in json.dumps(find("single", "Deployment"))
    assert len(find("single", "NetworkPolicy", "replica")["spec"]["egress"]) == 1


@pytest.mark.parametrize(("name", "kind"), [("gateway", "PrometheusRule"), ("scaled", "Rules")])
def test_the_rules_are_those_that_prometheus_reads(name: str, kind: str, tmp_path: Path) -> None:
    groups = find(name, kind)["spec"]["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert "MillraceEngineDown" in alerts
    assert {group["interval"] for group in groups} == {"1m"}
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    command = [tool, "check", "rules", str(tmp_path / "rules.yml")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_the_inventory_of_every_variant_is_as_it_was() -> None:
    """Rewrite golden/inventory.json with what this shows, if the change is meant."""
    found = {
        name: [
            f"{folder}: {one['kind']} {one['metadata']['name']}" for folder, one in objects(name)
        ]
        for name in VARIANTS
    }
    assert found == json.loads((GOLDEN / "inventory.json").read_text())


def test_one_whole_variant_is_as_it_was() -> None:
    text = "\n".join(f"# {name}\n{text}" for name, text in sorted(rendered("single").items())
                     if name.endswith(".yaml"))  # fmt: skip
    assert text == (GOLDEN / "single.yaml").read_text()


# --- what holds for all of them ----------------------------------------------------------------


def pod_specs(one: Any) -> list[dict[str, Any]]:
    """Every pod spec within an object."""
    if isinstance(one, dict):
        own = [one] if "containers" in one else []
        return own + [spec for value in one.values() for spec in pod_specs(value)]
    if isinstance(one, list):
        return [spec for value in one for spec in pod_specs(value)]
    return []


def all_pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """(variant, pod spec)"""
    for name in VARIANTS:
        for _, one in objects(name):
            yield from ((name, spec) for spec in pod_specs(one))


def test_nothing_runs_as_root_or_may_become_it() -> None:
    for _, spec in all_pods():
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        for one in [*spec["containers"], *spec.get("initContainers", ())]:
            security = one["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}


def test_every_container_says_its_size_and_a_fixed_image() -> None:
    for _, spec in all_pods():
        for one in spec["containers"]:
            assert {"cpu", "memory"} <= set(one["resources"]["requests"])
            assert "memory" in one["resources"]["limits"]
            tag = one["image"].rsplit(":", 1)[1]
            assert tag not in ("latest", "main")


def test_replicas_read_the_model_and_cannot_write_it() -> None:
    for name, spec in all_pods():
        for one in spec["containers"]:
            mounts = {m["name"]: m for m in one["volumeMounts"]}
            if one["name"] in ("replica", "bench") and not layout(name).ships:
                assert mounts["model"]["readOnly"]
            for mount in mounts:
                assert mount in {volume["name"] for volume in spec["volumes"]}


def test_mounted_claims_exist() -> None:
    for name in VARIANTS:
        claims = {one["metadata"]["name"] for _, one in objects(name)
                  if one["kind"] == "PersistentVolumeClaim"}  # fmt: skip
        used = {
            volume["persistentVolumeClaim"]["claimName"]
            for _, one in objects(name)
            for spec in pod_specs(one)
            for volume in spec["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert used <= claims
        assert claims <= used | {f"{layout(name).volume}-fill"}


def test_services_policies_and_budgets_select_pods_that_exist() -> None:
    for name in VARIANTS:
        pods = [
            template["metadata"]["labels"]
            for _, one in objects(name)
            for template in templates(one)
        ]
        pods += [{**labels, "leaderworkerset.sigs.k8s.io/worker-index": "0"} for labels in pods]
        for _, one in objects(name):
            wanted = selected(one)
            if wanted is not None:
                assert any(wanted.items() <= labels.items() for labels in pods), one


def templates(one: dict[str, Any]) -> list[dict[str, Any]]:
    spec = one.get("spec", {})
    if one["kind"] == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        return [group["leaderTemplate"], group["workerTemplate"]]
    return [spec["template"]] if "template" in spec else []


def selected(one: dict[str, Any]) -> dict[str, str] | None:
    spec = one.get("spec", {})
    if one["kind"] == "Service":
        return dict(spec["selector"])
    if one["kind"] == "NetworkPolicy":
        return dict(spec["podSelector"]["matchLabels"])
    if one["kind"] in ("PodDisruptionBudget", "InferencePool", "PodMonitor", "PodMonitoring"):
        return dict(spec["selector"]["matchLabels"])
    return None


def test_targets_of_ports_are_names_of_ports() -> None:
    for name in VARIANTS:
        for _, one in objects(name):
            for spec in pod_specs(one):
                for container in spec["containers"]:
                    ports = {port["name"] for port in container.get("ports", ())}
                    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                        found = container.get(probe, {})
                        target = found.get("httpGet", found.get("tcpSocket"))
                        assert target is None or target["port"] in ports


# --- the command -------------------------------------------------------------------------------


def test_the_command_writes_and_writes_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "deploy.yaml", tmp_path / "out"
    file.write_text("model: millrace-mini\ngpu: cpu\nbench: {}\n")
    assert run(["deploy", "render", str(file), "-o", str(out)]) == 0
    assert (out / "bench" / "bench.yaml").is_file()
    assert "README.md says what to do" in capsys.readouterr().out
    file.write_text("model: millrace-mini\ngpu: cpu\n")
    assert run(["deploy", "render", str(file), "-o", str(out)]) == 0
    assert not (out / "bench").exists(), "what is no longer rendered is gone"


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="name another folder"):
        write({"a": "b"}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
