"""A fleet over several machines: each has a supervisor of its own, and one more leads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.common.http_client import Target
from millrace.errors import UserError
from millrace.fleet.machines import read_machines_file, require_reachable
from millrace.fleet.supervisor import FleetOptions, Supervisor
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.relay.access import Access
from tests.fleet.test_rolling_update import MOCK, ask_until
from tests.support.gateways import FAST
from tests.support.running import eventually, run

KEY = "of-the-machines"


@contextlib.asynccontextmanager
async def supervised(
    lines: list[str] | None = None, key: str | None = KEY, new: list[str] = MOCK, **options: Any
) -> AsyncIterator[Supervisor]:
    gateway = GatewayOptions(
        policy="least_loaded", health=FAST, limits=GatewayLimits(hold_timeout=20),
        admin_port=0, access=Access(admin_key=key),
    )  # fmt: skip
    made = Supervisor(
        FleetOptions(
            command=MOCK, port=0, device="cpu", gateway=gateway, stop_timeout=2.0, **options
        ),
        lines.append if lines is not None else lambda line: None,
        lambda: new,
    )
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


def write(file: Path, *machines: Supervisor) -> Path:
    file.write_text("".join(f"http://127.0.0.1:{m.gateway.admin_port}\n" for m in machines))
    return file


def test_two_machines_are_updated_from_a_third_without_a_lost_request(tmp_path: Path) -> None:
    new = [*MOCK, "--gap", "0.01"]

    async def scenario() -> None:
        async with supervised(count=2, new=new) as first, supervised(count=1, new=new) as second:
            file = write(tmp_path / "machines", first, second)
            async with supervised(count=0, machines_file=str(file)) as main:
                assert main.gateway.healthy == 3
                stop, got = asyncio.Event(), list[int]()
                asking = [
                    asyncio.create_task(ask_until(stop, main.gateway.port, got)) for _ in range(6)
                ]
                await main.begin_update()
                await eventually(lambda: main.update.document()["state"] != "running", 60)
                stop.set()
                await asyncio.gather(*asking)
                everything = first.document()["replicas"] + second.document()["replicas"]
                assert main.document()["state"] == "done"
                assert sorted(main.document()["replaced"]) == sorted(everything)
                pids = first.pids + second.pids
                assert all("0.01" in psutil.Process(pid).cmdline() for pid in pids)
                assert got
                assert set(got) == {0}

    run(scenario(), timeout=120)


def test_a_version_that_does_not_start_on_a_machine_ends_the_update(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(count=2, new=["false"]) as machine:
            file = write(tmp_path / "machines", machine)
            async with supervised(count=0, machines_file=str(file)) as main:
                await main.begin_update()
                await eventually(lambda: main.update.document()["state"] != "running", 60)
                assert main.document()["state"] == "failed"
                assert "runs its old command again" in main.document()["reason"]
                await eventually(lambda: main.gateway.healthy == 2, 20)

    run(scenario(), timeout=120)


def test_machines_come_and_go_with_the_file(tmp_path: Path) -> None:
    lines: list[str] = []

    async def scenario() -> None:
        async with supervised(count=1) as machine:
            file = tmp_path / "machines"
            file.write_text("http://127.0.0.1:9  # not started yet\n")
            async with supervised(lines, count=1, machines_file=str(file)) as main:
                with pytest.raises(UserError, match=r"127\.0\.0\.1:9: no gateway answers"):
                    await main.begin_update()
                assert main.document()["state"] == "none"
                write(file, machine)
                await eventually(lambda: main.gateway.healthy == 2)
                assert [m["replicas"] for m in main.document()["machines"]] == [
                    machine.document()["replicas"]
                ]
                file.write_text("")
                await eventually(lambda: len(main.gateway.monitor.members) == 1)

    run(scenario(), timeout=120)
    assert any("127.0.0.1:9: no gateway answers" in line for line in lines)


def test_one_replica_is_replaced_by_its_number() -> None:
    async def scenario() -> None:
        async with supervised(count=2) as fleet:
            before = fleet.pids
            with pytest.raises(UserError, match="no replica 2; this host has 2"):
                await fleet.begin_update(2)
            await fleet.begin_update(1)
            await eventually(lambda: fleet.update.document()["state"] == "done", 60)
            assert fleet.pids[0] == before[0]
            assert fleet.pids[1] != before[1]

    run(scenario(), timeout=120)


def test_a_wrong_key_ends_the_update_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with supervised(count=1) as machine:
            file, before = write(tmp_path / "machines", machine), machine.pids
            async with supervised(count=0, key="another", machines_file=str(file)) as main:
                await main.begin_update()
                await eventually(lambda: main.update.document()["state"] != "running", 60)
                assert main.document()["state"] == "failed"
                assert "admin key" in main.document()["reason"]
                await eventually(lambda: main.gateway.healthy == 1, 20)
                assert machine.pids == before

    run(scenario(), timeout=60)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://a:1\nhttp://b:1 weight=2\n", "machines:2: one URL a line"),
        ("ftp://a\n", "machines:1: 'ftp://a' is no URL"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "machines"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_machines_file(file)
    file.write_text("# none yet\n\n a:1 # once\na:1\n")
    assert [str(machine) for machine in read_machines_file(file)] == ["http://a:1"]


def test_replicas_that_only_their_own_machine_reaches_are_refused() -> None:
    replica = Target("127.0.0.1", 8100)
    with pytest.raises(UserError, match="give its fleet file a replica_host"):
        require_reachable(Target("10.0.0.5", 8001), [replica])
    require_reachable(Target("localhost", 8001), [replica])
    require_reachable(Target("10.0.0.5", 8001), [Target("10.0.0.5", 8100)])
