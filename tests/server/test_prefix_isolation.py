"""A server whose clients share no cached prefixes: by API key, by `cache_salt`, by gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from millrace.common.prefix_hash import SALT_HEADER, hash_pieces
from millrace.common.sockets import free_port
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import read_request_info
from tests.support.live_server import LiveServer, started, wait_for

FLAGS = (
    *("--dtype=float32", "--max-model-len=256", "--max-num-seqs=4", "--snapshot-distance=0"),
    *("--kv-cache-memory-bytes=16777216", "--api-key=one", "--api-key=two"),
    *("--gateway-api-key=gate", "--cache-salt-by-api-key", "--served-model-name=small"),
)


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    command = [sys.executable, "-m", "millrace.cli", "serve", str(small_model), "--port=0", *FLAGS]
    with started(command, tmp_path_factory.mktemp("isolated") / "log") as running:
        running.wait_ready(120)
        yield running


def body_of(path: str, text: str, salt: str | None) -> dict[str, Any]:
    more = {} if salt is None else {"cache_salt": salt}
    if path == "/v1/completions":
        return {"prompt": text, "max_tokens": 2, **more}
    if path == "/v1/responses":
        return {"input": text, "max_output_tokens": 2, **more}
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **more}


def cached(usage: dict[str, Any]) -> int:
    """Cached prompt tokens, as each API names them."""
    if "cache_read_input_tokens" in usage:
        return int(usage["cache_read_input_tokens"])
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    return int(details["cached_tokens"])


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"]
)
def test_a_prompt_is_cached_for_its_own_clients_alone(server: LiveServer, path: str) -> None:
    text = f"{path} " + "one two three " * 6

    def ask(key: str, salt: str | None = None, header: str = "") -> bool:
        headers = {"x-api-key": key, **({SALT_HEADER: header} if header else {})}
        body = body_of(path, text, salt)
        answer = httpx.post(server.url + path, json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        return cached(answer.json()["usage"]) > 0

    clients: list[tuple[str, str | None, str]] = [
        ("one", None, ""),
        ("two", None, ""),
        ("one", "mine", ""),
        ("two", "mine", ""),
        ("gate", None, ""),
        ("gate", None, "abc"),
        ("gate", "mine", "abc"),
        ("gate", "abc", ""),
    ]
    for client in clients:
        assert not ask(*client), client
        assert ask(*client), client


@pytest.mark.parametrize("salt", ["", "x" * 1025, 5])
def test_a_salt_that_is_none_is_refused(server: LiveServer, salt: object) -> None:
    body = {"prompt": "x", "max_tokens": 1, "cache_salt": salt}
    headers = {"x-api-key": "one"}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_a_header_that_is_no_salt_is_refused(server: LiveServer) -> None:
    headers = {"x-api-key": "one", SALT_HEADER: "a/b"}
    body = {"prompt": "x", "max_tokens": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400
    assert SALT_HEADER in answer.json()["error"]["message"]


def test_only_the_gateway_learns_which_prefixes_are_cached(server: LiveServer) -> None:
    body = json.dumps({"prompt": "told " * 40, "max_tokens": 1, "cache_salt": "s"}).encode()
    headers = {"x-api-key": "gate", SALT_HEADER: "abc", "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 200
    load = f"{server.url}/load?prefixes_since=0"
    assert httpx.get(load).status_code == 401
    for key in ("one", "two"):
        report = httpx.get(load, headers={"x-api-key": key}).json()
        assert set(report) == {"requests", "tokens", "server_load"}
    told = set(httpx.get(load, headers={"x-api-key": "gate"}).json()["prefixes"]["hashes"])
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    info = read_request_info(Request(b"POST", b"/v1/completions", "1.1", pairs, body, True))
    assert set(hash_pieces(info.prompt, info.cache_salt)) <= told
    assert not set(hash_pieces(info.prompt)) & told


def test_behind_a_gateway_clients_are_kept_apart_too(small_model: Path, tmp_path: Path) -> None:
    """Both sides of `serve --replicas`: the gateway salts by key, and may read the prefixes."""
    port = free_port("127.0.0.1")
    flags = [one for one in FLAGS if not one.startswith("--gateway-api-key")]
    command = [
        *(sys.executable, "-m", "millrace.cli", "serve", str(small_model), f"--port={port}"),
        *("--replicas=2", "--policy=prefix_aware", "--device=cpu", *flags),
    ]
    url = f"http://127.0.0.1:{port}"
    with started(command, tmp_path / "log") as fleet:
        wait_for(lambda: "2 replicas on http" in fleet.log or fleet.process.poll() is not None, 180)
        body = {"prompt": "one two three " * 8, "max_tokens": 2}

        def cached_tokens(key: str) -> int:
            headers = {"x-api-key": key}
            answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
            return cached(answer.json()["usage"])

        assert cached_tokens("one") == 0
        assert cached_tokens("two") == 0
        for _ in range(3):  # each client's prompt finds the replica that has it
            assert cached_tokens("one") > 0
            assert cached_tokens("two") > 0
        # Whichever replica had a request, its sender is told why it was cached, and nobody else.
        for number in range(4):
            prompt = {"prompt": f"{number} " * 20, "max_tokens": 2}
            headers = {"x-api-key": "one"}
            answer = httpx.post(f"{url}/v1/completions", json=prompt, headers=headers, timeout=60)
            asked = f"{url}/cache/explain?request_id={answer.json()['id']}"
            told = httpx.get(asked, headers=headers, timeout=60)
            assert told.status_code == 200, told.text
            assert told.json()["prompt_tokens"] > 0
            assert httpx.get(asked, headers={"x-api-key": "two"}, timeout=60).status_code == 404
        listed = [
            {one["id"] for one in httpx.get(
                f"{url}/cache/explain", headers={"x-api-key": key}, timeout=60
            ).json()["requests"]}
            for key in ("one", "two")
        ]  # fmt: skip
        assert any(listed)
        assert not listed[0] & listed[1]
        replicas = httpx.get(f"{url}/gateway/replicas", headers={"x-api-key": "one"}).json()
        load = f"{replicas['replicas'][0]['url']}/load?prefixes_since=0"
        for key in ("one", "two"):
            assert "prefixes" not in httpx.get(load, headers={"x-api-key": key}).json()
