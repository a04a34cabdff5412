"""Replies before a request is complete: they arrive, and the rest of the request costs little."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from millrace.common.http_client import fetch
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.relay.access import Access
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

POST = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
BODY = b'{"model": "mock", "prompt": [1], "max_tokens": 2, "stream": true}'


async def read_reply(reader: asyncio.StreamReader) -> bytes:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head + await asyncio.wait_for(reader.readexactly(length), 3)


async def drip(writer: asyncio.StreamWriter) -> None:
    for _ in range(200):
        writer.write(b"drip")
        await writer.drain()
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(expect: bytes) -> None:
    async def scenario() -> None:
        limits = GatewayLimits(max_body_bytes=1000)
        async with gateway(replicas=[], limits=limits) as (_, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            writer.write(POST + expect + b"Content-Length: 1001\r\n\r\n")
            reply = await read_reply(reader)
            assert reply.startswith(b"HTTP/1.1 413 ")
            assert b"100 Continue" not in reply
            writer.close()

    run(scenario())


def test_a_client_that_sends_on_gets_its_reply_and_is_not_kept() -> None:
    """A close with unread bytes would have the reply discarded on its way."""

    async def scenario() -> None:
        limits = GatewayLimits(max_body_bytes=1000)
        async with gateway(replicas=[], limits=limits) as (made, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n")
            for _ in range(200):
                writer.write(b"7d0\r\n" + b"x" * 2000 + b"\r\n")
                await asyncio.sleep(0.002)
            assert (await read_reply(reader)).startswith(b"HTTP/1.1 413 ")
            assert await reader.read() == b""  # nothing more will come
            began = time.monotonic()
            with pytest.raises(ConnectionError):
                await drip(writer)
            assert time.monotonic() - began < 10
            assert made.relay.bodies.held == 0
            await eventually(lambda: made.counters.gauge("clients") == 0)

    run(scenario())


def test_a_large_body_without_a_key_is_not_read() -> None:
    async def scenario() -> None:
        async with gateway(replicas=[], access=Access(api_key=["k"])) as (_, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            writer.write(POST + b"Content-Length: 1000000\r\n\r\n")
            assert (await read_reply(reader)).startswith(b"HTTP/1.1 401 ")
            writer.close()

    run(scenario())


@pytest.mark.parametrize(
    "body", [b"zz\r\n", b"3\r\nabcXX\r\n", b"-1\r\n", b"f" * 17 + b"\r\n", b"3\r\nabc\r\n\r\n"]
)
def test_malformed_chunks_get_400(body: bytes) -> None:
    async def scenario() -> None:
        async with gateway(replicas=[]) as (_, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            writer.write(POST + b"Transfer-Encoding: chunked\r\n\r\n" + body)
            assert (await read_reply(reader)).startswith(b"HTTP/1.1 400 ")
            writer.close()

    run(scenario())


def test_of_many_pipelined_requests_the_first_are_answered_and_the_rest_refused() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.05).start()
        async with gateway(replica.url) as (_, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            one = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
            writer.write(one * 40)
            answer = await asyncio.wait_for(reader.read(-1), 10)
            assert answer.count(b"HTTP/1.1 200 ") == answer.count(b"[DONE]") == 17
            assert answer.index(b"HTTP/1.1 429 ") > answer.rindex(b"[DONE]")
            writer.close()
        await replica.stop()

    run(scenario())


def test_100_continue_waits_for_the_response_before_it() -> None:
    async def scenario() -> None:
        replica = await MockReplica(gap_s=0.05).start()
        async with gateway(replica.url) as (_, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            body = BODY.replace(b"2", b"8")
            writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            writer.write(POST + b"Expect: 100-continue\r\nContent-Length: 66\r\n\r\n")
            seen = await asyncio.wait_for(reader.readuntil(b"100 Continue\r\n\r\n"), 5)
            assert seen.count(b"[DONE]") == 1
            assert seen.endswith(b"0\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
            writer.write(BODY + b" " * (66 - len(BODY)))
            again = await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)
            assert again.startswith(b"HTTP/1.1 200 ")
            writer.close()
        await replica.stop()

    run(scenario())


def test_what_a_client_chose_is_short_in_replies_and_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, access_log=str(log)) as (_, target):
            long = "m" * 1_000_000
            body = json.dumps({"model": long, "prompt": "x"}).encode()
            answer = await fetch(target, "/v1/completions", method="POST", body=body)
            assert (answer.status, len(answer.body) < 3000) == (404, True)
            answer = await fetch(target, "/gateway/" + "p" * 60_000)
            assert (answer.status, len(answer.body) < 3000) == (404, True)
            answer = await fetch(target, "/" + "p" * 60_000)
        await replica.stop()

    run(scenario())
    assert all(len(line) < 3000 for line in log.read_text().splitlines())


@pytest.mark.parametrize("split", [False, True])
def test_an_offer_of_another_protocol_is_ignored(split: bool) -> None:
    """The body is no request of its own, which a proxy in front would not have seen."""

    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url) as (made, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
            length = b"Content-Length: %d\r\n\r\n" % len(BODY)
            writer.write(POST + offer + length)
            if split:
                await asyncio.sleep(0.2)
            writer.write(BODY + POST + b"Connection: close\r\n" + length + BODY)
            answers = await asyncio.wait_for(reader.read(), 5)
            assert answers.count(b"HTTP/1.1 200 ") == answers.count(b"HTTP/1.1 ") == 2
            assert replica.bodies == [json.loads(BODY)] * 2
            assert not {"upgrade", "http2-settings"} & set(replica.headers[0])
            await eventually(lambda: made.relay.in_flight == 0)
        await replica.stop()

    run(scenario())
