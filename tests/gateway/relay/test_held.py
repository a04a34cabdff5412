"""A gateway without replicas holds requests, in bounds, until one comes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from millrace.common.http_client import Response, Target, fetch
from millrace.gateway.app import Gateway
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.health.health_monitor import ReplicaSpec
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica


def limits(**more: Any) -> dict[str, Any]:
    return {"limits": GatewayLimits(**{"hold_timeout": 20.0} | more)}


async def ask(at: Target, number: int = 0, model: str = "mock") -> Response:
    body = {"model": model, "prompt": f"p{number}", "max_tokens": 2}
    return await fetch(
        at, "/v1/completions", method="POST", body=json.dumps(body).encode(), timeout=30.0
    )


async def scale(at: Target) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((await fetch(at, "/gateway/scale")).body)
    return found


async def until(made: Gateway, held: int) -> None:
    async with asyncio.timeout(10):
        while made.counters.gauge("held") != held:
            await asyncio.sleep(0.01)


def join(made: Gateway, replica: MockReplica) -> None:
    made.monitor.add(ReplicaSpec(target=Target("127.0.0.1", replica.port)))


def test_requests_wait_for_the_first_replica_and_are_spread_over_those_that_come() -> None:
    async def main() -> None:
        async with gateway(**limits(hold_per_replica=4)) as (made, at):
            asked = [asyncio.create_task(ask(at, number)) for number in range(40)]
            await until(made, 40)
            state = await scale(at)
            assert (state["wanted"], state["up"], state["held"]) == (1, 0, 40)
            page = (await fetch(at, "/metrics")).body.decode()
            assert "millrace_gateway_requests_held 40.0" in page
            assert 'millrace_gateway_requests_in_flight{service_class="interactive"} 0.0' in page
            replicas = [await MockReplica(gap_s=0.1).start() for _ in range(2)]
            join(made, replicas[0])
            await asyncio.sleep(0.3)
            join(made, replicas[1])
            assert [(await one).status for one in asked] == [200] * 40
            shares = [len(replica.bodies) for replica in replicas]
            assert sum(shares) == 40
            assert min(shares) >= 12  # the second one came later, and has its part
            await until(made, 0)
            for replica in replicas:
                await replica.stop()

    asyncio.run(main())


def test_what_waits_is_bounded_in_number_and_in_time() -> None:
    async def main() -> None:
        async with gateway(**limits(hold_timeout=0.5, hold_size=3)) as (made, at):
            asked = [asyncio.create_task(ask(at, number)) for number in range(3)]
            await until(made, 3)
            refused = await ask(at)
            assert refused.status == 503
            assert "no replica is configured" in refused.body.decode()
            for one in asked:
                answer = await one
                assert answer.status == 503
                assert dict(answer.headers)["retry-after"] == "10"
                assert "no replica came within 0.5 s" in answer.body.decode()
            assert made.counters.gauge("held") == 0

    asyncio.run(main())


def test_a_client_that_leaves_is_not_held() -> None:
    async def main() -> None:
        async with gateway(**limits()) as (made, at):
            asked = asyncio.create_task(ask(at))
            await until(made, 1)
            asked.cancel()
            await until(made, 0)

    asyncio.run(main())


def test_a_request_whose_last_replica_goes_waits_for_the_next() -> None:
    async def main() -> None:
        first = await MockReplica(behaviour="hang").start()
        async with gateway(f"http://127.0.0.1:{first.port}", **limits()) as (made, at):
            asked = asyncio.create_task(ask(at))
            async with asyncio.timeout(10):
                while not first.bodies:
                    await asyncio.sleep(0.01)
            (member,) = made.monitor.members
            made.monitor.remove(member.id)
            await asyncio.sleep(0.3)
            second = await MockReplica().start()
            join(made, second)
            assert (await asked).status == 200
            assert len(second.bodies) == 1
            await first.stop()
            await second.stop()

    asyncio.run(main())


def test_an_unknown_model_is_not_waited_for() -> None:
    async def main() -> None:
        replica = await MockReplica(kind="millrace").start()
        async with gateway(f"http://127.0.0.1:{replica.port}", **limits()) as (_, at):
            assert (await ask(at, model="other")).status == 404
            await replica.stop()

    asyncio.run(main())


@pytest.mark.parametrize("hold", [0.0, 20.0])
def test_without_the_option_nobody_waits(hold: float) -> None:
    async def main() -> None:
        async with gateway(**limits(hold_timeout=hold)) as (made, at):
            asked = asyncio.create_task(ask(at))
            if hold:
                await until(made, 1)
                asked.cancel()
            else:
                assert (await asked).status == 503

    asyncio.run(main())
