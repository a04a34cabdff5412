"""The line of figures under load: what it says, and when it is written."""

from __future__ import annotations

import pytest

from millrace.protocol import EngineStats
from millrace.server.telemetry.load_log import LoadLog, as_text, figures

BEFORE = EngineStats(steps=5, prefilled_tokens=100, generated_tokens=50)
AFTER = EngineStats(
    steps=25, running=3, waiting=1, prefilled_tokens=20_100, generated_tokens=10_050,
    total_pages=200, free_pages=40, evictable_pages=60, prefix_queries=20_000, prefix_hits=5_000,
    drafts=100, draft_tokens=300, accepted_per_position=[80, 60, 40],
)  # fmt: skip


def test_rates_and_shares() -> None:
    found = figures(BEFORE, AFTER, 10.0)
    assert found == {
        "prompt_tokens_per_second": 2000.0,
        "generation_tokens_per_second": 1000.0,
        "requests_running": 3,
        "requests_waiting": 1,
        "kv_cache_usage": 0.5,
        "prefix_cache_hit_rate": 0.25,
        "acceptance_length": 2.8,
        "draft_acceptance_rate": 0.6,
    }
    assert as_text(found) == (
        "2,000 tok/s in, 1,000 tok/s out; 3 running, 1 waiting; KV 50%; prefix hits 25%; "
        "acceptance length 2.80, 60% of drafts"
    )


def test_what_is_not_there_is_left_out() -> None:
    line = as_text(figures(BEFORE, BEFORE, 10.0))
    assert line == "0 tok/s in, 0 tok/s out; 0 running, 0 waiting; KV 0%"


def test_a_line_under_load_one_after_it_and_none_when_idle(
    caplog: pytest.LogCaptureFixture,
) -> None:
    moment, stats = [0.0], [EngineStats()]
    log = LoadLog(lambda: stats[0], lambda: moment[0])

    def written(now: EngineStats) -> list[str]:
        stats[0] = now
        moment[0] += 10.0
        caplog.clear()
        log.write()
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level("INFO"):
        assert written(EngineStats()) == []
        (busy,) = written(AFTER)
        assert busy.startswith("2,010 tok/s in")
        idle = EngineStats(steps=25, prefilled_tokens=20_100, generated_tokens=10_050)
        assert len(written(idle)) == 1
        assert written(idle) == []
        # The engine has been started again: its totals are below those before.
        (fresh,) = written(
            EngineStats(steps=3, running=1, prefilled_tokens=500, generated_tokens=10)
        )
        assert fresh.startswith("50 tok/s in, 1 tok/s out; 1 running")
