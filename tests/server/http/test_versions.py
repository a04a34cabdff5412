"""What older and odd clients send: HTTP/1.0, compressed bodies, byte order marks, nulls."""

from __future__ import annotations

import gzip
import json
import re
import socket
from typing import Any

import httpx
import pytest

from millrace.server.routes import ROUTES
from tests.support.live_server import LiveServer

BODY = {"prompt": "hello", "max_tokens": 3, "stream": True}
JSON = {"Content-Type": "application/json"}


def exchange(server: LiveServer, version: str, body: Any, path: str = "/v1/completions") -> bytes:
    """All that comes back for one request, until the server closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: a\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_http_1_0_gets_a_stream_without_chunks(server: LiveServer) -> None:
    head, _, body = exchange(server, "1.0", BODY).partition(b"\r\n\r\n")
    assert b"200" in head.splitlines()[0]
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    events = body.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    texts = [json.loads(event[len(b"data: ") :])["choices"][0]["text"] for event in events[:-2]]
    chunked = exchange(server, "1.1", BODY)
    assert b"transfer-encoding: chunked" in chunked.lower()
    same = re.findall(rb'"text": ?("(?:[^"\\]|\\.)*")', chunked)
    assert "".join(map(json.loads, same)) == "".join(texts) != ""


@pytest.mark.parametrize(
    ("body", "status"), [({**BODY, "stream": False}, b"200"), ({"prompt": 3}, b"400")]
)
def test_http_1_0_gets_whole_answers_with_their_length(
    server: LiveServer, body: Any, status: bytes
) -> None:
    head, _, answer = exchange(server, "1.0", body).partition(b"\r\n\r\n")
    assert status in head.splitlines()[0]
    assert f"content-length: {len(answer)}".encode() in head.lower()
    assert isinstance(json.loads(answer), dict)


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity"])
def test_a_compressed_body_is_refused(http: httpx.Client, encoding: str) -> None:
    data = gzip.compress(json.dumps(BODY).encode())
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/tokenize"):
        answer = http.post(path, content=data, headers={**JSON, "Content-Encoding": encoding})
        assert answer.status_code == 415
        assert encoding in answer.json()["error"]["message"]
        assert answer.headers["accept-encoding"] == "identity"


def test_a_byte_order_mark_is_no_part_of_the_body(http: httpx.Client) -> None:
    data = b"\xef\xbb\xbf" + json.dumps({"prompt": "hello", "max_tokens": 1}).encode()
    headers = {**JSON, "Content-Encoding": "identity"}
    assert http.post("/v1/completions", content=data, headers=headers).status_code == 200
    assert http.post("/tokenize", content=data, headers=JSON).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stream_options_may_be_null(http: httpx.Client, path: str) -> None:
    body: dict[str, Any] = {"max_tokens": 1, "stream": True}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "a"}
    for options in ({"include_usage": None}, {"continuous_usage_stats": None}, {}, None):
        answer = http.post(path, json={**body, "stream_options": options})
        assert answer.status_code == 200, options
        assert '"usage"' not in answer.text


def test_every_get_answers_head_without_a_body(server: LiveServer) -> None:
    """Claude Code asks HEAD / before anything else."""
    paths = [row.path for row in ROUTES if "GET" in row.methods and not row.manages]
    plain = [path for path in paths if "{" not in path and path not in ("/metrics", "/load")]
    with httpx.Client(base_url=server.url) as client:
        for path in (*plain, "/", "/docs", "/dashboard", "/nothing"):
            head, whole = client.head(path), client.get(path)
            assert head.content == b"", path
            assert head.status_code == whole.status_code, path
            assert head.headers.get("content-type") == whole.headers.get("content-type"), path
        assert client.head("/").status_code == 200
        assert client.head("/dashboard/events").headers["content-type"].startswith("text/event")
