"""The local paths of the gateway: health, metrics, models, status, and the admin API.

/health is 200 while at least one replica takes requests. /gateway/scale says how many replicas the
load asks for. /metrics has the gateway's own metrics, and those of the replicas with
merge_metrics. /gateway/fleet shows and replaces the replicas that run here. /gateway/status and
/gateway/replicas show each replica, and the latter adds, drains, changes and removes them. Every
other path is relayed.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote

import msgspec

from millrace.common.http_client import fetch, parse_base_url
from millrace.common.safe_log import dropped_lines
from millrace.common.tasks import task_failures
from millrace.dashboard.files import EVENTS_PATH, HEADERS, HISTORY_PATH, file_at
from millrace.dashboard.files import PATHS as PAGES
from millrace.dashboard.stream import CONTENT_TYPE, Cursor
from millrace.errors import UserError
from millrace.gateway.admin.cached_requests import PATH as CACHED_PATH
from millrace.gateway.admin.cached_requests import asks_for_all, cached_requests
from millrace.gateway.admin.live_page import FleetPage
from millrace.gateway.admin.metrics import exposition
from millrace.gateway.admin.metrics_merge import ENGINE_UP, engine_page, merged
from millrace.gateway.admin.scale import ScaleAdvisor
from millrace.gateway.common.shared_counters import (
    BYTES,
    CHUNKS,
    FAILURES,
    IN_FLIGHT,
    LOAD,
    PICKS,
    PROCESS_GAUGES,
    PROMPT_TOKENS,
    RESIDENT,
    SharedCounters,
)
from millrace.gateway.health.health_monitor import HealthMonitor, ReplicaSpec
from millrace.gateway.http.message import (
    LocalReply,
    Request,
    api_error_reply,
    error_reply,
    header,
    json_reply,
)
from millrace.gateway.relay.access import Access
from millrace.gateway.routing.candidates import model_not_found
from millrace.gateway.routing.replicas import Member, ReplicaSet

_OWN = frozenset(
    (b"/health", b"/metrics", b"/v1/models", *(path.encode() for path in PAGES)),
) | {EVENTS_PATH.encode(), HISTORY_PATH.encode()}
_MODEL = "/v1/models/"
_ID = re.compile("[0-9]{1,9}")
_MAX_ADMIN_BODY = 64 << 10
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class NewReplica(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of POST /gateway/replicas."""

    url: str
    weight: float = 1.0
    limit: int = 0
    models: tuple[str, ...] = ()


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Body of PATCH /gateway/replicas/ID."""

    weight: float


def is_local_request(request: Request) -> bool:
    """Whether a request is for the gateway itself."""
    path = request.path.partition(b"?")[0]
    reads = request.method in (b"GET", b"HEAD")
    if reads and (path in _OWN or path.startswith(_MODEL.encode()) or asks_for_all(request)):
        return True
    return path.startswith(b"/gateway/")


def health_reply(replicas: ReplicaSet) -> LocalReply:
    """The answer to GET /health."""
    healthy = len(replicas.available())
    if not healthy:
        reason = replicas.describe_outage()
        return error_reply(503, f"no healthy replica: {reason}", retry_after=1)
    counts = {"healthy": healthy, "total": len(replicas.all)}
    return json_reply(200, {"status": "ok", "replicas": counts})


class FleetControl(Protocol):
    """What runs the replicas, where something here does (fleet/supervisor.py)."""

    def document(self) -> dict[str, Any]:
        """Its replicas, and how far the latest rolling update is."""

    async def begin_update(self, only: int | None) -> None:
        """Start a rolling update, of one replica of this host or of all. Raises UserError."""


class AdminApi:
    """Answers local requests from the health monitor and the shared counters.

    workers: ids of the gateway processes. merge: /metrics includes the replicas' metrics, with the
    label that `label` returns.
    """

    def __init__(
        self,
        counters: SharedCounters,
        monitor: HealthMonitor,
        access: Access,
        scale: ScaleAdvisor,
        live: FleetPage,
        *,
        fleet: FleetControl | None = None,
        policy: str,
        merge: bool,
        label: Callable[[Member], str] = lambda member: member.target.authority,
        workers: Callable[[], list[int]],
        restarts: Callable[[], int] = lambda: 0,
    ) -> None:
        self._counters = counters
        self._monitor = monitor
        self._access = access
        self._scale = scale
        self._live = live
        self._fleet = fleet
        self._policy = policy
        self._merge = merge
        self._label = label
        self._workers = workers
        self._restarts = restarts

    async def answer(self, request: Request) -> LocalReply:
        """The reply to a local request other than /health."""
        path = unquote(request.path.partition(b"?")[0].decode("latin-1"))
        if path == "/metrics":
            return await self._metrics()
        if path in PAGES:
            return _page(path)
        if not self._may_read(request):
            return api_error_reply(self._access.refusal(request))
        if path == EVENTS_PATH:
            return self._events_reply(request)
        if path == HISTORY_PATH:
            return self._history_reply(request)
        if path == CACHED_PATH.decode():
            return await cached_requests(request, self._monitor.members, self._access)
        if path.startswith(_MODEL):
            return self._model(path.removeprefix(_MODEL))
        if path == "/v1/models":
            return json_reply(200, {"object": "list", "data": self._monitor.cards})
        if request.method == b"GET" and path == "/gateway/replicas":
            return json_reply(200, {"replicas": self._rows()})
        if request.method == b"GET" and path == "/gateway/scale":
            return json_reply(200, self._scale.document())
        if path.startswith("/gateway/fleet") and self._fleet is not None:
            return await self._fleet_reply(self._fleet, request, path)
        if request.method == b"GET" and path == "/gateway/status":
            return json_reply(200, self.status())
        if path != "/gateway/replicas" and not path.startswith("/gateway/replicas/"):
            return error_reply(404, f"the gateway has no {path}")
        refusal = self._access.admin_refusal(request)
        if refusal is not None:
            return api_error_reply(refusal)
        if len(request.body) > _MAX_ADMIN_BODY:
            return error_reply(413, f"a change has at most {_MAX_ADMIN_BODY} bytes")
        try:
            return self._administer(request, path)
        except (msgspec.DecodeError, UserError) as error:
            return error_reply(400, str(error))

    async def _fleet_reply(self, fleet: FleetControl, request: Request, path: str) -> LocalReply:
        """GET /gateway/fleet, and POST /gateway/fleet/restart."""
        if request.method == b"GET" and path == "/gateway/fleet":
            return json_reply(200, fleet.document())
        if request.method != b"POST" or path != "/gateway/fleet/restart":
            return error_reply(405, "use GET /gateway/fleet or POST /gateway/fleet/restart")
        refusal = self._access.admin_refusal(request)
        if refusal is not None:
            return api_error_reply(refusal)
        try:
            await fleet.begin_update(_replica_number(request))
        except UserError as error:
            return error_reply(409, str(error))
        return json_reply(202, fleet.document())

    def _events_reply(self, request: Request) -> LocalReply:
        """GET /dashboard/events: the next part of a viewer's stream."""
        last = header(request.headers, b"last-event-id").decode("latin-1")
        message, seen = self._live.message(Cursor.parse(last))
        headers = (("Cache-Control", "no-store"), ("X-Accel-Buffering", "no"))
        return LocalReply(200, message, CONTENT_TYPE, headers, follow=str(seen))

    def _history_reply(self, request: Request) -> LocalReply:
        """GET /dashboard/replica?id=ID: the last hour of one replica."""
        asked = parse_qs(request.path.partition(b"?")[2].decode("latin-1")).get("id", [""])[0]
        found = self._live.replica_history(int(asked)) if _ID.fullmatch(asked) else None
        if found is None:
            return error_reply(404, f"there is no replica {asked[:20]!r}")
        return json_reply(200, found)

    def _model(self, name: str) -> LocalReply:
        """One model, as /v1/models has it."""
        for card in self._monitor.cards:
            if card.get("id") == name:
                return json_reply(200, card)
        known = {name for member in self._monitor.members for name in member.models}
        if name in known:
            return json_reply(200, {"id": name, "object": "model"})
        return model_not_found(f"no replica serves model {name!r}", known)

    def _may_read(self, request: Request) -> bool:
        """Whether the client has a key of the API, or may change the gateway."""
        return self._access.allows_api(request) or self._access.admin_refusal(request) is None

    # --- reading ---------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The content of /gateway/status."""
        return {
            "policy": self._policy,
            "workers": self._workers(),
            "worker_restarts": self._restarts(),
            "live": {name: self._counters.gauge(name) for name in PROCESS_GAUGES},
            "answers": self._counters.statuses(),
            "events": self._counters.events(),
            "replicas": self._rows(),
        }

    def _rows(self) -> list[dict[str, Any]]:
        members = self._monitor.members
        sums = self._counters.replica_sums(max((m.slot for m in members), default=-1) + 1)
        return [_row(member, sums[member.slot]) for member in members]

    async def _metrics(self) -> LocalReply:
        counters, members = self._counters, self._monitor.members
        events = self._own_events()
        own = exposition(counters, members, self._policy, self._restarts(), events, self._label)
        if self._merge:
            pages = await asyncio.gather(*(self._replica_metrics(member) for member in members))
            own += merged(pages)
        return LocalReply(200, own, _TEXT)

    def _own_events(self) -> dict[str, int]:
        """Totals of this process, where it relays nothing and so publishes no counters."""
        if os.getpid() in self._workers():
            return {}
        return {"log_lines_dropped": dropped_lines(), "task_failures": task_failures()}

    async def _replica_metrics(self, member: Member) -> tuple[str, str]:
        """A replica's label and page; of one that gives none, that its engine is down."""
        label = self._label(member)
        if member.state == "down" and member.lost:
            return label, engine_page(up=False)
        try:
            response = await fetch(member.target, "/metrics", timeout=2.0)
        except OSError:
            return label, engine_page(up=False)
        if response.status != 200:
            return label, engine_page(up=False)
        text = response.body.decode("utf-8", "replace")
        return label, text if ENGINE_UP in text else text + engine_page(member.state != "down")

    # --- changing --------------------------------------------------------------------------------

    def _administer(self, request: Request, path: str) -> LocalReply:
        monitor, method = self._monitor, request.method
        parts = path.strip("/").split("/")[2:]
        if not parts:
            if method != b"POST":
                return error_reply(405, "use GET or POST here", headers=[("Allow", "GET, POST")])
            body = msgspec.json.decode(request.body, type=NewReplica)
            spec = ReplicaSpec(
                target=parse_base_url(body.url),
                weight=body.weight,
                limit=body.limit,
                models=body.models,
                source="admin",
            )
            return json_reply(201, self._row_of(monitor.add(spec)))
        member = monitor.find(int(parts[0])) if _ID.fullmatch(parts[0]) else None
        if member is None:
            ids = ", ".join(str(m.id) for m in monitor.members) or "none"
            return error_reply(404, f"no replica {parts[0]!r}; there are: {ids}")
        return self._change(request, member, parts[1:])

    def _change(self, request: Request, member: Member, rest: list[str]) -> LocalReply:
        monitor, method = self._monitor, request.method
        if method == b"DELETE" and not rest:
            if "1" in parse_qs(request.path.partition(b"?")[2].decode("latin-1")).get("force", ()):
                monitor.remove(member.id)
                return json_reply(200, {"id": member.id, "state": "removed"})
            monitor.drain(member.id, then_remove=True)
        elif method == b"PATCH" and not rest:
            monitor.set_weight(member.id, msgspec.json.decode(request.body, type=Change).weight)
        elif method == b"POST" and rest == ["drain"]:
            monitor.drain(member.id, then_remove=False)
        elif method == b"POST" and rest == ["undrain"]:
            monitor.undrain(member.id)
        else:
            message = "use DELETE or PATCH /gateway/replicas/ID, POST .../ID/drain or .../undrain"
            return error_reply(405, message)
        return json_reply(200, self._row_of(monitor.find(member.id) or member))

    def _row_of(self, member: Member) -> dict[str, Any]:
        sums = self._counters.replica_sums(member.slot + 1)
        return _row(member, sums[member.slot])


def _replica_number(request: Request) -> int | None:
    """The number in ?replica=N; None without one. Raises UserError."""
    query = parse_qs(request.path.partition(b"?")[2].decode("latin-1"), keep_blank_values=True)
    (text,) = query.get("replica", ("",))[-1:]
    if "replica" in query and not _ID.fullmatch(text):
        raise UserError(f"replica={text}: use the number of a replica of this host, from 0 on")
    return int(text) if text else None


def _page(path: str) -> LocalReply:
    """A page for people, or what it loads; it needs no key, for it holds no figures."""
    found = file_at(path)
    assert found is not None
    return LocalReply(200, found.body, found.media_type, HEADERS)


def _row(member: Member, sums: list[int]) -> dict[str, Any]:
    """One replica in the status."""
    return {
        "id": member.id,
        "url": str(member.target),
        "state": member.state,
        "healthy": member.state == "up",
        "reason": None if member.state == "up" else member.reason,
        "kind": member.kind,
        "models": list(member.models),
        "weight": member.weight,
        "limit": member.limit,
        "load_tokens": sums[LOAD],
        "resident_tokens": sums[RESIDENT],
        "in_flight": sums[IN_FLIGHT],
        "picks": sums[PICKS],
        "failures": sums[FAILURES],
        "prompt_tokens": sums[PROMPT_TOKENS],
        "relayed_bytes": sums[BYTES],
        "relayed_chunks": sums[CHUNKS],
    }
