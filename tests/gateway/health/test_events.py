"""Events of a gateway's replicas, from the lists of members that the health monitor publishes."""

from __future__ import annotations

import logging

import msgspec
import pytest

from millrace.common.http_client import Target
from millrace.gateway.health.events import MAX_EVENTS, FleetEvents
from millrace.gateway.routing.replicas import Member

NEW = Member(id=1, slot=0, target=Target("a", 1))


def changed(**fields: object) -> Member:
    return msgspec.structs.replace(NEW, **fields)


def test_changes_of_state_are_events_and_lines(caplog: pytest.LogCaptureFixture) -> None:
    events = FleetEvents(lambda member: member.target.authority)
    up = changed(state="up", reason="")
    down = changed(reason="connection refused")
    with caplog.at_level(logging.INFO, "millrace.gateway"):
        for members in ([NEW], [NEW], [up], [up], [down], [up], [changed(state="draining")], []):
            events.update(members)
    kinds = [event.kind for event in events.since(0)]
    assert kinds == ["added", "up", "down", "up", "draining", "removed"]
    assert [event.number for event in events.since(4)] == [5, 6]
    trouble = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert trouble == ["replica a:1 down: connection refused"]
    assert "replica a:1 added" not in caplog.text


def test_a_replica_that_is_down_from_its_first_check_is_reported() -> None:
    events = FleetEvents(lambda member: member.target.authority)
    events.update([NEW])
    events.update([changed(reason="connection refused")])
    assert [event.kind for event in events.since(0)] == ["added", "down"]


def test_the_list_is_bounded() -> None:
    events = FleetEvents(lambda member: "a")
    for _ in range(MAX_EVENTS + 5):
        events.add("ended", "a", "status 1")
    assert events.since(0)[0].number == 6
