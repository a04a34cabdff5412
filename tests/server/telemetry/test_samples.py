"""Samples of a server: what came since the one before."""

from __future__ import annotations

import msgspec

from millrace.dashboard.sample import BOUNDS
from millrace.dashboard.stream import Cursor
from millrace.protocol import EngineStats
from millrace.server.telemetry.live_page import LivePage
from millrace.server.telemetry.metrics import RequestMetrics
from millrace.server.telemetry.samples import Sampler

BUSY = EngineStats(
    steps=9, running=2, waiting=1, free_pages=5, evictable_pages=3, total_pages=10,
    snapshots_used=1, snapshots_total=4, prefilled_tokens=60, generated_tokens=20,
    prefix_queries=60, prefix_hits=16, drafts=4, draft_tokens=12, accepted_per_position=[4, 3, 1],
    step_times=[8, 0.08, 0.02, 0, 0, 0, 1, 0.05, 0],
)  # fmt: skip


def test_a_sample_has_what_came_since_the_last_one() -> None:
    stats, metrics = [EngineStats()], RequestMetrics()
    metrics.time_to_first_token.observe(0.3)  # before it began
    devices = {
        ("0", "a"): {"power_watts": 300.0, "sm_clock_mhz": 1500.0},
        ("1", "b"): {"power_watts": 100.0},
    }
    sampler = Sampler(lambda: stats[0], metrics, lambda: devices, now=lambda: 5.2)
    stats[0] = BUSY
    metrics.time_to_first_token.observe(0.0005)
    metrics.time_to_first_token.observe(9999.0)
    metrics.inter_token_latency.observe(0.012)
    metrics.finished["stop"] += 2
    metrics.finished["error"] += 1
    sample = sampler.take()
    assert (sample.at, sample.tokens_in, sample.tokens_out) == (5, 60, 20)
    assert (sample.running, sample.waiting, sample.pages, sample.states) == (2, 1, (2, 10), (1, 4))
    assert (sample.queries, sample.hits, sample.accepted) == (60, 16, [4, 3, 1])
    assert sample.steps == [8, 0.08, 0.02, 0, 0, 0, 1, 0.05, 0]
    assert (sample.ttft, sample.itl, sample.tpot) == (
        [(0, 1), (len(BOUNDS["ttft"]), 1)],
        [(5, 1)],
        [],
    )
    assert (sample.power, sample.clock, sample.ended, sample.failed) == (400.0, 1500, 3, 1)
    idle = sampler.take()
    assert (idle.tokens_out, idle.ttft, idle.steps, idle.ended) == (0, [], [], 0)
    assert idle.running == 2


def test_another_engine_begins_at_zero() -> None:
    stats = [BUSY]
    sampler = Sampler(lambda: stats[0], RequestMetrics())
    stats[0] = EngineStats(steps=2, generated_tokens=7, step_times=[2, 0.1, 0, 0, 0, 0, 0, 0, 0])
    sample = sampler.take()
    assert (sample.tokens_out, sample.steps[:2]) == (7, [2, 0.1])


def test_the_page_notes_changes_of_state_once() -> None:
    state = [("loading", "")]
    page = LivePage(Sampler(EngineStats, RequestMetrics()), lambda: state[0], {"name": "m"})
    page.sample()
    state[0] = ("up", "")
    page.sample()
    page.sample()
    state[0] = ("down", "it died")
    page.sample()
    message, _ = page.message(Cursor())
    data = msgspec.json.decode(message.decode().split("data: ")[1])
    assert [(e["number"], e["kind"], e["text"]) for e in data["events"]] == [
        (1, "loading", ""), (2, "up", ""), (3, "down", "it died")
    ]  # fmt: skip
    assert data["replicas"][0][1:4] == ["m", "down", "it died"]
    assert len(page.samples_since(0)) == 4
