"""The model's files: a volume, and the Job that fills it.

Where a disk is written by one machine and then read by many (Google's Hyperdisk ML), a snapshot
lies between: the Job fills one claim, and replicas mount another that is made from its snapshot.
Elsewhere one claim of a shared file system serves both, and replicas mount it read-only.
"""

from __future__ import annotations

from millrace.deploy.layout.commands import download_command
from millrace.deploy.layout.layout import MODELS, Layout
from millrace.deploy.manifests.parts import (
    Object,
    container,
    from_secret,
    labels,
    pod_spec,
    thing,
)
from millrace.deploy.manifests.placement import ARM_TAINT

# File systems that many pods write, of platforms where they have a usual name.
SHARED_CLASSES = {"eks": "efs-sc", "gke-standard": "standard-rwx", "gke-autopilot": "standard-rwx"}
HYPERDISK = "hyperdisk-ml"


def fill_objects(layout: Layout) -> list[Object]:
    """The claim to fill and the Job; [] for a model that ships."""
    if layout.ships:
        return []
    name = filled_claim(layout)
    access = "ReadWriteOnce" if by_snapshot(layout) else "ReadWriteMany"
    return [_claim(layout, name, access), _job(layout, name)]


def publish_objects(layout: Layout) -> list[Object]:
    """What makes the filled disk readable by many machines; [] where it is already."""
    if layout.ships or not by_snapshot(layout):
        return []
    snapshot = thing("snapshot.storage.k8s.io/v1", "VolumeSnapshot", layout.volume, layout,
                     "download")  # fmt: skip
    source = {"persistentVolumeClaimName": filled_claim(layout)}
    snapshot["spec"] = {"volumeSnapshotClassName": snapshot_class(layout), "source": source}
    claim = _claim(layout, layout.volume, "ReadOnlyMany")
    claim["spec"]["dataSource"] = {
        "apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": layout.volume,
    }  # fmt: skip
    return [snapshot, claim]


def storage_objects(layout: Layout) -> list[Object]:
    """Classes of the cluster that the volumes need, where they are ours to make."""
    if layout.ships or not by_snapshot(layout):
        return []
    storage = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": layout.file.model_volume.storage_class or HYPERDISK},
        "provisioner": "pd.csi.storage.gke.io",
        "parameters": {"type": HYPERDISK, "provisioned-throughput-on-create": "2400Mi"},
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Delete",
        "allowVolumeExpansion": True,
    }
    snapshots = {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshotClass",
        "metadata": {"name": snapshot_class(layout)},
        "driver": "pd.csi.storage.gke.io",
        "deletionPolicy": "Delete",
    }
    return [storage, snapshots]


def by_snapshot(layout: Layout) -> bool:
    return layout.file.on_google


def snapshot_class(layout: Layout) -> str:
    return f"{layout.name}-snapshots"


def filled_claim(layout: Layout) -> str:
    return f"{layout.volume}-fill" if by_snapshot(layout) else layout.volume


def _claim(layout: Layout, name: str, access: str) -> Object:
    part = layout.file.model_volume
    usual = HYPERDISK if by_snapshot(layout) else SHARED_CLASSES.get(layout.file.platform, "")
    storage = part.storage_class or usual
    found = thing("v1", "PersistentVolumeClaim", name, layout, "download")
    found["spec"] = {
        "accessModes": [access],
        **({"storageClassName": storage} if storage else {}),
        "resources": {"requests": {"storage": layout.model_size}},
    }
    return found


def _machines(layout: Layout) -> dict[str, str]:
    """Which machines fill the volume; on Autopilot a family that can attach its disk."""
    part = layout.file.download
    found: dict[str, str] = {} if part.arch == "any" else {"kubernetes.io/arch": part.arch}
    if layout.file.platform == "gke-autopilot":
        family = "c4a" if part.arch == "arm64" else "c3"
        found["cloud.google.com/compute-class"] = "Performance"
        found["cloud.google.com/machine-family"] = family
    return found


def _job(layout: Layout, claim: str) -> Object:
    """It goes on where a lost machine stopped, since what has arrived stays on the volume."""
    part = layout.file.download
    size = {"cpu": part.cpu, "memory": part.memory}
    secret = layout.file.hub_token_secret
    main = container(
        "download",
        layout.cpu_image,
        download_command(layout),
        env=[{"name": "HOME", "value": "/tmp"},
             *([from_secret("HF_TOKEN", secret, "HF_TOKEN")] if secret else [])],
        resources={"requests": size, "limits": {"memory": part.memory}},
        volumeMounts=[{"name": "model", "mountPath": MODELS}],
    )  # fmt: skip
    where = _machines(layout)
    spec = pod_spec(
        layout,
        [main],
        restartPolicy="OnFailure",
        **({"nodeSelector": where} if where else {}),
        **({"tolerations": [ARM_TAINT]} if part.arch != "amd64" else {}),
        volumes=[{"name": "model", "persistentVolumeClaim": {"claimName": claim}}],
    )
    found = thing("batch/v1", "Job", f"{layout.name}-download", layout, "download")
    found["spec"] = {
        "backoffLimit": 20,
        "template": {"metadata": {"labels": labels(layout, "download")}, "spec": spec},
    }
    return found
