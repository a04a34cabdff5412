"""Fleets, event by event: nothing is lost, and equal seeds bring equal runs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.bench.load.arrivals import Schedule
from millrace.bench.load.options import BenchOptions
from millrace.bench.workload.prompts import AgentSpec, PrefixSpec, RandomSpec, TraceRow, TraceSpec
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.routing.policies import POLICIES
from millrace.simulate.common.lifecycle import ScaleRule, wanted_replicas
from millrace.simulate.common.options import Scenario, Speeds
from millrace.simulate.common.outcome import Outcome, figures
from millrace.simulate.events.fleet import Fleet
from tests.simulate.scenarios import LinearSteps, load, loaded, scenario


def run(made: Scenario) -> Outcome:
    return Fleet(made).run()


def everything(outcome: Outcome) -> bytes:
    """All that a run brought, but for the time that it took."""
    records = outcome.records
    rows = [
        *(list(records.first), list(records.ended), list(records.output), list(records.replica)),
        *(list(records.sent), list(records.cached), records.errors),
    ]
    samples = [msgspec.structs.asdict(one) for one in outcome.samples]
    return msgspec.json.encode([rows, outcome.counts, samples, outcome.seconds])


scenarios = st.builds(
    scenario,
    st.builds(
        load,
        st.integers(1, 40),
        concurrency=st.sampled_from([None, 1, 7, 40]),
        rate=st.sampled_from([float("inf"), 3.0, 30.0]),
        seed=st.integers(0, 3),
        output_len=st.integers(1, 60),
        prefix_len=st.sampled_from([0, 64]),
    ),
    st.integers(1, 4),
    check=st.just(True),
    policy=st.sampled_from(sorted(POLICIES)),
    acceptance=st.sampled_from([(), (0.9,), (0.8, 0.5, 0.5)]),
    jitter=st.sampled_from([0.0, 0.2]),
    depth=st.sampled_from([0, 1]),
    seed=st.integers(0, 100),
    limits=st.sampled_from([{}, {"num_pages": 40}, {"max_num_seqs": 2}, {"prefix_caching": False}]),
    life=st.sampled_from(
        [{}, {"kills": ((0.3, 0),)}, {"crashes": 2000.0, "start_seconds": 0.5}]
    ),
)  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(scenarios)
def test_nothing_is_lost_and_equal_seeds_bring_equal_runs(made: Scenario) -> None:
    outcome = run(made)
    records = outcome.records
    wanted = made.load.workload.count
    assert len(records) == outcome.counts["requests"] == outcome.counts["ended"] == wanted
    assert outcome.ended
    for at in range(len(records)):
        assert records.sent[at] <= records.ended[at]
        if not records.errors[at]:
            # Every token of the answer has come, once.
            spec = made.load.workload
            assert isinstance(spec, RandomSpec)
            assert records.sent[at] < records.first[at] <= records.ended[at]
            assert records.chunks[at] <= records.output[at]
    delivered = sum(records.output)
    if outcome.counts["crashes"] == 0:
        assert not any(records.errors)
        assert delivered == outcome.counts["generated_tokens"]
        assert sum(records.prompt) - sum(records.cached) == outcome.counts["computed_prompts"]
    else:
        assert delivered <= outcome.counts["generated_tokens"]
    assert everything(run(made)) == everything(outcome)


SPLIT = {"transfers": True, "host_cache": 1 << 24, "page_bytes": 4096, "snapshot_bytes": 65536}


@settings(max_examples=4, deadline=None)
@given(
    given=st.builds(
        load,
        st.integers(1, 30),
        concurrency=st.sampled_from([None, 5]),
        rate=st.sampled_from([float("inf"), 20.0]),
        seed=st.integers(0, 3),
        input_len=st.sampled_from([30, 300]),
        prefix_len=st.sampled_from([0, 64]),
    ),
    replicas=st.integers(2, 4),
    life=st.sampled_from([{}, {"kills": ((0.3, 0),)}, {"crashes": 2000.0, "start_seconds": 0.5}]),
    host=st.sampled_from([1 << 18, 1 << 24]),
    depth=st.sampled_from([0, 1]),
)
def test_split_pools_lose_nothing(
    given: BenchOptions, replicas: int, life: dict[str, Any], host: int, depth: int
) -> None:
    limits = GatewayLimits(hand_over_prompt=100, hand_over_ratio=1.0)
    made = scenario(
        given, replicas, check=True, depth=depth, life={"prefill": 1, **life},
        limits={**SPLIT, "host_cache": host}, gateway={"limits": limits},
    )  # fmt: skip
    outcome = run(made)
    records, counts = outcome.records, outcome.counts
    assert outcome.ended
    assert len(records) == counts["ended"] == given.workload.count
    if not counts["crashes"]:
        assert not any(records.errors)
    if not life and host > 1 << 20:
        long = sum(prompt >= 100 for prompt in records.prompt)
        # A prompt for which no snapshot is free is answered by one replica.
        assert counts["handed_over"] + counts["hand_over_failed"] == long
        assert counts["hand_over_failed"] <= long / 4
        assert all(records.replica[at] != 0 for at in range(len(records))), "0 answers nobody"
        state = counts["handed_over"] * SPLIT["snapshot_bytes"]
        assert (counts["hand_over_bytes"] > state) == bool(long)
    assert everything(run(made)) == everything(outcome)


def test_split_pools_keep_streams_even_and_a_slow_link_costs_first_tokens() -> None:
    rows = [TraceRow(20, 200) for _ in range(12)]
    rows += [TraceRow(480, 2) for _ in range(12)]
    spec = TraceSpec(rows=tuple(rows), count=len(rows), streams=12)
    limits = GatewayLimits(hand_over_prompt=100, hand_over_ratio=1.0)
    found = {}
    for prefill, link in ((0, 1e9), (1, 1e9), (1, 1e6)):
        made = scenario(
            loaded(spec, schedule=Schedule(rate=20.0)), 3, limits=SPLIT,
            model=LinearSteps(0.01, 1e-4, 4e-4),
            life={"prefill": prefill}, gateway={"limits": limits},
        )  # fmt: skip
        kind = msgspec.structs.replace(made.kind, speeds=Speeds(link=link))
        outcome = run(msgspec.structs.replace(made, kind=kind))
        assert not any(outcome.records.errors)
        found[prefill, link] = figures(outcome.records, 0.0, outcome.seconds)
    mixed, split, slow = found.values()
    assert split.itl.p99 < 0.5 * mixed.itl.p99
    assert slow.ttft.p99 > split.ttft.p99 + 0.05


def test_answers_have_the_lengths_that_the_workload_wants() -> None:
    spec = TraceSpec(rows=tuple(TraceRow(20 + n, 1 + n) for n in range(30)), count=30)
    for changes in ({}, {"acceptance": (0.9, 0.8)}, {"gateway": {"max_tokens": 200}}):
        outcome = run(scenario(loaded(spec, concurrency=8), **changes))
        assert sorted(outcome.records.output) == [1 + n for n in range(30)]
        assert sorted(outcome.records.prompt) == [20 + n for n in range(30)]


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([8.0, 30.0]), st.sampled_from([None, 12]))
def test_littles_law(seed: int, rate: float, concurrency: int | None) -> None:
    """In flight, on average, is the rate of requests times their time in the fleet."""
    outcome = run(scenario(load(50, rate=rate, concurrency=concurrency, seed=seed)))
    seen = figures(outcome.records, 0.0, outcome.seconds)
    sent = outcome.records.sent
    mean = sum(e - s for e, s in zip(outcome.records.ended, sent, strict=True)) / len(sent)
    assert seen.in_flight == pytest.approx(seen.requests_rate * mean, rel=1e-9)


def test_a_closed_loop_keeps_its_concurrency() -> None:
    outcome = run(scenario(load(200, concurrency=10), replicas=2))
    loaded_samples = [s for s in outcome.samples if s.at < outcome.seconds - 2]
    assert loaded_samples
    assert all(s.running + s.waiting <= 10 for s in outcome.samples)
    seen = figures(outcome.records, 0.2 * outcome.seconds, 0.8 * outcome.seconds)
    assert 9 <= seen.in_flight <= 10


def test_steps_take_the_time_of_the_step_model() -> None:
    """One request alone: a step for its prompt, one for each token that follows, and the chunks."""
    spec = RandomSpec(count=1, input_len=100, output_len=10)
    for depth in (0, 1):
        made = scenario(loaded(spec), replicas=1, depth=depth, model=LinearSteps(0.01, 1e-3, 1e-4))
        records = run(made).records
        around = 2 * 1e-4 + 5e-4 + 2 * 2e-5  # network, API server, gateway
        # A snapshot splits the prompt of 100 tokens into 96 and 4.
        assert records.first[0] == pytest.approx(2 * 0.01 + 100 * 1e-4 + around, rel=0.05)
        assert records.ended[0] - records.first[0] == pytest.approx(9 * 0.011, rel=0.01)


def test_more_replicas_bring_more() -> None:
    rates = []
    for replicas in (1, 2, 4):
        outcome = run(scenario(load(160, concurrency=64), replicas))
        rates.append(figures(outcome.records, 0.0, outcome.seconds).output_rate)
    assert rates[1] > 1.6 * rates[0]
    assert rates[2] > 1.5 * rates[1]


def test_prefix_aware_hits_the_cache_more_often_than_round_robin() -> None:
    spec = PrefixSpec(count=120, prefix_len=256, suffix_len=32, num_prefixes=9, output_len=8)
    cached = {}
    for policy in ("round_robin", "prefix_aware"):
        # The cache of one replica has room for two prefixes, not for nine.
        limits = {"num_snapshots": 3, "num_pages": 120}
        outcome = run(scenario(loaded(spec, concurrency=8), 4, policy=policy, limits=limits))
        cached[policy] = sum(outcome.records.cached)
    assert cached["prefix_aware"] > 1.2 * cached["round_robin"]


def test_conversations_send_their_turns_in_order_and_find_what_was_said_before() -> None:
    spec = AgentSpec(count=6, turns=4, system_len=60, user_len=20, output_len=10, tool_max=60,
                     tool_min=20, pause=0.5, compaction=0.0)  # fmt: skip
    limits = {"max_model_len": 4096, "num_pages": 4000, "num_snapshots": 200}
    outcome = run(scenario(loaded(spec, concurrency=3), 1, limits=limits))
    assert not any(outcome.records.errors)
    assert max(outcome.records.turn) >= 3
    assert sum(outcome.records.cached) > 0.5 * sum(outcome.records.prompt)


def test_a_trace_is_sent_at_its_times() -> None:
    spec = TraceSpec(rows=tuple(TraceRow(30, 5) for _ in range(5)), count=5)
    times = (0.0, 0.5, 0.5, 2.0, 3.25)
    outcome = run(scenario(loaded(spec, schedule=Schedule(times=times))))
    assert list(outcome.records.due) == list(times)
    assert list(outcome.records.sent) == list(times)


# --- the life of replicas ------------------------------------------------------------------------


def test_streams_of_a_replica_that_dies_go_on_elsewhere() -> None:
    made = scenario(load(60, concurrency=20, output_len=50), 3, life={"kills": ((0.5, 1),)})
    outcome = run(made)
    assert outcome.counts["crashes"] == 1
    assert outcome.counts["resumed"] > 0
    assert not any(outcome.records.errors)
    calm = run(scenario(load(60, concurrency=20, output_len=50), 3))
    assert sorted(outcome.records.output) == sorted(calm.records.output)
    assert max(outcome.records.gaps.percentile(100), 0.0) > calm.records.gaps.percentile(100)


def test_without_a_replica_requests_are_refused_and_clients_wait() -> None:
    life = {"kills": ((1.0, 0),), "start_seconds": 4.0}
    outcome = run(scenario(load(50, rate=5.0), 1, life=life))
    errors = [error for error in outcome.records.errors if error]
    assert 10 < len(errors) == outcome.counts["refused"] < 40
    assert set(errors) == {"no healthy replica"}


def test_a_reclaimed_machine_with_notice_loses_nothing() -> None:
    life = {"reclaims": 400.0, "notice": 5.0, "reclaim_wait": 1.0, "start_seconds": 1.0}
    outcome = run(scenario(load(300, rate=20.0), 4, life=life, seed=3))
    assert outcome.counts["reclaims"] > 0
    assert not any(outcome.records.errors)
    assert outcome.counts["resumed"] == 0


def test_a_machine_that_vanishes_is_noticed_by_the_health_checks() -> None:
    life = {"reclaims": 1000.0, "notice": 0.0, "reclaim_wait": 1.0, "start_seconds": 1.0}
    outcome = run(scenario(load(100, rate=10.0, output_len=100), 3, life=life, seed=1))
    assert outcome.counts["reclaims"] > 0
    silent = [
        end - sent for end, sent in zip(outcome.records.ended, outcome.records.sent, strict=True)
    ]
    assert max(silent) > 5.0


def test_the_autoscaler_follows_the_load_up_and_down() -> None:
    rule = ScaleRule(least=1, most=6, target=8.0, interval=2.0, stabilisation=4.0)
    times = (*(n * 0.02 for n in range(400)), *(20.0 + n for n in range(60)))
    spec = RandomSpec(count=len(times), input_len=60, output_len=40)
    made = scenario(
        loaded(spec, schedule=Schedule(times=times)),
        1,
        life={"scale": rule, "start_seconds": 1.0},
    )
    outcome = run(made)
    counts = [s.up + s.starting for s in outcome.samples]
    assert max(counts) > 2
    assert counts[-1] == 1
    assert not any(outcome.records.errors)


def test_what_a_rule_wants() -> None:
    rule = ScaleRule(least=1, most=10, target=100.0)
    assert wanted_replicas(rule, 0, 3) == 1
    assert wanted_replicas(rule, 305, 3) == 3  # within the tolerance
    assert wanted_replicas(rule, 340, 3) == 4
    assert wanted_replicas(rule, 5000, 3) == 10
    assert wanted_replicas(rule, 120, 0) == 2
