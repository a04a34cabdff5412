"""Configurations of other proxies: each is tried where its program is installed."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from millrace.common.http_client import Target, connect, encode_request, fetch, parse_url
from millrace.common.sockets import free_port
from millrace.errors import UserError
from millrace.gateway.health.health_monitor import ReplicaSpec
from millrace.gateway.proxy_config import RENDERERS, render
from tests.support.mock_replica import MockReplica
from tests.support.running import run


def specs(*urls: str) -> list[ReplicaSpec]:
    return [ReplicaSpec(target=parse_url(url), weight=i + 1) for i, url in enumerate(urls)]


def test_each_names_every_replica_and_what_streams_need() -> None:
    some = specs("127.0.0.1:8001", "10.0.0.2:8002")
    texts = {kind: render(kind, some, "0.0.0.0", 80) for kind in RENDERERS}
    for kind, text in texts.items():
        assert "10.0.0.2" in text, kind
        assert "8002" in text, kind
    assert "proxy_buffering off;" in texts["nginx"]
    assert "option http-no-delay" in texts["haproxy"]
    cluster = json.loads(texts["envoy"])["static_resources"]["clusters"][0]
    assert cluster["circuit_breakers"]["thresholds"][0]["max_requests"] > 1024


def test_what_they_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="http for all"):
        render("nginx", specs("http://a:1", "https://b:2"), "0.0.0.0", 80)
    by_model = [ReplicaSpec(target=Target("a", 1), models=("m",))]
    with pytest.raises(UserError, match="needs `millrace gateway`"):
        render("envoy", by_model, "0.0.0.0", 80)


def command(kind: str, program: str, config: Path) -> Sequence[str]:
    pid = config.with_suffix(".pid")
    return {
        "nginx": [program, "-c", str(config), "-e", "stderr", "-g", f"daemon off; pid {pid};"],
        "haproxy": [program, "-f", str(config)],
        "envoy": [program, "-c", str(config), "-l", "error", "--use-dynamic-base-id"],
    }[kind]


@pytest.mark.parametrize("kind", list(RENDERERS))
def test_it_relays_a_stream_token_by_token(kind: str, tmp_path: Path) -> None:
    program = shutil.which(kind) or shutil.which(kind, path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip(f"{kind} is not installed")

    async def scenario() -> None:
        some = [await MockReplica(gap_s=0.02, name=str(i)).start() for i in range(2)]
        target = Target("127.0.0.1", free_port("127.0.0.1"))
        config = tmp_path / ("config.json" if kind == "envoy" else "config.conf")
        config.write_text(render(kind, specs(*(r.url for r in some)), target.host, target.port))
        with (tmp_path / "log").open("wb") as log:
            proxy = subprocess.Popen(command(kind, program, config), stdout=log, stderr=log)
        try:
            await _until_up(target, tmp_path / "log")
            body = b'{"model": "mock", "prompt": [1], "max_tokens": 10}'
            connection = await connect(target)
            answers = [
                await connection.send(encode_request(target, "POST", "/v1/completions", body))
                for _ in range(4)
            ]
            assert [a.status for a in answers] == [200] * 4
            assert {a.headers["x-replica"] for a in answers} == {"0", "1"}
            assert all(len(a.pieces) >= 8 for a in answers)
            connection.close()
        finally:
            proxy.terminate()
            proxy.wait(20)
        for replica in some:
            await replica.stop()

    run(scenario())


async def _until_up(target: Target, log: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if (await fetch(target, "/v1/models")).status == 200:
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise AssertionError(log.read_text())
