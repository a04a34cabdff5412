"""All files of one deployment: Kustomize folders, scripts, images and the guide, as texts by path.

folder       what
cluster/     what belongs to the cluster: namespace, classes of storage and machines
model/       the volume of the model and the Job that fills it; model/publish/: many may read it
base/        replicas, entry, network, budgets, scaling: no word of a platform
overlays/X/  the base on platform X
bench/       the benchmark
images/      Dockerfiles; compose/ and systemd/ in place of all above on one machine
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.deploy.files.cluster_script import cluster_script
from millrace.deploy.files.images import dockerfiles
from millrace.deploy.files.machine import machine_files
from millrace.deploy.guide import guide
from millrace.deploy.layout.layout import Layout
from millrace.deploy.layout.yaml_text import documents, yaml_text
from millrace.deploy.manifests import (
    bench,
    gateway,
    model_volume,
    network,
    observe,
    placement,
    pool,
    replicas,
)
from millrace.errors import ConfigError

MARK = ".millrace-deploy"  # in a folder that was rendered, so that it may be rendered again
Objects = list[dict[str, Any]]


def render(layout: Layout) -> dict[str, str]:
    """Path -> text of every file."""
    files = {**dockerfiles(layout)}
    if layout.file.platform == "machine":
        files |= machine_files(layout)
    else:
        files |= _on_cluster(layout)
    files["README.md"] = guide(layout, sorted(files))
    files[MARK] = "Made by `millrace deploy render`; every file here is written anew by it.\n"
    return files


def _on_cluster(layout: Layout) -> dict[str, str]:
    files = {"cluster.sh": cluster_script(layout)}
    for folder, content in folders(layout).items():
        for name, text in content.items():
            files[f"{folder}/{name}"] = text
    if layout.file.entry == "inference-pool":
        files["router/values.yaml"] = yaml_text(pool.router_values(layout))
    return files


def folders(layout: Layout) -> dict[str, dict[str, str]]:
    """Kustomize folder -> its files, kustomization.yaml among them."""
    platform = layout.file.platform
    found = {
        "cluster": _folder(layout, {"cluster": cluster_objects(layout)}, namespaced=False),
        "base": _folder(layout, base_objects(layout)),
        f"overlays/{platform}": _overlay(layout),
    }
    optional: dict[str, Objects] = {
        "model": model_volume.fill_objects(layout),
        "model/publish": model_volume.publish_objects(layout),
        "bench": bench.bench_objects(layout),
    }
    for folder, objects in optional.items():
        if objects:
            found[folder] = _folder(layout, {folder.rsplit("/", 1)[-1]: objects})
    return found


def cluster_objects(layout: Layout) -> Objects:
    # The router's chart says nothing of what its pods may do, so that "restricted" refuses them.
    level = "baseline" if layout.file.entry == "inference-pool" else "restricted"
    enforce = {"pod-security.kubernetes.io/enforce": level}
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": layout.file.namespace, "labels": enforce},
    }
    return [namespace, *model_volume.storage_objects(layout), *placement.compute_class(layout)]


def base_objects(layout: Layout) -> dict[str, Objects]:
    """File -> objects, without those of a platform."""
    prometheus = layout.file.monitoring == "prometheus"
    found = {
        "replicas": replicas.replica_objects(layout),
        "entry": gateway.entry_objects(layout) + pool.pool_objects(layout),
        "network": network.network_policies(layout) + network.disruption_budgets(layout),
        "scale": observe.scalers(layout),
        "monitors": observe.monitors(layout) if prometheus else [],
        "rules": observe.rules(layout) if prometheus else [],
    }
    return {name: objects for name, objects in found.items() if objects}


def _overlay(layout: Layout) -> dict[str, str]:
    google = layout.file.monitoring == "google"
    objects = {}
    if google:
        objects = {"monitors": observe.monitors(layout), "rules": observe.rules(layout)}
    found = _folder(layout, objects, also=("../../base",))
    patches = placement.placement_patch(layout)
    if patches:
        found["placement.yaml"] = documents(patches)
        found["kustomization.yaml"] += yaml_text({"patches": [{"path": "placement.yaml"}]})
    return found


def _folder(
    layout: Layout,
    objects: Mapping[str, Objects],
    *,
    namespaced: bool = True,
    also: tuple[str, ...] = (),
) -> dict[str, str]:
    """also: other folders that it builds on."""
    files = {f"{name}.yaml": documents(content) for name, content in objects.items()}
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **({"namespace": layout.file.namespace} if namespaced else {}),
        "resources": [*also, *files],
    }
    return {"kustomization.yaml": yaml_text(kustomization), **files}


def write(files: Mapping[str, str], directory: Path) -> None:
    """Write the files, and remove what an earlier rendering left. Raises ConfigError for a folder
    that holds anything else."""
    try:
        if directory.exists() and any(directory.iterdir()) and not (directory / MARK).exists():
            raise ConfigError(
                f"--output {directory}: it holds files that were not rendered; name another folder"
            )
        _remove_old(directory, files)
        for name, text in files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            if text.startswith("#!"):
                path.chmod(0o755)
    except OSError as error:
        raise ConfigError(f"--output {directory}: {error.strerror}") from None


def _remove_old(directory: Path, files: Mapping[str, str]) -> None:
    """Files of an earlier rendering that this one has not. Nothing else is there."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_file() and str(path.relative_to(directory)) not in files:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
