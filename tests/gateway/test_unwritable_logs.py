"""Logs and streams that cannot be written: the gateway and a fleet go on, and say what was lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from millrace.common.http_client import Target, fetch
from millrace.common.sockets import free_port
from millrace.gateway.common.limits import GatewayLimits
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

MOCK = Path(__file__).parents[1] / "support" / "mock_replica.py"
BODY = b'{"model": "mock", "prompt": [1], "max_tokens": 2}'
FLEET = """
import sys
from millrace.fleet.supervisor import run_replicas
run_replicas([sys.executable, *sys.argv[2:]], 2, "127.0.0.1", int(sys.argv[1]), device="cpu")
"""


async def post(target: Target) -> int:
    return (await fetch(target, "/v1/completions", method="POST", body=BODY, timeout=10)).status


def test_an_access_log_on_a_full_disk_costs_no_request() -> None:
    """More requests than are logged at a time, and many more than may run at once."""
    lines: list[str] = []

    async def scenario() -> None:
        replica = await MockReplica().start()
        limits = GatewayLimits(max_concurrent_requests=2)
        async with gateway(
            replica.url, access_log="/dev/full", limits=limits, log=lines.append
        ) as (made, target):
            assert {await post(target) for _ in range(200)} == {200}
            await eventually(lambda: made.counters.events()["log_lines_dropped"] >= 128)
            assert made.counters.gauge("interactive") == 0
            metrics = (await fetch(target, "/metrics")).body
            assert b"millrace_gateway_log_lines_dropped_total 1" in metrics
        await replica.stop()

    run(scenario())
    (line,) = lines
    assert line.startswith("access log /dev/full: No space left on device; lines are lost until")


def test_an_access_log_says_how_many_lines_it_has_lost(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def scenario() -> None:
        replica = await MockReplica().start()
        full = os.open("/dev/full", os.O_WRONLY)
        path = f"/proc/self/fd/{full}"
        async with gateway(replica.url, access_log=path) as (made, target):
            for _ in range(100):
                await post(target)
            await eventually(lambda: made.counters.events()["log_lines_dropped"] == 100)
            written = os.open(log, os.O_WRONLY | os.O_CREAT)
            for fd in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/self/fd/{fd}") == "/dev/full":
                        os.dup2(written, int(fd))  # the disk has space again
            await post(target)
        await replica.stop()

    run(scenario())
    first, second = map(json.loads, log.read_text().splitlines())
    assert (first["lost"], first["why"]) == (100, "No space left on device")
    assert second["status"] == 200


@contextlib.asynccontextmanager
async def started(command: str, port: int) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A shell command, once /health answers at the port; killed with its group afterwards."""
    process = subprocess.Popen(
        ["bash", "-c", command], start_new_session=True, stdout=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(40):
            while True:
                with contextlib.suppress(OSError):
                    if (await fetch(Target("127.0.0.1", port), "/health")).status == 200:
                        break
                assert process.poll() is None
                await asyncio.sleep(0.05)
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    "redirections", [">/dev/full 2>&1", "<&- >&- 2>&-", "2>&1 | head -1 >/dev/null"]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_gateway_runs_without_streams_to_write_to(redirections: str, processes: int) -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        port = free_port("127.0.0.1")
        command = (
            f"exec {sys.executable} -m millrace.cli gateway --worker-urls {replica.url} "
            f"--port {port} --processes {processes} --access-log - {redirections}"
        )
        async with started(command, port):
            target = Target("127.0.0.1", port)
            assert {await post(target) for _ in range(150)} == {200}
        await replica.stop()

    run(scenario())


@pytest.mark.parametrize("redirections", ["2>&1 | head -2 >/dev/null", ">/dev/full 2>&1"])
def test_a_fleet_whose_log_has_no_reader_serves_and_restarts_replicas(redirections: str) -> None:
    """Its replicas write 20 times what fits into a pipe."""

    async def scenario() -> None:
        port = free_port("127.0.0.1")
        words = f"{MOCK} --chatter 64"
        async with started(
            f"{sys.executable} -c '{FLEET}' {port} {words} {redirections}", port
        ) as process:
            target = Target("127.0.0.1", port)
            for _ in range(20):
                assert await post(target) == 200
                await asyncio.sleep(0.05)
            replicas = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if str(MOCK) in child.cmdline() and "--host" in child.cmdline()
            ]
            assert len(replicas) == 2
            os.kill(replicas[0].pid, signal.SIGKILL)
            await eventually(lambda: not replicas[0].is_running())
            assert await post(target) == 200

            async def healthy() -> int:
                answer = await fetch(target, "/health")
                return int(json.loads(answer.body)["replicas"]["healthy"])

            async with asyncio.timeout(20):
                while await healthy() < 2:
                    await asyncio.sleep(0.05)

    run(scenario())
