"""Several gateway processes on one port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.common.http_client import Response, Target, connect, encode_request, fetch
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.gateway.app import Gateway
from millrace.gateway.processes.options import GatewayOptions
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

BODY = {"model": "mock", "prompt": [1, 2], "stream": True}


async def post(target: Target, tokens: int = 4, **more: Any) -> Response:
    body = json.dumps({**BODY, "max_tokens": tokens, **more}).encode()
    return await fetch(target, "/v1/completions", method="POST", body=body, timeout=30)


async def status(target: Target) -> dict[str, Any]:
    return dict(json.loads((await fetch(target, "/gateway/status")).body))


def test_they_share_counters_know_the_same_replicas_and_one_killed_is_replaced() -> None:
    async def scenario() -> list[int]:
        some = [await MockReplica(kind="millrace", gap_s=0.01, name=str(i)).start() for i in (1, 2)]
        async with gateway(*(r.url for r in some), processes=2) as (made, target):
            assert len(set(made.pids)) == 2
            answers = await asyncio.gather(*(post(target) for _ in range(24)))
            assert [a.status for a in answers] == [200] * 24
            seen = await status(target)
            assert sum(row["picks"] for row in seen["replicas"]) == 24
            assert abs(seen["replicas"][0]["picks"] - seen["replicas"][1]["picks"]) <= 4

            # A replica added through one process is known to both.
            third = await MockReplica(kind="millrace", name="3").start()
            body = json.dumps({"url": third.url}).encode()
            admin = Target("127.0.0.1", made.admin_port)
            added = await fetch(admin, "/gateway/replicas", method="POST", body=body)
            assert added.status == 201
            await eventually(lambda: all(m.state == "up" for m in made.monitor.members))
            health = await asyncio.gather(*(fetch(target, "/health") for _ in range(12)))
            assert {json.loads(h.body)["replicas"]["healthy"] for h in health} == {3}

            await _kill_one_under_load(made.pids, target)
            await eventually(
                lambda: len(made.pids) == 2 and made.counters.gauge("interactive") == 0
            )
            seen = await status(target)
            assert seen["worker_restarts"] == 1
            assert all(row["in_flight"] == row["load_tokens"] == 0 for row in seen["replicas"])
            assert (await post(target)).status == 200
            pids = made.pids
            await third.stop()
        for replica in some:
            await replica.stop()
        return pids

    pids = run(scenario())
    assert not any(psutil.pid_exists(pid) for pid in pids)


async def _kill_one_under_load(pids: list[int], target: Target) -> None:
    """Those of the dead process lose their connection, nobody else does; new ones are served."""
    connections = [await connect(target) for _ in range(16)]
    request = encode_request(
        target,
        "POST",
        "/v1/completions",
        json.dumps({**BODY, "max_tokens": 250}).encode(),
    )
    running = [connection.send(request) for connection in connections]
    ports = [c.local_port for c in connections]
    await eventually(lambda: all(port in _owners(pids) for port in ports))
    owners = [_owners(pids)[port] for port in ports]
    os.kill(pids[0], signal.SIGKILL)
    answers = await asyncio.gather(*running)
    for owner, answer in zip(owners, answers, strict=True):
        assert (answer.error is None) == (owner != pids[0])
    assert pids[1] in owners
    fresh = await asyncio.gather(*(post(target) for _ in range(6)))
    assert [a.status for a in fresh] == [200] * 6
    for connection in connections:
        connection.close()


def _owners(pids: list[int]) -> dict[int, int]:
    """Client's port -> the process that has taken the connection from it."""
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            for other in psutil.Process(pid).net_connections("tcp"):
                if other.raddr:
                    found[other.raddr.port] = pid
    return found


def test_connections_that_a_killed_process_has_not_accepted_are_served() -> None:
    """They wait at its socket, which the main process holds; the other process takes them."""

    async def scenario() -> None:
        replica = await MockReplica(kind="millrace").start()
        async with gateway(replica.url, processes=2) as (made, target):
            victim = made.pids[0]
            os.kill(victim, signal.SIGSTOP)
            await eventually(lambda: psutil.Process(victim).status() == psutil.STATUS_STOPPED)
            waiting = [asyncio.create_task(post(target)) for _ in range(32)]
            await asyncio.sleep(0.3)
            left = [task for task in waiting if not task.done()]
            assert 0 < len(left) < 32
            os.kill(victim, signal.SIGKILL)
            answers = await asyncio.gather(*waiting)
            assert [answer.status for answer in answers] == [200] * 32
            while len(made.pids) < 2 or victim in made.pids:
                # Until there is another process, new ones do not wait for it.
                assert (await asyncio.wait_for(post(target), 1.0)).status == 200
            await eventually(lambda: made.counters.gauge("interactive") == 0)
            fresh = await asyncio.gather(*(post(target) for _ in range(16)))
            assert [answer.status for answer in fresh] == [200] * 16
        await replica.stop()

    run(scenario())


def test_two_gateways_do_not_share_a_port_unnoticed() -> None:
    async def scenario() -> None:
        async with gateway(processes=2) as (made, _):
            other = GatewayOptions(
                port=free_port("127.0.0.1"), admin_port=made.admin_port, processes=2
            )
            with pytest.raises(UserError, match=f"port {made.admin_port}: it is in use"):
                await Gateway(other).start()

    run(scenario())


def test_the_unix_socket_goes_on_while_its_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin"

    async def scenario() -> None:
        async with gateway(processes=2, admin_uds=str(path)) as (made, _):
            os.kill(made.pids[0], signal.SIGKILL)
            for _ in range(20):
                reader, writer = await asyncio.open_unix_connection(str(path))
                writer.write(b"GET /gateway/status HTTP/1.1\r\nHost: x\r\n\r\n")
                assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"200"
                writer.close()
                await asyncio.sleep(0.05)

    run(scenario())
    assert not path.exists()
