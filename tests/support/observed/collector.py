"""A collector of OpenTelemetry's spans: an HTTP server that decodes what exporters send."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Sent:
    """One span as it came. trace, id, parent: in hex; parent is empty for a root. start, end:
    nanoseconds since 1970. events: their names. error: its message, None without one."""

    name: str
    service: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: list[str]
    error: str | None


@dataclass
class Spans:
    """All that has come. problems: why requests were refused."""

    endpoint: str = ""
    all: list[Sent] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def named(self, name: str) -> list[Sent]:
        return [one for one in self.all if one.name == name]

    def below(self, parent: Sent) -> list[Sent]:
        """Its children, by their starts."""
        children = (one for one in self.all if one.parent == parent.id)
        return sorted(children, key=lambda one: (one.start, one.end))

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            facts = _values(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.all += [_sent(span, str(facts["service.name"])) for span in scope.spans]


@contextlib.contextmanager
def collector() -> Iterator[Spans]:
    """A collector on a free port of this host."""
    spans = Spans()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            kind = self.headers["content-type"]
            if self.path != "/v1/traces" or kind != "application/x-protobuf":
                spans.problems.append(f"{self.path} {kind}")
                self.send_response(415)
            else:
                spans.take(body)
                self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    spans.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    try:
        yield spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
    assert spans.problems == []


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def _sent(span: Any, service: str) -> Sent:
    return Sent(
        name=span.name,
        service=service,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_values(span.attributes),
        events=[event.name for event in span.events],
        error=span.status.message if span.status.code == 2 else None,
    )
