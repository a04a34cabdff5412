"""Who may talk to whom, and how many pods may go at a time."""

from __future__ import annotations

from typing import Any

from millrace.deploy.layout.layout import PORT, Layout
from millrace.deploy.manifests.parts import Object, selector, thing
from millrace.target import parse_url

DNS = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
GOOGLE_MONITORING = ("gmp-system", "gke-gmp-system")


def network_policies(layout: Layout) -> list[Object]:
    """Replicas take requests from the entry, the benchmark and what reads metrics, and call nobody
    but the ranks and transfers of their own kind, and the collector of traces. The download may
    call out."""
    found = [_replicas(layout)]
    if layout.file.entry == "gateway":
        found.append(_gateway(layout))
    if not layout.ships:
        found.append(download_policy(layout))
    return found


def _policy(layout: Layout, component: str, ingress: list[Any], egress: list[Any]) -> Object:
    found = thing("networking.k8s.io/v1", "NetworkPolicy", f"{layout.name}-{component}", layout,
                  component)  # fmt: skip
    found["spec"] = {
        "podSelector": {"matchLabels": selector(layout, component)},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": ingress,
        "egress": egress,
    }
    return found


def _replicas(layout: Layout) -> Object:
    http = [{"protocol": "TCP", "port": PORT}]
    own = {"podSelector": {"matchLabels": selector(layout, "replica")}}
    ingress: list[Any] = []
    if layout.file.entry == "gateway":
        sources = [{"podSelector": {"matchLabels": selector(layout, part)}}
                   for part in ("gateway", "bench")]  # fmt: skip
        ingress.append({"from": [*sources, *_monitoring(layout)], "ports": http})
    else:
        ingress.append({"ports": http})  # clients, or the cluster's proxy, from anywhere
    egress: list[Any] = [DNS, *_collector(layout)]
    if layout.groups or layout.file.split is not None:
        ingress.append({"from": [own]})
        egress.append({"to": [own]})
    return _policy(layout, "replica", ingress, egress)


def _gateway(layout: Layout) -> Object:
    http = [{"protocol": "TCP", "port": PORT}]
    replicas = {"podSelector": {"matchLabels": selector(layout, "replica")}}
    return _policy(layout, "gateway", [{"ports": http}],
                   [DNS, *_collector(layout), {"to": [replicas], "ports": http}])  # fmt: skip


def download_policy(layout: Layout) -> Object:
    return _policy(layout, "download", [], [DNS, {"ports": [{"protocol": "TCP", "port": 443}]}])


def _monitoring(layout: Layout) -> list[Object]:
    if layout.file.monitoring == "none":
        return []
    google = layout.file.monitoring == "google"
    names = GOOGLE_MONITORING if google else layout.file.monitoring_namespaces
    values = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": list(names)}
    return [{"namespaceSelector": {"matchExpressions": [values]}}]


def _collector(layout: Layout) -> list[Object]:
    """The way to where traces go: the namespace that its name has in a cluster, else its port."""
    if not layout.file.traces:
        return []
    target = parse_url(layout.file.traces)
    rule: Object = {"ports": [{"protocol": "TCP", "port": target.port}]}
    name, *rest = target.host.split(".")
    if name and (len(rest) == 1 or rest[1:2] == ["svc"]):
        labels = {"kubernetes.io/metadata.name": rest[0]}
        rule["to"] = [{"namespaceSelector": {"matchLabels": labels}}]
    elif not rest:
        rule["to"] = [{"podSelector": {}}]  # of the namespace of the fleet
    return [rule]


def disruption_budgets(layout: Layout) -> list[Object]:
    """Machines are emptied one pod at a time; with one pod only, that one may go. A group of pods
    goes and comes as a whole, so that its budget counts its leaders."""
    found = [_budget(layout, "replica")]
    if layout.file.entry == "gateway":
        found.append(_budget(layout, "gateway"))
    return found


def _budget(layout: Layout, component: str) -> Object:
    found = thing("policy/v1", "PodDisruptionBudget", f"{layout.name}-{component}", layout,
                  component)  # fmt: skip
    found["spec"] = {
        "maxUnavailable": layout.file.hosts if component == "replica" else 1,
        "selector": {"matchLabels": selector(layout, component)},
        # A pod that is not ready serves nobody: it never keeps a machine from being emptied.
        "unhealthyPodEvictionPolicy": "AlwaysAllow",
    }
    return found
