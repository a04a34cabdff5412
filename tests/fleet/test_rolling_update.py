"""Replicas replaced one by one under load: mock replicas, and the commands of `millrace fleet`."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from click.testing import CliRunner

from millrace.cli import cli
from millrace.common.http_client import Target, fetch
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.fleet.fleet_file import read_fleet_file
from millrace.fleet.supervisor import FleetOptions, Supervisor
from millrace.fleet.systemd_unit import unit
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.processes.options import GatewayOptions
from tests.support.gateways import FAST
from tests.support.running import eventually, run

MOCK = [sys.executable, str(Path(__file__).parents[1] / "support" / "mock_replica.py")]
BODY = b'{"model": "mock", "prompt": [1], "max_tokens": 20, "stream": true}'


@contextlib.asynccontextmanager
async def supervised(
    count: int, new: Sequence[str], limits: GatewayLimits | None = None, **options: Any
) -> AsyncIterator[Supervisor]:
    gateway = GatewayOptions(
        policy="least_loaded", health=FAST, limits=limits or GatewayLimits(hold_timeout=20)
    )
    made = Supervisor(
        FleetOptions(
            command=MOCK, count=count, port=0, device="cpu", gateway=gateway, stop_timeout=2.0,
            **options,
        ),
        lambda line: None,
        lambda: new,
    )  # fmt: skip
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


async def ask_until(stop: asyncio.Event, port: int, got: list[int]) -> None:
    while not stop.is_set():
        target = Target("127.0.0.1", port)
        response = await fetch(target, "/v1/completions", method="POST", body=BODY, timeout=20)
        whole = response.status == 200 and response.body.endswith(b"data: [DONE]\n\n")
        got.append(response.status if not whole else 0)


@pytest.mark.parametrize("count", [1, 3])
def test_no_request_is_lost_while_replicas_are_replaced(count: int) -> None:
    async def scenario() -> None:
        async with supervised(count, [*MOCK, "--gap", "0.01"]) as fleet:
            before, stop, got = fleet.pids, asyncio.Event(), list[int]()
            asking = [
                asyncio.create_task(ask_until(stop, fleet.gateway.port, got)) for _ in range(6)
            ]
            await fleet.begin_update()
            with pytest.raises(UserError, match="an update is running already"):
                await fleet.begin_update()
            await eventually(lambda: fleet.update.document()["state"] != "running", 60)
            stop.set()
            await asyncio.gather(*asking)
            assert fleet.update.document()["state"] == "done"
            assert fleet.update.document()["replaced"] == fleet.document()["replicas"]
            assert not set(before) & set(fleet.pids)
            assert all("0.01" in psutil.Process(pid).cmdline() for pid in fleet.pids)
            assert got
            assert set(got) == {0}

    run(scenario(), timeout=120)


@pytest.mark.parametrize("new", [["false"], [*MOCK, "--fail", "no"]])
def test_a_version_that_does_not_start_is_taken_back(new: list[str]) -> None:
    async def scenario() -> None:
        async with supervised(2, new) as fleet:
            await fleet.begin_update()
            await eventually(lambda: fleet.update.document()["state"] != "running", 60)
            state = fleet.update.document()
            assert state["state"] == "failed"
            assert state["replaced"] == []
            assert "runs its old command again" in state["reason"]
            await eventually(lambda: fleet.gateway.healthy == 2, 20)
            assert all(psutil.Process(pid).cmdline()[1] == MOCK[1] for pid in fleet.pids)
            assert not any("--fail" in psutil.Process(pid).cmdline() for pid in fleet.pids)

    run(scenario(), timeout=120)


def test_the_only_replica_is_not_taken_away_from_requests_that_cannot_wait() -> None:
    async def scenario() -> None:
        async with supervised(1, MOCK, GatewayLimits()) as fleet:
            with pytest.raises(UserError, match="give the gateway a hold_timeout"):
                await fleet.begin_update()

    run(scenario(), timeout=60)


def written(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(keys))
    return path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "give model or command"),
        ({"model": "m", "command": ["x"]}, "one of them"),
        ({"model": "m", "replicas": 0}, "use 1 or more"),
        ({"model": "m", "replica_port": 65536}, "use 1 to 65535"),
        ({"model": "m", "replica": 2}, "unknown field `replica`"),
        ({"model": "m", "port": "x"}, r"Expected `int`, got `str` - at `\$.port`"),
        ({"model": "m", "limits": {"hold": 1}}, "unknown field `hold`"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(
    tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read_fleet_file(written(tmp_path / "fleet.yaml", **keys))
    with pytest.raises(UserError, match="No such file"):
        read_fleet_file(tmp_path / "none.yaml")


def test_a_systemd_unit_gives_replicas_time_to_end(tmp_path: Path) -> None:
    text = unit(written(tmp_path / "a fleet.yaml", model="m", drain_timeout=100.0), "runner")
    assert f'ExecStart={sys.executable} -m millrace fleet up "{tmp_path}/a fleet.yaml"' in text
    assert "User=runner" in text
    assert "TimeoutStopSec=125" in text


def test_the_commands(tmp_path: Path) -> None:
    port, admin = free_port("127.0.0.1"), free_port("127.0.0.1")
    keys: dict[str, Any] = {"command": MOCK, "replicas": 2, "port": port, "admin_port": admin}
    keys |= {"device": "cpu", "health": {"health_check_interval": 0.05}}
    file = written(tmp_path / "fleet.yaml", **keys)
    url, admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}"
    process = subprocess.Popen(
        [sys.executable, "-m", "millrace", "fleet", "up", str(file)], stderr=subprocess.PIPE
    )
    try:
        runner = CliRunner()
        end = time.monotonic() + 60
        while runner.invoke(cli, ["fleet", "status", url, "--once"]).exit_code:
            assert time.monotonic() < end
            time.sleep(0.2)
        written(file, **keys | {"command": [*MOCK, "--gap", "0.001"]})
        done = runner.invoke(cli, ["fleet", "restart", admin_url])
        assert done.exit_code == 0, done.output
        assert done.output.splitlines()[-1] == "2 of 2 replicas are replaced"
        drained = runner.invoke(cli, ["fleet", "drain", "0", admin_url])
        assert drained.output.endswith(": draining\n")
        assert runner.invoke(cli, ["fleet", "drain", "0", admin_url, "--undo"]).exit_code == 0
        written(file, model="m", port="x")
        refused = subprocess.run(
            [sys.executable, "-m", "millrace", "fleet", "restart", admin_url],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert refused.returncode == 2
        assert "fleet.yaml: Expected `int`, got `str`" in refused.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
