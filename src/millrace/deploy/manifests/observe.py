"""What reads metrics, and what starts and stops pods by the load or by the clock."""

from __future__ import annotations

from millrace.deploy.layout.deploy_file import AutoscalePart, SchedulePart
from millrace.deploy.layout.layout import PORT, Layout
from millrace.deploy.manifests.parts import Object, selector, thing
from millrace.observe.rules import rule_groups

INTERVAL = "15s"
POLLING = 15  # seconds between two questions to the gateway
ROUTER_LOAD = "sum(llm_d_epp_flow_control_queue_size) + sum(llm_d_epp_request_running)"


def monitors(layout: Layout) -> list[Object]:
    """One monitor for each kind of pod with metrics."""
    kinds = ["replica", *(["gateway"] if layout.file.entry == "gateway" else [])]
    return [_monitor(layout, kind) for kind in kinds]


def _monitor(layout: Layout, component: str) -> Object:
    google = layout.file.monitoring == "google"
    api = "monitoring.googleapis.com/v1" if google else "monitoring.coreos.com/v1"
    kind = "PodMonitoring" if google else "PodMonitor"
    name = f"{layout.name}-{component}"
    endpoint = {"port": "http", "path": "/metrics", "interval": INTERVAL}
    where = "endpoints" if google else "podMetricsEndpoints"
    found = thing(api, kind, name, layout, component)
    found["spec"] = {
        "selector": {"matchLabels": selector(layout, component)},
        where: [endpoint],
    }
    return found


def rules(layout: Layout) -> list[Object]:
    """Recorded figures and alerts, as `millrace observe --write-rules` writes them."""
    google = layout.file.monitoring == "google"
    api = "monitoring.googleapis.com/v1" if google else "monitoring.coreos.com/v1"
    found = thing(
        api, "Rules" if google else "PrometheusRule", f"{layout.name}-rules", layout, "rules"
    )
    found["spec"] = {"groups": [{"interval": "1m", **group} for group in rule_groups()]}
    return [found]


# --- KEDA --------------------------------------------------------------------------------------


def scalers(layout: Layout) -> list[Object]:
    """KEDA's ScaledObject, and how it shows a key to the gateway where there is one."""
    wanted = layout.file.autoscale
    if wanted is None:
        return []
    found = thing("keda.sh/v1alpha1", "ScaledObject", layout.replica_name, layout, "replica")
    found["spec"] = {
        "scaleTargetRef": _target(layout),
        "minReplicaCount": wanted.min,
        "maxReplicaCount": wanted.max,
        "pollingInterval": POLLING,
        # The gateway itself waits before it wants fewer; KEDA adds nothing to that.
        "cooldownPeriod": 30,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior()}},
        "triggers": triggers(layout, wanted),
    }
    access = _access(layout)
    return [found, *([access] if access else [])]


def _target(layout: Layout) -> Object:
    if layout.groups:
        return {"apiVersion": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet",
                "name": layout.replica_name}  # fmt: skip
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": layout.replica_name}


def _behavior() -> Object:
    one = [{"type": "Pods", "value": 1, "periodSeconds": 60}]
    return {
        "scaleUp": {"stabilizationWindowSeconds": 0},
        "scaleDown": {"stabilizationWindowSeconds": 60, "policies": one},
    }


def triggers(layout: Layout, wanted: AutoscalePart) -> list[Object]:
    """The largest of what they ask for counts."""
    found = [_by_load(layout, wanted)] if _counts(layout, wanted) else []
    return found + [_by_clock(schedule) for schedule in wanted.schedules]


def _by_clock(schedule: SchedulePart) -> Object:
    metadata = {
        "timezone": schedule.timezone,
        "start": schedule.start,
        "end": schedule.end,
        "desiredReplicas": str(schedule.pods),
    }
    return {"type": "cron", "metadata": metadata}


def _counts(layout: Layout, wanted: AutoscalePart) -> bool:
    if layout.file.entry == "inference-pool":
        return bool(wanted.prometheus)
    return layout.file.entry == "gateway"


def _by_load(layout: Layout, wanted: AutoscalePart) -> Object:
    """Every value is a text: KEDA reads no numbers here."""
    if layout.file.entry == "inference-pool":
        metadata = {
            "serverAddress": wanted.prometheus,
            "query": ROUTER_LOAD,
            "threshold": str(layout.requests_per_pod),
            "ignoreNullValues": "false",  # no series is a fault, and not an idle fleet
        }
        return {"type": "prometheus", "metricType": "AverageValue", "metadata": metadata}
    metadata = scale_metadata(layout)
    found: Object = {"type": "metrics-api", "metricType": "AverageValue", "metadata": metadata}
    if layout.file.api_key_secret:
        metadata["authMode"] = "bearer"
        found["authenticationRef"] = {"name": layout.gateway_name}
    return found


def scale_metadata(layout: Layout) -> dict[str, str]:
    """Of KEDA's metrics-api trigger: what /gateway/scale says is the number of pods. Several
    gateways each see a part of the load, and their answers are added up."""
    pods = layout.file.gateway.pods
    several = {"aggregateFromKubeServiceEndpoints": "true", "aggregationType": "sum"}
    port = f":{PORT}" if pods > 1 else ""  # then pods are asked, at their own port
    return {
        "url": f"http://{layout.entry}.{layout.file.namespace}.svc.cluster.local{port}/gateway/scale",
        "valueLocation": "wanted",
        "targetValue": "1",
        "activationTargetValue": "0",
        **(several if pods > 1 else {}),
    }


def _access(layout: Layout) -> Object | None:
    secret = layout.file.api_key_secret
    if not secret or layout.file.entry != "gateway":
        return None
    found = thing("keda.sh/v1alpha1", "TriggerAuthentication", layout.gateway_name, layout,
                  "replica")  # fmt: skip
    found["spec"] = {"secretTargetRef": [{"parameter": "token", "name": secret, "key": "api-key"}]}
    return found
