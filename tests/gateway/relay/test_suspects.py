"""Requests at which replicas fail: two replicas see one at most, the others stay in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from millrace.common.http_client import Response, Target, fetch
from millrace.gateway.app import Gateway
from millrace.gateway.health.evidence import RequestEvidence, may_eject
from millrace.gateway.health.health_monitor import HealthPolicy
from millrace.gateway.http.message import Request
from millrace.gateway.routing import first_copies
from millrace.gateway.routing.replicas import Member
from millrace.gateway.routing.suspects import Failure, SuspectRequests, digest_of
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

HEALTH = HealthPolicy(health_check_interval=0.05, backoff=0.2, slow_start=0.0)
BAD = "poison"


class Poisoned(MockReplica):
    """A replica that fails on requests whose user is BAD, as `how` says; `seen` of them came."""

    how = "drop"
    seen = 0

    async def _complete(
        self, path: str, body: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        if body.get("user") != BAD or self.how == "nothing":
            await super()._complete(path, body, writer)
            return
        self.seen += 1
        if self.how == "drop":
            writer.transport.abort()
        elif self.how == "die":
            await self.stop()
        elif self.how == "engine dies":
            error = {"message": "the engine died", "code": "engine_dead"}
            self._plain(writer, 503, {"error": error})
        elif self.how == "at a token":
            self.cut_after = max(0, 5 - len(body.get("resume_token_ids") or ()))
            await super()._complete(path, body, writer)
            self.cut_after = None
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n")
            code = 400 if self.how == "client's mistake" else 500
            error = {"message": "no", "type": "Error", "code": code}
            self._chunk(writer, b"data: " + json.dumps({"error": error}).encode() + b"\n\n")
            writer.write(b"0\r\n\r\n")


async def post(target: Target, user: str = "", **more: Any) -> Response:
    body = {"model": "mock", "prompt": [1], "max_tokens": 8, "stream": True, "user": user, **more}
    data = json.dumps(body).encode()
    return await fetch(target, "/v1/completions", method="POST", body=data, timeout=20)


@asynccontextmanager
async def poisoned(
    how: str, count: int = 4, **options: Any
) -> AsyncIterator[tuple[list[Poisoned], Gateway, Target]]:
    replicas = [Poisoned(kind="millrace", name=str(i)) for i in range(count)]
    for replica in replicas:
        replica.how = how
        await replica.start()
    options.setdefault("health", HEALTH)
    async with gateway(*(r.url for r in replicas), **options) as (made, target):
        yield replicas, made, target
    for replica in replicas:
        await replica.stop()


def up(made: Gateway) -> int:
    return sum(member.state == "up" for member in made.monitor.members)


@pytest.mark.parametrize("how", ["drop", "die", "engine dies", "server's error", "at a token"])
@pytest.mark.parametrize("warm", [False, True], ids=["new connections", "idle connections"])
def test_two_replicas_see_it_and_a_copy_is_refused_at_once(how: str, warm: bool) -> None:
    async def scenario() -> None:
        async with poisoned(how, policy="round_robin") as (replicas, made, target):
            for number in range(8 if warm else 0):
                assert (await post(target, f"good {number}")).status == 200
            if how == "at a token":
                with pytest.raises(ConnectionError):
                    await post(target, BAD)
            else:
                first = await post(target, BAD)
                assert first.status == 502
                error = json.loads(first.body)["error"]
                assert error["code"] == "replicas_failed_on_request"
                assert "sent to no other one" in error["message"]
            assert sum(replica.seen > 0 for replica in replicas) == 2
            seen = [replica.seen for replica in replicas]
            for _ in range(3):
                copy = await post(target, BAD)
                assert copy.status == 502
                assert "is refused for another" in json.loads(copy.body)["error"]["message"]
                assert int(copy.headers["retry-after"]) > 60
            assert [replica.seen for replica in replicas] == seen
            answers = [await post(target, f"later {number}") for number in range(8)]
            assert [answer.status for answer in answers] == [200] * 8
            await asyncio.sleep(0.2)
            assert up(made) == (2 if how == "die" else 4)

    run(scenario())


def test_other_running_requests_are_answered_and_are_not_suspects() -> None:
    """They stream on replicas that it kills; they go on elsewhere, and are no suspects."""

    async def scenario() -> None:
        async with poisoned("die", 4, policy="round_robin") as (replicas, made, target):
            for replica in replicas:
                replica.gap_s = 0.03
            beside = [
                asyncio.create_task(post(target, f"beside {number}", max_tokens=30))
                for number in range(12)
            ]
            await eventually(lambda: all(len(r.exchanges) == 3 for r in made.replicas.all))
            await asyncio.sleep(0.2)
            assert (await post(target, BAD, max_tokens=30)).status == 502
            answers = await asyncio.gather(*beside)
            assert [answer.status for answer in answers] == [200] * 12
            assert all(answer.body.count(b'"text":"w') == 30 for answer in answers)
            for replica in replicas:
                replica.gap_s = 0.0
            copies = [await post(target, f"beside {n}", max_tokens=30) for n in range(12)]
            assert [copy.status for copy in copies] == [200] * 12
            assert sum(replica.seen for replica in replicas) == 2

    run(scenario())


def test_a_copy_of_a_request_that_failed_once_goes_to_one_more_replica() -> None:
    async def scenario() -> None:
        async with poisoned("drop", 1) as ((only,), made, target):
            assert (await post(target, BAD)).status == 502
            assert (await post(target, BAD)).status == 502
            assert only.seen == 2
            refused = await post(target, BAD)
            assert "is refused for another" in json.loads(refused.body)["error"]["message"]
            assert only.seen == 2
            assert (await post(target, "good")).status == 200
            assert up(made) == 1

    run(scenario())


def test_an_only_replica_whose_engine_dies_of_it_sees_it_twice() -> None:
    async def scenario() -> None:
        async with poisoned("engine dies", 1) as ((only,), made, target):
            assert [(await post(target, BAD)).status for _ in range(2)] == [503, 503]
            refused = await post(target, BAD)
            assert (refused.status, only.seen) == (502, 2)
            assert up(made) == 1

    run(scenario())


def test_a_replica_without_capacity_is_not_ejected() -> None:
    async def scenario() -> None:
        async with poisoned("drop", 2) as (replicas, made, target):
            for replica in replicas:
                replica.behaviour, replica.kind = "unavailable", "other"
            answers = [(await post(target, f"good {number}")).status for number in range(20)]
            assert set(answers) == {503}
            assert up(made) == 2

    run(scenario())


def test_a_clients_mistake_in_a_stream_is_passed_on_and_costs_no_replica() -> None:
    async def scenario() -> None:
        async with poisoned("client's mistake", 2) as (replicas, made, target):
            answers = [await post(target, BAD, seed=number) for number in range(12)]
            assert [answer.status for answer in answers] == [200] * 12
            assert all(b'"code": 400' in answer.body for answer in answers)
            assert sum(replica.seen for replica in replicas) == 12
            assert up(made) == 2

    run(scenario())


def test_many_different_requests_never_eject_the_last_replica_nor_half_of_them() -> None:
    async def scenario() -> None:
        async with poisoned("drop", 3) as (_, made, target):
            least = 3
            for number in range(60):
                assert (await post(target, BAD, seed=number)).status == 502
                least = min(least, up(made))
            assert least == 2
            assert (await post(target, "good")).status == 200

    run(scenario())


def test_what_a_gateway_process_knows_the_others_know() -> None:
    async def scenario() -> None:
        async with poisoned("drop", 4, processes=3) as (replicas, _, target):
            assert (await post(target, BAD)).status == 502
            await asyncio.sleep(0.3)
            copies = await asyncio.gather(*(post(target, BAD) for _ in range(24)))
            assert {copy.status for copy in copies} == {502}
            assert sum(replica.seen for replica in replicas) == 2

    run(scenario())


def test_copies_on_a_replica_that_dies_once_are_answered_by_others() -> None:
    """Whoever kills the replica: its failure is one, however many copies it had."""

    async def scenario() -> None:
        async with poisoned("nothing", 3, policy="round_robin") as (replicas, made, target):
            for replica in replicas:
                replica.gap_s = 0.05
            copies = [asyncio.create_task(post(target, "one", max_tokens=12)) for _ in range(9)]
            await eventually(lambda: all(len(r.exchanges) == 3 for r in made.replicas.all))
            await replicas[0].stop()
            await asyncio.sleep(0.1)
            copies += [asyncio.create_task(post(target, "one", max_tokens=12)) for _ in range(3)]
            assert [answer.status for answer in await asyncio.gather(*copies)] == [200] * 12
            await eventually(lambda: len(made.relay.suspects) == 0)

    run(scenario())


@pytest.mark.parametrize("how", ["drop", "die", "engine dies"])
def test_copies_that_come_at_once_cost_two_replicas_at_most(how: str) -> None:
    async def scenario() -> None:
        async with poisoned(how, 4) as (replicas, made, target):
            answers = await asyncio.gather(*(post(target, BAD) for _ in range(8)))
            assert {answer.status for answer in answers} == {502}
            assert sum(replica.seen > 0 for replica in replicas) == 2
            assert (await post(target, "good")).status == 200
            assert len(made.relay.first_copies) == 0

    run(scenario())


def test_copies_wait_for_the_first_output_of_one_and_are_spread_then() -> None:
    async def scenario() -> None:
        async with poisoned("nothing", 4) as (replicas, made, target):
            for replica in replicas:
                replica.first_s, replica.gap_s = 0.3, 0.1
            copies = [asyncio.create_task(post(target, "one")) for _ in range(8)]
            await asyncio.sleep(0.15)
            assert sum(len(r.exchanges) for r in made.replicas.all) == 1
            await eventually(lambda: [len(r.exchanges) for r in made.replicas.all] == [2] * 4)
            assert {answer.status for answer in await asyncio.gather(*copies)} == {200}
            assert len(made.relay.first_copies) == 0

    run(scenario())


def test_copies_wait_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_copies, "MOST_SECONDS", 0.2)

    async def scenario() -> None:
        async with poisoned("nothing", 3) as (replicas, made, target):
            for replica in replicas:
                replica.first_s = 1.0
            copies = [asyncio.create_task(post(target, "one")) for _ in range(4)]
            await eventually(lambda: sum(len(r.exchanges) for r in made.replicas.all) == 4, 0.8)
            for copy in copies[:2]:
                copy.cancel()
            answers = await asyncio.gather(*copies, return_exceptions=True)
            assert sum(isinstance(one, Response) and one.status == 200 for one in answers) == 2
            await eventually(lambda: len(made.relay.first_copies) == 0)

    run(scenario())


def test_the_next_copy_runs_when_the_first_one_left() -> None:
    async def scenario() -> None:
        async with poisoned("nothing", 3) as (replicas, made, target):
            for replica in replicas:
                replica.first_s = 0.3
            first = asyncio.create_task(post(target, "one"))
            await eventually(lambda: sum(len(r.exchanges) for r in made.replicas.all) == 1)
            second = asyncio.create_task(post(target, "one"))
            await asyncio.sleep(0.05)
            assert sum(len(r.exchanges) for r in made.replicas.all) == 1
            first.cancel()
            assert (await second).status == 200
            await eventually(lambda: len(made.relay.first_copies) == 0)

    run(scenario())


def test_a_request_that_succeeds_is_cleared() -> None:
    async def scenario() -> None:
        async with poisoned("drop", 1) as ((only,), made, target):
            assert (await post(target, BAD)).status == 502
            await eventually(lambda: len(made.relay.suspects) == 1)
            only.how = "nothing"
            for _ in range(3):
                assert (await post(target, BAD)).status == 200
            await eventually(lambda: len(made.relay.suspects) == 0)

    run(scenario())


# --- evidence ----------------------------------------------------------------------------------


def request(body: bytes) -> Request:
    return Request(b"POST", b"/v1/completions", "1.1", [], body, True)


def failure(name: str, sent_at: float = 0.0) -> Failure:
    return Failure("died", digest_of(request(name.encode())), sent_at=sent_at)


def test_victims_of_another_request_are_refused_for_a_shorter_time() -> None:
    evidence = RequestEvidence(300.0)
    for name in ("a", "b"):
        evidence.add(0, "r0", failure(name))
    both = [evidence.add(1, "r1", failure(name)) for name in ("a", "b")]
    assert all(suspect.refused for suspect in both)
    reviewed = [evidence.review(suspect.digest) for suspect in both]
    assert [suspect.seconds for suspect in reviewed if suspect] == [30.0, 30.0]
    third = evidence.add(2, "r2", failure("a"))
    assert (third.seconds, third.failures) == (300.0, 3)
    for replica in (3, 4):
        alone = evidence.add(replica, "r", failure("c"))
    assert (alone.refused, alone.seconds) == (True, 300.0)


def test_copies_that_one_failure_meets_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = RequestEvidence(300.0)
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    for later in (0.0, 0.2, 5.0):  # the last one notices it late
        now = 1000.0 + later
        suspect = evidence.add(0, "r0", failure("a", sent_at=999.0))
        assert (suspect.failures, suspect.refused) == (1, False)
    for copy in range(2):
        assert evidence.add(1, "r1", failure("a", sent_at=999.0 + copy)).failures == 2
    assert evidence.add(0, "r0", failure("a", sent_at=999.0)).failures == 2
    # One that was sent after the failure has met another one.
    assert evidence.add(0, "r0", failure("a", sent_at=1004.0)).failures == 3


def test_with_a_timeout_of_0_nothing_is_refused() -> None:
    evidence = RequestEvidence(0.0)
    assert not any(evidence.add(replica, "r", failure("a")).refused for replica in range(3))


def test_suspects_are_bounded_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, known = RequestEvidence(300.0), SuspectRequests()
    for number in range(10_000):
        known.update(evidence.add(0, "r", failure(str(number))))
    assert len(known) == 4096
    assert known.find(request(b"9999")) is not None
    assert known.find(request(b"1")) is None
    assert known.find(request(b"another size")) is None
    monkeypatch.setattr("time.monotonic", lambda: 1e12)
    assert known.find(request(b"9999")) is None
    assert len(known) == 4095


@pytest.mark.parametrize(
    ("states", "allowed"),
    [("U", False), ("UU", True), ("UUU", True), ("UUD", False), ("UUUD", True), ("UDD", False)],
)
def test_requests_alone_eject_no_more_than_half(states: str, allowed: bool) -> None:
    members = [
        Member(id=i, slot=i, target=Target("r", 80), state="up" if state == "U" else "down")
        for i, state in enumerate(states)
    ]
    assert may_eject(members[0], members) is allowed


def test_the_last_replica_of_a_model_is_not_ejected_whatever_others_serve() -> None:
    members = [
        Member(id=i, slot=i, target=Target("r", 80), state="up", models=(name,))
        for i, name in enumerate("abb")
    ]
    assert [may_eject(member, members) for member in members] == [False, True, True]
