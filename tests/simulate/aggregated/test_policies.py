"""Policies over arrays pick what the policies that serve pick."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from millrace.gateway.common.shared_counters import LOAD, SharedCounters
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import RequestInfo
from millrace.gateway.routing.policies import make_policy
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import Member, ReplicaSet
from millrace.simulate.aggregated.policies import Loads, make_pick
from millrace.target import Target

REQUEST = Request(b"POST", b"/v1/completions", "1.1", [], b"", True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "policy", ["least_loaded", "round_robin", "random", "power_of_two", "consistent_hash"]
)
def test_the_same_picks_for_the_same_loads(policy: str, weighted: bool) -> None:
    if policy == "consistent_hash" and weighted:
        pytest.skip("its ring does not know slow starts")
    random, count = Random(5), 12
    weights = [random.choice([0.5, 1.0, 2.0]) if weighted else 1.0 for _ in range(count)]
    counters = SharedCounters(1, replicas=count)
    own = counters.process_counters(0)
    replicas = ReplicaSet(counters, own, lambda id, outcome: None)
    targets = {n: Target(f"replica-{n}", 8000) for n in range(count)}
    replicas.apply(
        Member(id=n, slot=n, target=targets[n], state="up", weight=weights[n]) for n in range(count)
    )
    real = make_policy(policy, replicas, PrefixTable(counters.prefixes), seed=3)
    pick = make_pick(policy, 3, targets.__getitem__)
    load = np.zeros(count)
    for number in range(300):
        some = sorted(random.sample(range(count), random.randrange(1, count + 1)))
        rows = np.array(some)
        weight = np.array(weights)[rows] if weighted else None
        prompt = random.randrange(1, 500)
        info = RequestInfo(request=REQUEST, prompt_tokens=prompt, affinity_key=str(number).encode())
        chosen = real.pick([replicas.all[n] for n in some], info).slot
        if policy == "consistent_hash":  # where some are missing, both go on along their rings
            continue
        assert pick(Loads(rows, load[rows], weight), prompt, number) == chosen
        size = prompt + random.randrange(100)
        load[chosen] += size
        own.add(chosen, LOAD, size)
    counters.close()


def test_consistent_hash_has_the_same_ring() -> None:
    counters = SharedCounters(1, replicas=7)
    replicas = ReplicaSet(counters, counters.process_counters(0), lambda id, outcome: None)
    targets = {n: Target(f"replica-{n}", 8000) for n in range(7)}
    replicas.apply(Member(id=n, slot=n, target=targets[n], state="up") for n in range(7))
    real = make_policy("consistent_hash", replicas, PrefixTable(counters.prefixes))
    pick = make_pick("consistent_hash", 0, targets.__getitem__)
    loads = Loads(np.arange(7), np.zeros(7), None)
    picked = []
    for number in range(200):
        info = RequestInfo(request=REQUEST, affinity_key=str(number).encode())
        chosen = real.pick(replicas.all, info).slot
        assert pick(loads, 10, number) == chosen
        picked.append(chosen)
    assert set(picked) == set(range(7))
    counters.close()
