"""OpenTelemetry traces of requests, where they are wanted (extra `otel`).

One span a request, made when it has ended, with the attributes that vLLM's spans have; a
`traceparent` header of the request makes it part of the caller's trace. OpenTelemetry is imported
only when an endpoint was named, and sends from a thread of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from millrace.common.optional import require
from millrace.errors import ConfigError
from millrace.server.engine_link.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

NANOSECONDS = 1_000_000_000
FLUSH_MS = 3000


class Tracer:
    """Sends a span for each request that reached the engine; without a provider it does nothing."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("millrace") if provider else None

    @classmethod
    def to(cls, endpoint: str | None) -> Tracer:
        """A tracer that sends to this OTLP/HTTP URL; None: one that does nothing.

        Raises ConfigError where OpenTelemetry is not installed, or is broken.
        """
        if endpoint is None:
            return cls()
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"--otlp-traces-endpoint {endpoint!r}: use a URL of OTLP over HTTP, such as "
                "http://127.0.0.1:4318/v1/traces"
            )
        require("opentelemetry", "--otlp-traces-endpoint")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: "millrace"}), shutdown_on_exit=False
        )
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        return cls(provider)

    @property
    def active(self) -> bool:
        return self._tracer is not None

    def record(self, record: RequestRecord) -> None:
        """A request has ended."""
        if self._tracer is None or not record.streams:
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in record.scope["headers"]}
        span = self._tracer.start_span(
            "llm_request",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=trace.SpanKind.SERVER,
            start_time=int(record.started_unix * NANOSECONDS),
            attributes=_attributes(record),
        )
        if record.status >= 400:
            span.set_status(trace.StatusCode.ERROR, f"HTTP {record.status}")
        span.end()

    def close(self) -> None:
        """Send what waits, within a few seconds."""
        if self._provider is not None:
            self._provider.force_flush(FLUSH_MS)
            self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """Named as vLLM names them; times in seconds, those of the first output."""
    stream = record.streams[0]
    params = stream.params
    attributes = {
        "http.request.method": record.scope["method"],
        "http.route": record.route,
        "http.response.status_code": record.status,
        "gen_ai.request.id": record.id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.usage.prompt_tokens": record.prompt_tokens,
        "gen_ai.usage.completion_tokens": record.completion_tokens,
        "gen_ai.latency.time_in_queue": stream.queue_time,
    }
    if stream.generated_tokens:
        admitted = stream.arrival + stream.queue_time
        attributes |= {
            "gen_ai.latency.time_to_first_token": stream.first_token_time - stream.arrival,
            "gen_ai.latency.e2e": stream.last_token_time - stream.arrival,
            "gen_ai.latency.time_in_model_prefill": stream.first_token_time - admitted,
            "gen_ai.latency.time_in_model_decode": stream.last_token_time - stream.first_token_time,
            "gen_ai.latency.time_in_model_inference": stream.last_token_time - admitted,
        }
    return {name: value for name, value in attributes.items() if value is not None}
