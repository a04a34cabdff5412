"""HTTP requests under the names that vLLM's API server has, without a prefix and without a model:
the API server's panels of its dashboards read them. Probes are left out, as they are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

PROBES = frozenset({"/health", "/ping", "/metrics", "/load", "/version"})
BOUNDS = (0.1, 0.5, 1.0)  # seconds, as there


class HttpDurations:
    """Seconds that requests took to their last byte, by route and method."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], float] = {}
        self.counts: dict[tuple[str, str], list[int]] = {}

    def observe(self, route: str, method: str, seconds: float) -> None:
        key = route, method
        self.sums[key] = self.sums.get(key, 0.0) + seconds
        counts = self.counts.setdefault(key, [0] * (len(BOUNDS) + 1))
        for at, bound in enumerate(BOUNDS):
            counts[at] += seconds <= bound
        counts[-1] += 1


def families(
    answered: Mapping[tuple[str, str, int], int], durations: HttpDurations
) -> Iterator[Metric]:
    """answered: requests by route, method and status."""
    classes: Counter[tuple[str, str, str]] = Counter()
    for (route, method, status), count in answered.items():
        if route not in PROBES:
            classes[route, method, f"{status // 100}xx"] += count
    text = "HTTP requests of the API, by class of status."
    counter = CounterMetricFamily("http_requests", text, labels=["handler", "method", "status"])
    for labels, count in classes.items():
        counter.add_metric(labels, count)
    yield counter
    text = "Seconds from a request's arrival to the last byte of its answer."
    histogram = HistogramMetricFamily(
        "http_request_duration_seconds", text, labels=["handler", "method"]
    )
    for (route, method), counts in durations.counts.items():
        if route not in PROBES:
            bounds = [*map(str, BOUNDS), "+Inf"]
            rows = [(bound, float(count)) for bound, count in zip(bounds, counts, strict=True)]
            histogram.add_metric([route, method], rows, durations.sums[route, method])
    yield histogram
