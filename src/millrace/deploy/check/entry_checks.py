"""What clients reach: a Gateway that is stuck says why, and so does what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator

from millrace.deploy.check.cluster import Cluster, Thing
from millrace.deploy.check.conditions import Condition, condition, conditions, parent_conditions
from millrace.deploy.files.cluster_script import proxy_subnet_command
from millrace.deploy.layout.layout import Layout
from millrace.deploy.layout.remedies import install_router
from millrace.deploy.manifests.pool import gateway_class, router_service
from millrace.doctor.finding import Finding

API = "/apis/gateway.networking.k8s.io/v1"
POOLS = "/apis/inference.networking.k8s.io/v1"


def entry(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """Class, Gateway, route, pool and endpoint picker; nothing with another entry."""
    if layout.file.entry != "inference-pool":
        return
    name = gateway_class(layout)
    if cluster.get(f"{API}/gatewayclasses/{name}") is None:
        yield Finding("entry", f"class {name}", "not there: nobody takes Gateways of it up", "fail",
                      _install_class(layout, name))  # fmt: skip
    yield from _gateway(cluster, layout)
    yield from _route(cluster, layout)
    yield from _router(cluster, layout)


def _install_class(layout: Layout, name: str) -> str:
    if layout.file.on_google:
        return "gcloud container clusters update NAME --gateway-api standard"
    if name == "istio":
        return "istioctl install --set values.pilot.env.ENABLE_GATEWAY_API_INFERENCE_EXTENSION=true"
    return f"install the controller of {name}, or set router: {{gateway_class: NAME}}"


def _gateway(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    space, name = layout.file.namespace, layout.entry
    found = cluster.get(f"{API}/namespaces/{space}/gateways/{name}")
    if found is None:
        yield Finding("entry", "Gateway", "not there yet")
        return
    programmed = condition(conditions(found), "Programmed")
    if programmed is not None and programmed.status == "True":
        addresses = (found.get("status") or {}).get("addresses") or []
        where = ", ".join(one.get("value", "") for one in addresses) or "no address yet"
        yield Finding("entry", "Gateway", f"programmed, {where}")
        return
    yield Finding("entry", "Gateway", _stuck(found, programmed), "fail",
                  _gateway_advice(layout, programmed))  # fmt: skip


def _stuck(found: Thing, programmed: Condition | None) -> str:
    """Why a Gateway takes no requests. The cause is often in another condition, or nowhere."""
    causes = [one for one in conditions(found)
              if one.status != "True" and one.kind in ("Accepted", "Programmed")]  # fmt: skip
    for listener in (found.get("status") or {}).get("listeners") or []:
        causes += [one for one in conditions({"status": listener}) if _is_bad(one)]
    if not causes:
        return "not programmed, and no controller says a word: is there one of its class?"
    silent = programmed is not None and not programmed.message
    hint = "; its controller gives no reason" if silent and len(causes) == 1 else ""
    return "not programmed: " + "; ".join(dict.fromkeys(c.words for c in causes)) + hint


def _is_bad(one: Condition) -> bool:
    if one.kind == "Conflicted":  # the only one that is good when it is not so
        return one.status == "True"
    return one.status != "True" and one.kind in ("Accepted", "Programmed", "ResolvedRefs")


def _gateway_advice(layout: Layout, programmed: Condition | None) -> str:
    describe = f"kubectl describe gateway {layout.entry} -n {layout.file.namespace}"
    if layout.file.on_google:
        # What Google's controller waits for without a word, seen most often.
        return f"{proxy_subnet_command(layout.file.google.region)}; then {describe}"
    return describe


def _route(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    space = layout.file.namespace
    things = {
        "HTTPRoute": f"{API}/namespaces/{space}/httproutes/{layout.entry}",
        "InferencePool": f"{POOLS}/namespaces/{space}/inferencepools/{layout.name}",
    }
    for kind, path in things.items():
        found = cluster.get(path)
        if found is None:
            yield Finding("entry", kind, "not there yet")
            continue
        bad = [one for one in parent_conditions(found) if one.status == "False"]
        if not parent_conditions(found):
            look = f"kubectl describe {kind.lower()} -n {space}"
            yield Finding("entry", kind, "no Gateway has taken it up", "warn", look)
        elif bad:
            words = "; ".join(dict.fromkeys(one.words for one in bad))
            yield Finding(
                "entry", kind, words, "fail", f"kubectl describe {kind.lower()} -n {space}"
            )
        else:
            yield Finding("entry", kind, "accepted")


def _router(cluster: Cluster, layout: Layout) -> Iterator[Finding]:
    """The endpoint picker is one process: more replicas are spares, and bring no throughput."""
    space, name = layout.file.namespace, router_service(layout)
    found = cluster.get(f"/apis/apps/v1/namespaces/{space}/deployments/{name}")
    install = install_router(layout.name, space, layout.file.router.version)
    if found is None:
        yield Finding("entry", "endpoint picker", f"no {name}", "fail", install)
        return
    ready = int((found.get("status") or {}).get("readyReplicas") or 0)
    wanted = int((found.get("spec") or {}).get("replicas") or 0)
    if not ready:
        look = f"kubectl describe deployment {name} -n {space}"
        yield Finding("entry", "endpoint picker", "not ready", "fail", look)
    elif wanted > 1:
        less = f"kubectl scale deployment/{name} -n {space} --replicas 1"
        value = f"{wanted} replicas, of which one picks: the others only wait for it to fail"
        yield Finding("entry", "endpoint picker", value, "warn", less)
    else:
        yield Finding("entry", "endpoint picker", "one process, ready")
