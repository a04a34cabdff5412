"""Who gets requests: checks, ejection, drain, replicas that come and go, discovery."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from millrace.common.http_client import Response, Target, fetch, parse_url
from millrace.errors import UserError
from millrace.gateway.app import Gateway
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import IN_FLIGHT, LOAD
from millrace.gateway.health.discovery import DnsSource, FileSource, parse_dns
from millrace.gateway.health.health_monitor import HealthPolicy, ReplicaSpec
from millrace.gateway.health.load_report import LoadReport
from millrace.gateway.relay.access import Access
from tests.support.gateways import FAST, gateway, streamed
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

QUIET = HealthPolicy(health_check_interval=60, slow_start=0.0)


async def post(target: Target, tokens: int = 2, **more: Any) -> Response:
    body = {"model": "mock", "prompt": [1, 2], "max_tokens": tokens, "stream": True, **more}
    return await fetch(
        target, "/v1/completions", method="POST", body=json.dumps(body).encode(), timeout=30
    )


async def admin(
    made: Gateway, method: str, path: str = "", body: Any = None, key: str | None = None
) -> Response:
    data = b"" if body is None else json.dumps(body).encode()
    headers = (("Authorization", f"Bearer {key}"),) if key else ()
    target = Target("127.0.0.1", made.admin_port)
    return await fetch(
        target, f"/gateway/replicas{path}", method=method, body=data, headers=headers
    )


def states(made: Gateway) -> list[str]:
    return [member.state for member in made.monitor.members]


def test_what_is_drained_by_hand_stays_so_while_its_source_lists_it() -> None:
    async def scenario() -> None:
        some = [await MockReplica(name=str(i)).start() for i in range(2)]
        specs = [ReplicaSpec(target=parse_url(r.url), source="a file") for r in some]
        async with gateway() as (made, _):
            made.monitor.sync("a file", specs)
            await eventually(lambda: states(made) == ["up", "up"])
            made.monitor.drain(made.monitor.members[1].id, then_remove=False)
            made.monitor.sync("a file", specs)
            assert states(made) == ["up", "draining"]
            made.monitor.sync("a file", specs[:1])
            await eventually(lambda: states(made) == ["up"])
            assert [m.target for m in made.monitor.members] == [specs[0].target]
        for replica in some:
            await replica.stop()

    run(scenario())


# --- checks ------------------------------------------------------------------------------------


def test_a_green_health_page_is_not_enough() -> None:
    """A replica must complete a token before it gets requests."""

    async def scenario() -> None:
        hollow = await MockReplica(probe_status=500).start()
        async with gateway(hollow.url) as (made, target):
            answer = await post(target)
            assert answer.status == 503
            assert b"a completion of one token got 500" in answer.body
            hollow.probe_status = 200
            await eventually(lambda: states(made) == ["up"])
            assert (await post(target)).status == 200
        await hollow.stop()

    run(scenario())


def test_a_replica_that_serves_no_completions_is_taken_as_it_is() -> None:
    async def scenario() -> None:
        embedder = await MockReplica(probe_status=501).start()
        async with gateway(embedder.url) as (made, _):
            assert states(made) == ["up"]
        await embedder.stop()

    run(scenario())


def test_an_idle_replica_must_prove_a_step_again_and_a_busy_one_need_not() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        health = HealthPolicy(health_check_interval=0.02, idle_probe=0.2, slow_start=0.0)
        async with gateway(replica.url, health=health) as (_, target):
            for _ in range(20):
                await post(target)
                await asyncio.sleep(0.02)
            assert replica.probes == 1
            await eventually(lambda: replica.probes == 2)
        await replica.stop()

    run(scenario())


def test_checks_never_touch_load_counters() -> None:
    async def scenario() -> None:
        replica = await MockReplica(gap_s=0.02).start()
        async with gateway(replica.url) as (made, target):
            waiting = asyncio.create_task(post(target, 100))
            await eventually(lambda: made.counters.replica_sums(1)[0][IN_FLIGHT] == 1)
            for _ in range(10):
                await made.monitor.check(0)
                row = made.counters.replica_sums(1)[0]
                assert row[IN_FLIGHT] == 1
                assert row[LOAD] >= 2
            assert (await waiting).status == 200
            assert made.counters.replica_sums(1)[0][:3] == [0, 0, 0]
        await replica.stop()

    run(scenario())


def test_the_backoff_doubles_with_each_ejection_in_a_row() -> None:
    async def scenario() -> None:
        bad = await MockReplica(behaviour="silent").start()
        good = await MockReplica().start()
        health = HealthPolicy(
            health_check_interval=0.01, backoff=0.1, slow_start=0.0, consecutive_failures=2
        )
        async with gateway(bad.url, good.url, health=health) as (made, target):
            pauses = []
            for attempt in range(3):
                for number in range(8):
                    assert (await post(target, seed=10 * attempt + number)).status == 200
                assert states(made) == ["down", "up"]
                began = time.monotonic()
                await eventually(lambda: states(made) == ["up", "up"])
                pauses.append(time.monotonic() - began)
            for pause, expected in zip(pauses, (0.1, 0.2, 0.4), strict=True):
                assert 0.7 * expected < pause < expected + 0.15
        await bad.stop()
        await good.stop()

    run(scenario())


def test_a_replica_that_answers_nothing_but_errors_is_ejected() -> None:
    async def scenario() -> None:
        bad = await MockReplica(behaviour="error", name="bad").start()
        good = await MockReplica(name="good").start()
        async with gateway(bad.url, good.url, health=QUIET, policy="round_robin") as (made, target):
            statuses = [(await post(target, seed=number)).status for number in range(16)]
            assert (statuses.count(500), statuses.count(200)) == (5, 11)
            assert states(made) == ["down", "up"]
            assert "5 different requests failed in a row" in made.monitor.members[0].reason
        await bad.stop()
        await good.stop()

    run(scenario())


# --- load reports ------------------------------------------------------------------------------


def test_load_from_other_clients_counts() -> None:
    async def scenario() -> None:
        busy = await MockReplica(kind="millrace", load={"requests": 9, "tokens": 5000}).start()
        free = await MockReplica(kind="millrace", load={"requests": 0, "tokens": 0}).start()
        health = HealthPolicy(health_check_interval=60, load_interval=0.01, slow_start=0.0)
        async with gateway(busy.url, free.url, health=health) as (made, target):
            await eventually(lambda: made.counters.replica_sums(2)[0][LOAD] > 4500)
            answers = [await post(target) for _ in range(4)]
            assert {a.headers["x-replica"] for a in answers} == {"mock"}
            assert [len(busy.bodies), len(free.bodies)] == [0, 4]
        await busy.stop()
        await free.stop()

    run(scenario())


def test_a_report_without_tokens_is_weighed_by_requests() -> None:
    assert LoadReport(requests=5).correction(counted=300, requests=3) == 200
    assert LoadReport(requests=3).correction(counted=300, requests=3) == 0
    assert LoadReport(requests=3, tokens=350).correction(counted=300, requests=3) == 50


# --- coming and going --------------------------------------------------------------------------


def test_a_drained_replica_ends_its_streams_and_is_removed() -> None:
    async def scenario() -> None:
        leaving = await MockReplica(name="leaving", gap_s=0.02).start()
        async with gateway(leaving.url, health=QUIET) as (made, target):
            running = asyncio.create_task(post(target, 100))
            await eventually(lambda: streamed(made) > 2)
            staying = await MockReplica(name="staying").start()
            added = await admin(made, "POST", "", {"url": staying.url, "weight": 2})
            assert added.status == 201
            assert (await admin(made, "DELETE", "/0")).status == 200
            await eventually(lambda: states(made) == ["draining", "up"])
            answers = [await post(target) for _ in range(4)]
            assert {a.headers["x-replica"] for a in answers} == {"staying"}
            assert states(made)[0] == "draining"
            assert (await running).body.count(b"x ") == 100
            await eventually(lambda: states(made) == ["up"])
            await staying.stop()
        await leaving.stop()

    run(scenario())


def test_replicas_are_drained_and_taken_back_and_reweighted() -> None:
    async def scenario() -> None:
        some = [await MockReplica(name=str(i)).start() for i in range(2)]
        async with gateway(*(r.url for r in some)) as (made, _):
            assert (await admin(made, "POST", "/1/drain")).status == 200
            assert states(made) == ["up", "draining"]
            assert (await admin(made, "POST", "/1/undrain")).status == 200
            await eventually(lambda: states(made) == ["up", "up"])
            assert (await admin(made, "PATCH", "/1", {"weight": 3})).status == 200
            assert made.replicas.all[1].member.weight == 3
        for replica in some:
            await replica.stop()

    run(scenario())


def test_a_stream_of_a_removed_replica_is_resumed_on_another() -> None:
    async def scenario() -> None:
        some = [await MockReplica(kind="millrace", gap_s=0.02).start() for _ in range(2)]
        async with gateway(*(r.url for r in some), policy="round_robin") as (made, target):
            running = asyncio.create_task(post(target, 60))
            await eventually(lambda: streamed(made) > 2)
            assert (await admin(made, "DELETE", "/0?force=1")).status == 200
            assert (await running).body.count(b"w") >= 60
            assert made.counters.events()["resumed"] == 1
        for replica in some:
            await replica.stop()

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "", {"url": "ftp://x"}, 400, "use a form like"),
        ("POST", "", {"url": "127.0.0.1:9", "weight": -1}, 400, "above 0"),
        ("POST", "", {"link": "127.0.0.1:9"}, 400, "link"),
        ("DELETE", "/7", None, 404, "there are: 0"),
        ("POST", "/0/explode", None, 405, "undrain"),
        ("PATCH", "/0", {"weight": 0}, 400, "above 0"),
    ],
)
def test_invalid_changes_are_refused(
    method: str, path: str, body: Any, status: int, says: str
) -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url) as (made, _):
            answer = await admin(made, method, path, body)
            assert answer.status == status
            assert says in json.loads(answer.body)["error"]["message"]
            assert states(made) == ["up"]
        await replica.stop()

    run(scenario())


def test_changes_need_the_admin_key_where_there_is_one() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, access=Access(admin_key="root")) as (made, _):
            assert (await admin(made, "POST", "/0/drain")).status == 403
            assert (await admin(made, "POST", "/0/drain", key="no")).status == 403
            assert states(made) == ["up"]
            assert (await admin(made, "POST", "/0/drain", key="root")).status == 200
        await replica.stop()

    run(scenario())


# --- discovery ---------------------------------------------------------------------------------


def test_a_watched_file_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileSource, "interval", 0.02)

    async def scenario() -> None:
        one, two = await MockReplica().start(), await MockReplica().start()
        listed = tmp_path / "replicas"
        listed.write_text(f"# ours\n{one.url} weight=2\n")
        async with gateway(worker_file=str(listed), replicas=[]) as (made, target):
            assert [m.weight for m in made.monitor.members] == [2.0]
            listed.write_text(f"{one.url}\n{two.url} limit=5 models=mock,other\n")
            await eventually(lambda: states(made) == ["up", "up"])
            assert made.monitor.members[1].models == ("mock", "other")
            listed.write_text("nonsense://\n")
            await asyncio.sleep(0.1)
            assert states(made) == ["up", "up"]  # the last good list stands
            listed.write_text(two.url)
            await eventually(lambda: [m.target.port for m in made.monitor.members] == [two.port])
            assert (await post(target)).status == 200
        await one.stop()
        await two.stop()

    run(scenario())


def test_models_are_read_again_when_a_replica_comes_back() -> None:
    async def scenario() -> None:
        replica = await MockReplica(model="old").start()
        async with gateway(replica.url) as (made, target):
            assert made.monitor.members[0].models == ("old",)
            replica.model, replica.kind, replica.healthy = "new", "millrace", False
            await eventually(lambda: states(made) == ["down"])
            replica.healthy = True
            await eventually(lambda: states(made) == ["up"])
            member = made.monitor.members[0]
            assert (member.models, member.kind) == (("new",), "millrace")
            cards = json.loads((await fetch(target, "/v1/models")).body)["data"]
            assert [card["id"] for card in cards] == ["new"]
        await replica.stop()

    run(scenario())


def test_models_of_a_replica_that_stays_up_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as adapters that were loaded since."""
    monkeypatch.setattr("millrace.gateway.health.health_monitor._MODELS_SECONDS", 0.1)

    async def scenario() -> None:
        replica = await MockReplica(model="old").start()
        async with gateway(replica.url) as (made, _):
            replica.model = "new"
            await eventually(lambda: made.monitor.members[0].models == ("new",))
            assert states(made) == ["up"]
        await replica.stop()

    run(scenario())


def test_every_field_of_a_watched_file_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileSource, "interval", 0.02)

    async def scenario() -> None:
        replica = await MockReplica().start()
        listed = tmp_path / "replicas"
        listed.write_text(f"{replica.url} weight=2\n")

        def fields(made: Gateway) -> tuple[float, int, tuple[str, ...]]:
            (member,) = made.monitor.members
            return member.weight, member.limit, member.models

        async with gateway(worker_file=str(listed), replicas=[]) as (made, _):
            assert fields(made) == (2.0, 0, ("mock",))
            listed.write_text(f"{replica.url} limit=7 models=a,b\n")
            await eventually(lambda: fields(made) == (1.0, 7, ("a", "b")))
            listed.write_text(f"{replica.url}\n")
            await eventually(lambda: fields(made) == (1.0, 0, ("mock",)))
            listed.write_text(f"{replica.url} limit=-1\n")
            await asyncio.sleep(0.1)
            assert fields(made) == (1.0, 0, ("mock",))
        await replica.stop()

    run(scenario())


def test_every_address_of_a_name_is_a_replica() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        name = f"localhost:{replica.port}"
        async with gateway(worker_dns=[name], replicas=[]) as (made, target):
            assert Target("127.0.0.1", replica.port) in [m.target for m in made.monitor.members]
            assert (await post(target)).status == 200
        await replica.stop()

    run(scenario())


def test_a_gateway_that_holds_requests_waits_for_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A headless service has no address until its first pod is ready."""
    monkeypatch.setattr(DnsSource, "read", _no_address)
    lines: list[str] = []

    async def start(**options: Any) -> None:
        async with gateway(worker_dns=["replicas.test:8000"], replicas=[], **options):
            pass

    run(start(limits=GatewayLimits(hold_timeout=5.0), log=lines.append))
    assert lines == ["DNS replicas.test: no address yet; it is asked for again"]
    with pytest.raises(UserError, match="not known"):
        run(start())


async def _no_address(_: DnsSource) -> list[ReplicaSpec]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_sources_that_cannot_be_read_fail_the_start(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("127.0.0.1:1 size=2\n")

    async def start(**options: Any) -> None:
        async with gateway(replicas=[], **options):
            pass

    with pytest.raises(UserError, match=r"bad:1: 'size=2': use weight="):
        run(start(worker_file=str(bad)))
    with pytest.raises(UserError, match="No such file"):
        run(start(worker_file=str(tmp_path / "none")))
    with pytest.raises(UserError, match="use name:port"):
        parse_dns("replicas")


def test_replicas_of_one_source_survive_the_others() -> None:
    async def scenario() -> None:
        one = await MockReplica().start()
        spec = ReplicaSpec(target=parse_url(one.url))
        async with gateway(replicas=[spec], health=FAST) as (made, _):
            made.monitor.sync("file", [])
            assert states(made) == ["up"]
        await one.stop()

    run(scenario())
