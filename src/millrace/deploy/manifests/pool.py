"""The Gateway API's inference extension: the pool, its route, and values of the router's chart.

The endpoint picker stays one process, whatever its number of replicas: others are only spares
that take over. So it gets one, on a machine without GPUs.
"""

from __future__ import annotations

from millrace.deploy.layout.layout import PORT, Layout
from millrace.deploy.layout.yaml_text import yaml_text
from millrace.deploy.manifests.parts import Object, thing
from millrace.deploy.manifests.replicas import served_by

CHART = "oci://ghcr.io/llm-d/charts/llm-d-router-gateway"
ROUTER_PORT = 9002
SCORERS = [
    {"pluginRef": "max-score-picker"},
    {"pluginRef": "prefix-cache-scorer", "weight": 2},
    {"pluginRef": "queue-scorer", "weight": 1},
]


def gateway_class(layout: Layout) -> str:
    if layout.file.router.gateway_class:
        return layout.file.router.gateway_class
    return "gke-l7-rilb" if layout.file.on_google else "istio"


def pool_objects(layout: Layout) -> list[Object]:
    """InferencePool, Gateway and HTTPRoute; [] with another entry."""
    if layout.file.entry != "inference-pool":
        return []
    pool = thing("inference.networking.k8s.io/v1", "InferencePool", layout.name, layout, "router")
    pool["spec"] = {
        "selector": {"matchLabels": served_by(layout)},
        "targetPorts": [{"number": PORT}],
        "endpointPickerRef": {
            "name": router_service(layout),
            "port": {"number": ROUTER_PORT},
            "failureMode": "FailOpen",
        },
    }  # fmt: skip
    gateway = thing("gateway.networking.k8s.io/v1", "Gateway", layout.entry, layout, "router")
    gateway["spec"] = {
        "gatewayClassName": gateway_class(layout),
        "listeners": [{"name": "http", "protocol": "HTTP", "port": 80,
                       "allowedRoutes": {"namespaces": {"from": "Same"}}}],
    }  # fmt: skip
    route = thing("gateway.networking.k8s.io/v1", "HTTPRoute", layout.entry, layout, "router")
    target = {"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": layout.name}
    route["spec"] = {
        "parentRefs": [{"name": layout.entry}],
        "rules": [{"matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
                   "backendRefs": [target]}],
    }  # fmt: skip
    return [pool, gateway, route]


def router_service(layout: Layout) -> str:
    """The service of the endpoint picker, as the chart names it."""
    return f"{layout.name}-epp"


def router_values(layout: Layout) -> Object:
    """Values of the chart; the pool itself is among the manifests."""
    epp: Object = {
        "replicas": 1,
        "image": {"registry": "ghcr.io/llm-d", "repository": "llm-d-router-endpoint-picker",
                  "tag": layout.file.router.version, "pullPolicy": "IfNotPresent"},
        # The chart's 8 cores are more than a machine of 8 has left for pods.
        "resources": {"requests": {"cpu": "4", "memory": "8Gi"}, "limits": {"memory": "16Gi"}},
    }  # fmt: skip
    if layout.file.split is not None:
        epp["pluginsConfigFile"] = "split.yaml"
        epp["pluginsCustomConfig"] = {"split.yaml": yaml_text(_split_plugins())}
    router: Object = {
        "epp": epp,
        "inferencePool": {"create": False},
        "modelServers": {
            "type": "sglang" if layout.file.engine == "sglang" else "vllm",
            "targetPorts": [{"number": PORT}],
            "matchLabels": served_by(layout),
        },
        **_monitoring(layout),
    }
    return {
        "router": router,
        "provider": {"name": "gke" if layout.file.on_google else _provider(layout)},
    }


def _monitoring(layout: Layout) -> Object:
    """Who reads the endpoint picker's metrics; scaling asks for them."""
    if layout.file.monitoring == "none":
        return {}
    google = layout.file.monitoring == "google"
    autopilot = layout.file.platform == "gke-autopilot"
    provider = {"name": "gmp", "gmp": {"autopilot": autopilot}} if google else {
        "name": "prometheusoperator"}  # fmt: skip
    # Nobody outside the cluster reaches them, and an operator has no token for them.
    prometheus = {"enabled": True, **({} if google else {"auth": {"enabled": False}})}
    return {"monitoring": {"provider": provider, "prometheus": prometheus}}


def _provider(layout: Layout) -> str:
    return "istio" if gateway_class(layout) == "istio" else "none"


def _split_plugins() -> Object:
    """A prompt goes to a prefill pod if it has tokens that no decode pod knows."""
    return {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "approx-prefix-cache-producer"},
            {"type": "prefix-cache-scorer"},
            {"type": "queue-scorer"},
            {"type": "prefill-filter"},
            {"type": "decode-filter"},
            {"type": "max-score-picker"},
            {"type": "prefix-based-pd-decider", "parameters": {"nonCachedTokens": 256}},
            {"type": "disagg-profile-handler",
             "parameters": {"deciders": {"prefill": "prefix-based-pd-decider"}}},
        ],
        "schedulingProfiles": [
            {"name": "prefill", "plugins": [{"pluginRef": "prefill-filter"}, *SCORERS]},
            {"name": "decode", "plugins": [{"pluginRef": "decode-filter"}, *SCORERS]},
        ],
    }  # fmt: skip
