"""Conditions of Kubernetes objects in plain words: what they wait for, and what would help."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Thing = dict[str, Any]

# Reasons of Gateways and routes -> what they mean and what would help.
GATEWAY_WORDS = {
    "Pending": "nobody has taken it up yet: is there a controller of this class?",
    "Invalid": "its class's controller finds it invalid",
    "NoResources": "its controller has no machines or quota for it",
    "AddressNotAssigned": "it waits for an address: quota of addresses, or the subnet of proxies",
    "AddressNotUsable": "the address that it asks for is taken or of another network",
    "InvalidParameters": "its parameters do not exist or are of another kind",
    "ListenersNotValid": "one of its listeners is wrong: port, protocol or certificate",
    "NotAllowedByListeners": "its Gateway takes no routes of this namespace",
    "NoMatchingParent": "its Gateway or the listener that it names does not exist",
    "BackendNotFound": "what it sends to does not exist",
    "InvalidKind": "its Gateway cannot send to this kind: the inference extension is missing there",
    "RefNotPermitted": "what it sends to is in a namespace that does not allow that",
    "UnsupportedProtocol": "its Gateway does not know this protocol",
}


class Condition(NamedTuple):
    """status: "True", "False" or "Unknown"."""

    kind: str
    status: str
    reason: str
    message: str

    @property
    def words(self) -> str:
        """What it means, with the controller's own message."""
        known = GATEWAY_WORDS.get(self.reason, self.reason or "no reason given")
        return f"{known} ({self.message})" if self.message else known


def conditions(thing: Thing, *path: str) -> list[Condition]:
    """Of the object's status, or of what lies at a path within it."""
    found: Any = thing.get("status") or {}
    for step in path:
        found = found.get(step) or {}
    return [_condition(one) for one in found.get("conditions") or []]


def parent_conditions(thing: Thing) -> list[Condition]:
    """Of a route or an inference pool: what each Gateway that it belongs to says."""
    parents = (thing.get("status") or {}).get("parents") or []
    return [_condition(one) for parent in parents for one in parent.get("conditions") or []]


def condition(found: Iterable[Condition], kind: str) -> Condition | None:
    return next((one for one in found if one.kind == kind), None)


def _condition(one: Thing) -> Condition:
    message = " ".join(str(one.get("message") or "").split())[:300]
    return Condition(one["type"], one["status"], one.get("reason") or "", message)


# --- pods --------------------------------------------------------------------------------------

WAITING_WORDS = {
    "ImagePullBackOff": "its image cannot be pulled",
    "ErrImagePull": "its image cannot be pulled",
    "InvalidImageName": "its image's name is wrong",
    "CreateContainerConfigError": "a Secret or ConfigMap that it names does not exist",
    "CreateContainerError": "its container cannot be made",
    "RunContainerError": "its command cannot be run",
}
BROKEN = {*WAITING_WORDS, "CrashLoopBackOff"}


class PodState(NamedTuple):
    """name, whether it is ready, whether it will not become ready by itself, and why."""

    name: str
    ready: bool
    broken: bool
    words: str


def pod_state(pod: Thing) -> PodState:
    """Of a pod, in words."""
    name, status = pod["metadata"]["name"], pod.get("status") or {}
    found = conditions(pod)
    ready = condition(found, "Ready")
    if pod["metadata"].get("deletionTimestamp"):
        return PodState(name, False, False, "stops")
    if ready is not None and ready.status == "True":
        return PodState(name, True, False, "ready")
    scheduled = condition(found, "PodScheduled")
    if scheduled is not None and scheduled.status == "False":
        return PodState(name, False, False, f"no machine takes it yet: {scheduled.message}")
    states = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    for one in states:
        problem = _container_problem(one)
        if problem is not None:
            return PodState(name, False, problem[0], problem[1])
    return PodState(name, False, False, _under_way(states))


def _container_problem(one: Thing) -> tuple[bool, str] | None:
    """(whether it stays so, words) of a container that has a problem."""
    waiting = (one.get("state") or {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason == "CrashLoopBackOff":
        last = (one.get("lastState") or {}).get("terminated") or {}
        return True, f"it ends again and again: {_ended(last)}, {one.get('restartCount', 0)} times"
    if reason in WAITING_WORDS:
        return True, f"{WAITING_WORDS[reason]}: {message or one.get('image', '')}"
    ended = (one.get("state") or {}).get("terminated")
    if ended and ended.get("exitCode"):
        return False, f"it ended: {_ended(ended)}"
    return None


def _ended(state: Thing) -> str:
    if state.get("reason") == "OOMKilled":
        return "it used more memory than its limit"
    code = state.get("exitCode")
    if code == 2:
        return "status 2, an option is wrong: its log's last line says which"
    return f"status {code}" if code is not None else "no status is known"


def _under_way(states: list[Thing]) -> str:
    waiting = [s for s in states if "waiting" in (s.get("state") or {})]
    if waiting or not states:
        return "its volumes are attached and its image is pulled"
    return "it runs and is not ready yet: it loads, and at the first time compiles"
