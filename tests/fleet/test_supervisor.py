"""The supervisor with mock replicas as its command."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.common.backoff import BackoffPolicy
from millrace.common.http_client import Target, fetch
from millrace.errors import UserError
from millrace.fleet.supervisor import FleetOptions, Supervisor
from millrace.gateway.health.health_monitor import HealthPolicy
from millrace.gateway.processes.options import GatewayOptions
from tests.support.gateways import FAST
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

MOCK = [sys.executable, str(Path(__file__).parents[1] / "support" / "mock_replica.py")]
BODY = b'{"model": "mock", "prompt": [1], "max_tokens": 2}'


@contextlib.asynccontextmanager
async def supervised(lines: list[str], *extra: str, **options: Any) -> AsyncIterator[Supervisor]:
    options = {
        "count": 2,
        "port": 0,
        "restarts": BackoffPolicy(0.1),
        "stop_timeout": 2.0,
        "device": "cpu",
        **options,
    }
    spread = {"policy": "least_loaded", "health": FAST, "merge_metrics": True}
    options.setdefault("gateway", GatewayOptions(**spread))
    made = Supervisor(
        FleetOptions(command=[*MOCK, *extra], **options),
        lines.append,
        on_line=lambda name, line: lines.append(f"{name}: {line}"),
    )
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        for pid in pids
    )


async def answers(port: int, count: int = 4) -> list[str]:
    target = Target("127.0.0.1", port)
    got = [
        await fetch(target, "/v1/completions", method="POST", body=BODY, timeout=10)
        for _ in range(count)
    ]
    assert [a.status for a in got] == [200] * count
    return [a.headers["x-replica"] for a in got]


def test_replicas_come_up_share_the_load_and_go_away() -> None:
    lines: list[str] = []

    async def scenario() -> list[int]:
        async with supervised(lines) as fleet:
            assert sorted(set(await answers(fleet.gateway.port))) == sorted(map(str, fleet.pids))
            return fleet.pids

    pids = run(scenario())
    assert gone(pids)
    assert any(line.startswith("replica 1: mock replica") for line in lines)


def test_each_replica_gets_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = tmp_path / "threads"

    async def scenario() -> None:
        async with supervised([], "--threads-file", str(told)):
            pass

    run(scenario())
    expected = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [line.split()[0] for line in told.read_text().splitlines()] == [expected] * 2


def test_a_killed_replica_is_restarted_and_meanwhile_the_other_answers() -> None:
    async def scenario() -> Supervisor:
        async with supervised([]) as fleet:
            before = fleet.pids
            os.kill(before[0], signal.SIGKILL)
            assert set(await answers(fleet.gateway.port)) == {str(before[1])}
            await eventually(lambda: len(fleet.gateway.replicas.available()) == 2)
            assert fleet.pids[0] != before[0]
            assert len(set(await answers(fleet.gateway.port))) == 2
            return fleet

    fleet = run(scenario())
    (ended,) = [event for event in fleet.gateway.events.since(0) if event.kind == "ended"]
    assert (ended.replica, ended.text) == ("0", "status -9; restarting in 0.1 s")


def test_a_replica_that_hangs_is_killed_and_restarted() -> None:
    health = HealthPolicy(health_check_interval=0.05, health_check_timeout=0.2, slow_start=0.0)

    async def scenario() -> Supervisor:
        gateway = GatewayOptions(health=health)
        async with supervised([], gateway=gateway, hang_timeout=0.3) as fleet:
            before = fleet.pids[0]
            await eventually(lambda: len(fleet.gateway.replicas.available()) == 2)
            await asyncio.sleep(0.2)  # it is seen to serve
            os.kill(before, signal.SIGSTOP)
            await eventually(lambda: fleet.pids[0] != before)
            await eventually(lambda: len(fleet.gateway.replicas.available()) == 2)
            return fleet

    fleet = run(scenario())
    (killed,) = [event for event in fleet.gateway.events.since(0) if event.kind == "killed"]
    assert (killed.replica, killed.text) == ("0", "silent for 0.3 s")


def test_metrics_of_all_replicas_are_on_one_page() -> None:
    async def scenario() -> None:
        async with supervised([]) as fleet:
            page = await fetch(Target("127.0.0.1", fleet.gateway.port), "/metrics")
            text = page.body.decode()
            assert text.count("# TYPE mock_up gauge") == 1
            assert [f'mock_up{{replica="{i}"}} 1' in text for i in (0, 1)] == [True, True]
            assert "millrace_gateway_picks_total" in text

    run(scenario())


def test_a_replica_that_ends_at_once_fails_the_start_with_its_last_words() -> None:
    async def scenario() -> None:
        began = time.monotonic()
        with pytest.raises(UserError, match=r"(?s)status 1 before .* error: no such model"):
            async with supervised([], "--fail", "no such model"):
                pass
        assert time.monotonic() - began < 10

    run(scenario())


def test_a_replica_that_is_not_healthy_in_time_fails_the_start() -> None:
    async def scenario() -> None:
        with pytest.raises(UserError, match=r"not healthy within 0\.5 s"):
            async with supervised([], "--start-after", "60", start_timeout=0.5):
                pass

    run(scenario())
    assert not [p for p in psutil.process_iter(["cmdline"]) if "--start-after" in _words(p)]


def _words(process: psutil.Process) -> list[str]:
    return process.info["cmdline"] or []


def test_a_command_that_does_not_exist_is_named() -> None:
    async def scenario() -> None:
        with pytest.raises(UserError, match="cannot run '/no/such/program'"):
            await Supervisor(
                FleetOptions(command=["/no/such/program"], count=1, port=0, device="cpu"), print
            ).start()

    run(scenario())


def test_a_taken_port_is_known_before_anything_starts() -> None:
    lines: list[str] = []

    async def scenario() -> None:
        holder = await MockReplica().start()
        with pytest.raises(UserError, match=rf"127\.0\.0\.1 port {holder.port}: it is in use"):
            async with supervised(lines, port=holder.port):
                pass
        await holder.stop()

    run(scenario())
    assert lines == []


def test_a_replica_that_will_not_end_is_killed_after_its_grace() -> None:
    async def scenario() -> list[int]:
        async with supervised([], "--ignore-sigterm", count=1, stop_timeout=0.3) as fleet:
            pids = fleet.pids
            began = time.monotonic()
        assert 0.3 <= time.monotonic() - began < 3
        return pids

    assert gone(run(scenario()))


PROGRAM = """
import sys
from millrace.logs.setup import set_up_logs
from millrace.fleet.supervisor import run_replicas
set_up_logs("supervisor")
run_replicas(sys.argv[1:], 2, "127.0.0.1", 0, device="cpu")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_however_the_supervisor_ends(number: signal.Signals) -> None:
    supervisor = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *MOCK], stderr=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stderr is not None
        for line in supervisor.stderr:
            if "2 replicas on" in line:
                break
        children = [child.pid for child in psutil.Process(supervisor.pid).children()]
        assert len(children) == 2
        supervisor.send_signal(number)
        status = supervisor.wait(20)
        assert status == (-number if number == signal.SIGKILL else 0)

        async def all_gone() -> None:
            await eventually(lambda: gone(children))

        asyncio.run(all_gone())
    finally:
        supervisor.kill()
        supervisor.wait()
