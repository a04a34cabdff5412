"""GPUs of a cluster: who offers them, how many are free, what quotas and Google's classes say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from millrace.deploy.check.cluster import Cluster, Thing
from millrace.deploy.check.conditions import conditions
from millrace.deploy.layout import remedies
from millrace.deploy.layout.clouds import machine_for
from millrace.deploy.layout.layout import Layout
from millrace.deploy.manifests.replicas import gpu_resource
from millrace.doctor.finding import Finding

SPARK_PLUGIN = (0, 17, 4)  # the first device plugin that knows a DGX Spark's GPU


def wanted_gpus(layout: Layout) -> int:
    """GPUs of all pods, of an autoscaled fleet at its least, and one pod at any rate."""
    pods = max(1, layout.file.autoscale.min) if layout.file.autoscale else layout.count
    return layout.gpus * pods * layout.file.hosts


def gpus(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """What nodes offer. Where the platform makes machines when pods want them, none is no fault."""
    if not layout.file.has_gpus:
        return
    resource, need = gpu_resource(layout), wanted_gpus(layout)
    nodes = cluster.items("/api/v1/nodes")
    offers = [_count(node, resource) for node in nodes]
    total, largest = sum(offers), max(offers, default=0)
    if layout.file.on_google:
        yield Finding("GPUs", resource, f"{total} now; GKE makes machines for {need}")
        return
    add = _more_machines(layout, need)
    if not total:
        have = [n for n in nodes if _labelled(n)]
        why = f"{len(have)} machines have GPUs that nobody offers" if have else "no node has any"
        advice = remedies.INSTALL_GPU_PLUGIN if have or layout.file.platform == "plain" else add
        yield Finding("GPUs", resource, why, "fail", advice)
    elif total < need:
        yield Finding("GPUs", resource, f"{total} of {need}", "fail", add)
    elif largest < layout.gpus:
        value = f"{largest} on one machine, and a pod wants {layout.gpus}"
        yield Finding("GPUs", resource, value, "fail", add)
    else:
        yield Finding("GPUs", resource, f"{total}, {need} are wanted")


def _count(node: Thing, resource: str) -> int:
    return int(((node.get("status") or {}).get("allocatable") or {}).get(resource, 0))


def _labelled(node: Thing) -> bool:
    labels = node["metadata"].get("labels") or {}
    return any("gpu.present" in name or "gke-accelerator" in name for name in labels)


def _more_machines(layout: Layout, need: int) -> str:
    if layout.file.platform == "eks":
        size, machine = machine_for("eks", layout.file.gpu, layout.gpus)
        count = -(-need // size)
        return (
            f"eksctl scale nodegroup --cluster NAME --name gpus --nodes {count} "
            f"--nodes-max {count}  # {machine}"
        )
    return f"add machines for {need} GPUs, or set a smaller number of replicas in deploy.yaml"


def plugin(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """The version of the device plugin, where the GPU needs a new one."""
    if layout.file.gpu != "gb10":
        return
    found = [
        version
        for one in cluster.items("/apis/apps/v1/daemonsets")
        for container in one["spec"]["template"]["spec"]["containers"]
        if (version := re.search(r"k8s-device-plugin:v(\d+)\.(\d+)\.(\d+)", container["image"]))
    ]
    numbers = [tuple(int(part) for part in one.groups()) for one in found]
    if numbers and max(numbers) >= SPARK_PLUGIN:
        yield Finding("GPUs", "device plugin", ".".join(map(str, max(numbers))))
        return
    have = ".".join(map(str, max(numbers))) if numbers else "none"
    yield Finding("GPUs", "device plugin", f"{have}; a DGX Spark needs 0.17.4 or newer", "fail",
                  remedies.INSTALL_GPU_PLUGIN)  # fmt: skip


def quotas(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Quotas of the namespace that leave too few GPUs."""
    if not layout.file.has_gpus:
        return
    space, key = layout.file.namespace, f"requests.{gpu_resource(layout)}"
    need = wanted_gpus(layout)
    for one in cluster.items(f"/api/v1/namespaces/{space}/resourcequotas"):
        name = one["metadata"]["name"]
        hard = ((one.get("spec") or {}).get("hard") or {}).get(key)
        if hard is None:
            continue
        if int(hard) >= need:
            yield Finding("GPUs", f"quota {name}", f"{hard}, {need} are wanted")
        else:
            patch = f'{{"spec": {{"hard": {{"{key}": "{need}"}}}}}}'
            command = f"kubectl patch resourcequota {name} -n {space} --type merge -p '{patch}'"
            yield Finding("GPUs", f"quota {name}", f"{hard} of {need}", "fail", command)


def compute_class(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Google's list of ways to a machine: whether it is there, and what GKE finds wrong in it."""
    if not layout.file.on_google or not layout.file.has_gpus:
        return
    path = f"/apis/cloud.google.com/v1/computeclasses/{layout.name}"
    found = cluster.get(path)
    if found is None:
        yield Finding("GPUs", "ComputeClass", f"no {layout.name}: pods wait for ever", "fail",
                      "kubectl apply -k cluster")  # fmt: skip
        return
    bad = [one for one in conditions(found) if one.kind == "Health" and one.status != "True"]
    for one in bad:
        yield Finding("GPUs", "ComputeClass", one.words, "fail",
                      f"kubectl describe computeclass {layout.name}")  # fmt: skip
    if not bad:
        ways = len((found.get("spec") or {}).get("priorities") or [])
        yield Finding("GPUs", "ComputeClass", f"{layout.name}, {ways} ways to a machine")
