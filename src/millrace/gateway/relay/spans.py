"""OpenTelemetry spans of relayed requests, where an endpoint was named.

One span `gateway` a request, from its last byte to the end of its answer. Below it `queue`, while
it waited for admission; `replica`, once for each replica that it was sent to; and `prompt`, where
one replica computes its prompt for another. Replicas get a `traceparent` of their span, so what
they do becomes part of the same trace. Without an endpoint no method does anything, and a client's
own `traceparent` passes unchanged.
"""

from __future__ import annotations

from time import time_ns
from typing import TYPE_CHECKING

from millrace.gateway.http.message import Request
from millrace.gateway.routing.replicas import Replica
from millrace.logs.otlp import close_provider, open_provider

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

TRACEPARENT = b"traceparent"


class RequestSpans:
    """The spans of one request: here of one that is not traced, which costs nothing."""

    trace_id = ""

    def waits(self) -> None:
        """It is not admitted at once."""

    def admitted(self) -> None:
        """It waits no longer."""

    def sent_to(self, replica: Replica, name: str = "replica") -> bytes:
        """It goes to a replica; returns the `traceparent` for that, b"" to leave the client's."""
        return b""

    def first_byte(self) -> None:
        """The answer has begun."""

    def failed(self, reason: str, name: str = "replica") -> None:
        """The replica that it was sent to last, by this name, failed."""

    def left(self, name: str = "replica") -> None:
        """The replica is done with it."""

    def ended(self, status: int, retries: int, resumptions: int) -> None:
        """The request has ended. status: 499 where the client left."""


UNTRACED = RequestSpans()


class TracedRequest(RequestSpans):
    """Those of one request that is traced."""

    def __init__(self, tracer: Tracer, request: Request) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {
            key.decode("latin-1").lower(): value.decode("latin-1")
            for key, value in request.headers
            if key.lower() in (TRACEPARENT, b"tracestate")
        }
        self._tracer = tracer
        self._began = time_ns()
        self._span = tracer.start_span(
            "gateway",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            start_time=self._began,
            attributes={
                "http.request.method": request.method.decode("latin-1"),
                "url.path": request.path.partition(b"?")[0].decode("latin-1")[:256],
                "gen_ai.request.id": request.id.decode("latin-1"),
                "client.address": request.peer,
            },
        )
        self._queue: Span | None = None
        self._attempts: dict[str, Span] = {}  # one at a time of each name
        self.trace_id = f"{self._span.get_span_context().trace_id:032x}"

    def _child(self, name: str, start: int | None = None, *, client: bool = False) -> Span:
        from opentelemetry.trace import SpanKind, set_span_in_context

        kind = SpanKind.CLIENT if client else SpanKind.INTERNAL
        context = set_span_in_context(self._span)
        return self._tracer.start_span(name, context=context, kind=kind, start_time=start)

    def waits(self) -> None:
        self._queue = self._child("queue", self._began)

    def admitted(self) -> None:
        if self._queue is not None:
            self._queue.end()
            self._queue = None

    def sent_to(self, replica: Replica, name: str = "replica") -> bytes:
        self.left(name)
        span = self._attempts[name] = self._child(name, client=True)
        target = replica.target
        span.set_attribute("server.address", target.host)
        span.set_attribute("server.port", target.port)
        own = span.get_span_context()
        return b"00-%032x-%016x-%02x" % (own.trace_id, own.span_id, own.trace_flags)

    def first_byte(self) -> None:
        if (span := self._attempts.get("replica")) is not None:
            span.add_event("first byte")

    def failed(self, reason: str, name: str = "replica") -> None:
        from opentelemetry.trace import StatusCode

        if (span := self._attempts.get(name)) is not None:
            span.set_status(StatusCode.ERROR, reason)
            self.left(name)

    def left(self, name: str = "replica") -> None:
        if (span := self._attempts.pop(name, None)) is not None:
            span.end()

    def ended(self, status: int, retries: int, resumptions: int) -> None:
        from opentelemetry.trace import StatusCode

        self.admitted()  # or refused
        for name in list(self._attempts):
            self.left(name)
        span = self._span
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("millrace.retries", retries)
        span.set_attribute("millrace.resumptions", resumptions)
        if status >= 500 or not status:
            span.set_status(StatusCode.ERROR, f"HTTP {status}")
        span.end()


class RequestTracer:
    """Makes the spans of all requests of a gateway process."""

    def __init__(self, endpoint: str | None = None) -> None:
        """Raises ConfigError where spans cannot be sent."""
        self._provider: TracerProvider | None = open_provider(endpoint, "millrace-gateway")
        self._tracer = self._provider.get_tracer("millrace") if self._provider else None

    def begin(self, request: Request) -> RequestSpans:
        """A request has come."""
        return UNTRACED if self._tracer is None else TracedRequest(self._tracer, request)

    def close(self) -> None:
        """Send what waits, within a few seconds."""
        close_provider(self._provider)
