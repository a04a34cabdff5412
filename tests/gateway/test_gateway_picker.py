"""The picking policies."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import UserError
from millrace.gateway.message import Request
from millrace.gateway.picker import POLICIES, LeastLoaded, PowerOfTwo, RoundRobin, make_picker
from millrace.gateway.replicas import Replica
from millrace.http1 import Target

ASK = Request(b"POST", b"/v1/completions", "1.1", [], b"{}", True)


def replicas(loads: list[int]) -> list[Replica]:
    made = [Replica(i, Target("127.0.0.1", 8000 + i)) for i in range(len(loads))]
    for replica, load in zip(made, loads, strict=True):
        replica.in_flight = load
    return made


@given(count=st.integers(1, 9), rounds=st.integers(1, 9))
def test_round_robin_gives_each_the_same(count: int, rounds: int) -> None:
    some, picker = replicas([0] * count), RoundRobin()
    picks = Counter(picker.pick(some, ASK).index for _ in range(count * rounds))
    assert picks == dict.fromkeys(range(count), rounds)


def test_round_robin_skips_a_missing_one_and_takes_it_in_again() -> None:
    some, picker = replicas([0, 0, 0]), RoundRobin()
    assert picker.pick(some, ASK).index == 0
    assert [picker.pick([some[0], some[2]], ASK).index for _ in range(3)] == [2, 0, 2]
    assert [picker.pick(some, ASK).index for _ in range(3)] == [0, 1, 2]


@given(loads=st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_least_loaded_takes_a_minimum_and_turns_among_equals(loads: list[int]) -> None:
    some, picker = replicas(loads), LeastLoaded()
    least = [r.index for r in some if r.in_flight == min(loads)]
    assert [picker.pick(some, ASK).index for _ in least] == least


@given(loads=st.lists(st.integers(0, 5), min_size=2, max_size=9), seed=st.integers(0, 99))
def test_power_of_two_never_takes_a_single_worst(loads: list[int], seed: int) -> None:
    some, picker = replicas([*loads, 9]), PowerOfTwo(seed)
    assert all(picker.pick(some, ASK).in_flight < 9 for _ in range(20))


def test_power_of_two_keeps_the_load_far_more_even_than_chance() -> None:
    some, picker = replicas([0] * 16), PowerOfTwo(1)
    for _ in range(1600):
        picker.pick(some, ASK).in_flight += 1
    loads = [r.in_flight for r in some]
    assert max(loads) - min(loads) <= 8  # drawing one at random spreads by about 40


def test_an_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="round_robin, least_loaded, power_of_two"):
        make_picker("best")
    assert all(make_picker(name).pick(replicas([0]), ASK).index == 0 for name in POLICIES)
