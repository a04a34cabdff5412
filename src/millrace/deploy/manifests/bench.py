"""The benchmark as a Job: it serves the model itself, on GPUs of its own, and prints the table."""

from __future__ import annotations

from millrace.deploy.layout.commands import bench_command
from millrace.deploy.layout.layout import Layout
from millrace.deploy.manifests.parts import Object, container, labels, pod_spec, thing
from millrace.deploy.manifests.placement import placement
from millrace.deploy.manifests.replicas import environment, gpu_resource, mounts, volumes


def bench_objects(layout: Layout) -> list[Object]:
    """The Job, and the same as a pod that waits for commands; [] where the file asks for none."""
    if layout.file.bench is None:
        return []
    job = thing("batch/v1", "Job", f"{layout.name}-bench", layout, "bench")
    job["spec"] = {
        "backoffLimit": 0,  # a second run beside the first one's remains would not compare
        "template": {
            "metadata": {"labels": labels(layout, "bench")},
            "spec": _pod(layout, bench_command(layout), "Never"),
        },
    }
    pod = thing("v1", "Pod", f"{layout.name}-bench-shell", layout, "bench")
    pod["spec"] = _pod(layout, ["sleep", "infinity"], "Never")
    return [job, pod]


def _pod(layout: Layout, command: list[str], restart: str) -> Object:
    part = layout.file.bench
    assert part is not None
    gpus = layout.bench_gpus
    size = {"cpu": str(max(4, 6 * gpus)), "memory": f"{max(16, 48 * gpus)}Gi"}
    count = {gpu_resource(layout): str(gpus)} if layout.file.has_gpus else {}
    main = container(
        "bench",
        layout.image,
        command,
        env=environment(layout),
        resources={"requests": {**size, **count},
                   "limits": {"memory": size["memory"], **count}},
        volumeMounts=mounts(layout),
    )  # fmt: skip
    return pod_spec(layout, [main], restartPolicy=restart, volumes=volumes(layout, own_cache=True),
                    **placement(layout, gpus))  # fmt: skip
