"""Answers that a client gets although it is still sending, and connections that nobody ends."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_server import LiveServer, fake_server

BODY_BYTES = 1 << 20
PART = b"x" * (1 << 16)


@pytest.fixture(scope="module")
def server(text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("connection") / "log"
    with fake_server(text_model, log, max_body_bytes=BODY_BYTES) as running:
        yield running


def connect(server: LiveServer) -> contextlib.closing[socket.socket]:
    port = int(server.url.rpartition(":")[2])
    return contextlib.closing(socket.create_connection(("127.0.0.1", port), timeout=30))


def head(path: str, *lines: str) -> bytes:
    fixed = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def received(connection: socket.socket) -> bytes:
    """All that comes until the server ends its side."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    return data


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_first_and_reads_then_gets_its_413(
    server: LiveServer, chunked: bool
) -> None:
    count = 40 * BODY_BYTES // len(PART)
    with connect(server) as connection:
        if chunked:
            connection.sendall(head("/v1/completions", "Transfer-Encoding: chunked"))
        else:
            size = count * len(PART)
            connection.sendall(head("/v1/completions", f"Content-Length: {size}"))
        for _ in range(count):
            connection.sendall(b"%x\r\n%b\r\n" % (len(PART), PART) if chunked else PART)
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"--max-body-bytes" in answer
    assert b"connection: close" in answer.lower()


def test_headers_that_are_too_large_get_431_though_more_of_them_comes(server: LiveServer) -> None:
    with connect(server) as connection:
        connection.sendall(head("/v1/completions")[:-2])
        for at in range(200):
            connection.sendall(f"X-{at}: {'y' * 2000}\r\n".encode())
        assert received(connection).startswith(b"HTTP/1.1 431 ")


def test_a_malformed_chunk_gets_an_answer(server: LiveServer) -> None:
    with connect(server) as connection:
        connection.sendall(head("/v1/completions", "Transfer-Encoding: chunked") + b"zz\r\n")
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_body_that_comes_soon_after_its_answer_leaves_the_connection_usable(
    server: LiveServer,
) -> None:
    with connect(server) as connection:
        connection.sendall(head("/nowhere", "Content-Length: 5"))
        answer = b""
        while b'"not_found"' not in answer:
            answer += connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 404 ")
        connection.sendall(b"hello" + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_a_body_that_drips_after_its_answer_ends(text_model: Path, tmp_path: Path) -> None:
    constants = {"millrace.server.http.connection:UNWANTED_BODY_SECONDS": 1.0}
    with (
        fake_server(text_model, tmp_path / "log", constants=constants) as server,
        connect(server) as connection,
    ):
        connection.sendall(head("/nowhere", "Content-Length: 100000"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 404 ")
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 60:
                connection.sendall(b"x")
                time.sleep(0.2)
        assert time.monotonic() - started < 30


def test_many_pipelined_requests_are_all_answered(server: LiveServer) -> None:
    with connect(server) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert received(connection).count(b"HTTP/1.1 200 ") == 101


def test_no_interim_answer_stands_within_a_stream(server: LiveServer) -> None:
    body = json.dumps({"prompt": "hello", "max_tokens": 30, "stream": True}).encode()
    expecting = ("Expect: 100-continue", f"Content-Length: {len(body)}")
    with connect(server) as connection:
        connection.sendall(head("/v1/completions", f"Content-Length: {len(body)}") + body)
        connection.sendall(head("/v1/completions", "Connection: close", *expecting) + body)
        answer = received(connection)
    first, interim, second = answer.partition(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert interim
    assert first.count(b"[DONE]") == second.count(b"[DONE]") == 1


def test_a_path_is_logged_up_to_a_length(server: LiveServer) -> None:
    with connect(server) as connection:
        path = "/" + "a" * 60_000
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert len(answer) < 1000
    assert "(60001 characters)" in server.log
    assert max(map(len, server.log.splitlines())) < 1000


@pytest.mark.parametrize("split", [False, True])
def test_an_offer_of_another_protocol_is_ignored(server: LiveServer, split: bool) -> None:
    """Java's client offers HTTP/2 with each request; the body is no request of its own."""
    body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
    lines = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA")
    length = f"Content-Length: {len(body)}"
    last = head("/v1/completions", "Connection: close", length) + body
    with connect(server) as connection:
        connection.sendall(head("/v1/completions", *lines, length))
        if split:
            time.sleep(0.2)
        connection.sendall(body + last)
        answer = received(connection)
    assert answer.count(b"HTTP/1.1 200 ") == 2
    assert answer.count(b"HTTP/1.1 ") == 2
