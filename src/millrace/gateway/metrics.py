"""The gateway's counters in Prometheus' format.

The relay counts in plain integers, which cost nothing a byte; they are read when scraped.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from millrace.gateway.relay import Relay


class RelayCollector(Collector):
    """Reads a Relay's counters."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def collect(self) -> Iterator[Metric]:
        relay = self._relay
        answers = CounterMetricFamily(
            "millrace_gateway_requests", "Requests answered, by status.", labels=["status"]
        )
        for status, count in sorted(relay.answered.items()):
            answers.add_metric([str(status)], count)
        yield answers
        for name, text, value in (
            ("retries", "Requests sent to another replica before their first byte.", relay.retries),
            ("client_disconnects", "Requests whose client left early.", relay.disconnects),
            ("responses_cut_off", "Responses that a replica did not finish.", relay.cut_off),
        ):
            yield CounterMetricFamily(f"millrace_gateway_{name}", text, value=value)
        in_flight = "millrace_gateway_requests_in_flight"
        yield GaugeMetricFamily(in_flight, "Requests not yet answered.", value=relay.in_flight)
        yield from self._by_replica()

    def _by_replica(self) -> Iterator[Metric]:
        replicas = self._relay.replicas.all
        counters = {
            "picks": "Requests given to a replica.",
            "failures": "Failures that requests met at a replica.",
            "relayed_bytes": "Response bytes relayed.",
            "relayed_chunks": "Pieces of responses relayed.",
        }
        for name, text in counters.items():
            family = CounterMetricFamily(f"millrace_gateway_{name}", text, labels=["replica"])
            for replica in replicas:
                family.add_metric([replica.target.authority], getattr(replica, name))
            yield family
        gauges = {
            "healthy": "1 while a replica takes requests.",
            "in_flight": "Requests that a replica carries.",
        }
        for name, text in gauges.items():
            gauge = GaugeMetricFamily(f"millrace_gateway_replica_{name}", text, labels=["replica"])
            for replica in replicas:
                gauge.add_metric([replica.target.authority], float(getattr(replica, name)))
            yield gauge


def exposition(relay: Relay) -> bytes:
    """The text of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(RelayCollector(relay))
    return generate_latest(registry)
