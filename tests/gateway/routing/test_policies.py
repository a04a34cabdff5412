"""The picking policies."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.common.http_client import Target
from millrace.common.prefix_hash import BLOCK, hash_chain, hash_pieces
from millrace.errors import UserError
from millrace.gateway.common.shared_counters import LOAD, SharedCounters
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import RequestInfo, read_request_info
from millrace.gateway.routing.policies import (
    POLICIES,
    ConsistentHash,
    LeastLoaded,
    Policy,
    PowerOfTwo,
    PrefixAware,
    Random,
    RoundRobin,
    make_policy,
)
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import Member, ReplicaSet


def fleet(
    loads: Sequence[int], weights: Sequence[float] = (), ramp: Sequence[float | None] = ()
) -> ReplicaSet:
    counters = SharedCounters(1)
    made = ReplicaSet(counters, counters.process_counters(0), lambda id, outcome: None)
    made.apply(
        Member(
            id=i,
            slot=i,
            target=Target("127.0.0.1", 8000 + i),
            state="up",
            weight=weights[i] if weights else 1.0,
            slow_start_from=ramp[i] if ramp else None,
        )
        for i in range(len(loads))
    )
    for slot, load in enumerate(loads):
        made.process_counters.add(slot, LOAD, load)
    return made


def info(prompt: str = "hello", key: str = "") -> RequestInfo:
    body = f'{{"model": "m", "prompt": "{prompt}"}}'.encode()
    headers = [(b"X-Session-Id", key.encode())] if key else []
    return read_request_info(Request(b"POST", b"/v1/completions", "1.1", headers, body, True))


def pick(policy: Policy, some: ReplicaSet, one: RequestInfo | None = None) -> int:
    return policy.pick(some.available(), one or info()).slot


@given(count=st.integers(1, 9), rounds=st.integers(1, 9))
def test_round_robin_gives_each_the_same(count: int, rounds: int) -> None:
    some = fleet([0] * count)
    policy = RoundRobin(some)
    picks = Counter(pick(policy, some) for _ in range(count * rounds))
    assert picks == dict.fromkeys(range(count), rounds)


def test_round_robin_skips_a_missing_one_and_takes_it_in_again() -> None:
    some = fleet([0, 0, 0])
    policy, every = RoundRobin(some), some.available()
    assert policy.pick(every, info()).slot == 0
    two = [every[0], every[2]]
    assert [policy.pick(two, info()).slot for _ in range(3)] == [2, 0, 2]
    assert [policy.pick(every, info()).slot for _ in range(3)] == [0, 1, 2]


def test_round_robin_and_random_keep_to_the_weights() -> None:
    some = fleet([0, 0, 0], weights=[1, 2, 5])
    turns = RoundRobin(some)
    order = [pick(turns, some) for _ in range(16)]
    assert Counter(order) == {0: 2, 1: 4, 2: 10}
    assert order[:8].count(2) == 5  # spread, not in a block
    drawn = Random(some, seed=1)
    counts = Counter(pick(drawn, some) for _ in range(4000))
    assert 400 < counts[0] < 600 < 900 < counts[1] < 1100 < 2300 < counts[2] < 2700


@given(loads=st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_least_loaded_takes_a_minimum_and_turns_among_equals(loads: list[int]) -> None:
    some = fleet(loads)
    policy = LeastLoaded(some)
    least = [slot for slot, load in enumerate(loads) if load == min(loads)]
    assert [pick(policy, some) for _ in least] == least


@given(
    loads=st.lists(st.integers(0, 5), min_size=17, max_size=60),
    arrivals=st.lists(st.integers(0, 59), max_size=20),
)
def test_least_loaded_picks_of_many_what_it_picks_of_few(
    loads: list[int], arrivals: list[int]
) -> None:
    """Arrays are a faster way to the same replica."""
    some = fleet(loads)
    policy, last = LeastLoaded(some), -1
    for arrival in arrivals:
        chosen = policy.pick(some.available(), info())
        some.refresh_load(some.all)
        equals = [r.slot for r in some.all if r.load == min(r.load for r in some.all)]
        assert chosen.slot == next((slot for slot in equals if slot > last), equals[0])
        last = chosen.slot
        some.process_counters.add(chosen.slot, LOAD, 1)
        some.process_counters.add(arrival % len(loads), LOAD, 1)


def test_available_replicas_follow_the_members() -> None:
    """The kept list is made anew when members change, and is not kept for every name asked."""
    some = fleet([0] * 3)
    before = some.available()
    assert some.available() is before
    assert [r.slot for r in some.available([before[1]])] == [0, 2]
    for number in range(200):
        assert len(some.available(model=f"m{number}")) == 3
    some.apply(
        Member(id=i, slot=i, target=Target("127.0.0.1", 8000 + i), state="up" if i else "down")
        for i in range(3)
    )
    assert [r.slot for r in some.available()] == [1, 2]


def test_least_loaded_weighs_loads_and_corrections() -> None:
    some = fleet([100, 150], weights=[1, 2])
    assert pick(LeastLoaded(some), some) == 1
    some.counters.set_load_correction(1, 400)
    assert pick(LeastLoaded(some), some) == 0


@given(loads=st.lists(st.integers(0, 5), min_size=2, max_size=9), seed=st.integers(0, 99))
def test_power_of_two_never_takes_a_single_worst(loads: list[int], seed: int) -> None:
    some = fleet([*loads, 9])
    policy = PowerOfTwo(some, seed)
    assert all(pick(policy, some) != len(loads) for _ in range(20))


def test_power_of_two_keeps_the_load_far_more_even_than_chance() -> None:
    some = fleet([0] * 16)
    policy = PowerOfTwo(some, 1)
    for _ in range(1600):
        some.process_counters.add(pick(policy, some), LOAD, 1)
    some.refresh_load(some.all)
    loads = [r.load for r in some.all]
    assert max(loads) - min(loads) <= 8  # drawing one at random spreads by about 40


def test_a_new_replica_starts_slowly() -> None:
    some = fleet([1000, 0], ramp=[None, time.monotonic()])
    one = info("x" * 4000)  # 1,000 tokens
    assert pick(LeastLoaded(some), some, one) == 0  # a tenth of the weight: 2,000 < 10,000
    settled = fleet([1000, 0], ramp=[None, time.monotonic() - 60])
    assert pick(LeastLoaded(settled), settled, one) == 1


# --- prefixes ----------------------------------------------------------------------------------


def aware(some: ReplicaSet, gap: int = 4096) -> PrefixAware:
    return PrefixAware(some, PrefixTable(some.counters.prefixes), gap)


def test_prompts_that_begin_alike_go_to_one_replica_and_others_spread() -> None:
    some = fleet([0, 0, 0, 0])
    policy = aware(some)
    shared = "s" * 4 * BLOCK
    first = pick(policy, some, info(shared + "one"))
    assert {pick(policy, some, info(f"{shared}{i}")) for i in range(9)} == {first}
    others = {pick(policy, some, info(f"{i}" * 2 * BLOCK)) for i in range(4)}
    assert others == {0, 1, 2, 3}


def test_affinity_ends_where_the_load_gap_passes_the_threshold() -> None:
    some = fleet([0, 0])
    policy = aware(some, gap=1000)
    shared = info("s" * 4 * BLOCK)  # worth 256 tokens
    first = pick(policy, some, shared)
    some.process_counters.add(first, LOAD, 1200)
    assert pick(policy, some, shared) == first
    some.process_counters.add(first, LOAD, 100)
    other = pick(policy, some, shared)
    assert other != first
    some.process_counters.add(first, LOAD, -1300)
    assert pick(policy, some, shared) in (first, other)


def test_long_conversations_of_one_system_prompt_stay_apart_where_they_are() -> None:
    some = fleet([0, 0])
    policy = aware(some)
    system = "s" * 60_000
    lines = [system + "a" * 20_000, system + "b" * 20_000]
    first = pick(policy, some, info(lines[0]))
    some.process_counters.add(first, LOAD, 60_000)  # so that the second one goes to the other
    assert pick(policy, some, info(lines[1])) == 1 - first
    some.process_counters.add(first, LOAD, -60_000)
    for turn in range(1, 6):
        grown = [line + f"{turn}" * 4000 * turn for line in lines]
        assert [pick(policy, some, info(line)) for line in grown] == [first, 1 - first]


def test_a_few_words_that_prompts_share_keep_nobody_together() -> None:
    some = fleet([0, 0])
    policy = aware(some)
    words = info("hello")  # one block, worth 64 tokens
    first = pick(policy, some, words)
    some.process_counters.add(first, LOAD, 5 * 64)
    assert pick(policy, some, words) == first
    some.process_counters.add(first, LOAD, 1)
    assert pick(policy, some, words) != first


def test_a_prefix_in_a_lower_tier_is_worth_less() -> None:
    some = fleet([0, 0])
    policy, table = aware(some), PrefixTable(some.counters.prefixes)
    line = info("l" * 200_000)  # 48,000 tokens and more
    chain = hash_pieces(line.prompt)
    for slot in (0, 1):
        table.learn(slot, chain)
    for slower, faster, most in (("host", "device", 2_000), ("disk", "host", 15_000)):
        table.put_in_tier(0, chain, slower)
        table.put_in_tier(1, chain, faster)
        some.process_counters.add(1, LOAD, most)
        assert pick(policy, some, line) == 1
        table.put_in_tier(1, chain, faster)
        some.process_counters.add(1, LOAD, most)
        assert pick(policy, some, line) == 0
        some.process_counters.add(1, LOAD, -2 * most)


def test_the_tier_of_a_block_is_that_of_the_replica() -> None:
    table, chain = PrefixTable(SharedCounters(1).prefixes), hash_chain(b"a" * 999)
    for slot, tier in enumerate(("device", "host", "disk")):
        table.learn(slot, chain)
        table.put_in_tier(slot, chain, tier)
    assert [table.tier(slot, chain[-1]) for slot in range(3)] == ["device", "host", "disk"]
    table.put_in_tier(2, chain, "host")
    assert [table.tier(slot, chain[-1]) for slot in range(3)] == ["device", "host", "host"]
    assert table.longest_match([0, 1, 2], chain) == (len(chain), [0, 1, 2])


def test_the_longest_known_beginning_wins() -> None:
    table = PrefixTable(SharedCounters(1).prefixes)
    long = hash_chain(b"a" * 8 * BLOCK)
    table.learn(0, long[:2])
    table.learn(1, long[:5])
    assert table.longest_match([0, 1], long) == (5, [1])
    assert table.longest_match([0], long) == (2, [0])
    table.forget(1, long)
    assert table.longest_match([0, 1], long) == (2, [0])
    assert table.longest_match([0, 1], hash_chain(b"b" * 999)) == (0, [])


@given(a=st.binary(max_size=2000), b=st.binary(max_size=2000), common=st.integers(0, 6))
def test_hash_chains_agree_exactly_as_far_as_prompts_do(a: bytes, b: bytes, common: int) -> None:
    beginning = b"c" * common * BLOCK
    one, two = hash_chain(beginning + b"1" + a), hash_chain(beginning + b"2" + b)
    shared = sum(x == y for x, y in zip(one, two, strict=False))
    assert shared == min(common, len(one), len(two)) or not common


@given(prompt=st.binary(max_size=2000), salts=st.lists(st.text(max_size=8), min_size=2, max_size=2))
def test_hash_chains_of_different_salts_share_nothing(prompt: bytes, salts: list[str]) -> None:
    one, two = (set(hash_chain(prompt, salt)) for salt in salts)
    assert one == two if salts[0] == salts[1] else not one & two


def test_a_prompt_under_another_salt_is_another_prompt() -> None:
    some = fleet([0, 0])
    policy = aware(some, gap=1000)
    mine, theirs = info("s" * 4 * BLOCK), info("s" * 4 * BLOCK)
    theirs.cache_salt = "theirs"
    first = pick(policy, some, mine)
    some.process_counters.add(first, LOAD, 100)
    assert pick(policy, some, mine) == first
    assert pick(policy, some, theirs) != first


def test_a_replica_that_lost_its_cache_is_forgotten() -> None:
    counters = SharedCounters(1)
    table = PrefixTable(counters.prefixes)
    chain = hash_chain(b"a" * 999)
    table.learn(0, chain)
    table.learn(3, chain)
    counters.forget_prefixes(3)
    assert table.longest_match([0, 3], chain) == (len(chain), [0])


# --- consistent hashing --------------------------------------------------------------------------


def test_a_key_stays_with_its_replica_and_only_lost_ones_move() -> None:
    some = fleet([0] * 5)
    policy = ConsistentHash(some)
    keys = [f"user{i}" for i in range(500)]
    before = {key: pick(policy, some, info(key=key)) for key in keys}
    assert min(Counter(before.values()).values()) > 40
    rest = [r for r in some.available() if r.slot != 2]
    after = {key: policy.pick(rest, info(key=key)).slot for key in keys}
    moved = {key for key in keys if before[key] != after[key]}
    assert moved == {key for key in keys if before[key] == 2}


def test_without_a_session_the_user_or_the_prompt_is_the_key() -> None:
    body = b'{"prompt": "p", "user": "ann"}'
    asked = read_request_info(Request(b"POST", b"/v1/completions", "1.1", [], body, True))
    assert (asked.affinity_key, info("p").affinity_key) == (b"ann", b'"p"')


# --- all -----------------------------------------------------------------------------------------


def test_an_unknown_policy_names_the_known_ones() -> None:
    some = fleet([0])
    table = PrefixTable(some.counters.prefixes)
    with pytest.raises(UserError, match="least_loaded, round_robin, random, power_of_two"):
        make_policy("best", some, table)
    assert all(pick(make_policy(name, some, table), some) == 0 for name in POLICIES)


def test_gateways_that_share_a_board_keep_replicas_within_5_percent_in_tokens() -> None:
    """Four processes pick for 4,000 requests of very uneven length, each by least_loaded."""
    counters, draw = SharedCounters(4), random.Random(2)
    members = [
        Member(id=i, slot=i, target=Target("127.0.0.1", 8000 + i), state="up") for i in range(6)
    ]
    sets = [
        ReplicaSet(counters, counters.process_counters(p), lambda id, outcome: None)
        for p in range(4)
    ]
    for one in sets:
        one.apply(members)
    pickers = [LeastLoaded(one) for one in sets]
    given = [0] * 6
    running: list[tuple[int, ReplicaSet, int, int]] = []
    for moment in range(4000):
        which = draw.randrange(4)
        size = draw.choice((50, 100, 200, 400, 1600))
        chosen = pickers[which].pick(sets[which].available(), info())
        sets[which].request_started(chosen, size, size)
        given[chosen.slot] += size
        running.append((moment + size // 4, sets[which], chosen.slot, size))
        for ended in [r for r in running if r[0] <= moment]:
            running.remove(ended)
            _, owner, slot, tokens = ended
            owner.request_ended(owner.all[slot], tokens, tokens)
    assert max(given) < 1.05 * sum(given) / 6
