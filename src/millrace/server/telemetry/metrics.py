"""What a replica reports at /metrics: the engine's totals, and latencies that the server sees.

Each figure has Millrace's own name. Where vLLM has a figure of the same meaning, it also appears
under vLLM's name, with vLLM's labels and buckets, so that existing dashboards keep working.
Recording a value costs a few list operations, since it happens for every token of a stream.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from millrace.protocol import STEP_TOKENS, EngineStats, FinishReason
from millrace.server.telemetry import http_metrics
from millrace.server.telemetry.http_metrics import HttpDurations
from millrace.server.telemetry.work_metrics import WorkMetrics

# vLLM's buckets, in seconds, tokens and outputs.
_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_TOKENS = tuple(float(m * 10**power) for power in range(7) for m in (1, 2, 5))
_OUTPUTS = (1.0, 2.0, 5.0, 10.0, 20.0)
_PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)
# What Millrace adds to them under its own names, where tokens come faster than vLLM's buckets see.
_FINE = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04)
_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")


class Histogram:
    """Counts of values up to each bound, and their sum.

    bounds: those that vLLM has. finer: bounds that are ours alone.
    """

    def __init__(self, bounds: Sequence[float], finer: Sequence[float] = ()) -> None:
        self._vllm = frozenset(bounds)
        self._bounds = sorted({*bounds, *finer})
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self, vllm: bool) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus counts them: cumulatively.

        vllm: only at the bounds that vLLM has.
        """
        seen, rows = 0, []
        for bound, count in zip(self._bounds, self._counts, strict=False):
            seen += count
            if not vllm or bound in self._vllm:
                rows.append((str(bound), float(seen)))
        rows.append(("+Inf", float(seen + self._counts[-1])))
        return rows

    @property
    def sum(self) -> float:
        return self._sum


class RequestMetrics:
    """Latencies and ends of requests, in seconds and tokens."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(_FIRST_TOKEN, _FINE)
        self.inter_token_latency = Histogram(_TOKEN, _FINE)
        self.time_per_output_token = Histogram(_TOKEN, _FINE)
        self.time_per_output_token_or_zero = Histogram(_TOKEN)
        self.queue_time = Histogram(_REQUEST, (*_FINE, *_TOKEN))
        self.end_to_end = Histogram(_REQUEST, _TOKEN)
        self.inference_time = Histogram(_REQUEST, _TOKEN)
        self.prefill_time = Histogram(_REQUEST, (*_FINE, *_TOKEN))
        self.decode_time = Histogram(_REQUEST, _TOKEN)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.max_tokens = Histogram(_TOKENS)
        self.n = Histogram(_OUTPUTS)
        self.longest_output = Histogram(_TOKENS)
        self.prefill_computed_tokens = Histogram(_TOKENS)
        self.preemptions = Histogram(_PREEMPTIONS)
        self.finished: Counter[FinishReason] = Counter(dict.fromkeys(_REASONS, 0))
        self.http: Counter[tuple[str, str, int]] = Counter()  # route, method, status
        self.http_durations = HttpDurations()
        self.rejected = 0
        self.restarts = 0


def kv_usage(stats: EngineStats) -> float:
    """What the prefix cache alone holds is free for whoever needs it, so it is not in use."""
    available = stats.free_pages + stats.evictable_pages
    return 1.0 - available / stats.total_pages if stats.total_pages else 0.0


def reported_load(stats: EngineStats) -> Mapping[str, float]:
    """What answers report of the engine's load to balancers that ask (ORCA), as vLLM does."""
    return {
        "kv_cache_usage_perc": kv_usage(stats),
        "num_requests_waiting": float(stats.waiting),
    }


def _transferred(name: str, stats: EngineStats) -> float:
    return float(getattr(stats.transfers, name))


# name, vLLM's name if it has one of the same meaning, what it is, its value
_Row = tuple[str | None, str | None, str, Callable[[EngineStats], float]]

GAUGES: tuple[_Row, ...] = (
    ("num_requests_running", "num_requests_running", "Requests that own a slot.",
     lambda s: s.running),
    ("num_requests_waiting", "num_requests_waiting", "Requests that wait for a slot.",
     lambda s: s.waiting),
    ("kv_cache_usage_perc", "kv_cache_usage_perc",
     "Share of KV pages that requests hold; 1 is all.", kv_usage),
    ("kv_pages_free", None, "KV pages that nothing holds.", lambda s: s.free_pages),
    ("kv_pages_evictable", None, "KV pages that only the prefix cache holds.",
     lambda s: s.evictable_pages),
    ("kv_pages_capacity", None, "KV pages that there are.", lambda s: s.total_pages),
    ("snapshots_used", None, "State snapshots that the prefix cache holds.",
     lambda s: s.snapshots_used),
    ("snapshots_capacity", None, "State snapshots that there is room for.",
     lambda s: s.snapshots_total),
    ("kv_transfer_open", None, "Records of prompts that other engines may take.",
     lambda s: s.transfers.open),
)  # fmt: skip

COUNTERS: tuple[_Row, ...] = (
    ("steps", None, "Steps that the engine has run.", lambda s: s.steps),
    ("num_preemptions", "num_preemptions", "Requests put back for want of pages.",
     lambda s: s.preemptions),
    ("prompt_tokens", "prompt_tokens", "Prompt tokens taken in.", lambda s: s.prompt_tokens),
    ("generation_tokens", "generation_tokens", "Tokens generated.", lambda s: s.generated_tokens),
    ("prompt_tokens_cached", "prompt_tokens_cached",
     "Prompt tokens that came from the prefix cache.", lambda s: s.prefix_hits),
    ("rows_not_finite", "corrupted_requests",
     "Requests ended because their logits were NaN or infinite.", lambda s: s.rows_not_finite),
    ("prefix_cache_queries", "prefix_cache_queries", "Prompt tokens looked up.",
     lambda s: s.prefix_queries),
    ("prefix_cache_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache.",
     lambda s: s.prefix_hits),
    ("spec_decode_num_drafts", "spec_decode_num_drafts", "Rows of draft tokens verified.",
     lambda s: s.drafts),
    ("spec_decode_num_draft_tokens", "spec_decode_num_draft_tokens", "Draft tokens verified.",
     lambda s: s.draft_tokens),
    ("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens",
     "Draft tokens accepted.", lambda s: sum(s.accepted_per_position)),
    (None, "external_prefix_cache_queries", "Prompt tokens that were to come from other engines.",
     lambda s: s.remote_queries),
    (None, "external_prefix_cache_hits", "Prompt tokens that came from other engines.",
     lambda s: s.remote_hits),
    *((f"kv_transfer_{name}", None, text, partial(_transferred, name)) for name, text in (
        ("sent", "Records of prompts that other engines have taken."),
        ("sent_pages", "Pages of these records."),
        ("sent_bytes", "Bytes of these records that went over."),
        ("sent_failed", "Records that nobody took before their lease ended."),
        ("received", "Records of prompts that came from other engines."),
        ("received_pages", "Pages of these records that came."),
        ("received_bytes", "Bytes of these records that came."),
        ("received_failed", "Records that did not come whole."),
        ("local", "Records that were asked for and were here already."),
        ("seconds", "Seconds that receiving records took."),
    )),
    # vLLM has these at 0 where it has no such cache, and there is none here.
    *((None, name, text, lambda _: 0) for name, text in (
        ("mm_cache_queries", "Images and sounds looked up; prompts are texts."),
        ("mm_cache_hits", "Images and sounds found; prompts are texts."),
    )),
)  # fmt: skip

_HistogramRow = tuple[str | None, str | None, str, Callable[[RequestMetrics], Histogram]]

HISTOGRAMS: tuple[_HistogramRow, ...] = (
    ("time_to_first_token_seconds", "time_to_first_token_seconds",
     "From a request's arrival to its first token.", lambda m: m.time_to_first_token),
    ("request_queue_time_seconds", "request_queue_time_seconds",
     "From a request's arrival to the step that admits it.", lambda m: m.queue_time),
    ("inter_token_latency_seconds", "inter_token_latency_seconds",
     "Between two steps that brought tokens to one request.", lambda m: m.inter_token_latency),
    ("time_per_output_token_seconds", None,
     "Mean over a request's tokens after the first, of requests of several tokens.",
     lambda m: m.time_per_output_token),
    (None, "time_per_output_token_seconds",
     "Between two steps that brought tokens to one request; older dashboards read this name.",
     lambda m: m.inter_token_latency),
    (None, "request_time_per_output_token_seconds",
     "Mean over a request's tokens after the first; 0 for a request of one token.",
     lambda m: m.time_per_output_token_or_zero),
    ("e2e_request_latency_seconds", "e2e_request_latency_seconds",
     "From a request's arrival to its end.", lambda m: m.end_to_end),
    ("request_prompt_tokens", "request_prompt_tokens", "Prompt tokens of a request.",
     lambda m: m.prompt_tokens),
    ("request_generation_tokens", "request_generation_tokens", "Tokens that a request generated.",
     lambda m: m.generation_tokens),
    ("request_inference_time_seconds", "request_inference_time_seconds",
     "From a request's admission to its end.", lambda m: m.inference_time),
    ("request_prefill_time_seconds", "request_prefill_time_seconds",
     "From a request's admission to its first token.", lambda m: m.prefill_time),
    ("request_decode_time_seconds", "request_decode_time_seconds",
     "From a request's first token to its last.", lambda m: m.decode_time),
    ("request_params_max_tokens", "request_params_max_tokens", "The max_tokens of requests.",
     lambda m: m.max_tokens),
    ("request_params_n", "request_params_n", "Outputs asked for by a request.", lambda m: m.n),
    ("request_max_num_generation_tokens", "request_max_num_generation_tokens",
     "Tokens of the longest of a request's outputs.", lambda m: m.longest_output),
    ("request_prefill_kv_computed_tokens", "request_prefill_kv_computed_tokens",
     "Prompt tokens of a request that were computed, not cached.",
     lambda m: m.prefill_computed_tokens),
    ("request_num_preemptions", "request_num_preemptions",
     "How often a request was put back for want of pages.", lambda m: m.preemptions),
)  # fmt: skip


class MetricsPage:
    """The page that Prometheus reads.

    stats: gives the engine's latest figures. config: facts of the engine that never change, once
    they are known. sleep_level: 0 while the engine is awake. up: whether the engine runs. work:
    what steps compute, and the GPUs that they run on. gauges, counters: further figures by name,
    each with what it is.
    """

    def __init__(
        self,
        model: str,
        requests: RequestMetrics,
        stats: Callable[[], EngineStats],
        config: Callable[[], Mapping[str, str]] = dict,
        sleep_level: Callable[[], int] = lambda: 0,
        up: Callable[[], bool] = lambda: True,
        work: WorkMetrics | None = None,
    ) -> None:
        self._sleep_level, self._up = sleep_level, up
        self._work = work or WorkMetrics(lambda: self._stats().work)
        self._labels = {"model_name": model, "engine": "0"}
        self._requests = requests
        self._stats = stats
        self._config = config
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self.counters: dict[str, tuple[str, Callable[[], float]]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' way of asking for every figure."""
        stats = self._stats()
        text = "1 while an engine has loaded its model and runs; 0 while it loads or is dead."
        yield self._gauge("millrace:engine_up", text, float(self._up()))
        for name, vllm_name, text, value in GAUGES:
            for full in _names(name, vllm_name):
                yield self._gauge(full, text, value(stats))
        for name, (text, read) in self.gauges.items():
            yield self._gauge(f"millrace:{name}", text, read())
        for name, (text, read) in self.counters.items():
            yield self._counter(f"millrace:{name}", text, {(): read()})
        for name, vllm_name, text, value in COUNTERS:
            for full in _names(name, vllm_name):
                yield self._counter(full, text, {(): value(stats)})
        yield from self._histograms()
        yield from self._labelled(stats)
        yield from self._work.collect(self._labels)

    def _histograms(self) -> Iterator[Metric]:
        for name, vllm_name, text, pick in HISTOGRAMS:
            for full in _names(name, vllm_name):
                histogram = pick(self._requests)
                rows = histogram.buckets(vllm=full.startswith("vllm:"))
                yield self._histogram(full, text, rows, histogram.sum)

    def _histogram(
        self, name: str, text: str, buckets: list[tuple[str, float]], total: float
    ) -> Metric:
        family = HistogramMetricFamily(name, text, labels=list(self._labels))
        family.add_metric([*self._labels.values()], buckets, total)
        return family

    def _labelled(self, stats: EngineStats) -> Iterator[Metric]:
        """Figures with labels of their own."""
        requests = self._requests
        yield from self._waiting_by_reason(stats)
        for full in _names("iteration_tokens", "iteration_tokens_total"):
            text = "Tokens that a step computes, of prompts and outputs."
            yield self._histogram(full, text, _step_buckets(stats), stats.step_tokens_sum)
        yield self._admission_rejections()
        if self._up() or self._sleep_level():  # a dead engine is neither awake nor asleep
            yield from self._sleep_state()
        accepted = {(str(at),): count for at, count in enumerate(stats.accepted_per_position)}
        finished = {(str(reason),): count for reason, count in requests.finished.items()}
        for name, vllm_name, text, label, counts in (
            ("spec_decode_num_accepted_tokens_per_pos", "spec_decode_num_accepted_tokens_per_pos",
             "Draft tokens accepted at each position.", "position", accepted),
            ("requests_finished", "request_success", "Requests ended, by how they did.",
             "finished_reason", finished),
            ("prompt_tokens_by_source", "prompt_tokens_by_source",
             "Prompt tokens, by where they came from.", "source", _by_source(stats)),
            ("prompt_tokens_cached_by_source", "prompt_tokens_cached_by_source",
             "Prompt tokens found in the prefix cache, by where it is.", "source",
             _cached_by_source(stats)),
            ("requests_rejected", None, "Requests refused because the queue was full.",
             "reason", {("queue_full",): requests.rejected}),
        ):  # fmt: skip
            for full in _names(name, vllm_name):
                yield self._counter(full, text, counts, label)
        yield from self._drafts_by_method(stats)
        if stats.expert_tokens:
            yield from self._expert_load(stats)
        depths = {(str(depth),): n for depth, n in sorted(stats.steps_by_depth.items())}
        text = "Steps with decode rows, by the drafts that a row verifies."
        yield self._counter("millrace:spec_decode_steps_by_depth", text, depths, "depth")
        http = {(route, method, str(code)): n for (route, method, code), n in requests.http.items()}
        yield self._counter(
            "millrace:http_requests", "HTTP requests.", http, "route", "method", "status"
        )
        yield from http_metrics.families(requests.http, requests.http_durations)
        restarts = {(): requests.restarts}
        yield self._counter("millrace:engine_restarts", "Engines started again.", restarts)
        config = self._config()
        if config:
            text = "Facts of the cache."
            for full in _names("cache_config_info", "cache_config_info"):
                yield self._gauge(full, text, 1.0, config)

    def _expert_load(self, stats: EngineStats) -> Iterator[Metric]:
        """Tokens by expert, and by how much the busiest expert, and rank, is above the mean."""
        counts = {
            (layer, str(expert)): count
            for layer, load in stats.expert_tokens.items()
            for expert, count in enumerate(load)
        }
        text = "Tokens that each expert got."
        yield self._counter("millrace:expert_tokens", text, counts, "layer", "expert")
        for name, text, ranks in (
            ("expert_load_imbalance", "Tokens of a layer's busiest expert, over the mean.", 0),
            ("rank_load_imbalance", "Tokens of the rank with a layer's busiest experts, over the "
             "mean.", stats.expert_ranks),
        ):  # fmt: skip
            for layer, load in stats.expert_tokens.items():
                value = imbalance(load, ranks or len(load))
                yield self._gauge(f"millrace:{name}", text, value, {"layer": layer})

    def _drafts_by_method(self, stats: EngineStats) -> Iterator[Metric]:
        """As the figures of all drafts, by the method that made them."""
        methods = stats.draft_methods
        rows = {(name,): one.drafts for name, one in methods.items()}
        tokens = {(name,): one.tokens for name, one in methods.items()}
        accepted = {
            (name, str(at)): count
            for name, one in methods.items()
            for at, count in enumerate(one.accepted)
        }
        name = "millrace:spec_decode_num"
        text = "Rows of draft tokens verified, by the method that drafted."
        yield self._counter(f"{name}_drafts_by_method", text, rows, "method")
        text = "Draft tokens verified, by the method that drafted."
        yield self._counter(f"{name}_draft_tokens_by_method", text, tokens, "method")
        text = "Draft tokens accepted, by the method that drafted and by position."
        yield self._counter(
            f"{name}_accepted_tokens_by_method", text, accepted, "method", "position"
        )

    def _waiting_by_reason(self, stats: EngineStats) -> Iterator[Metric]:
        deferred = stats.waiting_deferred
        text = "Requests that wait: for room (capacity), or for something else (deferred)."
        for full in _names("num_requests_waiting_by_reason", "num_requests_waiting_by_reason"):
            family = GaugeMetricFamily(full, text, labels=[*self._labels, "reason"])
            for reason, count in (("capacity", stats.waiting - deferred), ("deferred", deferred)):
                family.add_metric([*self._labels.values(), reason], count)
            yield family

    def _sleep_state(self) -> Iterator[Metric]:
        text = "1 for the state that the engine is in: awake, or asleep at level 1 or 2."
        for full in _names("engine_sleep_state", "engine_sleep_state"):
            family = GaugeMetricFamily(full, text, labels=[*self._labels, "sleep_state"])
            for level, state in enumerate(("awake", "weights_offloaded", "discard_all")):
                family.add_metric([*self._labels.values(), state], self._sleep_level() == level)
            yield family

    def _admission_rejections(self) -> Metric:
        """vLLM's name for refused requests; it has no label `engine`."""
        text = "Requests refused because the queue was full."
        family = CounterMetricFamily(
            "vllm:admission_rejections", text, labels=["model_name", "reason"]
        )
        model = self._labels["model_name"]
        family.add_metric([model, "max_num_queued_reqs"], self._requests.rejected)
        family.add_metric([model, "max_num_queued_tokens"], 0)  # there is no such limit
        return family

    def _gauge(
        self, name: str, text: str, value: float, more: Mapping[str, str] | None = None
    ) -> Metric:
        labels = {**self._labels, **(more or {})}
        family = GaugeMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _counter(self, name: str, text: str, counts: Mapping[Any, float], *labels: str) -> Metric:
        """counts: by the values of `labels`, a tuple."""
        family = CounterMetricFamily(name, text, labels=[*self._labels, *labels])
        for values, count in counts.items():
            family.add_metric([*self._labels.values(), *values], count)
        return family


def _step_buckets(stats: EngineStats) -> list[tuple[str, float]]:
    """The histogram of tokens in a step, counted cumulatively."""
    counts = stats.step_tokens or [0] * (len(STEP_TOKENS) + 1)
    bounds = [*(str(float(bound)) for bound in STEP_TOKENS), "+Inf"]
    return list(zip(bounds, map(float, accumulate(counts)), strict=True))


def _cached_by_source(stats: EngineStats) -> Mapping[tuple[str], float]:
    """Every hit in the tier that had it; `p2p` is vLLM's word for another engine."""
    elsewhere = stats.host_hits + stats.disk_hits + stats.remote_hits
    return {
        ("device",): stats.prefix_hits - elsewhere,
        ("host",): stats.host_hits,
        ("disk",): stats.disk_hits,
        ("p2p",): stats.remote_hits,
    }


def imbalance(load: Sequence[int], parts: int) -> float:
    """The largest part of a load, which is cut into so many parts in its order, over the mean; 1
    is even, and also what a load of nothing has."""
    each, total = len(load) // parts, sum(load)
    most = max(sum(load[start : start + each]) for start in range(0, len(load), each))
    return most * parts / total if total else 1.0


def _by_source(stats: EngineStats) -> Mapping[tuple[str], float]:
    return {
        ("local_compute",): stats.prompt_tokens - stats.prefix_hits,
        ("local_cache_hit",): stats.prefix_hits - stats.remote_hits,
        ("external_kv_transfer",): stats.remote_hits,
    }


def _names(name: str | None, vllm_name: str | None) -> Iterator[str]:
    if name:
        yield f"millrace:{name}"
    if vllm_name:
        yield f"vllm:{vllm_name}"
