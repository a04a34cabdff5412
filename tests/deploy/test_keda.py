"""KEDA's triggers as they are rendered, against a gateway that runs with the rendered options."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest

from millrace.common.http_client import Response, Target, fetch
from millrace.gateway.admin.scale import ScalePolicy
from millrace.gateway.app import Gateway
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.health.health_monitor import ReplicaSpec
from millrace.gateway.relay.access import Access
from tests.deploy.test_render import pod_specs
from tests.deploy.variants import find, layout
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica

KEY = "k3y"


def rendered_policy(name: str, **changes: Any) -> ScalePolicy:
    """By the --scale flags of the pod's command, but for the changes."""
    (spec,) = pod_specs(find(name, "Deployment", "-gateway"))
    flags = {flag[2:].replace("-", "_"): value
             for flag, value in pairwise(spec["containers"][0]["command"])
             if flag.startswith("--scale")}  # fmt: skip
    assert flags
    found = msgspec.convert(flags, ScalePolicy, strict=False)
    return msgspec.structs.replace(found, **changes)


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


class Keda:
    """What KEDA makes of a ScaledObject: the value by a trigger's path, then the number of pods."""

    def __init__(self, name: str) -> None:
        self.spec = find(name, "ScaledObject")["spec"]
        (trigger,) = [one for one in self.spec["triggers"] if one["type"] == "metrics-api"]
        self.trigger, self.metadata = trigger, trigger["metadata"]
        assert all(isinstance(value, str) for value in self.metadata.values()), "it reads no others"

    async def ask(self, at: Target, key: str = KEY) -> float:
        """The value that one gateway answers."""
        headers = bearer(key) if "authMode" in self.metadata else ()
        found = await fetch(at, urlsplit(self.metadata["url"]).path, headers=headers)
        if found.status != 200:
            raise PermissionError(found.status)
        value: Any = json.loads(found.body)
        for step in self.metadata["valueLocation"].split("."):
            value = value[step]
        assert isinstance(value, int | float)
        return float(value)

    async def pods(self, *gateways: Target) -> int:
        values = [await self.ask(at) for at in gateways]
        assert len(values) == 1 or self.metadata["aggregationType"] == "sum"
        value, least = sum(values), self.spec["minReplicaCount"]
        if value <= float(self.metadata["activationTargetValue"]) and not least:
            return 0
        assert self.trigger["metricType"] == "AverageValue"
        wanted = math.ceil(value / float(self.metadata["targetValue"]))
        return int(min(max(wanted, least, 1), self.spec["maxReplicaCount"]))


@contextlib.asynccontextmanager
async def running(
    name: str, access: Access | None = None, **changes: Any
) -> AsyncIterator[tuple[Gateway, Target]]:
    limits = GatewayLimits(hold_timeout=30.0, hold_per_replica=1000)
    policy = rendered_policy(name, **changes)
    async with gateway(limits=limits, scale=policy, access=access or Access()) as (made, at):
        yield made, at


def send(at: Target, count: int) -> list[asyncio.Task[Response]]:
    headers = bearer(KEY)
    return [
        asyncio.create_task(
            fetch(at, "/v1/completions", method="POST", timeout=60.0, headers=headers,
                  body=json.dumps({"model": "mock", "prompt": f"p{n}", "max_tokens": 2}).encode())
        )
        for n in range(count)
    ]  # fmt: skip


async def until(keda: Keda, pods: int, *gateways: Target) -> None:
    async with asyncio.timeout(20):
        while await keda.pods(*gateways) != pods:
            await asyncio.sleep(0.05)


def test_from_nothing_to_three_replicas_and_back() -> None:
    """Requests that wait start pods, three replicas keep them busy, and idleness ends them."""
    wanted = 3
    count = layout("scaled").requests_per_pod * (wanted - 1) + 1

    async def main() -> None:
        keda = Keda("scaled")
        async with running("scaled", scale_down_after=0.5, scale_zero_after=0.5) as (made, at):
            assert await keda.pods(at) == 0, "without a request no pod runs"
            asked = send(at, count)
            await until(keda, wanted, at)
            replicas = [await MockReplica(gap_s=0.4).start() for _ in range(wanted)]
            for replica in replicas:
                made.monitor.add(ReplicaSpec(target=Target("127.0.0.1", replica.port)))
            async with asyncio.timeout(20):
                while made.counters.gauge("held"):
                    await asyncio.sleep(0.02)
            assert await keda.pods(at) == wanted, "they run, and no longer wait"
            assert {(await one).status for one in asked} == {200}
            await until(keda, 0, at)
            for replica in replicas:
                await replica.stop()

    asyncio.run(main())


def test_the_number_of_pods_has_its_bound() -> None:
    async def main() -> None:
        keda = Keda("scaled")
        most = layout("scaled").file.autoscale.max  # type: ignore[union-attr]
        async with running("scaled", scale_requests=1) as (_, at):
            asked = send(at, most + 5)
            await until(keda, most, at)
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(main())


def test_several_gateways_are_added_up_and_asked_with_the_key() -> None:
    """Each sees a part of the load; nobody without the key learns of it."""

    async def main() -> None:
        keda = Keda("gateways")
        secret = find("gateways", "TriggerAuthentication")["spec"]["secretTargetRef"][0]
        assert (secret["parameter"], secret["key"]) == ("token", "api-key")
        assert keda.metadata["authMode"] == "bearer"
        assert keda.trigger["authenticationRef"] == {"name": "millrace-gateway"}
        key = Access(api_key=[KEY])
        async with running("gateways", key) as (_, a), running("gateways", key) as (_, b):
            with pytest.raises(PermissionError):
                await keda.ask(a, "another")
            idle = await keda.pods(a, b)
            asked = [*send(a, 60), *send(b, 10)]  # 40 for each pod
            await until(keda, 3, a, b)
            assert idle <= 2, "the least of each"
            for one in asked:
                one.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(main())


def test_schedules_are_cron_triggers() -> None:
    (cron,) = [one for one in find("scaled", "ScaledObject")["spec"]["triggers"]
               if one["type"] == "cron"]  # fmt: skip
    assert cron["metadata"] == {
        "timezone": "Europe/Berlin", "start": "30 7 * * 1-5", "end": "0 19 * * 1-5",
        "desiredReplicas": "4",
    }  # fmt: skip
