"""Bodies of requests: bounded one by one and together, and forgotten once they are answered."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

import pytest
from click.testing import CliRunner

from millrace.common.http_client import Target, fetch
from millrace.gateway.command import gateway as command
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import SharedCounters
from millrace.gateway.health.health_monitor import HealthPolicy
from millrace.gateway.http.bodies import BodyBudget, RequestBodies
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

QUIET = HealthPolicy(health_check_interval=60, slow_start=0.0)
BODY = b'{"prompt": [1], "max_tokens": 2}'


def room(each: int = 100, together: int = 250) -> tuple[SharedCounters, BodyBudget]:
    counters = SharedCounters(1)
    return counters, BodyBudget(
        GatewayLimits(max_body_bytes=each, max_bodies_bytes=together), counters.process_counters(0)
    )


def fill(bodies: RequestBodies, pieces: Iterable[int]) -> None:
    for size in pieces:
        assert bodies.take(b"x" * size) is None


def test_bodies_count_until_they_are_answered() -> None:
    counters, held = room()
    one, other = RequestBodies(held), RequestBodies(held)
    fill(one, [60, 40])
    assert one.finish() == b"x" * 100
    fill(one, [80])
    fill(other, [30, 30])
    assert (held.held, counters.gauge("body_bytes")) == (240, 240)
    one.release_oldest()
    assert held.held == 140
    other.finish()
    other.close()
    assert held.held == 80
    one.close()
    assert (held.held, counters.gauge("body_bytes")) == (0, 0)


def test_a_body_above_a_bound_is_dropped() -> None:
    counters, held = room()
    large = RequestBodies(held)
    fill(large, [100])
    refusal = large.take(b"x")
    assert refusal is not None
    assert (refusal.status, refusal.close, held.held) == (413, True, 0)
    assert b"larger than 100 bytes, which is --max-body-bytes" in refusal.body
    several = [RequestBodies(held) for _ in range(3)]
    fill(several[0], [100])
    fill(several[1], [100])
    fill(several[2], [50])
    refusal = several[2].take(b"x")
    assert refusal is not None
    assert (refusal.status, held.held) == (503, 200)
    error = json.loads(refusal.body)["error"]
    assert error["code"] == "too_many_bytes"
    assert "--max-bodies-bytes" in error["message"]
    assert counters.events()["body_refused"] == 1


async def half(target: Target, size: int) -> asyncio.StreamWriter:
    """A client that owes the last byte of a body of `size` bytes."""
    _, writer = await asyncio.open_connection(target.host, target.port)
    head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size
    writer.write(head + BODY.ljust(size - 1))
    return writer


def test_bodies_of_many_clients_take_no_more_than_they_may_together() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        limits = GatewayLimits(max_body_bytes=1000, max_bodies_bytes=2500)
        async with gateway(replica.url, health=QUIET, limits=limits) as (made, target):
            body = BODY.ljust(700)
            for _ in range(3):  # what has been answered takes no room
                answer = await fetch(target, "/v1/completions", method="POST", body=body)
                assert answer.status == 200
            slow = [await half(target, 1000) for _ in range(2)]
            await eventually(lambda: made.relay.bodies.held == 1998)
            answer = await fetch(target, "/v1/completions", method="POST", body=body)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert json.loads(answer.body)["error"]["code"] == "too_many_bytes"
            assert made.relay.bodies.held == 1998
            for writer in slow:
                writer.close()
            await eventually(lambda: made.relay.bodies.held == 0)
            answer = await fetch(target, "/v1/completions", method="POST", body=body)
            assert answer.status == 200
            text = (await fetch(target, "/metrics")).body.decode()
            assert "millrace_gateway_body_refused_total 1" in text
            assert "millrace_gateway_body_bytes 0" in text
        await replica.stop()

    run(scenario())


def test_a_body_counts_while_its_request_is_under_way() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=30.0).start()
        async with gateway(replica.url, health=QUIET) as (made, target):
            writer = await half(target, 500)
            writer.write(b" ")
            await eventually(lambda: made.relay.in_flight == 1)
            assert made.relay.bodies.held == 500
            writer.close()
            await eventually(lambda: made.relay.in_flight == 0)
            assert made.relay.bodies.held == 0
        await replica.stop()

    run(scenario())


def test_a_request_that_only_drips_is_given_up() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        limits = GatewayLimits(client_timeout=0.3)
        async with gateway(replica.url, health=QUIET, limits=limits) as (made, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100000\r\n\r\n")
            answer = asyncio.create_task(reader.read(-1))
            async with asyncio.timeout(20):
                while not answer.done():
                    writer.write(b" ")  # never silent for as long as `client_timeout`
                    made.relay.sweep()
                    await asyncio.sleep(0.02)
            assert (await answer).startswith(b"HTTP/1.1 408 ")
            await eventually(lambda: made.relay.bodies.held == 0)
            writer.close()
        await replica.stop()

    run(scenario())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-bodies-bytes", "1000"], "use at least --max-body-bytes, 67108864"),
        (["--max-body-bytes", "0"], "--max-body-bytes 0: use 1 or more"),
    ],
)
def test_bounds_that_cannot_be_are_refused(flags: list[str], said: str) -> None:
    result = CliRunner().invoke(command, ["--worker-urls", "http://127.0.0.1:1", *flags])
    assert said in str(result.exception)
