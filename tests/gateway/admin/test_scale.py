from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.common.http_client import Target
from millrace.errors import UserError
from millrace.gateway.admin.scale import ScaleAdvisor
from millrace.gateway.common.limits import ScalePolicy
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.processes.options import GatewayOptions, check_options
from millrace.gateway.routing.replicas import Member


class HandClock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.moment = 1000.0

    def now(self) -> float:
        return self.moment

    def call_later(self, seconds: float, call: Callable[..., object], *arguments: object) -> None:
        raise AssertionError("nothing here waits")


class Bench:
    """An advisor with a clock and counters of its own."""

    def __init__(self, **policy: float) -> None:
        self.counters = SharedCounters(1)
        self.cells = self.counters.process_counters(0)
        self.clock = HandClock()
        self.members: list[Member] = []
        self.advisor = ScaleAdvisor(
            self.counters,
            lambda: self.members,
            ScalePolicy(**policy),  # type: ignore[arg-type]
            self.clock,  # type: ignore[arg-type]
        )

    def up(self, count: int) -> None:
        self.members = [
            Member(id=n, slot=n, target=Target("127.0.0.1", 1 + n), state="up")
            for n in range(count)
        ]

    def after(self, seconds: int, **gauges: int) -> int:
        """What is wanted after so many seconds with these changes of gauges at their start."""
        for name, change in gauges.items():
            self.cells.add_gauge(name, change)
        for _ in range(seconds):
            self.clock.moment += 1
            self.advisor.sample()
        return int(self.advisor.document()["wanted"])


def test_held_requests_wake_the_first_replica_and_the_last_one_goes_when_idle() -> None:
    bench = Bench(scale_down_after=30, scale_zero_after=60)
    assert bench.after(5) == 0
    assert bench.after(0, held=1) == 1  # at once, before the next sample
    assert bench.advisor.document()["reason"] == "1 requests, 64 for each replica"
    bench.up(1)
    assert bench.after(5, held=-1, interactive=1) == 1
    assert bench.after(59, interactive=-1) == 1
    assert bench.after(2) == 0


def test_more_load_counts_at_once_and_less_load_later() -> None:
    bench = Bench(scale_requests=10, scale_down_after=30)
    bench.up(1)
    assert bench.after(1, interactive=25) == 3
    assert bench.after(29, interactive=-20) == 3
    assert bench.after(2) == 1
    assert bench.after(0, queued_batch=30, batch=1) == 4


def test_short_requests_between_two_samples_are_seen() -> None:
    bench = Bench(scale_zero_after=10, scale_down_after=1)
    bench.up(1)
    assert bench.after(20) == 0
    bench.cells.count_status(200)  # as of an autoscaler that asks
    assert bench.after(1) == 0
    bench.cells.count_event("relayed_requests")
    assert bench.after(1) == 1
    assert bench.after(12) == 0


def test_slow_answers_ask_for_one_more() -> None:
    bench = Bench(scale_first_byte=1.0, scale_down_after=10)
    bench.up(2)
    bench.after(1, interactive=5)
    for _ in range(19):
        bench.cells.observe_first_byte(4.0)
    assert bench.after(1) == 1
    bench.cells.observe_first_byte(4.0)
    assert bench.after(1) == 3
    assert bench.advisor.document()["first_byte_p95"] == 5.0
    assert bench.advisor.document()["reason"] == "answers begin later than --scale-first-byte"
    assert bench.after(45) == 2  # nothing slow was seen lately; one would have all of them
    assert bench.advisor.document()["reason"].startswith("answers of fewer replicas began later")
    assert bench.after(60) == 1
    assert bench.after(1, interactive=-5) == 1
    assert bench.after(300) == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 10))
def test_a_fleet_that_obeys_an_objective_does_not_flap(
    requests: int, bearable: int, start_seconds: int
) -> None:
    """Answers are late where a replica has more requests than it bears, and the load is steady."""
    bench = Bench(scale_first_byte=1.0, scale_down_after=30)
    bench.up(1)
    up, turns, since, rising = 1, 0, 0, True
    enough = -(-requests // bearable)
    bench.after(1, interactive=requests)
    for _ in range(900):
        late = requests / up > bearable
        for _ in range(5):
            bench.cells.observe_first_byte(4.0 if late else 0.2)
        wanted = bench.after(1)
        since = since + 1 if wanted > up else 0
        if wanted < up or since > start_seconds:
            rose = wanted > up
            turns += rose != rising
            up, since, rising = (up + 1 if rose else wanted), 0, rose
            bench.up(up)
    # Once in SLOW_MEMORY times 30 s fewer are tried.
    assert turns <= 2 * 900 // (6 * 30)
    assert up <= enough + 1


@given(st.integers(0, 5000), st.integers(0, 5), st.integers(5, 9))
def test_the_bounds_hold(requests: int, fewest: int, most: int) -> None:
    bench = Bench(scale_min=fewest, scale_max=most)
    assert fewest <= bench.after(1, interactive=requests) <= most


@pytest.mark.parametrize(
    "policy", [{"scale_requests": 0}, {"scale_min": -1}, {"scale_min": 3, "scale_max": 2}]
)
def test_impossible_policies_are_refused(policy: dict[str, int]) -> None:
    with pytest.raises(UserError, match="--scale-"):
        check_options(GatewayOptions(scale=ScalePolicy(**policy)))
