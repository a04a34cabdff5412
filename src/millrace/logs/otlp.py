"""Spans of OpenTelemetry on their way to a collector, over OTLP/HTTP (extra `otel`).

It knows how spans are sent, and not what they are of. OpenTelemetry is imported only where an
endpoint was named. Spans wait in a queue of bounded size; a thread sends them, and drops what a
collector does not take; a line a minute says so. The environment variables of
OpenTelemetry hold: OTEL_TRACES_SAMPLER for the share of requests, OTEL_EXPORTER_OTLP_HEADERS for
keys, OTEL_SERVICE_NAME for the name.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from millrace.common.optional import require
from millrace.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLAG = "--otlp-traces-endpoint"
HELP = "URL that receives OpenTelemetry traces, such as http://127.0.0.1:4318/v1/traces."
FLUSH_SECONDS = 3.0
COMPLAIN_EVERY = 60.0  # seconds
_EXPORTER_LOG = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def check_endpoint(endpoint: str | None) -> None:
    """Raise ConfigError where spans cannot be sent to it, or OpenTelemetry is missing."""
    if endpoint is None:
        return
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(
            f"{FLAG} {endpoint!r}: use a URL of OTLP over HTTP, such as "
            "http://127.0.0.1:4318/v1/traces"
        )
    require("opentelemetry", FLAG)


def open_provider(endpoint: str | None, service: str) -> TracerProvider | None:
    """What makes spans for this endpoint; None without one. service: its name in traces. Raises
    ConfigError like `check_endpoint`."""
    check_endpoint(endpoint)
    if endpoint is None:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME") or service
    facts: dict[str, str | int] = {SERVICE_NAME: name, "process.pid": os.getpid()}
    facts["host.name"] = socket.gethostname()
    provider = TracerProvider(resource=Resource.create(facts), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    log = logging.getLogger(_EXPORTER_LOG)
    if not any(isinstance(one, Seldom) for one in log.filters):
        log.addFilter(Seldom())
    return provider


def close_provider(provider: TracerProvider | None) -> None:
    """Send what waits, within FLUSH_SECONDS; a collector that does not answer keeps no process."""
    if provider is None:
        return
    # Its own limits are those of whole exports with their retries, one after another.
    thread = threading.Thread(target=_finish, args=(provider,), name="otlp-end", daemon=True)
    thread.start()
    thread.join(FLUSH_SECONDS)


def _finish(provider: TracerProvider) -> None:
    provider.force_flush(int(FLUSH_SECONDS * 1000))
    provider.shutdown()


class Seldom(logging.Filter):
    """Lets one line through every COMPLAIN_EVERY seconds: a collector that is gone fails each
    batch, with four lines."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._next = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._now()
        if now < self._next:
            return False
        self._next = now + COMPLAIN_EVERY
        return True
