"""A Kubernetes API in this process, on a thread of its own, with objects that a test puts in."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kmock
import yaml

KINDS = {
    "Deployment": "apps/v1/deployments",
    "Secret": "v1/secrets",
    "Node": "v1/nodes",
    "Pod": "v1/pods",
    "Event": "v1/events",
    "DaemonSet": "apps/v1/daemonsets",
    "ResourceQuota": "v1/resourcequotas",
    "PersistentVolumeClaim": "v1/persistentvolumeclaims",
    "StorageClass": "storage.k8s.io/v1/storageclasses",
    "Job": "batch/v1/jobs",
    "CustomResourceDefinition": "apiextensions.k8s.io/v1/customresourcedefinitions",
    "APIService": "apiregistration.k8s.io/v1/apiservices",
    "EndpointSlice": "discovery.k8s.io/v1/endpointslices",
    "VolumeSnapshot": "snapshot.storage.k8s.io/v1/volumesnapshots",
    "ComputeClass": "cloud.google.com/v1/computeclasses",
    "GatewayClass": "gateway.networking.k8s.io/v1/gatewayclasses",
    "Gateway": "gateway.networking.k8s.io/v1/gateways",
    "HTTPRoute": "gateway.networking.k8s.io/v1/httproutes",
    "InferencePool": "inference.networking.k8s.io/v1/inferencepools",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1/leaderworkersets",
}


class FakeCluster:
    """Objects by kind, namespace and name; they may be changed while it runs."""

    def __init__(self, handler: Any) -> None:
        self._handler = handler
        self.version = {"gitVersion": "v1.33.1"}
        handler["get /version/"] << (lambda: dict(self.version))  # what the client asks first

    def put(self, kind: str, name: str, space: str | None = None, **content: Any) -> None:
        metadata = {"name": name, **content.pop("metadata", {})}
        if space:
            metadata["namespace"] = space
        if kind == "Namespace":  # whose path the library reads as something else
            self._handler[f"get /api/v1/namespaces/{name}"] << {"metadata": metadata}
            return
        key = (KINDS[kind], space, name)
        self._handler.objects[key] = {"kind": kind, "metadata": metadata, **content}

    def change(self, kind: str, name: str, space: str | None = None, **content: Any) -> None:
        self._handler.objects[KINDS[kind], space, name].patch(content)

    def remove(self, kind: str, name: str, space: str | None = None) -> None:
        del self._handler.objects[KINDS[kind], space, name]

    def answer(self, path: str, content: Any) -> None:
        """What a path answers, whatever the objects are; an int is a status."""
        self._handler[f"get {path}"] << content

    def methods(self) -> set[str]:
        """Of all requests so far."""
        return {str(one.method.value) for one in self._handler}


@contextmanager
def fake_cluster(folder: Path) -> Iterator[tuple[FakeCluster, str]]:
    """(the cluster, the path of a kubeconfig that leads to it)."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    handler = kmock.KubernetesEmulator()
    server = kmock.Server(handler)

    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(timeout=30)

    wait(handler.__aenter__())
    wait(server.__aenter__())
    config = folder / "kubeconfig"
    config.write_text(yaml.safe_dump(_config(str(server.url).rstrip("/"))))
    try:
        yield FakeCluster(handler), str(config)
    finally:
        wait(server.__aexit__(None, None, None))
        wait(handler.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=30)
        loop.close()


def _config(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {"token": "t"}}],
        "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        "current-context": "fake",
    }
