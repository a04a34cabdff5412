"""The aggregated mode against the one event by event, and what holds in both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.bench.load.arrivals import Schedule
from millrace.bench.load.options import BenchOptions
from millrace.bench.workload.prompts import AgentSpec, PrefixSpec, RandomSpec, TraceRow, TraceSpec
from millrace.errors import UserError
from millrace.simulate.aggregated.fleet import AggregatedFleet
from millrace.simulate.aggregated.requests import step_tokens_moments, steps_drawer
from millrace.simulate.common.options import Scenario
from millrace.simulate.common.outcome import Figures, Outcome, figures
from millrace.simulate.events.fleet import Fleet
from tests.simulate.scenarios import load, loaded, scenario


def same_lengths(
    count: int, *, rate: float = 0.0, concurrency: int | None = None, prompt: int = 100
) -> BenchOptions:
    """A load whose lengths are the same in both modes."""
    rng = np.random.default_rng(1)
    prompts = rng.integers(prompt // 2, prompt * 3 // 2, count).tolist()
    outputs = rng.integers(15, 46, count).tolist()
    spec = TraceSpec(
        rows=tuple(TraceRow(p, o) for p, o in zip(prompts, outputs, strict=True)), count=count
    )
    times = tuple(np.cumsum(rng.exponential(1 / rate, count)).tolist()) if rate else None
    return loaded(spec, concurrency=concurrency, schedule=Schedule(times=times))


def both(made: Scenario) -> tuple[Figures, Figures]:
    found = []
    for outcome in (Fleet(made).run(), AggregatedFleet(made).run()):
        assert outcome.ended
        assert not any(outcome.records.errors)
        found.append(figures(outcome.records, 0.0, outcome.seconds))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("given_load", "changes"),
    [
        (same_lengths(480, concurrency=160), {}),
        (same_lengths(480, concurrency=160), {"acceptance": (0.9,)}),
        (same_lengths(500, rate=350.0), {}),
        (same_lengths(1000, concurrency=400), {"depth": 0}),  # more than there are slots
    ],
)
def test_sixteen_replicas_are_within_three_percent(
    given_load: BenchOptions, changes: dict[str, Any]
) -> None:
    events, arrays = both(scenario(given_load, 16, **changes))
    assert arrays.total_rate == pytest.approx(events.total_rate, rel=0.03)
    assert arrays.tpot.mean == pytest.approx(events.tpot.mean, rel=0.03)
    assert arrays.tpot.p99 == pytest.approx(events.tpot.p99, rel=0.03)
    assert arrays.itl.mean == pytest.approx(events.itl.mean, rel=0.03)
    assert arrays.e2el.mean == pytest.approx(events.e2el.mean, rel=0.03)
    assert arrays.ttft.mean == pytest.approx(events.ttft.mean, rel=0.03)


def test_round_robin_without_drafts_is_the_same_request_by_request() -> None:
    limits = {"prefix_caching": False}
    made = scenario(same_lengths(300, rate=30.0), 2, policy="round_robin", limits=limits)
    times = []
    for outcome in (Fleet(made).run(), AggregatedFleet(made).run()):
        records = outcome.records
        order = np.argsort(np.array(records.due), kind="stable")
        times.append(np.stack([np.array(records.first)[order], np.array(records.ended)[order]]))
    assert np.abs(times[0] - times[1]).max() < 2e-3


def test_prompts_in_pieces_and_snapshots() -> None:
    for limits in ({"prefix_caching": False}, {}):
        made = scenario(same_lengths(150, concurrency=12, prompt=300), 2, limits=limits)
        events, arrays = both(made)
        assert arrays.total_rate == pytest.approx(events.total_rate, rel=0.03)
        assert arrays.ttft.mean == pytest.approx(events.ttft.mean, rel=0.06)


def test_crashes_and_starts() -> None:
    life = {"kills": ((1.0, 1),), "start_seconds": 1.5}
    made = scenario(same_lengths(400, concurrency=32), 3, life=life)
    outcomes = Fleet(made).run(), AggregatedFleet(made).run()
    events, arrays = (figures(one.records, 0.0, one.seconds) for one in outcomes)
    assert all(one.counts["resumed"] > 0 for one in outcomes)
    assert all(one.counts["starts"] == 1 for one in outcomes)
    assert arrays.total_rate == pytest.approx(events.total_rate, rel=0.03)
    assert arrays.ttft.mean == pytest.approx(events.ttft.mean, rel=0.05)


def run(made: Scenario) -> Outcome:
    return AggregatedFleet(made).run()


@settings(max_examples=8, deadline=None)
@given(
    st.builds(
        scenario,
        st.builds(
            load,
            st.integers(1, 60),
            concurrency=st.sampled_from([None, 1, 7, 40]),
            rate=st.sampled_from([float("inf"), 5.0, 50.0]),
            seed=st.integers(0, 3),
            output_len=st.integers(1, 60),
        ),
        st.integers(1, 5),
        policy=st.sampled_from(["least_loaded", "power_of_two", "random", "consistent_hash"]),
        acceptance=st.sampled_from([(), (0.9,), (0.8, 0.5, 0.5)]),
        jitter=st.sampled_from([0.0, 0.2]),
        depth=st.sampled_from([0, 1]),
        limits=st.sampled_from([{}, {"max_num_seqs": 2}, {"prefix_caching": False}]),
        life=st.sampled_from(
            [{}, {"kills": ((0.3, 0),)}, {"crashes": 2000.0, "start_seconds": 0.5}]
        ),
    )
)
def test_nothing_is_lost_and_equal_seeds_bring_equal_runs(made: Scenario) -> None:
    outcome = run(made)
    records = outcome.records
    assert outcome.ended
    assert outcome.counts["requests"] == outcome.counts["ended"] == len(records.errors)
    assert len(records.errors) == made.load.workload.count
    good = np.array([not error for error in records.errors])
    first, ended, sent = (np.array(a) for a in (records.first, records.ended, records.sent))
    assert (sent[good] < first[good]).all()
    assert (first[good] <= ended[good]).all()
    if not outcome.counts["crashes"]:
        assert good.all()
    again = run(made).records
    for name in ("sent", "first", "ended", "output", "prompt", "replica"):
        assert np.array_equal(getattr(again, name), getattr(records, name)), name
    # Little's law.
    seen = figures(records, 0.0, outcome.seconds)
    total = (ended - sent).sum() / outcome.seconds
    assert seen.in_flight == pytest.approx(total, rel=1e-9)


def test_a_thousand_replicas() -> None:
    """A thousand times the load of one brings a thousand times as much."""
    one, many = (
        run(scenario(load(8 * n, concurrency=4 * n, output_len=10), n)) for n in (40, 1000)
    )
    few = figures(one.records, 0.0, one.seconds)
    all_of_them = figures(many.records, 0.0, many.seconds)
    assert all_of_them.total_rate == pytest.approx(25 * few.total_rate, rel=0.05)
    assert many.counts["ended"] == 8_000


@pytest.mark.parametrize("acceptance", [(0.9,), (0.85, 0.6, 0.5), (0.0,), (1.0, 1.0)])
def test_steps_for_tokens(acceptance: tuple[float, ...]) -> None:
    """Few tokens step by step, many by their limit: the mean is that of drawing every step."""
    rng = np.random.default_rng(0)
    mean, variance = step_tokens_moments(acceptance)
    chances = np.cumprod((1.0, *acceptance))
    shares = np.append(-np.diff(chances), chances[-1])
    assert shares @ np.arange(1, len(shares) + 1) == pytest.approx(mean)
    draw = steps_drawer(acceptance, rng)
    for tokens in (1, 5, 64, 65, 400):
        drawn = draw(np.full(4000, tokens))
        made = rng.choice(np.arange(1, len(shares) + 1), (4000, tokens), p=shares).cumsum(axis=1)
        exact = (made < tokens).sum(axis=1) + 1
        assert drawn.mean() == pytest.approx(exact.mean(), rel=0.025)
        assert drawn.std() == pytest.approx(exact.std(), rel=0.1, abs=0.3)
        assert variance >= 0


@pytest.mark.parametrize(
    "spec",
    [
        PrefixSpec(count=5),
        AgentSpec(count=2),
        RandomSpec(count=3, input_len=10, output_len=3, turns=2),
        RandomSpec(count=3, input_len=10, output_len=3, prefix_len=50),
        TraceSpec(rows=(TraceRow(600, 5, (1, 2)),), count=1),
    ],
)
def test_prompts_with_something_in_common_need_the_other_mode(spec: Any) -> None:
    with pytest.raises(UserError, match="use --mode event"):
        AggregatedFleet(scenario(loaded(spec)))


def test_a_full_kv_cache_is_counted() -> None:
    made = scenario(load(20, concurrency=16, output_len=120), 1, limits={"num_pages": 60})
    assert run(made).counts["page_shortages"] > 0
