"""What a replica reports at /metrics: the engine's totals and the latencies that the front sees.

Every figure stands under Millrace's own name and, where vLLM has one with the same meaning, under
vLLM's too, so that dashboards made for it keep working. Recording is a few list operations: it
happens for every token that is streamed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from millrace.protocol import EngineStats, FinishReason

SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
    0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
TOKENS = tuple(float(2**power) for power in range(21))


class Histogram:
    """Counts of values up to each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus counts them: cumulatively."""
        names = [*map(str, self._bounds), "+Inf"]
        seen, rows = 0, []
        for name, count in zip(names, self._counts, strict=True):
            seen += count
            rows.append((name, float(seen)))
        return rows

    @property
    def sum(self) -> float:
        return self._sum


class RequestMetrics:
    """Latencies and ends of requests, in seconds and tokens."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(SECONDS)
        self.queue_time = Histogram(SECONDS)
        self.inter_token_latency = Histogram(SECONDS)
        self.time_per_output_token = Histogram(SECONDS)
        self.end_to_end = Histogram(SECONDS)
        self.prompt_tokens = Histogram(TOKENS)
        self.generation_tokens = Histogram(TOKENS)
        self.finished: Counter[FinishReason] = Counter()
        self.rejected = 0


def _used(free: int, total: int) -> float:
    return 1.0 - free / total if total else 0.0


# name, vLLM's name if it has one of the same meaning, what it is, its value
_Row = tuple[str, str | None, str, Callable[[EngineStats], float]]

_GAUGES: tuple[_Row, ...] = (
    ("num_requests_running", "num_requests_running", "Requests that own a slot.",
     lambda s: s.running),
    ("num_requests_waiting", "num_requests_waiting", "Requests that wait for a slot.",
     lambda s: s.waiting),
    ("kv_cache_usage_perc", "kv_cache_usage_perc", "Share of KV pages in use; 1 is all.",
     lambda s: _used(s.free_pages, s.total_pages)),
    ("snapshots_used", None, "State snapshots that the prefix cache holds.",
     lambda s: s.snapshots_used),
    ("snapshots_total", None, "State snapshots that there is room for.",
     lambda s: s.snapshots_total),
)  # fmt: skip

_COUNTERS: tuple[_Row, ...] = (
    ("steps", None, "Steps that the engine has run.", lambda s: s.steps),
    ("num_preemptions", "num_preemptions", "Requests put back for want of pages.",
     lambda s: s.preemptions),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens taken in.", lambda s: s.prompt_tokens),
    ("generation_tokens", "generation_tokens", "Tokens generated.", lambda s: s.generated_tokens),
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up.",
     lambda s: s.prefix_queries),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache.",
     lambda s: s.prefix_hits),
    ("spec_decode_num_drafts", "spec_decode_num_drafts", "Rows of draft tokens verified.",
     lambda s: s.drafts),
    ("spec_decode_num_draft_tokens", "spec_decode_num_draft_tokens", "Draft tokens verified.",
     lambda s: s.drafts * len(s.accepted_per_position)),
    ("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens",
     "Draft tokens accepted.", lambda s: sum(s.accepted_per_position)),
)  # fmt: skip

_HISTOGRAMS: tuple[tuple[str, str, str, Callable[[RequestMetrics], Histogram]], ...] = (
    ("time_to_first_token_seconds", "time_to_first_token_seconds",
     "From a request's arrival to its first token.", lambda m: m.time_to_first_token),
    ("request_queue_time_seconds", "request_queue_time_seconds",
     "From a request's arrival to the step that admits it.", lambda m: m.queue_time),
    ("inter_token_latency_seconds", "inter_token_latency_seconds",
     "Between two steps that brought tokens to one request.", lambda m: m.inter_token_latency),
    ("time_per_output_token_seconds", "request_time_per_output_token_seconds",
     "Mean over a request's tokens after the first.", lambda m: m.time_per_output_token),
    ("e2e_request_latency_seconds", "e2e_request_latency_seconds",
     "From a request's arrival to its end.", lambda m: m.end_to_end),
    ("request_prompt_tokens", "request_prompt_tokens", "Prompt tokens of a request.",
     lambda m: m.prompt_tokens),
    ("request_generation_tokens", "request_generation_tokens", "Tokens that a request generated.",
     lambda m: m.generation_tokens),
)  # fmt: skip


class MetricsPage:
    """The page that Prometheus reads. stats: gives the engine's latest figures."""

    def __init__(
        self, model: str, requests: RequestMetrics, stats: Callable[[], EngineStats]
    ) -> None:
        self._model = model
        self._requests = requests
        self._stats = stats
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' way of asking for every figure."""
        stats = self._stats()
        labels = ["model_name"]
        for name, vllm_name, text, value in _GAUGES:
            for full in _names(name, vllm_name):
                gauge = GaugeMetricFamily(full, text, labels=labels)
                gauge.add_metric([self._model], value(stats))
                yield gauge
        for name, vllm_name, text, value in _COUNTERS:
            for full in _names(name, vllm_name):
                counter = CounterMetricFamily(full, text, labels=labels)
                counter.add_metric([self._model], value(stats))
                yield counter
        for name, vllm_name, text, pick in _HISTOGRAMS:
            for full in _names(name, vllm_name):
                histogram = pick(self._requests)
                family = HistogramMetricFamily(full, text, labels=labels)
                family.add_metric([self._model], histogram.buckets(), histogram.sum)
                yield family
        yield from self._labelled(stats)

    def _labelled(self, stats: EngineStats) -> Iterator[Metric]:
        """Counters with a label of their own."""
        accepted = {str(at): count for at, count in enumerate(stats.accepted_per_position)}
        finished = {str(reason): count for reason, count in self._requests.finished.items()}
        for name, vllm_name, text, label, counts in (
            ("spec_decode_num_accepted_tokens_per_pos", "spec_decode_num_accepted_tokens_per_pos",
             "Draft tokens accepted at each position.", "position", accepted),
            ("requests_finished", "request_success", "Requests ended, by how they did.",
             "finished_reason", finished),
            ("requests_rejected", None, "Requests refused because the queue was full.",
             "reason", {"queue_full": self._requests.rejected}),
        ):  # fmt: skip
            for full in _names(name, vllm_name):
                family = CounterMetricFamily(full, text, labels=["model_name", label])
                for key, count in counts.items():
                    family.add_metric([self._model, key], count)
                yield family


def _names(name: str, vllm_name: str | None) -> Iterator[str]:
    yield f"millrace:{name}"
    if vllm_name:
        yield f"vllm:{vllm_name}"
