"""What every HTTP request passes through: request ids, API keys, counts, the access log.

The middleware wraps the whole application and knows no endpoint. It costs one call for a request
and one for each piece of its answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from millrace.common.api_errors import ApiError
from millrace.server.engine_link.request_record import RequestRecord, current
from millrace.server.http.access import Access
from millrace.server.http.errors import error_response
from millrace.server.telemetry.metrics import RequestMetrics

logger = logging.getLogger("millrace.access")

_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,256}")


class Middleware:
    """An ASGI application around another one.

    unlogged_paths: paths whose requests get no line in the access log; None: no request gets one.
    on_finish: called with the record of each request that has ended. root_path: a prefix that is
    taken off paths. load: the engine's load by name, for requests that ask for it (ORCA).
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: RequestMetrics,
        access: Access,
        *,
        add_request_ids: bool = True,
        unlogged_paths: frozenset[str] | None = frozenset(),
        on_finish: Sequence[Callable[[RequestRecord], None]] = (),
        root_path: str = "",
        load: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._root_path = root_path.rstrip("/")
        self._load = load
        self._app = app
        self._metrics = metrics
        self._access = access
        self._add_request_ids = add_request_ids
        self._unlogged_paths = unlogged_paths
        self._on_finish = on_finish
        self.open_requests = 0
        self._idle = asyncio.Event()

    async def wait_idle(self, limit: float) -> bool:
        """Wait up to `limit` seconds until no request is open; False if some still are."""
        try:
            async with asyncio.timeout(limit):
                while self.open_requests:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path and scope["path"].startswith(f"{self._root_path}/"):
            scope = {**scope, "path": scope["path"][len(self._root_path) :]}
        record = RequestRecord(scope, _request_id(scope))
        current.set(record)
        headers = [(b"x-request-id", record.id.encode("ascii"))] if self._add_request_ids else []
        load_format = _load_format(scope)

        async def send_recording_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                if load_format is not None:
                    report = load_report(load_format, self._load())
                    headers.append((b"endpoint-load-metrics", report))
                if headers:
                    message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        self.open_requests += 1
        try:
            await self._check_and_run(scope, receive, send_recording_status)
        except Exception:
            record.status = 500
            raise
        finally:
            self.open_requests -= 1
            if not self.open_requests:
                self._idle.set()
            self._finish(record)

    async def _check_and_run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._access.admit(scope)
        except ApiError as error:
            answer = await error_response(Request(scope), error)
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _finish(self, record: RequestRecord) -> None:
        method = record.scope["method"]
        method = method if method in _METHODS else "other"
        self._metrics.http[record.route, method, record.status] += 1
        seconds = monotonic() - record.started
        self._metrics.http_durations.observe(record.route, method, seconds)
        if self._unlogged_paths is not None and record.scope["path"] not in self._unlogged_paths:
            logger.info("%s", access_line(record))
        for callback in self._on_finish:
            callback(record)


def access_line(record: RequestRecord) -> str:
    """`POST /v1/completions 200 12 ms prompt=5 cached=0 output=7 end=stop id=… from=…`"""
    scope = record.scope
    parts = [
        f"{scope['method']} {record.path} {record.status}",
        f"{(monotonic() - record.started) * 1000:.0f} ms",
    ]
    if record.streams:
        ends = {stream.finish_reason or "open" for stream in record.streams}
        known = record.known_tokens
        missed = f" known={known}" if known > record.cached_tokens else ""
        parts.append(f"prompt={record.prompt_tokens} cached={record.cached_tokens}{missed}")
        parts.append(f"output={record.completion_tokens} end={'+'.join(sorted(ends))}")
    client = scope.get("client")
    parts.append(f"id={record.id}")
    parts.append(f"from={client[0]}:{client[1]}" if client else "from=?")
    return " ".join(parts)


def _load_format(scope: Scope) -> str | None:
    """The format in which the request wants the engine's load; None where it does not ask."""
    for name, value in scope["headers"]:
        if name == b"endpoint-load-metrics-format":
            wanted: str = value.decode("latin-1").strip().upper()
            return wanted if wanted in ("TEXT", "JSON") else None
    return None


def load_report(wanted: str, load: Mapping[str, float]) -> bytes:
    """The value of the header `endpoint-load-metrics`, as ORCA has it. wanted: TEXT or JSON."""
    if wanted == "JSON":
        return b"JSON " + msgspec.json.encode({"named_metrics": load})
    pairs = (f"named_metrics.{name}={value}" for name, value in load.items())
    return f"TEXT {', '.join(pairs)}".encode("ascii")


def _request_id(scope: Scope) -> str:
    """The request's own id if it can stand in a header and a log, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            given: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(given):
                return given
    return uuid4().hex
