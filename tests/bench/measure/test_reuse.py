"""New and recomputed tokens, counted by hand."""

from __future__ import annotations

import pytest

from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.reuse import reuse_fields
from millrace.bench.workload.agent import KINDS

MS = 1_000_000


def record(turn: int, kind: str, inp: int, out: int, cached: int, **more: int) -> RequestTiming:
    return RequestTiming(
        index=0, turn=turn, kind=KINDS.index(kind),
        scheduled_ns=0, start_ns=0, end_ns=20 * MS, chunk_ns=[(turn + 1) * MS],
        input_tokens=inp, output_tokens=out, cached_tokens=cached, **more,
    )  # fmt: skip


def test_a_turn_owes_what_comes_behind_the_answer_before_it() -> None:
    records = [
        record(0, "user", 100, 10, 60, fresh=400),
        record(1, "aux", 50, 5, 0, fresh=500),
        record(2, "tool", 160, 10, 96, base=0),  # 50 new, 64 computed
    ]
    found = reuse_fields(records)
    assert found["tokens"]["all"] == {
        "requests": 3, "new": 40 + 25 + 50, "recomputed": 40 + 50 + 64,
        "recomputed_over_new": pytest.approx(154 / 115),
    }  # fmt: skip
    assert found["tokens"]["tool"]["recomputed"] == 64
    assert [(one["turns"], one["requests"]) for one in found["turns"]] == [("1", 1), ("2", 1)]
    assert found["turns"][1]["median_ttft_ms"] == 3.0  # the auxiliary call is no turn


def test_requests_without_a_count_are_left_out() -> None:
    assert reuse_fields([record(0, "user", 100, 10, -1)])["tokens"] == {}
