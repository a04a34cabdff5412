"""A cluster that has everything which a layout needs; tests take something away."""

from __future__ import annotations

from typing import Any

from millrace.deploy.bundle import cluster_objects
from millrace.deploy.check.cluster_checks import VERSIONS
from millrace.deploy.layout.layout import Layout
from millrace.deploy.manifests.model_volume import fill_objects, publish_objects
from millrace.deploy.manifests.parts import selector
from millrace.deploy.manifests.pool import gateway_class, router_service
from millrace.deploy.manifests.replicas import replica_objects
from tests.deploy.fake_cluster import FakeCluster


def true(kind: str, reason: str = "Ok") -> dict[str, str]:
    return {"type": kind, "status": "True", "reason": reason}


def false(kind: str, reason: str, message: str = "") -> dict[str, str]:
    return {"type": kind, "status": "False", "reason": reason, "message": message}


def make_healthy(cluster: FakeCluster, layout: Layout) -> None:
    space = layout.file.namespace
    cluster.put("Namespace", space)
    secrets = {"hub": "HF_TOKEN", "keys": "api-key", "registry": ".dockerconfigjson"}
    for name, key in secrets.items():
        cluster.put("Secret", name, space, data={key: "eA=="})
    for name, version in VERSIONS.items():
        versions = [{"name": version, "served": True}]
        cluster.put("CustomResourceDefinition", name, spec={"versions": versions})
    for where, name in (("keda", "keda-operator"), ("lws-system", "lws-controller-manager")):
        cluster.put("Deployment", name, where, status={"availableReplicas": 1})
    metrics = "v1beta1.external.metrics.k8s.io"
    cluster.put("APIService", metrics, status={"conditions": [true("Available")]})
    dns = {"kubernetes.io/service-name": "kube-dns"}
    cluster.put("EndpointSlice", "kube-dns-1", "kube-system", metadata={"labels": dns},
                endpoints=[{"conditions": {"ready": True}}])  # fmt: skip
    for number in range(16):
        resources = {"nvidia.com/gpu": "8", "cpu": "200"}
        cluster.put("Node", f"node-{number}", status={"allocatable": resources})
    _storage(cluster, layout)
    _entry(cluster, layout)


def _storage(cluster: FakeCluster, layout: Layout) -> None:
    space = layout.file.namespace
    default = {"annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
    for name in ("nfs", "efs-sc"):
        metadata = default if name == "nfs" else {}
        cluster.put("StorageClass", name, metadata=metadata, provisioner="nfs.csi.k8s.io")
    cluster.put("StorageClass", "disks", provisioner="ebs.csi.aws.com")
    for one in cluster_objects(layout):
        if one["kind"] in ("StorageClass", "ComputeClass"):
            content = {k: v for k, v in one.items() if k not in ("kind", "apiVersion", "metadata")}
            cluster.put(one["kind"], one["metadata"]["name"], **content)
    claims = [*fill_objects(layout), *publish_objects(layout), *replica_objects(layout)]
    for one in claims:
        if one["kind"] == "PersistentVolumeClaim":
            cluster.put("PersistentVolumeClaim", one["metadata"]["name"], space,
                        spec={"accessModes": one["spec"]["accessModes"]},
                        status={"phase": "Bound"})  # fmt: skip
    done = {"conditions": [true("Complete")]}
    cluster.put("Job", f"{layout.name}-download", space, status=done)
    cluster.put("VolumeSnapshot", layout.volume, space, status={"readyToUse": True})


def _entry(cluster: FakeCluster, layout: Layout) -> None:
    space, parents = layout.file.namespace, [{"conditions": [true("Accepted")]}]
    cluster.put("GatewayClass", gateway_class(layout))
    cluster.put("Gateway", layout.entry, space,
                status={"conditions": [true("Accepted"), true("Programmed")],
                        "addresses": [{"value": "10.0.0.9"}]})  # fmt: skip
    cluster.put("HTTPRoute", layout.entry, space, status={"parents": parents})
    cluster.put("InferencePool", layout.name, space, status={"parents": parents})
    cluster.put("Deployment", router_service(layout), space, spec={"replicas": 1},
                status={"readyReplicas": 1})  # fmt: skip


def put_pod(
    cluster: FakeCluster,
    layout: Layout,
    name: str,
    component: str = "replica",
    *,
    ready: bool = False,
    **state: Any,
) -> None:
    """state: of its container."""
    found = [true("Ready")] if ready else [true("PodScheduled"), false("Ready", "No")]
    status: dict[str, Any] = {"conditions": found}
    if state:
        status["containerStatuses"] = [{"name": component, "image": layout.image, **state}]
    cluster.put("Pod", name, layout.file.namespace,
                metadata={"labels": selector(layout, component)}, status=status)  # fmt: skip
