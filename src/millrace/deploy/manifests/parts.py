"""What many objects share: metadata, who a container runs as, its temporary files, probes."""

from __future__ import annotations

from typing import Any

from millrace.deploy.layout.layout import Layout

Object = dict[str, Any]
USER = 10001  # of the images; no process runs as root


def labels(layout: Layout, component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": layout.name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": "millrace",
    }


def selector(layout: Layout, component: str) -> dict[str, str]:
    """The labels that never change, by which pods are found."""
    return {name: value for name, value in labels(layout, component).items()
            if not name.endswith("managed-by")}  # fmt: skip


def thing(api: str, kind: str, name: str, layout: Layout, component: str, **others: Any) -> Object:
    metadata = {"name": name, "labels": labels(layout, component)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **others}


def pod_security() -> Object:
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> Object:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def container(name: str, image: str, command: list[str], **others: Any) -> Object:
    """A container that writes nothing but its volumes."""
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, *others.pop("volumeMounts", [])]
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": command,
        **others,
        "securityContext": container_security(),
        "volumeMounts": mounts,
    }


def pod_spec(layout: Layout, containers: list[Object], **others: Any) -> Object:
    """A pod that gets no token of the cluster's API. volumes: besides /tmp."""
    volumes = [{"name": "tmp", "emptyDir": {}}, *others.pop("volumes", [])]
    secret = layout.file.image_pull_secret
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        **({"imagePullSecrets": [{"name": secret}]} if secret else {}),
        **others,
        "containers": containers,
        "volumes": volumes,
    }


def get(path: str, port: str, **times: int) -> Object:
    return {"httpGet": {"path": path, "port": port}, "timeoutSeconds": 5, **times}


def connects(port: str, **times: int) -> Object:
    return {"tcpSocket": {"port": port}, "timeoutSeconds": 5, **times}


def pause(seconds: int) -> Object:
    """A hook that waits, so that nobody sends to a pod any more when it is told to stop."""
    return {"preStop": {"sleep": {"seconds": seconds}}}


def from_secret(variable: str, secret: str, key: str) -> Object:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
