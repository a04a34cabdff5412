"""Volumes: whether classes suit them, whether claims are bound, and whether the model is there."""

from __future__ import annotations

from collections.abc import Iterator

from millrace.deploy.check.cluster import Cluster, Thing
from millrace.deploy.check.conditions import condition, conditions, pod_state
from millrace.deploy.layout.layout import Layout
from millrace.deploy.manifests.model_volume import fill_objects, publish_objects
from millrace.deploy.manifests.replicas import replica_objects
from millrace.doctor.finding import Finding

CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
# Their disks are written by one machine, whatever a claim asks for.
BLOCK = ("ebs.csi.aws.com", "kubernetes.io/aws-ebs", "rancher.io/local-path",
         "kubernetes.io/no-provisioner", "pd.csi.storage.gke.io")  # fmt: skip
DEFAULT = "storageclass.kubernetes.io/is-default-class"


def storage(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """The class of every claim, and the claims that are there."""
    classes = {one["metadata"]["name"]: one for one in cluster.items(CLASSES)}
    claims = [
        one
        for one in (*fill_objects(layout), *publish_objects(layout), *replica_objects(layout))
        if one["kind"] == "PersistentVolumeClaim"
    ]
    for claim in claims:
        problem = _class_problem(layout, classes, claim)
        yield problem or _claim(cluster, layout, claim)


def _class_problem(layout: Layout, classes: dict[str, Thing], claim: Thing) -> Finding | None:
    title, spec = f"claim {claim['metadata']['name']}", claim["spec"]
    wanted = spec.get("storageClassName")
    usual = [one for one in classes.values()
             if (one["metadata"].get("annotations") or {}).get(DEFAULT) == "true"]  # fmt: skip
    found = classes.get(wanted) if wanted else (usual[0] if usual else None)
    key = "cache_volume" if claim["metadata"]["name"] == layout.cache else "model_volume"
    known = ", ".join(classes) or "none"
    choose = f"set {key}: {{storage_class: NAME}} in deploy.yaml; there are {known}"
    if found is None:
        ours = layout.file.on_google and key == "model_volume"
        why = f"no storage class {wanted}" if wanted else "the cluster has no default storage class"
        return Finding(
            "volumes", title, why, "fail", "kubectl apply -k cluster" if ours else choose
        )
    mode = spec["accessModes"][0]
    if mode == "ReadWriteMany" and found.get("provisioner") in BLOCK:
        name = found["metadata"]["name"]
        why = f"{name} makes disks that one machine writes, and many pods must read this one"
        return Finding("volumes", title, why, "fail", choose)
    return None


def _claim(cluster: Cluster, layout: Layout, claim: Thing) -> Finding:
    name, space = claim["metadata"]["name"], layout.file.namespace
    found = cluster.get(f"/api/v1/namespaces/{space}/persistentvolumeclaims/{name}")
    title = f"claim {name}"
    if found is None:
        return Finding("volumes", title, "not there yet; its class suits it")
    have = (found.get("spec") or {}).get("accessModes") or []
    want = claim["spec"]["accessModes"]
    if not set(want) <= set(have):
        value = f"is {', '.join(have)}, and {want[0]} is needed"
        again = f"kubectl delete pvc {name} -n {space}, and apply its folder again"
        return Finding("volumes", title, value, "fail", again)
    phase = (found.get("status") or {}).get("phase")
    if phase == "Bound":
        return Finding("volumes", title, "bound")
    why = _event(cluster, space, name) or "it waits for its first pod"
    look = f"kubectl describe pvc {name} -n {space}"
    return Finding("volumes", title, f"{phase or 'Pending'}: {why}", "warn", look)


def _event(cluster: Cluster, space: str, name: str) -> str:
    """The last warning about an object; empty if there is none."""
    found = [
        " ".join(str(one.get("message") or "").split())[:200]
        for one in cluster.items(f"/api/v1/namespaces/{space}/events")
        if (one.get("involvedObject") or {}).get("name") == name and one.get("type") == "Warning"
    ]
    return found[-1] if found else ""


def download(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Whether the model is on its volume."""
    if layout.ships:
        return
    space, name = layout.file.namespace, f"{layout.name}-download"
    job = cluster.get(f"/apis/batch/v1/namespaces/{space}/jobs/{name}")
    if job is None:
        yield Finding("model", "download", "not begun", "fail", "kubectl apply -k model")
        return
    found = conditions(job)
    logs = f"kubectl logs -n {space} job/{name}"
    done, failed = condition(found, "Complete"), condition(found, "Failed")
    if failed is not None and failed.status == "True":
        again = f"{logs}; then kubectl delete -n {space} job/{name} && kubectl apply -k model"
        yield Finding("model", "download", f"failed: {failed.words}", "fail", again)
    elif done is not None and done.status == "True":
        yield Finding("model", "download", "complete")
        yield from _published(cluster, layout)
    else:
        why = _pod_words(cluster, space, name) or "under way"
        yield Finding("model", "download", why, "warn", logs)


def _published(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    if not publish_objects(layout):
        return
    space = layout.file.namespace
    path = f"/apis/snapshot.storage.k8s.io/v1/namespaces/{space}/volumesnapshots/{layout.volume}"
    found = cluster.get(path)
    if found is None:
        yield Finding("model", "snapshot", "not there: replicas have no disk to mount", "fail",
                      "kubectl apply -k model/publish")  # fmt: skip
    elif not (found.get("status") or {}).get("readyToUse"):
        error = ((found.get("status") or {}).get("error") or {}).get("message", "being made")
        look = f"kubectl describe volumesnapshot {layout.volume} -n {space}"
        yield Finding("model", "snapshot", error, "warn", look)
    else:
        yield Finding("model", "snapshot", "ready")


def _pod_words(cluster: Cluster, space: str, job: str) -> str:
    pods = [
        pod
        for pod in cluster.items(f"/api/v1/namespaces/{space}/pods")
        if (pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-name") == job
    ]
    return pod_state(pods[-1]).words if pods else ""
