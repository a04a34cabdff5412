"""How far a rollout is: lines where something changes, until it is done, stuck or out of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from millrace.deploy.check.cluster import Cluster, Thing
from millrace.deploy.check.conditions import PodState, condition, conditions, pod_state
from millrace.deploy.check.entry_checks import entry
from millrace.deploy.layout.layout import Layout
from millrace.deploy.manifests.parts import selector
from millrace.errors import UserError

POLL = 2.0
PATIENCE = 120.0  # seconds that a pod may be broken before nobody waits for it any more


@dataclass(frozen=True)
class Workload:
    """What runs pods: ready of wanted; done: every pod is new and ready. problem: why not, where
    its controller has given up."""

    name: str
    ready: int
    wanted: int
    done: bool
    problem: str = ""

    @property
    def words(self) -> str:
        return self.problem or f"{self.ready} of {self.wanted} ready"


@dataclass
class _Seen:
    """What was said, so that it is said once, and since when pods are broken."""

    lines: dict[str, str] = field(default_factory=dict)
    broken: dict[str, float] = field(default_factory=dict)


def workloads(cluster: Cluster, layout: Layout) -> list[Workload]:
    """Of replicas and gateway. Raises UserError if none is there."""
    base, found = f"/apis/apps/v1/namespaces/{layout.file.namespace}/deployments", []
    if layout.groups:
        groups = (
            f"/apis/leaderworkerset.x-k8s.io/v1/namespaces/{layout.file.namespace}/leaderworkersets"
        )
        one = cluster.get(f"{groups}/{layout.replica_name}")
        found += [_group(one)] if one else []
    split = layout.file.split is not None
    names = [f"{layout.name}-prefill", f"{layout.name}-decode"] if split else [layout.replica_name]
    names = [] if layout.groups else names
    if layout.file.entry == "gateway":
        names.append(layout.gateway_name)
    for name in names:
        one = cluster.get(f"{base}/{name}")
        found += [_deployment(one)] if one else []
    if not found:
        raise UserError(
            f"nothing of {layout.name} runs in {layout.file.namespace}; "
            f"kubectl apply -k overlays/{layout.file.platform} starts it"
        )
    return found


def _deployment(one: Thing) -> Workload:
    status, spec = one.get("status") or {}, one.get("spec") or {}
    wanted = int(spec.get("replicas", 1))
    ready, new = int(status.get("readyReplicas") or 0), int(status.get("updatedReplicas") or 0)
    seen = int(status.get("observedGeneration") or 0) >= int(one["metadata"].get("generation") or 0)
    old = int(status.get("replicas") or 0) > new
    progress = condition(conditions(one), "Progressing")
    problem = ""
    if progress is not None and progress.reason == "ProgressDeadlineExceeded":
        problem = f"{ready} of {wanted} ready, and no more came in time"
    done = seen and not old and ready >= wanted and new >= wanted
    return Workload(one["metadata"]["name"], ready, wanted, done, problem)


def _group(one: Thing) -> Workload:
    status, wanted = one.get("status") or {}, int((one.get("spec") or {}).get("replicas", 1))
    ready, new = int(status.get("readyReplicas") or 0), int(status.get("updatedReplicas") or 0)
    done = ready >= wanted and new >= wanted
    return Workload(one["metadata"]["name"], ready, wanted, done)


def pods(cluster: Cluster, layout: Layout) -> list[PodState]:
    """Of replicas and gateway, in words."""
    wanted = [selector(layout, part).items() for part in ("replica", "gateway")]
    return [
        pod_state(pod)
        for pod in cluster.items(f"/api/v1/namespaces/{layout.file.namespace}/pods")
        if any(part <= (pod["metadata"].get("labels") or {}).items() for part in wanted)
    ]


def lines(cluster: Cluster, layout: Layout) -> Iterator[tuple[str, str]]:
    """(what, its state) of everything that is not as it should be, workloads first."""
    for one in workloads(cluster, layout):
        yield one.name, one.words
    for pod in pods(cluster, layout):
        if not pod.ready:
            yield f"  {pod.name}", pod.words
    for finding in entry(cluster, layout):
        if finding.verdict == "fail":
            yield f"  {finding.name}", finding.value


def follow(
    cluster: Cluster,
    layout: Layout,
    say: Callable[[str], object],
    *,
    timeout: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Say what changes until every pod is ready. Raises UserError, with the reason, if that does
    not happen: a pod is broken for two minutes, its controller gave up, or the time is over."""
    seen, end = _Seen(), clock() + timeout
    while True:
        for name, text in lines(cluster, layout):
            if seen.lines.get(name) != text:
                say(f"{name}: {text}")
                seen.lines[name] = text
        found = workloads(cluster, layout)
        if all(one.done for one in found):
            return
        _give_up(found, pods(cluster, layout), seen, clock())
        if clock() >= end:
            behind = "; ".join(f"{one.name}: {one.words}" for one in found if not one.done)
            raise UserError(f"not done after {timeout:g} s: {behind}")
        sleep(POLL)


def _give_up(found: list[Workload], states: list[PodState], seen: _Seen, now: float) -> None:
    for one in found:
        if one.problem:
            raise UserError(f"{one.name}: {one.problem}")
    broken = {one.name: one for one in states if one.broken}
    seen.broken = {name: seen.broken.get(name, now) for name in broken}
    for name, since in seen.broken.items():
        if now - since >= PATIENCE:
            raise UserError(f"{name} stays as it is: {broken[name].words}")
