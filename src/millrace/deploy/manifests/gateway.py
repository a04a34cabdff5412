"""What clients reach: the gateway's pods, and the Service of the entry.

With `hold_timeout` a gateway without replicas is ready: it holds requests until one is up. So its
probes ask whether it listens, and not /health, which is 503 then.
"""

from __future__ import annotations

from millrace.deploy.layout.commands import gateway_command
from millrace.deploy.layout.layout import ENGINE_END, PORT, UNLISTED, Layout
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
from millrace.deploy.manifests.replicas import served_by

CPU_PER_PROCESS, MEMORY_PER_PROCESS = 1, 2  # cores and GiB


def entry_objects(layout: Layout) -> list[Object]:
    """The entry of the file: pods of the gateway and their service, or a service alone."""
    if layout.file.entry == "gateway":
        return [deployment(layout), service(layout, selector(layout, "gateway"), "gateway")]
    if layout.file.entry == "service":
        return [service(layout, served_by(layout), "replica")]
    return []


def service(layout: Layout, target: dict[str, str], component: str) -> Object:
    found = thing("v1", "Service", layout.entry, layout, component)
    found["spec"] = {
        "type": "ClusterIP",
        "selector": target,
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
    }
    return found


def deployment(layout: Layout) -> Object:
    part = layout.file.gateway
    found = thing("apps/v1", "Deployment", layout.gateway_name, layout, "gateway")
    found["spec"] = {
        "replicas": part.pods,
        "selector": {"matchLabels": selector(layout, "gateway")},
        "strategy": {"type": "RollingUpdate",
                     "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
        "template": {
            "metadata": {"labels": labels(layout, "gateway")},
            "spec": _pod(layout),
        },
    }  # fmt: skip
    return found


def _pod(layout: Layout) -> Object:
    secret = layout.file.api_key_secret
    processes = layout.file.gateway.processes
    size = {
        "cpu": str(CPU_PER_PROCESS * processes),
        "memory": f"{MEMORY_PER_PROCESS * processes}Gi",
    }
    ready = connects if layout.holds else get
    target = ("http",) if layout.holds else ("/health", "http")
    main = container(
        "gateway",
        layout.cpu_image,
        gateway_command(layout),
        env=[from_secret("MILLRACE_API_KEY", secret, "api-key")] if secret else [],
        ports=[{"name": "http", "containerPort": PORT}],
        resources={"requests": size, "limits": {"memory": size["memory"]}},
        startupProbe=connects("http", periodSeconds=2, failureThreshold=60),
        livenessProbe=connects("http", periodSeconds=10, failureThreshold=6),
        readinessProbe=ready(*target, periodSeconds=5, failureThreshold=2),
        lifecycle=pause(UNLISTED),
    )
    grace = UNLISTED + layout.file.drain + ENGINE_END
    return pod_spec(layout, [main], terminationGracePeriodSeconds=grace, **_spread(layout))


def _spread(layout: Layout) -> Object:
    """Several gateways do not go with one machine."""
    if layout.file.gateway.pods == 1:
        return {}
    return {
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": selector(layout, "gateway")},
            }
        ]
    }
