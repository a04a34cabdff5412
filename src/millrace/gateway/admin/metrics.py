"""The gateway's metrics in Prometheus' format, read from the shared counters when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from millrace.gateway.common import shared_counters as cells
from millrace.gateway.common.shared_counters import FIRST_BYTE_BOUNDS, SharedCounters
from millrace.gateway.routing.admission import CLASSES
from millrace.gateway.routing.replicas import Member

_EVENTS = {
    "retries": "Requests sent to another replica before their first byte.",
    "resumed": "Streams resumed on another replica.",
    "resume_failed": "Streams that could not be resumed again after a first success.",
    "unprotected": "Streams that cannot be resumed if their replica fails.",
    "cut_off": "Responses that broke off before their end.",
    "disconnects": "Requests whose client left early.",
    "queue_refused": "Requests refused because the queue was full.",
    "log_lines_dropped": "Log lines lost because they could not be written.",
    "task_failures": "Failures of background tasks, which were restarted.",
    "handed_over": "Prompts that one replica computed for another.",
    "hand_over_failed": "Prompts that were computed for another replica and did not get there; "
    "one replica then did everything.",
    "hand_over_unproven": "Times that replicas said they had handed prompts over, and their "
    "counters had not moved.",
    "prefix_moved": "Prompts whose cached beginning went from the replica that had it to another.",
    "stream_moved": "Streams that another replica went on with by their records.",
    "stream_rebalanced": "Streams that left a crowded replica for one with room.",
    "body_refused": "Requests refused because request bodies used all of their memory.",
}
_SECONDS = {
    "relay": ("relay_ns", "Seconds spent choosing replicas."),
    "cpu": ("cpu_ns", "CPU seconds of the gateway's processes."),
}
_COUNTERS = {
    "failures": (cells.FAILURES, "Failures that requests met at a replica."),
    "relayed_bytes": (cells.BYTES, "Response bytes relayed."),
    "relayed_chunks": (cells.CHUNKS, "Pieces of responses relayed: about one per step."),
    "prompt_tokens": (cells.PROMPT_TOKENS, "Prompt tokens sent, estimated from their bytes."),
}
_GAUGES = {
    "in_flight": (cells.IN_FLIGHT, "Running requests of a replica."),
    "load_tokens": (cells.LOAD, "Load of a replica in tokens, as the policies see it."),
    "resident_tokens": (cells.RESIDENT, "Tokens of its running requests so far."),
}


class SharedCountersCollector(Collector):
    """Reads the shared counters."""

    def __init__(
        self,
        counters: SharedCounters,
        members: Sequence[Member],
        policy: str,
        restarts: int,
        more_events: Mapping[str, int],
        label: Callable[[Member], str],
    ) -> None:
        self._label = label
        self._counters = counters
        self._members = members
        self._policy = policy
        self._restarts = restarts
        self._more_events = more_events

    def collect(self) -> Iterator[Metric]:
        answers = _counter("requests", "Requests answered, by status.", ["status"])
        for status, count in self._counters.statuses().items():
            if count:
                answers.add_metric([status], count)
        yield answers
        events = self._counters.events()
        for name, text in _EVENTS.items():
            total = events[name] + self._more_events.get(name, 0)
            yield _counter(name, text, value=total)
        for name, (event, text) in _SECONDS.items():
            yield _counter(f"{name}_seconds", text, value=events[event] / 1e9)
        yield _counter("worker_restarts", "Gateway processes restarted.", value=self._restarts)
        yield from self._first_byte(events["first_byte_ns"] / 1e9)
        yield from self._live()
        yield from self._by_replica()

    def _first_byte(self, total: float) -> Iterator[Metric]:
        counts, seen, rows = self._counters.first_byte_counts(), 0, []
        for bound, count in zip((*map(str, FIRST_BYTE_BOUNDS), "+Inf"), counts, strict=True):
            seen += count
            rows.append((bound, float(seen)))
        yield HistogramMetricFamily(
            "millrace_gateway_first_byte_seconds",
            "Seconds from the complete request to the first byte of its response.",
            buckets=rows,
            sum_value=total,
        )

    def _live(self) -> Iterator[Metric]:
        live = self._counters.gauge
        for name, prefix, text in (
            ("requests_in_flight", "", "Running requests."),
            ("requests_queued", "queued_", "Requests that wait for admission."),
        ):
            family = _gauge(name, text, ["service_class"])
            for service in CLASSES:
                family.add_metric([service], live(f"{prefix}{service}"))
            yield family
        yield _gauge("requests_held", "Requests that wait for a first replica.", value=live("held"))
        yield _gauge("client_connections", "Connections of clients.", value=live("clients"))
        yield _gauge(
            "kept_bytes", "Bytes of streams buffered to resume them.", value=live("kept_bytes")
        )
        yield _gauge("body_bytes", "Bytes of request bodies in memory.", value=live("body_bytes"))

    def _by_replica(self) -> Iterator[Metric]:
        members = self._members
        sums = self._counters.replica_sums(max((m.slot for m in members), default=-1) + 1)
        picks = _counter("picks", "Requests given to a replica.", ["replica", "policy"])
        healthy = _gauge("replica_healthy", "1 while a replica takes requests.", ["replica"])
        info = _gauge("replica_info", "1 for each replica, with its address.", ["replica", "url"])
        for member in members:
            name = self._label(member)
            picks.add_metric([name, self._policy], sums[member.slot][cells.PICKS])
            healthy.add_metric([name], float(member.state == "up"))
            info.add_metric([name, str(member.target)], 1.0)
        yield picks
        yield healthy
        yield info
        for name, (cell, text) in _COUNTERS.items():
            family = _counter(name, text, ["replica"])
            for member in members:
                family.add_metric([self._label(member)], sums[member.slot][cell])
            yield family
        for name, (cell, text) in _GAUGES.items():
            gauge = _gauge(f"replica_{name}", text, ["replica"])
            for member in members:
                gauge.add_metric([self._label(member)], sums[member.slot][cell])
            yield gauge


def _counter(
    name: str, text: str, labels: Sequence[str] | None = None, value: float | None = None
) -> CounterMetricFamily:
    return CounterMetricFamily(f"millrace_gateway_{name}", text, value=value, labels=labels)


def _gauge(
    name: str, text: str, labels: Sequence[str] | None = None, value: float | None = None
) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"millrace_gateway_{name}", text, value=value, labels=labels)


def exposition(
    counters: SharedCounters,
    members: Sequence[Member],
    policy: str,
    restarts: int = 0,
    more_events: Mapping[str, int] = {},
    label: Callable[[Member], str] = lambda member: member.target.authority,
) -> bytes:
    """The text of /metrics. more_events: added to the processes' own totals. label: a replica's
    name, the same here and in the replicas' own metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(
        SharedCountersCollector(counters, members, policy, restarts, more_events, label)
    )
    return generate_latest(registry)
