"""Where a request can go: who is tried, in what order, and what is said when nobody is left."""

from __future__ import annotations

import json
from typing import Any

from millrace.common.http_client import Target
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.http.message import Answer, Request
from millrace.gateway.http.request_info import read_request_info
from millrace.gateway.routing.candidates import Search
from millrace.gateway.routing.policies import RoundRobin
from millrace.gateway.routing.replicas import Member, ReplicaSet


def fleet(*members: dict[str, Any]) -> ReplicaSet:
    counters = SharedCounters(1)
    made = ReplicaSet(counters, counters.part(0), lambda id, reason: None)
    made.apply(
        Member(id=at, slot=at, target=Target("r", 80 + at), **{"state": "up", **member})
        for at, member in enumerate(members)
    )
    return made


def search(replicas: ReplicaSet, model: str | None = None, per_replica: int = 0) -> Search:
    body = json.dumps({"prompt": "x", **({"model": model} if model else {})}).encode()
    info = read_request_info(Request(b"POST", b"/v1/completions", "1.1", [], body, True))
    return Search(replicas, RoundRobin(replicas), info, per_replica)


def message(answer: Answer | None) -> tuple[int, str]:
    assert answer is not None
    return answer.status, json.loads(answer.body)["error"]["message"]


def test_each_replica_is_tried_once_and_may_come_back() -> None:
    replicas = fleet({}, {}, {})
    one = search(replicas)
    tried = [one.pick(one.untried()) for _ in range(3)]
    assert tried == replicas.all
    assert one.untried() == []
    one.again(but_last=True)
    assert one.untried() == tried[:2]
    one.again(but_last=False)
    assert one.untried() == tried


def test_a_full_replica_is_picked_only_if_all_are_full() -> None:
    replicas = fleet({"limit": 1}, {})
    full, free = replicas.all
    replicas.picked(full, 10, 5)
    for _ in range(2):
        one = search(replicas)
        assert one.has_room()
        assert one.pick(one.untried()) is free
    replicas.picked(free, 10, 5)
    assert search(replicas).has_room()  # the other one may carry any number
    bounded = search(replicas, per_replica=1)
    assert not bounded.has_room()
    assert bounded.pick(bounded.untried()) in replicas.all


def test_what_is_said_when_nobody_can_be_found() -> None:
    replicas = fleet({"models": ("a",)}, {"models": ("b",), "state": "down", "reason": "asleep"})
    assert search(replicas, "a").refusal() is None
    assert search(replicas).refusal() is None
    unknown = message(search(replicas, "c").refusal())
    assert unknown == (404, "no replica serves model 'c'; served are: a, b")
    assert message(search(replicas, "b").refusal()) == (
        503,
        "no healthy replica: http://r:81: asleep",
    )
    one = search(replicas, "a")
    one.failed(one.pick(one.untried()), "fell over")
    assert message(one.nobody()) == (502, "every replica failed; the last: http://r:80: fell over")


def test_with_no_replica_at_all_nothing_is_waited_for() -> None:
    one = search(fleet())
    assert one.has_room()
    assert message(one.nobody()) == (503, "no healthy replica: no replica is configured")
