"""Where a request can go: who is tried, in what order, and what is said when nobody is left."""

from __future__ import annotations

import json
from typing import Any

from millrace.common.http_client import Target
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.http.message import LocalReply, Request
from millrace.gateway.http.request_info import read_request_info
from millrace.gateway.routing.candidates import Candidates
from millrace.gateway.routing.policies import RoundRobin
from millrace.gateway.routing.replicas import Member, ReplicaSet


def fleet(*members: dict[str, Any]) -> ReplicaSet:
    counters = SharedCounters(1)
    made = ReplicaSet(counters, counters.process_counters(0), lambda id, outcome: None)
    made.apply(
        Member(id=at, slot=at, target=Target("r", 80 + at), **{"state": "up", **member})
        for at, member in enumerate(members)
    )
    return made


def make_candidates(
    replicas: ReplicaSet, model: str | None = None, max_requests_per_replica: int = 0
) -> Candidates:
    body = json.dumps({"prompt": "x", **({"model": model} if model else {})}).encode()
    info = read_request_info(Request(b"POST", b"/v1/completions", "1.1", [], body, True))
    return Candidates(replicas, RoundRobin(replicas), info, max_requests_per_replica)


def message(answer: LocalReply | None) -> tuple[int, str]:
    assert answer is not None
    return answer.status, json.loads(answer.body)["error"]["message"]


def test_each_replica_is_tried_once_and_may_come_back() -> None:
    replicas = fleet({}, {}, {})
    candidates = make_candidates(replicas)
    tried = [candidates.pick(candidates.untried()) for _ in range(3)]
    assert tried == replicas.all
    assert candidates.untried() == []
    candidates.reset(keep_last=True)
    assert candidates.untried() == tried[:2]
    candidates.reset(keep_last=False)
    assert candidates.untried() == tried


def test_a_full_replica_is_picked_only_if_all_are_full() -> None:
    replicas = fleet({"limit": 1}, {})
    full, free = replicas.all
    replicas.request_started(full, 10, 5)
    for _ in range(2):
        candidates = make_candidates(replicas)
        assert candidates.has_capacity()
        assert candidates.pick(candidates.untried()) is free
    replicas.request_started(free, 10, 5)
    assert make_candidates(replicas).has_capacity()  # the other one may carry any number
    bounded = make_candidates(replicas, max_requests_per_replica=1)
    assert not bounded.has_capacity()
    assert bounded.pick(bounded.untried()) in replicas.all


def test_replies_when_no_replica_can_be_found() -> None:
    replicas = fleet({"models": ("a",)}, {"models": ("b",), "state": "down", "reason": "asleep"})
    assert make_candidates(replicas, "a").refusal() is None
    nameless = (404, "the request names no model; served are: a, b")
    assert message(make_candidates(replicas).refusal()) == nameless
    assert make_candidates(fleet({"models": ("a",)}, {"models": ()})).refusal() is None
    unknown = message(make_candidates(replicas, "c").refusal())
    assert unknown == (404, "no replica serves model 'c'; served are: a, b")
    assert message(make_candidates(replicas, "b").refusal()) == (
        503,
        "no healthy replica: http://r:81: asleep",
    )
    candidates = make_candidates(replicas, "a")
    candidates.record_failure(candidates.pick(candidates.untried()), "fell over")
    assert message(candidates.exhausted_reply()) == (
        502,
        "every replica failed; the last: http://r:80: fell over",
    )


def test_with_no_replica_at_all_nothing_is_waited_for() -> None:
    candidates = make_candidates(fleet())
    assert candidates.has_capacity()
    assert message(candidates.exhausted_reply()) == (
        503,
        "no healthy replica: no replica is configured",
    )
