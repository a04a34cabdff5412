"""On which machines replicas run: selectors and tolerations of a platform, and Google's
ComputeClass.
"""

from __future__ import annotations

from millrace.deploy.layout.clouds import cloud_gpu, machine_for
from millrace.deploy.layout.layout import Layout
from millrace.deploy.manifests.parts import Object, thing

ARM_TAINT = {"key": "kubernetes.io/arch", "operator": "Equal", "value": "arm64",
             "effect": "NoSchedule"}  # fmt: skip
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
LEAD_SECONDS = 3600  # before a flex-start machine's week is over, another one is asked for
# Ways to a machine by the price that is wanted, each tried when those before have none.
ORDER = {
    "reserved": ("reservation", "flex-start", "spot"),
    "flex": ("reservation", "flex-start", "spot"),
    "spot": ("reservation", "spot", "flex-start"),
    "on-demand": ("reservation", "on-demand"),
}


ARM_GPUS = ("gb10", "gb200", "gb300")  # on machines whose processors are arm64


def placement(layout: Layout, gpus: int = 0) -> Object:
    """nodeSelector and tolerations of pods with GPUs, as many as replicas have or another number;
    both may be missing."""
    gpus = gpus or layout.gpus
    wanted = dict(layout.file.node_selector)
    if not layout.file.has_gpus:
        return {"nodeSelector": wanted} if wanted else {}
    if layout.file.on_google:
        wanted["cloud.google.com/compute-class"] = class_name(layout, gpus)
    if layout.file.platform == "eks":
        machine = machine_for("eks", layout.file.gpu, gpus)[1]
        wanted["node.kubernetes.io/instance-type"] = machine
        if layout.file.price == "spot":
            wanted["eks.amazonaws.com/capacityType"] = "SPOT"
    found: Object = {"nodeSelector": wanted} if wanted else {}
    found["tolerations"] = [GPU_TAINT]
    if layout.file.on_google:
        taint = {"key": "cloud.google.com/compute-class", "operator": "Equal",
                 "value": class_name(layout, gpus), "effect": "NoSchedule"}  # fmt: skip
        found["tolerations"].append(taint)
    if layout.file.gpu in ARM_GPUS:
        found["tolerations"].append(ARM_TAINT)
    return found


def class_name(layout: Layout, gpus: int) -> str:
    """The ComputeClass of machines for pods with so many GPUs: each has one type of machine."""
    same = layout.machine_gpus(gpus) == layout.machine_gpus(layout.gpus)
    return layout.name if same else f"{layout.name}-bench"


def placement_patch(layout: Layout) -> list[Object]:
    """The same as patches of what runs replicas; [] where pods may run anywhere."""
    wanted = placement(layout)
    if not wanted:
        return []
    if layout.groups:
        template = {"spec": wanted}
        names, kind, api = [layout.replica_name], "LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1"
        spec: Object = {"leaderWorkerTemplate": {"leaderTemplate": template,
                                                 "workerTemplate": template}}  # fmt: skip
    else:
        split = layout.file.split is not None
        names = [f"{layout.name}-{role}" for role in ("prefill", "decode")]
        names = names if split else [layout.replica_name]
        kind, api = "Deployment", "apps/v1"
        spec = {"template": {"spec": wanted}}
    return [
        {"apiVersion": api, "kind": kind, "metadata": {"name": name}, "spec": spec}
        for name in names
    ]


def compute_class(layout: Layout) -> list[Object]:
    """Google's list of ways to a machine with the GPU, and one for the benchmark where it takes a
    larger one; [] elsewhere."""
    if not layout.file.on_google or not layout.file.has_gpus:
        return []
    sizes = dict.fromkeys([layout.gpus, *([layout.bench_gpus] if layout.file.bench else [])])
    classes = {class_name(layout, gpus): gpus for gpus in reversed(sizes)}
    return [_class(layout, name, classes[name]) for name in sorted(classes)]


def _class(layout: Layout, name: str, gpus: int) -> Object:
    # A reservation is of the replicas' machines.
    reserved = layout.file.google.reservation and name == layout.name
    ways = [way for way in ORDER[layout.file.price] if way != "reservation" or reserved]
    found = thing("cloud.google.com/v1", "ComputeClass", name, layout, "replica")
    found["spec"] = {
        "priorities": [_priority(layout, way, gpus) for way in ways],
        # Pods move back to a way that stands earlier in the list once it has machines again.
        "activeMigration": {"optimizeRulePriority": len(ways) > 1},
        "nodePoolAutoCreation": {"enabled": True},
        "whenUnsatisfiable": "DoNotScaleUp",
    }
    return found


def _priority(layout: Layout, way: str, gpus: int) -> Object:
    google = layout.file.google
    size, machine = machine_for(layout.file.platform, layout.file.gpu, gpus)
    label = cloud_gpu(layout.file.platform, layout.file.gpu).label
    found: Object = {
        "machineType": machine,
        "gpu": {"type": label, "count": size, "driverVersion": "default"},
    }
    if google.zones:
        found["location"] = {"zones": list(google.zones)}
    if way == "spot":
        found["spot"] = True
    if way == "flex-start":
        found["flexStart"] = {"enabled": True,
                              "nodeRecycling": {"leadTimeSeconds": LEAD_SECONDS}}  # fmt: skip
    if way == "reservation":
        one = {"name": google.reservation}
        if google.reservation_project:
            one["project"] = google.reservation_project
        found["reservations"] = {"affinity": "Specific", "specific": [one]}
    return found
