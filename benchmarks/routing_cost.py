"""Microseconds to choose a replica, by policy, replicas and gateway processes.

python benchmarks/routing_cost.py
"""

from __future__ import annotations

import json
import random
import timeit

from millrace.common.http_client import Target
from millrace.gateway.common.shared_counters import MAX_REPLICAS, SharedCounters
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import RequestInfo, read_request_info
from millrace.gateway.routing.policies import POLICIES, make_policy
from millrace.gateway.routing.prefix_index import PrefixTable
from millrace.gateway.routing.replicas import Member, ReplicaSet

PICKS = 500


def asks() -> list[RequestInfo]:
    """Requests of 4 KB, an eighth of each from one of eight texts."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=512)) for _ in range(8)]
    made = []
    for _ in range(64):
        rest = "".join(draw.choices("abcdefgh ", k=3500))
        body = json.dumps({"model": "m", "prompt": draw.choice(texts) + rest}).encode()
        made.append(read_request_info(Request(b"POST", b"/v1/completions", "1.1", [], body, True)))
    return made


def cost(policy: str, count: int, processes: int) -> float:
    """Least mean of seven runs, in microseconds."""
    counters = SharedCounters(processes, replicas=max(count, MAX_REPLICAS))
    fleet = ReplicaSet(counters, counters.process_counters(0), lambda id, reason: None)
    fleet.apply(
        Member(id=i, slot=i, target=Target("10.0.0.1", 8000 + i), state="up") for i in range(count)
    )
    chosen_policy = make_policy(policy, fleet, PrefixTable(counters.prefixes))
    some = asks()

    def picks() -> None:
        for number in range(PICKS):
            chosen_policy.pick(fleet.available(), some[number % 64])

    return min(timeit.repeat(picks, number=1, repeat=7)) / PICKS * 1e6


def main() -> None:
    for count, processes in ((3, 1), (8, 4), (96, 12), (256, 1), (1000, 1)):
        row = {policy: round(cost(policy, count, processes), 1) for policy in POLICIES}
        print(f"{count} replicas, {processes} processes: {json.dumps(row)}")


if __name__ == "__main__":
    main()
