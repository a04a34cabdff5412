"""The gateway and the server answer alike: the same status has the same body and headers."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from millrace.common.http_client import Response, fetch
from millrace.common.sockets import free_port
from millrace.gateway.relay.access import Access
from tests.server.test_lifecycle import LONG, answers
from tests.support.fake_engine import Behaviour
from tests.support.gateways import gateway
from tests.support.live_server import LiveServer, fake_server, wait_for
from tests.support.mock_replica import MockReplica
from tests.support.running import run

KEY = "sk-one"
OWN_HEADERS = {"date", "x-request-id", "connection", "server"}  # of the connection, not the error


@pytest.fixture(scope="module")
def server(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("alike") / "log"
    with fake_server(text_model, log, api_key=[KEY]) as started:
        yield started


def told(status: int, headers: Any, body: bytes) -> tuple[int, dict[str, str], Any]:
    """What a client learns: status, headers of the error, body."""
    kept = {name.lower(): value for name, value in headers.items()}
    return status, {k: v for k, v in kept.items() if k not in OWN_HEADERS}, json.loads(body)


def by_server(server: LiveServer, path: str, **headers: str) -> tuple[int, dict[str, str], Any]:
    answer = httpx.post(f"{server.url}{path}", headers=headers, json={}, timeout=20)
    return told(answer.status_code, answer.headers, answer.content)


def by_gateway(path: str, stopping: bool = False, **headers: str) -> Any:
    async def ask() -> Response:
        replica = await MockReplica().start()
        async with gateway(replica.url, access=Access(api_key=[KEY])) as (made, target):
            made.relay.closing = stopping
            pairs = tuple(headers.items())
            answer = await fetch(target, path, method="POST", body=b"{}", headers=pairs)
        await replica.stop()
        return answer

    answer = run(ask())
    return told(answer.status, answer.headers, answer.body)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/nothing"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"x-api-key": "wrong"},
        {"Authorization": "Basic x"},
    ],
)
def test_a_request_without_a_valid_key(
    server: LiveServer, path: str, headers: dict[str, str]
) -> None:
    status, own, body = by_server(server, path, **headers)
    assert status == 401
    assert own["www-authenticate"] == "Bearer"
    assert ("type" in body) == (path == "/v1/messages")
    assert by_gateway(path, **headers) == (status, own, body)


def test_a_server_that_is_told_to_stop(text_model: Path, tmp_path: Path) -> None:
    options: Any = {"shutdown_timeout": 60, "api_key": [KEY]}
    key = {"Authorization": f"Bearer {KEY}"}
    with (
        fake_server(text_model, tmp_path / "log", Behaviour(step=0.02), **options) as server,
        httpx.stream(
            "POST", f"{server.url}/v1/completions", headers=key, timeout=60,
            json={**LONG, "max_tokens": 200, "stream": True},
        ) as stream,
    ):  # fmt: skip
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        health = httpx.get(f"{server.url}/health")
        ours = told(health.status_code, health.headers, health.content)
        list(lines)
    assert ours[2]["error"]["code"] == "shutting_down"
    assert by_gateway("/v1/completions", stopping=True, **key) == ours


def test_nothing_that_could_answer_is_there(text_model: Path, tmp_path: Path) -> None:
    """One engine that loads, and a gateway whose replicas are down: the same but for the words."""
    port = free_port("127.0.0.1")
    behaviour = Behaviour(load=600)
    with fake_server(text_model, tmp_path / "log", behaviour, ready=False, port=port):
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"))
        loading = httpx.get(f"http://127.0.0.1:{port}/health")

    async def ask() -> Response:
        async with gateway("http://127.0.0.1:9") as (_, target):
            return await fetch(target, "/health")

    down = run(ask())
    ours = told(loading.status_code, loading.headers, loading.content)
    theirs = told(down.status, down.headers, down.body)
    for status, headers, body in (ours, theirs):
        assert status == 503
        assert headers["retry-after"] == "1"
        assert body["error"].pop("message")
        assert body["error"].pop("code") in ("engine_loading", "unavailable")
        del headers["content-length"]
    assert ours == theirs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_a_prompt_that_is_too_long(server: LiveServer, path: str, stream: bool) -> None:
    """The replica's own error, asked for once: no other replica could answer."""
    path, key = f"/v1/{path}", {"Authorization": f"Bearer {KEY}"}
    messages = [{"role": "user", "content": "word " * 5000}]
    prompts = {"/v1/completions": {"prompt": "word " * 5000}, "/v1/responses": {"input": messages}}
    body = {**prompts.get(path, {"messages": messages}), "max_tokens": 5, "stream": stream}
    if path == "/v1/responses":
        del body["max_tokens"]
    own = httpx.post(f"{server.url}{path}", headers=key, json=body, timeout=20)

    async def ask() -> Response:
        async with gateway(server.url, access=Access(worker_api_key=KEY)) as (_, target):
            pairs = (("Content-Type", "application/json"),)
            data = json.dumps(body).encode()
            return await fetch(target, path, method="POST", body=data, headers=pairs)

    theirs = run(ask())
    assert theirs.status == own.status_code
    assert re.search("maximum context length is|prompt is too long", own.text)
    volatile = r"resp_[0-9a-f]+|\"created_at\":[0-9]+"
    assert re.sub(volatile, "", theirs.body.decode()) == re.sub(volatile, "", own.text)


URL = "data:image/png;base64,iVBORw0KGgo="
SOURCE = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
PICTURE = {"type": "image", "source": SOURCE}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": [PICTURE]}
IMAGES = [
    ("chat/completions", {"type": "image_url", "image_url": {"url": URL}}),
    ("responses", {"type": "input_image", "image_url": URL}),
    ("messages", PICTURE),
    ("messages", RESULT),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "part"), IMAGES)
def test_an_image(server: LiveServer, path: str, part: dict[str, Any], stream: bool) -> None:
    """Refused with the reason and what would serve it, on each API, by a gateway as well."""
    path, key = f"/v1/{path}", {"Authorization": f"Bearer {KEY}"}
    text = {"type": "input_text" if path == "/v1/responses" else "text", "text": "What is this?"}
    messages = [{"role": "user", "content": [text, part]}]
    body = {"input" if path == "/v1/responses" else "messages": messages, "stream": stream}
    body |= {"max_tokens": 5} if path == "/v1/messages" else {}
    own = httpx.post(f"{server.url}{path}", headers=key, json=body, timeout=20)
    assert own.status_code == 400
    error = own.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "reads text only, and no images" in error["message"]
    assert "--engine vllm" in error["message"]

    async def ask() -> Response:
        async with gateway(server.url, access=Access(worker_api_key=KEY)) as (_, target):
            pairs = (("Content-Type", "application/json"),)
            data = json.dumps(body).encode()
            return await fetch(target, path, method="POST", body=data, headers=pairs)

    theirs = run(ask())
    assert (theirs.status, theirs.body) == (400, own.content)
