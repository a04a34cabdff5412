"""The measuring connection: whole answers found wherever the bytes are cut, and nothing else."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.bench.load.answer_reader import read_answer
from millrace.bench.load.timed_connection import RawResponse, TimedConnection, connect
from millrace.common.http_client import parse_url
from tests.support.mock_replica import MockReplica, ScriptedServer
from tests.support.running import run

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def stream(
    texts: Sequence[str],
    newline: bytes = b"\n",
    end: bytes = b"0\r\n\r\n",
    interim: bytes = b"",
    extension: bytes = b"",
) -> bytes:
    events = [b'{"choices":[{"text":"%b"}]}' % text.encode() for text in texts]
    events += [b'{"choices":[{"text":"","finish_reason":"stop"}]}', b"[DONE]"]
    body = b"".join(chunk(b"data: " + event + newline * 2, extension) for event in events)
    return interim + HEAD + body + end


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
ENDS = [
    b"0\r\n\r\n",
    b"0;x=1\r\n\r\n",
    b"000\r\n\r\n",
    b"0\r\nX-Checksum: abc\r\n\r\n",
    b"0;x\r\nA: b\r\nC: 0\r\n\r\n",
]


class Transport(asyncio.Transport):
    """Takes writes and says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return "anything" if name == "ssl_object" else default


def received(pieces: Sequence[bytes]) -> tuple[RawResponse | None, bool]:
    """What the connection makes of these pieces, and whether it can be used again."""

    async def scenario() -> tuple[RawResponse | None, bool]:
        connection, transport = TimedConnection(), Transport()
        connection.connection_made(transport)
        future = connection.send(b"GET")
        for piece in pieces:
            connection.data_received(piece)
        return (future.result() if future.done() else None), connection.open

    return run(scenario())


def cut(whole: bytes, at: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(whole), *(min(n, len(whole)) for n in at)})
    return [whole[a:b] for a, b in pairwise(edges)]


@settings(max_examples=60)
@given(
    texts=st.lists(st.sampled_from(["a", "0", "[DONE]", "x" * 40]), min_size=1, max_size=6),
    at=st.lists(st.integers(0, 900), max_size=12),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    end=st.sampled_from(ENDS),
    interim=st.sampled_from([b"", EARLY_HINTS, EARLY_HINTS * 2]),
    extension=st.sampled_from([b"", b";a", b';a="0\\r"']),
)
def test_an_answer_is_complete_exactly_when_its_last_byte_has_arrived(
    texts: list[str], at: list[int], newline: bytes, end: bytes, interim: bytes, extension: bytes
) -> None:
    whole = stream(texts, newline, end, interim, extension)
    raw, usable = received(cut(whole, at))
    assert raw is not None
    assert usable
    answer = read_answer(raw.response())
    assert answer.error is None
    assert answer.text == "".join(texts)
    missing, _ = received(cut(whole[:-1], at))
    assert missing is None


def test_a_chunk_that_looks_like_the_last_one_ends_nothing() -> None:
    """A piece of text, torn just behind bytes that would end a body."""
    trap = HEAD + chunk(b'data: {"choices":[{"text":"0\r\n\r\n')
    raw, _ = received([trap[: trap.index(b"0\r\n\r\n") + 5]])
    assert raw is None


def test_an_answer_with_a_length_and_one_that_is_not_http() -> None:
    raw, usable = received([b"HTTP/1.1 500 X\r\nContent-Length: 4\r\n\r\nno", b"pe"])
    assert raw is not None
    assert usable
    assert (raw.response().status, raw.response().body) == (500, b"nope")
    raw, usable = received([b"what is this\r\n\r\n"])
    assert raw is not None
    assert not usable
    assert "not HTTP/1.1" in (raw.response().error or "")


def test_a_body_whose_framing_breaks_is_an_error_and_its_connection_is_not_used_again() -> None:
    raw, usable = received([HEAD + chunk(b"data: a\n\n"), b"no size\r\n\r\n"])
    assert raw is not None
    assert not usable
    assert "not HTTP/1.1" in (raw.response().error or "")


@pytest.mark.parametrize("apart", [True, False])
def test_an_unrequested_second_response_changes_nothing(apart: bool) -> None:
    """As of a server that times out an idle connection with a 408."""
    first, second = stream(["a"]), b"HTTP/1.1 408 X\r\nContent-Length: 4\r\n\r\nlate"
    raw, usable = received([first, second] if apart else [first[:90], first[90:] + second])
    if raw is None:  # its end is known when the next bytes come
        raw, usable = received([first[:90], first[90:] + second, b"\r\n\r\n"])
    assert raw is not None
    assert not usable
    assert (raw.response().status, read_answer(raw.response()).error) == (200, None)


def test_unrequested_bytes_close_the_connection() -> None:
    raw, usable = received([stream(["a"]), b"more"])
    assert raw is not None
    assert raw.response().error is None
    assert not usable


def test_a_coding_that_is_not_chunked_ends_with_its_connection() -> None:
    async def scenario() -> str | None:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n"
        server = await ScriptedServer([head + b"all of it"], close=True).start()
        connection = await connect(parse_url(server.url))
        response = (await connection.send(b"GET / HTTP/1.1\r\n\r\n")).response()
        connection.close()
        await server.stop()
        return response.error

    assert run(scenario()) is None


def test_a_body_that_ends_with_its_connection() -> None:
    async def scenario() -> tuple[str | None, bytes]:
        server = await ScriptedServer([b"HTTP/1.1 200 OK\r\n\r\nall of it"], close=True).start()
        connection = await connect(parse_url(server.url))
        response = (await connection.send(b"GET / HTTP/1.1\r\n\r\n")).response()
        connection.close()
        await server.stop()
        return response.error, response.body

    assert run(scenario()) == (None, b"all of it")


def test_a_large_request_arrives_completely() -> None:
    """More than the socket takes at once: the rest goes through the transport."""

    async def scenario() -> int:
        replica = await MockReplica().start()
        connection = await connect(parse_url(replica.url))
        body = b'{"prompt": "%b", "max_tokens": 1}' % (b"x " * 4_000_000)
        head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        response = (await connection.send(head + body)).response()
        assert read_answer(response).error is None
        connection.close()
        await replica.stop()
        return len(replica.bodies[0]["prompt"])

    assert run(scenario()) == 8_000_000


def test_an_unreferenced_answer_is_freed_without_garbage_collection() -> None:
    """Nobody collects garbage while a run measures."""
    freed: list[int] = []

    class Noted(RawResponse):
        def __del__(self) -> None:
            freed.append(len(self.pieces))

    gc.collect()
    gc.disable()
    try:
        raw = Noted()
        raw.pieces.append((1, stream(["a", "b"])))
        assert raw.response().error is None
        del raw
        assert freed == [1]
    finally:
        gc.enable()
