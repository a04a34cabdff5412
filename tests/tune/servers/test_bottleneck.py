"""What limits a server, by its metrics, in words."""

from __future__ import annotations

from typing import Any

import pytest

from millrace.bench.measure.telemetry import Sample
from millrace.tune.servers.bottleneck import read_bottleneck

FIELDS: dict[str, Any] = {"mean_ttft_ms": 100.0, "mean_e2el_ms": 2000.0, "max_concurrency": 64}


def samples(
    running: float = 60, waiting: float = 0, kv: float = 0.4, gpu: float | None = None,
    each: tuple[float, ...] = (),
) -> list[Sample]:  # fmt: skip
    server = {
        "num_requests_running": running,
        "num_requests_waiting": waiting,
        "kv_cache_usage_perc": kv,
    }
    return [Sample(n, server, {} if gpu is None else {"utilization": gpu}, each) for n in range(9)]


@pytest.mark.parametrize(
    ("seen", "fields", "bottleneck", "words"),
    [
        (samples(30, 34, 0.97), {}, "kv_full", "34 requests wait while 97%"),
        (samples(), {"server": {"counters": {"num_preemptions": 3}}}, "kv_full", "3 preemptions"),
        (samples(16, 48, 0.3), {}, "slots_full", "48 requests wait behind 16"),
        (samples(each=(50, 5, 5)), {}, "imbalance", "2.5 times the mean"),
        (
            samples(),
            {"server": {"speculation": {"acceptance_by_position": [0.9, 0.2]}}},
            "drafts_rejected",
            "last of 2 drafts is accepted at 20%",
        ),
        (samples(gpu=0.5), {}, "host_bound", "GPU is busy 50%"),
        (samples(gpu=0.97), {}, "decode_bandwidth", "nothing waits"),
        (samples(), {"mean_ttft_ms": 1500.0}, "prefill_compute", "75%"),
        (samples(20), {}, "host_bound", "20 of 64 requests"),
    ],
)
def test_what_limits(
    seen: list[Sample], fields: dict[str, Any], bottleneck: str, words: str
) -> None:
    found = read_bottleneck(seen, {**FIELDS, **fields}, "")
    assert found is not None
    assert found.bottleneck == bottleneck
    assert words in found.why


def test_a_busy_client_comes_first() -> None:
    found = read_bottleneck(samples(30, 34, 0.97), FIELDS, "a load process used 99% of a core")
    assert found is not None
    assert found.bottleneck == "client_bound"


def test_a_server_without_metrics_says_nothing() -> None:
    assert read_bottleneck([Sample(0)], FIELDS, "") is None
