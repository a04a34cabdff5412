"""Replicas: a Deployment, or a LeaderWorkerSet where one spans hosts, and the names that find them.

A replica that stops: the hook waits until nobody sends to it, SIGTERM makes the server refuse new
requests and end the open ones, and the engine ends. `Layout.grace` covers all three.
"""

from __future__ import annotations

from typing import Any

from millrace.deploy.layout.commands import rank_script, replica_command
from millrace.deploy.layout.layout import CACHES, MODELS, PORT, RANK_PORT, UNLISTED, Layout
from millrace.deploy.manifests.model_volume import SHARED_CLASSES
from millrace.deploy.manifests.parts import (
    Object,
    connects,
    container,
    from_secret,
    get,
    labels,
    pause,
    pod_spec,
    selector,
    thing,
)

START_PERIOD, START_TRIES = 10, 360  # an hour: a first start compiles, and reads cold disks
ENGINE_CPU, ENGINE_MEMORY = 6, 48  # of one GPU: cores and GiB
SMALL_GPUS = {"l4": 24, "l40s": 32}  # whose machines have less memory
CPU_REPLICA = {"cpu": "4", "memory": "8Gi"}
LEADER = {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
INNER_PORT = 8200  # of a decode pod's engine, behind its side-car
SIDECAR = "ghcr.io/llm-d/llm-d-router-disagg-sidecar"


def replica_objects(layout: Layout) -> list[Object]:
    """What runs replicas, and the service whose addresses they are."""
    if layout.groups:
        found = [groups(layout)]
    elif layout.file.split is not None:
        split = layout.file.split
        found = [
            deployment(layout, split.prefill, "prefill"),
            deployment(layout, split.decode, "decode"),
        ]
    else:
        found = [deployment(layout, layout.count)]
    cache = _cache_claim(layout)
    return [*found, headless(layout), *([cache] if cache else [])]


def deployment(layout: Layout, count: int, role: str = "") -> Object:
    """role: prefill or decode, in a split."""
    name = f"{layout.name}-{role}" if role else layout.replica_name
    match = {**selector(layout, "replica"), **_role(role)}
    found = thing("apps/v1", "Deployment", name, layout, "replica")
    scaled = layout.file.autoscale is not None
    found["spec"] = {
        # Without a number an autoscaler's is not undone whenever the file is applied.
        **({} if scaled else {"replicas": count}),
        "selector": {"matchLabels": match},
        # No spare GPUs: one that goes makes room for one that comes.
        "strategy": {"type": "RollingUpdate",
                     "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "progressDeadlineSeconds": START_PERIOD * START_TRIES + 300,
        "template": {
            "metadata": {"labels": {**labels(layout, "replica"), **_role(role)}},
            "spec": _pod(layout, role),
        },
    }  # fmt: skip
    return found


def groups(layout: Layout) -> Object:
    """A LeaderWorkerSet: the leader serves, and a group starts again as a whole."""
    found = thing("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", layout.replica_name, layout,
                  "replica")  # fmt: skip
    scaled = layout.file.autoscale is not None
    meta = {"labels": labels(layout, "replica")}
    found["spec"] = {
        **({} if scaled else {"replicas": layout.count}),
        "startupPolicy": "LeaderCreated",
        "rolloutStrategy": {
            "type": "RollingUpdate",
            "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0},
        },
        "leaderWorkerTemplate": {
            "size": layout.file.hosts,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": {"metadata": meta, "spec": _pod(layout, "", rank="leader")},
            "workerTemplate": {"metadata": meta, "spec": _pod(layout, "", rank="worker")},
        },
    }
    return found


def headless(layout: Layout) -> Object:
    """A service without an address of its own: its name has the addresses of all that are ready,
    of groups those of the leaders."""
    found = thing("v1", "Service", layout.replica_service, layout, "replica")
    found["spec"] = {
        "clusterIP": "None",
        "selector": served_by(layout),
        "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
    }
    return found


def served_by(layout: Layout) -> dict[str, str]:
    """The labels of pods that take requests."""
    return {**selector(layout, "replica"), **(LEADER if layout.groups else {})}


def _role(role: str) -> dict[str, str]:
    return {"llm-d.ai/role": role} if role else {}


def _pod(layout: Layout, role: str, rank: str = "") -> Object:
    behind = role == "decode"
    serves = rank != "worker"
    port = INNER_PORT if behind else PORT
    command = ["/bin/sh", "-c", rank_script(layout)] if rank else None
    main = container(
        "replica",
        layout.image,
        command or replica_command(layout, port, role),
        env=environment(layout, role, rank),
        ports=_ports(layout, role, rank),
        resources=_resources(layout),
        **(_probes(layout, "engine" if behind else "http") if serves else {}),
        **({"lifecycle": pause(UNLISTED)} if serves else {}),
        volumeMounts=mounts(layout),
    )
    others: dict[str, Any] = {"terminationGracePeriodSeconds": layout.grace}
    if behind:
        others["initContainers"] = [_sidecar(layout)]
    if layout.file.split is not None:
        others["affinity"] = _together(layout)
    return pod_spec(layout, [main], **others, volumes=volumes(layout))


def _ports(layout: Layout, role: str, rank: str) -> list[Object]:
    ports = []
    if rank != "worker":
        port = INNER_PORT if role == "decode" else PORT
        ports.append({"name": "engine" if role == "decode" else "http", "containerPort": port})
    if rank:
        ports.append({"name": "ranks", "containerPort": RANK_PORT})
    if role:
        ports.append({"name": "transfer", "containerPort": 5600})
    return ports


def _probes(layout: Layout, port: str) -> Object:
    """/health is 503 while an engine starts or drains, so what asks whether the process lives asks
    something else."""
    if layout.file.engine == "millrace":
        alive = get("/version", port) if layout.engines == 1 else connects(port)
    else:
        alive = get("/health", port)
    return {
        "startupProbe": get("/health", port, periodSeconds=START_PERIOD,
                            failureThreshold=START_TRIES),
        "livenessProbe": {**alive, "periodSeconds": 10, "failureThreshold": 6},
        "readinessProbe": get("/health", port, periodSeconds=5, failureThreshold=2),
    }  # fmt: skip


def environment(layout: Layout, role: str = "", rank: str = "") -> list[Object]:
    """Caches on their volume, nothing in a home directory, and no way to a hub: the model is
    there."""
    fixed = {
        "HOME": f"{CACHES}/home",
        "USER": "millrace",  # libraries ask for the user's name, which the image need not know
        "XDG_CACHE_HOME": CACHES,
        "TRITON_CACHE_DIR": f"{CACHES}/triton",
        "DG_JIT_CACHE_DIR": f"{CACHES}/deep_gemm",
        "TORCHINDUCTOR_CACHE_DIR": f"{CACHES}/inductor",
        "VLLM_CACHE_ROOT": f"{CACHES}/vllm",
        "HF_HUB_OFFLINE": "1",
    }
    if layout.file.traces and layout.file.engine == "vllm":
        fixed["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] = "http/protobuf"  # it speaks gRPC by itself
    if rank:
        fixed |= {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    if role:
        fixed |= {"VLLM_SSM_CONV_STATE_LAYOUT": "DS", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
    found: list[Object] = [{"name": k, "value": v} for k, v in
                           {**fixed, **layout.file.environment}.items()]  # fmt: skip
    if role:
        address = {"fieldRef": {"fieldPath": "status.podIP"}}
        found.append({"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": address})
    secret = layout.file.api_key_secret
    if secret and layout.file.entry != "gateway":
        variable = "VLLM_API_KEY" if layout.file.engine == "vllm" else "MILLRACE_API_KEY"
        found.append(from_secret(variable, secret, "api-key"))
    return found


def _resources(layout: Layout) -> Object:
    if not layout.file.has_gpus:
        size = {**CPU_REPLICA, **layout.file.resources}
        return {"requests": size, "limits": {"memory": size["memory"]}}
    memory = SMALL_GPUS.get(layout.file.gpu, ENGINE_MEMORY)
    size = {"cpu": str(ENGINE_CPU * layout.gpus), "memory": f"{memory * layout.gpus}Gi"}
    size |= layout.file.resources
    gpus = {gpu_resource(layout): str(layout.gpus)}
    return {"requests": {**size, **gpus}, "limits": {"memory": size["memory"], **gpus}}


def gpu_resource(layout: Layout) -> str:
    """What device plugins call a GPU."""
    return "amd.com/gpu" if layout.file.gpu.startswith("mi") else "nvidia.com/gpu"


def mounts(layout: Layout) -> list[Object]:
    found: list[Object] = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "cache", "mountPath": CACHES},
    ]
    if not layout.ships:
        found.append({"name": "model", "mountPath": MODELS, "readOnly": True})
    return found


def volumes(layout: Layout, *, own_cache: bool = False) -> list[Object]:
    """Ranks and NCCL need more shared memory than the 64 MiB that containers get. own_cache: the
    pod compiles for itself."""
    claim = {"persistentVolumeClaim": {"claimName": layout.cache}}
    shared = layout.file.cache_volume is not None and not own_cache
    cache: Object = claim if shared else {"emptyDir": {}}
    found: list[Object] = [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        {"name": "cache", **cache},
    ]
    if not layout.ships:
        source = {"claimName": layout.volume, "readOnly": True}
        found.append({"name": "model", "persistentVolumeClaim": source})
    return found


def _cache_claim(layout: Layout) -> Object | None:
    """Compiled kernels survive pods, and one pod compiles for all."""
    part = layout.file.cache_volume
    if part is None:
        return None
    alone = layout.cache_alone
    usual = "" if alone else SHARED_CLASSES.get(layout.file.platform, "")
    storage = part.storage_class or usual
    # Google's shared file systems have a terabyte at least.
    size = part.size or ("1Ti" if storage == SHARED_CLASSES["gke-standard"] else "20Gi")
    found = thing("v1", "PersistentVolumeClaim", layout.cache, layout, "replica")
    found["spec"] = {
        "accessModes": ["ReadWriteOnce" if alone else "ReadWriteMany"],
        **({"storageClassName": storage} if storage else {}),
        "resources": {"requests": {"storage": size}},
    }
    return found


# --- prefill and decode ------------------------------------------------------------------------


def _sidecar(layout: Layout) -> Object:
    """It has the prompt computed by the prefill pod that the endpoint picker names in a header."""
    found = container(
        "routing-proxy",
        f"{SIDECAR}:{layout.file.router.version}",
        [],
        args=[f"--port={PORT}", f"--vllm-port={INNER_PORT}", "--kv-connector=nixlv2",
              "--secure-proxy=false"],
        ports=[{"name": "http", "containerPort": PORT}],
        resources={"requests": {"cpu": "500m", "memory": "256Mi"}},
        restartPolicy="Always",
    )  # fmt: skip
    del found["command"]
    return found


def _together(layout: Layout) -> Object:
    """Pods whose GPUs fit into one machine share it, so that states go over its own links."""
    split = layout.file.split
    assert split is not None
    one = layout.settings.ranks * (split.prefill + split.decode) <= 8
    term = {
        "labelSelector": {"matchLabels": selector(layout, "replica")},
        "topologyKey": "kubernetes.io/hostname" if one else "topology.kubernetes.io/zone",
    }
    if one:
        return {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    weighted = [{"weight": 100, "podAffinityTerm": term}]
    return {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": weighted}}
