"""Who may change a gateway, and changes that are not valid."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from millrace.common.http_client import Target, fetch
from millrace.errors import UserError
from millrace.gateway.app import Gateway
from millrace.gateway.processes.options import GatewayOptions, check_options
from millrace.gateway.relay.access import Access
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

JSON = ("Content-Type", "application/json")
KEY = ("Authorization", "Bearer root")


async def change(port: int, *headers: tuple[str, str], url: str = "http://127.0.0.1:9") -> int:
    """The status of adding a replica, with exactly these headers and a JSON body."""
    body = json.dumps({"url": url}).encode()
    lines = [f"{name}: {value}" for name, value in headers]
    if not any(name == "Host" for name, _ in headers):
        lines.append(f"Host: 127.0.0.1:{port}")
    head = "\r\n".join(("POST /gateway/replicas HTTP/1.1", *lines, "Connection: close"))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    answer = await asyncio.wait_for(reader.read(-1), 10)
    writer.close()
    return int(answer.split()[1])


def replicas(made: Gateway) -> int:
    return len(made.monitor.members)


@pytest.mark.parametrize("headers", [(JSON,), (JSON, ("X-Forwarded-For", "203.0.113.9")), ()])
def test_without_a_key_the_public_port_takes_no_changes(headers: tuple[Any, ...]) -> None:
    """Behind a proxy on this host a stranger has the same address as its administrator."""

    async def scenario() -> None:
        async with gateway(replicas=[]) as (made, target):
            assert await change(target.port, *headers) == 403
            assert replicas(made) == 0

    run(scenario())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((JSON,), 201),
        ((("Content-Type", "application/json; charset=utf-8"),), 201),
        ((JSON, ("Host", "localhost:80")), 201),
        ((JSON, ("Host", "[::1]")), 201),
        ((("Content-Type", "text/plain"),), 415),
        ((("Content-Type", "application/x-www-form-urlencoded"),), 415),
        ((), 415),
        ((JSON, ("Origin", "http://evil.example")), 403),
        ((JSON, ("Origin", "null")), 403),
        ((JSON, ("Sec-Fetch-Site", "cross-site")), 403),
        ((JSON, ("Host", "llm.example.com")), 403),
        ((JSON, ("Host", "127.0.0.1.evil.example")), 403),
        ((JSON, ("Host", "[::1")), 403),
        ((JSON, ("X-Forwarded-For", "203.0.113.9")), 403),
        ((JSON, ("X-FORWARDED-PROTO", "https")), 403),
        ((JSON, ("Forwarded", "for=203.0.113.9")), 403),
        ((JSON, ("Via", "1.1 proxy")), 403),
        ((JSON, ("X-Real-IP", "203.0.113.9")), 403),
    ],
)
def test_the_admin_port_takes_what_neither_a_web_page_nor_a_proxy_sends(
    headers: tuple[Any, ...], status: int
) -> None:
    async def scenario() -> None:
        async with gateway(replicas=[]) as (made, _):
            assert await change(made.admin_port, *headers) == status
            assert replicas(made) == (status == 201)

    run(scenario())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ((JSON, KEY), 201),
        ((JSON, KEY, ("Host", "llm.example.com"), ("X-Forwarded-For", "203.0.113.9")), 201),
        ((JSON, ("x-api-key", "root")), 201),
        ((JSON,), 403),
        ((JSON, ("Authorization", "Bearer toor")), 403),
        ((JSON, KEY, ("Origin", "http://evil.example")), 403),
        ((KEY,), 415),
    ],
)
def test_with_an_admin_key_every_port_needs_it(headers: tuple[Any, ...], status: int) -> None:
    async def scenario() -> None:
        async with gateway(replicas=[], access=Access(admin_key="root")) as (made, target):
            assert await change(target.port, *headers) == status
            assert await change(made.admin_port, *headers, url="http://127.0.0.1:10") == status
            assert replicas(made) == 2 * (status == 201)

    run(scenario())


@pytest.mark.parametrize("processes", [1, 2])
def test_the_unix_socket_is_for_this_user_and_needs_no_key(processes: int, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"

    async def ask(*lines: str, body: bytes = b"") -> bytes:
        reader, writer = await asyncio.open_unix_connection(str(path))
        head = "\r\n".join((*lines, "Host: x", "Connection: close", f"Content-Length: {len(body)}"))
        writer.write(f"{head}\r\n\r\n".encode() + body)
        answer = await asyncio.wait_for(reader.read(-1), 10)
        writer.close()
        return answer

    async def scenario() -> None:
        replica = await MockReplica().start()
        access = Access(admin_key="root", api_key=["k"])
        options = {"admin_uds": str(path), "processes": processes, "access": access}
        async with gateway(replica.url, **options) as (made, _):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert b'"healthy":1' in await ask("GET /health HTTP/1.1")
            assert b'"state":"up"' in await ask("GET /gateway/replicas HTTP/1.1")
            kind = "Content-Type: application/json"
            body = b'{"url": "http://127.0.0.1:9"}'
            added = await ask("POST /gateway/replicas HTTP/1.1", kind, body=body)
            assert added.startswith(b"HTTP/1.1 201")
            assert replicas(made) == 2
            relayed = await ask("POST /v1/completions HTTP/1.1", kind, body=b"{}")
            assert relayed.startswith(b"HTTP/1.1 404")
        assert not path.exists()
        await replica.stop()

    run(scenario())


def test_a_unix_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "admin.sock"

    async def scenario() -> None:
        async with gateway(replicas=[], admin_uds=str(path)):
            inode = path.stat().st_ino
            with pytest.raises(UserError, match="another process listens there"):
                async with gateway(replicas=[], admin_uds=str(path)):
                    pass
            assert path.stat().st_ino == inode
            os.link(path, tmp_path / "kept")
        os.rename(tmp_path / "kept", path)
        async with gateway(replicas=[], admin_uds=str(path)):
            _, writer = await asyncio.open_unix_connection(str(path))
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"admin_port": 8001, "admin_host": "0.0.0.0"}, "give it --admin-key"),
        ({"admin_port": 70000}, "use 1 to 65535"),
        ({"admin_port": 0, "processes": 2}, "use 1 to 65535"),
        ({"admin_port": 8000, "port": 8000}, "use another port"),
    ],
)
def test_invalid_admin_listeners(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_options(GatewayOptions(**options))
    key = {"admin_host": "0.0.0.0", "admin_port": 8001}
    check_options(GatewayOptions(**key, access=Access(admin_key="k")))


# --- changes that are not valid ----------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/%C2%B2/drain", "", 404),  # a superscript 2
        ("POST", f"/{'9' * 5000}/drain", "", 404),
        ("POST", "/-1/drain", "", 404),
        ("DELETE", "/%00", "", 404),
        ("POST", "", '{"url": "http://[::1"}', 400),
        ("POST", "", '{"url": "http://[zz]:1"}', 400),
        ("POST", "", '{"url": "http://a b:1"}', 400),
        ("POST", "", '{"url": "http://a:0"}', 400),
        ("POST", "", '{"url": "http://a:99999"}', 400),
        ("POST", "", '{"url": "127.0.0.1:9", "limit": -5}', 400),
        ("POST", "", '{"url": "127.0.0.1:9", "limit": ' + "9" * 5000 + "}", 400),
        ("POST", "", '{"url": "127.0.0.1:9", "weight": 1e999}', 400),
        ("POST", "", '{"url": "127.0.0.1:9", "models": [""]}', 400),
        ("POST", "", '{"url": "127.0.0.1:9", "models": ["' + "m" * 501 + '"]}', 400),
        ("POST", "", '{"url": "' + "a" * 60_000 + '"}', 400),
        ("POST", "", "[" * 10_000, 400),
        ("POST", "", '{"url": "' + "a" * 70_000 + '"}', 413),
        ("PATCH", "/0", '{"weight": "1"}', 400),
        ("PATCH", "/0", "\xff", 400),
        ("POST", "x", "", 404),
    ],
)
def test_changes_that_are_not_valid_are_answered_at_once_and_briefly(
    method: str, path: str, body: str, status: int, processes: int
) -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, processes=processes) as (made, _):
            await eventually(lambda: made.healthy == 1)
            answer = await fetch(
                Target("127.0.0.1", made.admin_port),
                f"/gateway/replicas{path}",
                method=method,
                body=body.encode("latin-1"),
                timeout=3,
            )
            assert answer.status == status
            assert len(answer.body) < 3000
            assert [member.state for member in made.monitor.members] == ["up"]
        await replica.stop()

    run(scenario())


def test_a_local_request_that_fails_in_the_gateway_gets_500(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: object) -> None:
        raise ZeroDivisionError("on purpose")

    async def scenario() -> None:
        async with gateway(replicas=[]) as (_, target):
            monkeypatch.setattr("millrace.gateway.admin.api.AdminApi.status", broken)
            assert (await fetch(target, "/gateway/status", timeout=3)).status == 500
            assert (await fetch(target, "/gateway/replicas", timeout=3)).status == 200

    run(scenario())
    assert "ZeroDivisionError: on purpose" in caplog.text
