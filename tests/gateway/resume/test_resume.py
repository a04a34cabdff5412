"""No request lost: streams whose replica fails go on elsewhere, token by token."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.common.http_client import Response, Target, connect, encode_request, fetch
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.health.health_monitor import HealthPolicy
from millrace.gateway.resume.journal import Journal, parse_progress
from tests.support.gateways import gateway, streamed
from tests.support.mock_replica import MockReplica, ScriptedServer, next_token, word
from tests.support.running import eventually, run

MOCK = Path(__file__).parents[2] / "support" / "mock_replica.py"
QUIET = HealthPolicy(health_check_interval=60, slow_start=0.0)
PROMPT = [1, 2, 3]


def expected(count: int, prompt: list[int] = PROMPT) -> list[int]:
    return [next_token(prompt, at) for at in range(count)]


async def info(target: Target, count: int = 12, chat: bool = False, **more: Any) -> Response:
    body: dict[str, Any] = {"model": "mock", "max_tokens": count, "stream": True, **more}
    if chat:
        body["messages"] = [{"role": "user", "content": "a bc def"}]
    else:
        body.setdefault("prompt", PROMPT)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return await fetch(target, path, method="POST", body=json.dumps(body).encode(), timeout=30)


def events(answer: Response) -> list[dict[str, Any]]:
    lines = [line for line in answer.body.split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]


def text(answer: Response) -> str:
    choices = [c for e in events(answer) for c in e["choices"]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)


def words(count: int) -> str:
    return "".join(map(word, expected(count)))


# --- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("first", "second"), [("millrace", "millrace"), ("vllm", "vllm")])
def test_a_broken_stream_is_resumed_on_another_replica(first: str, second: str, chat: bool) -> None:
    async def scenario() -> None:
        bad = await MockReplica(kind=first, cut_after=5, name="bad").start()
        good = await MockReplica(kind=second, name="good").start()
        async with gateway(bad.url, good.url, health=QUIET, policy="round_robin") as (made, to):
            answer = await info(to, chat=chat, stream_options={"include_usage": True})
            assert text(answer) == words(12)
            said = events(answer)
            assert {e["id"] for e in said} == {said[0]["id"]}
            assert {e["object"] for e in said} == {said[0]["object"]}
            usage = {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}
            assert said[-1]["usage"] == usage
            assert [c["finish_reason"] for e in said for c in e["choices"]][-1] == "length"
            assert b"token_ids" not in answer.body
            roles = [c["delta"] for e in said for c in e["choices"] if "role" in c.get("delta", {})]
            assert len(roles) == int(chat)
            assert made.counters.events()["resumed"] == 1
            assert made.counters.gauge("kept_bytes") == 0
        await bad.stop()
        await good.stop()

    run(scenario())


def test_a_stream_outlives_one_replica_after_another() -> None:
    async def scenario() -> None:
        some = [
            await MockReplica(kind="millrace", cut_after=4, name=str(i)).start() for i in range(3)
        ]
        last = await MockReplica(kind="millrace", name="last").start()
        urls = [r.url for r in (*some, last)]
        async with gateway(*urls, health=QUIET, policy="round_robin") as (made, target):
            answer = await info(target, count=30, return_token_ids=True)
            ids = [t for e in events(answer) for c in e["choices"] for t in c["token_ids"]]
            assert ids == expected(30)
            assert text(answer) == words(30)
            assert made.counters.events()["resumed"] == 3
        for replica in (*some, last):
            await replica.stop()

    run(scenario())


def test_an_engine_that_dies_behind_its_server_is_as_good_as_a_broken_connection() -> None:
    async def scenario() -> None:
        bad = await MockReplica(kind="millrace", behaviour="engine_died", name="bad").start()
        good = await MockReplica(kind="millrace", name="good").start()
        async with gateway(bad.url, good.url, health=QUIET, policy="round_robin") as (_, target):
            answer = await info(target)
            assert text(answer) == words(12)
            assert b"error" not in answer.body
        await bad.stop()
        await good.stop()

    run(scenario())


def test_a_stream_that_lacks_only_its_end_gets_it_from_the_gateway() -> None:
    async def scenario() -> None:
        # All tokens came, the counts and [DONE] did not.
        stream = await _recorded(12, stream_options={"include_usage": True})
        cut = stream[: stream.index(b'"finish_reason":"length"')]
        end = stream.index(b"\n\n\r\n", len(cut)) + 4
        bad = await ScriptedServer(
            [stream[:end]], close=True, card={"id": "mock", "owned_by": "millrace"}
        ).start()
        async with gateway(bad.url, health=QUIET) as (made, target):
            answer = await info(target, stream_options={"include_usage": True})
            assert text(answer) == words(12)
            assert events(answer)[-1]["usage"]["completion_tokens"] == 12
            assert made.counters.events()["cut_off"] == 0
        await bad.stop()

    run(scenario())


def test_a_stream_waits_for_a_replica_that_comes_back() -> None:
    async def scenario() -> None:
        only = await MockReplica(kind="millrace", cut_after=5).start()
        health = HealthPolicy(health_check_interval=0.05, backoff=0.1, slow_start=0.0)
        async with gateway(only.url, health=health) as (made, target):
            waiting = asyncio.create_task(info(target))
            await eventually(lambda: made.counters.events()["resumed"] == 1)
            only.cut_after = None
            assert text(await waiting) == words(12)
        await only.stop()

    run(scenario())


def test_a_replica_that_stops_answering_checks_loses_its_streams_to_others() -> None:
    """SIGSTOP: connections stay open and nothing comes."""

    async def scenario() -> None:
        process = subprocess.Popen(
            [sys.executable, str(MOCK), "--kind", "millrace", "--gap", "0.05"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rsplit(" ", 1)[1])
            good = await MockReplica(kind="millrace", name="good").start()
            health = HealthPolicy(
                health_check_interval=0.1, health_check_timeout=0.3, slow_start=0.0
            )
            async with gateway(
                f"127.0.0.1:{port}", good.url, health=health, policy="round_robin"
            ) as (made, target):
                waiting = asyncio.create_task(info(target, count=200))
                await eventually(lambda: streamed(made) > 3)
                os.kill(process.pid, signal.SIGSTOP)
                assert text(await waiting) == words(200)
                assert "health checks in a row" in made.monitor.members[0].reason
            await good.stop()
        finally:
            process.kill()
            process.wait()

    run(scenario())


# --- what cannot be guaranteed is said ---------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "limits"),
    [
        ({"n": 2}, GatewayLimits()),
        ({"echo": True}, GatewayLimits()),
        ({}, GatewayLimits(max_kept_bytes=0)),
    ],
)
def test_what_cannot_go_on_is_cut_off_and_counted(
    more: dict[str, Any], limits: GatewayLimits
) -> None:
    async def scenario() -> None:
        bad = await MockReplica(kind="millrace", cut_after=200, name="bad").start()
        good = await MockReplica(kind="millrace", name="good").start()
        async with gateway(
            bad.url, good.url, health=QUIET, policy="round_robin", limits=limits
        ) as (made, target):
            with pytest.raises(ConnectionError, match="before the response was complete"):
                await info(target, count=400, **more)
            counts = made.counters.events()
            assert (counts["cut_off"], counts["unprotected"], counts["resumed"]) == (1, 1, 0)
        await bad.stop()
        await good.stop()

    run(scenario())


# --- bytes -------------------------------------------------------------------------------------


async def _recorded(count: int, **more: Any) -> bytes:
    """What a replica sends, on the wire, for a request that asks for token ids."""
    replica = await MockReplica(kind="millrace").start()
    body = {"prompt": PROMPT, "max_tokens": count, "stream": True, "return_token_ids": True, **more}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", replica.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    raw = await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    await replica.stop()
    return raw


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


RECORDED = run(_recorded(20))
HEAD, _, BODY = RECORDED.partition(b"\r\n\r\n")
CARD = {"id": "mock", "owned_by": "millrace"}
CHUNK_ENDS = [found.end() for found in re.finditer(rb"\n\n\r\n", RECORDED)]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(cuts=st.lists(st.integers(0, 9999), max_size=12), events=st.booleans())
def test_a_protected_stream_passes_byte_for_byte(cuts: list[int], events: bool) -> None:
    """A client that asked for token ids gets the replica's bytes, wherever TCP cuts them; also
    where most pieces are one event."""
    pieces = split(RECORDED, cuts + CHUNK_ENDS * events)

    async def scenario() -> None:
        server = await ScriptedServer(pieces, pause_s=0.0005, card=CARD).start()
        async with gateway(server.url, health=QUIET) as (_, target):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            data = b'{"prompt": [1], "stream": true, "return_token_ids": true}'
            writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 57\r\n\r\n" + data)
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(BODY)) == BODY
            writer.close()
        await server.stop()

    run(scenario())


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.lists(st.integers(0, 9999), max_size=8),
    cut=st.integers(0, 9999),
    events=st.booleans(),
)
def test_wherever_a_stream_breaks_the_client_has_all_tokens_once(
    cuts: list[int], cut: int, events: bool
) -> None:
    """The connection breaks at any byte, the pieces before it come in any sizes."""
    broken = RECORDED[: len(HEAD) + 4 + cut % len(BODY)]
    edges = cuts + [end for end in CHUNK_ENDS if end < len(broken)] * events
    pieces = split(broken, edges)

    async def scenario() -> None:
        bad = await ScriptedServer(pieces, pause_s=0.0005, close=True, card=CARD).start()
        good = await MockReplica(kind="millrace").start()
        async with gateway(bad.url, good.url, health=QUIET, policy="round_robin") as (_, target):
            answer = await info(target, count=20)
            assert text(answer) == words(20)
            assert b"token_ids" not in answer.body
        await bad.stop()
        await good.stop()

    run(scenario())


@given(cuts=st.lists(st.integers(0, 9999), max_size=20))
def test_a_journal_passes_on_complete_events(cuts: list[int]) -> None:
    journal, passed = Journal(strip=False), b""
    for piece in split(BODY, cuts):
        passed += journal.feed(piece)
        assert passed == b"" or passed.endswith(b"\n\n\r\n")
        assert journal.raw == passed
    progress = parse_progress(journal.raw)
    assert progress is not None
    assert progress.token_ids == expected(20)
    assert progress.prompt_token_ids == PROMPT
    assert progress.finished


def framed(text: bytes, size: int) -> list[bytes]:
    return [
        b"%x\r\n%b\r\n" % (len(piece), piece)
        for piece in (text[at : at + size] for at in range(0, len(text), size))
    ]


EVENTS = [f'data: {{"choices":[{{"text":"t{i}","token_ids":[{i}]}}]}}'.encode() for i in range(9)]


@pytest.mark.parametrize(
    "pieces",
    [
        framed(b"".join(e + b"\r\n\r\n" for e in EVENTS), 40),  # CRLF, chunks cut in mid-event
        [p for e in EVENTS for p in framed(e + b"\r\n\r\n", 999)],  # CRLF
        [p for e in EVENTS for p in framed(e + b"\r\r", 999)],  # CR
        framed(b"".join(e + b"\n\n" for e in EVENTS), 7),  # chunks cut in mid-event
        [b"fffff\r\n", *(e + b"\n\n" for e in EVENTS)],  # one chunk that comes slowly
        [b"1;x=y\r\n:\r\n", *(p for e in EVENTS for p in framed(e + b"\n\n", 999))],
        framed(bytes(range(256)), 60),  # not events at all
    ],
)
def test_no_framing_is_held_back(pieces: list[bytes]) -> None:
    """The first piece passes at once, and nothing waits for what is not on its way."""
    journal, passed = Journal(strip=True), b""
    for number, piece in enumerate(pieces, 1):
        passed += journal.feed(piece)
        assert len(b"".join(pieces[:number])) - len(passed) <= len(b"fffff\r\n") + len(EVENTS[0])
    assert journal.unsupported_framing


@pytest.mark.parametrize("framing", ["crlf", "mid-event", "gzip", "slow chunk"])
def test_a_stream_in_any_framing_arrives_as_it_is_sent(framing: str) -> None:
    async def scenario() -> None:
        events = [f'data: {{"choices":[{{"text":"t{i}"}}]}}\n\n'.encode() for i in range(8)]
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        pieces = [p for event in events for p in framed(event, 999)]
        if framing == "crlf":
            pieces = [p for e in events for p in framed(e.replace(b"\n", b"\r\n"), 999)]
        elif framing == "mid-event":
            pieces = framed(b"".join(events), 25)
        elif framing == "gzip":
            head += b"Content-Encoding: gzip\r\n"
            packer = zlib.compressobj(wbits=31)
            packed = [packer.compress(e) + packer.flush(zlib.Z_SYNC_FLUSH) for e in events]
            pieces = [p for piece in packed for p in framed(piece, 999)]
        else:
            text = b"".join(events)
            pieces = [b"%x\r\n" % len(text), *(text[i : i + 20] for i in range(0, len(text), 20))]
            pieces.append(b"\r\n")
        head += b"Transfer-Encoding: chunked\r\n\r\n"
        replica = await ScriptedServer(
            [head, *pieces, b"0\r\n\r\n"], pause_s=0.2, card={"id": "m", "owned_by": "vllm"}
        ).start()
        async with gateway(replica.url, health=QUIET) as (made, target):
            connection = await connect(target)
            body = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()
            sent = encode_request(target, "POST", "/v1/completions", body)
            response = await connection.send(sent)
            connection.close()
            assert response.error is None
            times = [moment for moment, _ in response.pieces]
            assert len(times) >= 6
            assert times[-1] - times[0] > 0.2e9 * (len(times) - 2) * 0.8
            assert made.relay.in_flight == 0
            assert made.counters.gauge("kept_bytes") == 0
        await replica.stop()

    run(scenario())


def test_text_that_looks_like_token_ids_stays() -> None:
    said = b'data: {"text":"a,\\"token_ids\\":[1]","token_ids":[7, 8]}\n\n'
    chunk = b"%x\r\n%b\r\n" % (len(said), said)
    left = b'data: {"text":"a,\\"token_ids\\":[1]"}\n\n'
    assert Journal(strip=True).feed(chunk) == b"%x\r\n%b\r\n" % (len(left), left)


def test_every_event_of_a_chunk_loses_its_token_ids() -> None:
    with_ids = b'data: {"choices":[{"text":"a","token_ids":[1, 22]}]}\n\n' * 3
    without = b'data: {"choices":[{"text":"a"}]}\n\n' * 3
    passed = Journal(strip=True).feed(b"%x\r\n%b\r\n" % (len(with_ids), with_ids))
    assert passed == b"%x\r\n%b\r\n" % (len(without), without)
