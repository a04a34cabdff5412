"""OpenTelemetry traces of requests, where they are wanted (extra `otel`).

One span a request, made when it has ended, with the attributes that vLLM's spans have, and below it
the engine's phases of each output: queue, prefill, decode. A `traceparent` header of the request
makes all of it part of the caller's trace, such as the gateway's.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from millrace.logs.otlp import close_provider, open_provider
from millrace.server.engine_link.request_record import RequestRecord
from millrace.server.engine_link.stream import Stream

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

NANOSECONDS = 1_000_000_000


class Phase(NamedTuple):
    """What the engine did for an output, from start to end, on the clock of its stream's times."""

    name: str
    start: float
    end: float
    attributes: dict[str, Any]


class Tracer:
    """Sends spans for each request that reached the engine; without a provider it does nothing."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("millrace") if provider else None

    @classmethod
    def to(cls, endpoint: str | None) -> Tracer:
        """A tracer that sends to this OTLP/HTTP URL; None: one that does nothing.

        Raises ConfigError where OpenTelemetry is not installed, or is broken.
        """
        return cls(open_provider(endpoint, "millrace"))

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
            start_time=_unix(record, record.started),
            attributes=_attributes(record),
        )
        if record.status >= 400:
            span.set_status(trace.StatusCode.ERROR, f"HTTP {record.status}")
        if span.is_recording():
            for stream in record.streams:
                self._record_phases(record, stream, span)
        span.end()

    def _record_phases(self, record: RequestRecord, stream: Stream, parent: Span) -> None:
        from opentelemetry.trace import set_span_in_context

        assert self._tracer is not None
        for phase in phases(stream, monotonic()):
            span = self._tracer.start_span(
                phase.name,
                context=set_span_in_context(parent),
                start_time=_unix(record, phase.start),
                attributes={"gen_ai.request.id": stream.id, **phase.attributes},
            )
            span.end(_unix(record, phase.end))

    def close(self) -> None:
        """Send what waits, within a few seconds."""
        close_provider(self._provider)


def phases(stream: Stream, now: float) -> Iterator[Phase]:
    """The phases of an output that has ended, or whose reader has gone. Before its first token the
    engine does not say when it was admitted: what was until then is one phase."""
    prompt = {
        "gen_ai.usage.prompt_tokens": stream.prompt_len,
        "gen_ai.usage.cached_tokens": stream.cached_tokens,
    }
    if not stream.generated_tokens:
        yield Phase("queue and prefill", stream.arrival, now, prompt)
        return
    admitted = stream.arrival + stream.queue_time
    yield Phase("queue", stream.arrival, admitted, {})
    yield Phase("prefill", admitted, stream.first_token_time, prompt)
    answer = {
        "gen_ai.usage.completion_tokens": stream.generated_tokens,
        "gen_ai.response.finish_reason": stream.finish_reason or "abort",
        "millrace.preemptions": stream.preemptions,
    }
    yield Phase("decode", stream.first_token_time, stream.last_token_time, answer)


def _unix(record: RequestRecord, t: float) -> int:
    """Nanoseconds since 1970 of a time on the monotonic clock."""
    return int((record.started_unix + t - record.started) * NANOSECONDS)


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
