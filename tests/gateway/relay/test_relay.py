"""The relay against replicas that behave, misbehave and die."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import signal
import subprocess
import sys
import time
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.common.http_client import Target, connect, encode_request, fetch
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.common.shared_counters import FAILURES, IN_FLIGHT
from millrace.gateway.health.health_monitor import HealthPolicy
from millrace.gateway.relay.access import Access
from tests.support.gateways import gateway, streamed
from tests.support.mock_replica import MockReplica, ScriptedServer
from tests.support.running import eventually, run

MOCK = Path(__file__).parents[2] / "support" / "mock_replica.py"


def completion(tokens: int = 4, **body: Any) -> bytes:
    return json.dumps({"model": "mock", "prompt": [1, 2], "max_tokens": tokens, **body}).encode()


async def post(target: Target, body: bytes = b"", path: str = "/v1/completions") -> Any:
    return await fetch(target, path, method="POST", body=body or completion(), timeout=30)


async def raw(target: Target, sent: bytes, count: int | None = None) -> bytes:
    """What comes back for raw bytes, until the connection closes or `count` bytes are there."""
    reader, writer = await asyncio.open_connection(target.host, target.port)
    writer.write(sent)
    try:
        if count is None:
            return await asyncio.wait_for(reader.read(-1), 10)
        return await asyncio.wait_for(reader.readexactly(count), 10)
    finally:
        writer.close()


# --- bytes -------------------------------------------------------------------------------------


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def chunked(body: bytes, sizes: list[int]) -> bytes:
    framed = b""
    for piece in split(body, sizes):
        framed += f"{len(piece):X}\r\n".encode() + piece + b"\r\n"
    return framed + b"0\r\n\r\n"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.binary(max_size=3000),
    framing=st.sampled_from(["chunked", "length", "close"]),
    chunks=st.lists(st.integers(0, 5000), max_size=8),
    cuts=st.lists(st.integers(0, 5000), max_size=8),
    interim=st.booleans(),
)
def test_a_response_passes_byte_for_byte(
    body: bytes, framing: str, chunks: list[int], cuts: list[int], interim: bool
) -> None:
    """Whatever the framing, and wherever TCP happens to cut, the body's bytes are the same."""
    tail = {"chunked": chunked(body, chunks), "length": body, "close": body}[framing]
    field = {
        "chunked": b"Transfer-Encoding: chunked\r\n",
        "length": f"Content-Length: {len(body)}\r\n".encode(),
        "close": b"",
    }[framing]
    head = b"HTTP/1.1 200 Fine\r\nX-Odd-Case: Yes\r\n" + field + b"Keep-Alive: timeout=9\r\n\r\n"
    early = b"HTTP/1.1 100 Continue\r\n\r\n" if interim else b""

    async def scenario() -> None:
        server = ScriptedServer(
            split(early + head + tail, cuts), close=framing == "close", pause_s=0.0005
        )
        await server.start()
        async with gateway(server.url) as (made, target):
            info = encode_request(target, "POST", "/x", b"{}", (("Connection", "close"),))
            answer = await raw(target, info)
            got_head, _, got_tail = answer.partition(b"\r\n\r\n")
            assert got_tail == tail
            assert got_head.startswith(b"HTTP/1.1 200 Fine\r\nX-Odd-Case: Yes\r\n")
            assert b"Keep-Alive" not in got_head
            await eventually(lambda: made.relay.in_flight == 0)
            assert made.counters.events()["cut_off"] == 0
        await server.stop()

    run(scenario())


def test_a_request_arrives_without_the_clients_connection_headers() -> None:
    async def scenario() -> None:
        server = await ScriptedServer([b"HTTP/1.1 204 Gone\r\n\r\n"]).start()
        async with gateway(server.url) as (_, target):
            sent = (
                b"POST /v1/x?q=1 HTTP/1.1\r\nHost: me\r\nAuthorization: Bearer k\r\n"
                b"Connection: close, X-Mine\r\nX-Mine: no\r\nTE: trailers\r\n"
                b"X-Request-ID: seven\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
            )
            assert (await raw(target, sent)).startswith(b"HTTP/1.1 204 Gone")
        host = server.url.removeprefix("http://").encode()
        assert server.requests == [
            b"POST /v1/x?q=1 HTTP/1.1\r\nHost: " + host + b"\r\nAuthorization: Bearer k\r\n"
            b"X-Request-Id: seven\r\nContent-Length: 5\r\n\r\nabcde"
        ]
        await server.stop()

    run(scenario())


@pytest.mark.parametrize("worker_api_key", [None, "inner"])
def test_no_replica_sees_a_clients_key(worker_api_key: str | None) -> None:
    async def scenario() -> None:
        server = await ScriptedServer([b"HTTP/1.1 204 Gone\r\n\r\n"]).start()
        access = Access(api_key=["secret"], worker_api_key=worker_api_key)
        async with gateway(server.url, access=access) as (_, target):
            sent = (
                b"POST /v1/x?a=1&key=s%65cret&b=2 HTTP/1.1\r\nHost: gw.example\r\n"
                b"Authorization: Bearer secret\r\nX-API-Key: secret\r\nApi-Key: other\r\n"
                b"Proxy-Authorization: Basic x\r\nX-Odd: my secret here\r\nCookie: t=secret\r\n"
                b"X-Millrace-Probe: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            )
            assert (await raw(target, sent)).startswith(b"HTTP/1.1 204 Gone")
        (seen,) = server.requests
        host = server.url.removeprefix("http://").encode()
        inner = b"Authorization: Bearer inner\r\n" if worker_api_key else b""
        head = b"POST /v1/x?a=1&b=2 HTTP/1.1\r\nHost: " + host + b"\r\n" + inner
        assert seen.startswith(head + b"X-Request-Id: ")
        assert seen.endswith(b"\r\nContent-Length: 0\r\n\r\n")
        assert seen.count(b"\r\n") == 5 + bool(worker_api_key)
        await server.stop()

    run(scenario())


def test_connections_are_kept_alive_on_both_sides() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, health=HealthPolicy(health_check_interval=60)) as (
            _,
            target,
        ):
            before = replica.connections
            connection = await connect(target)
            for _ in range(20):
                response = await connection.send(
                    encode_request(target, "POST", "/v1/completions", completion())
                )
                assert (response.status, response.error) == (200, None)
            assert connection.open
            connection.close()
            assert replica.connections == before + 1
        await replica.stop()

    run(scenario())


def test_pipelined_requests_are_answered_in_order() -> None:
    async def scenario() -> None:
        slow = await MockReplica(first_s=0.1, name="slow").start()
        async with gateway(slow.url) as (_, target):
            one = encode_request(target, "POST", "/v1/completions", completion(2))
            two = encode_request(target, "GET", "/health")
            last = encode_request(target, "GET", "/none", headers=(("Connection", "close"),))
            answer = await raw(target, one + two + last)
            assert answer.index(b"[DONE]") < answer.index(b'"total":1') < answer.index(b"no /none")
        await slow.stop()

    run(scenario())


def test_an_http_1_0_client_gets_a_body_that_ends_with_the_connection() -> None:
    async def scenario() -> None:
        server = await ScriptedServer(
            [b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n", b"to the end"], close=True
        ).start()
        async with gateway(server.url) as (_, target):
            answer = await raw(target, b"GET /x HTTP/1.0\r\n\r\n")
            assert answer.endswith(b"\r\n\r\nto the end")
            assert server.requests[0].startswith(b"GET /x HTTP/1.0\r\n")
        await server.stop()

    run(scenario())


def test_interim_answers_are_not_taken_for_the_answer() -> None:
    """Before the answer, in one piece with it, and several of them."""

    async def scenario() -> None:
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        stream = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(b"data: x\n\n", [])
        for pieces in (
            [hints, stream],
            [hints + stream],
            [hints * 2, b"HTTP/1.1 102 \r\n\r\n", stream],
        ):
            server = await ScriptedServer(pieces, pause_s=0.02).start()
            async with gateway(server.url) as (_, target):
                answer = await post(target)
                assert (answer.status, answer.body) == (200, b"data: x\n\n")
            await server.stop()

    run(scenario())


def test_the_429_of_a_replica_survives_a_dead_neighbour() -> None:
    async def scenario() -> None:
        body = b'{"error": {"message": "the queue is full"}}'
        answer = b"HTTP/1.1 429 X\r\nRetry-After: 7\r\nContent-Length: %d\r\n\r\n" % len(body)
        full = await ScriptedServer([answer + body]).start()
        dead = await MockReplica().start()
        quiet = HealthPolicy(health_check_interval=60)
        urls = [full.url, dead.url]
        async with gateway(*urls, health=quiet, policy="round_robin") as (made, target):
            await dead.stop()
            for number in range(4):
                refused = await post(target, completion(user=str(number)))
                assert (refused.status, refused.headers["retry-after"]) == (429, "7")
                assert b"the queue is full" in refused.body
            assert made.monitor.members[0].state == "up"
        await full.stop()

    run(scenario())


def test_a_head_request_ends_with_its_head() -> None:
    async def scenario() -> None:
        server = await ScriptedServer([b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"]).start()
        async with gateway(server.url) as (made, target):
            info = b"HEAD /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
            answer = await raw(target, info)
            assert b"\r\nContent-Length: 5\r\n" in answer
            assert answer.endswith(b"\r\nConnection: close\r\n\r\n")
            assert made.counters.events()["cut_off"] == 0
        await server.stop()

    run(scenario())


def test_a_slow_client_slows_the_replica_down_and_loses_nothing() -> None:
    body = random.Random(0).randbytes(30_000_000)

    async def scenario() -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        pieces = [head, *(body[i : i + 100_000] for i in range(0, len(body), 100_000))]
        server = await ScriptedServer(pieces).start()
        async with gateway(server.url) as (made, target):
            reader, writer = await asyncio.open_connection(target.host, target.port, limit=2**16)
            writer.write(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            await asyncio.sleep(0.5)
            held = sum(e.account.bytes for e in made.replicas.all[0].exchanges)
            assert 0 < held < len(body) / 2, "the relay took everything while nobody read"
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(len(body)) == body
            writer.close()
        await server.stop()

    run(scenario())


# --- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["silent", "garbage", "unavailable"])
def test_before_the_first_byte_a_request_is_retried_elsewhere(behaviour: str) -> None:
    async def scenario() -> None:
        bad = await MockReplica(behaviour=behaviour, name="bad").start()
        good = await MockReplica(name="good").start()
        async with gateway(bad.url, good.url, health=HealthPolicy(health_check_interval=60)) as (
            made,
            target,
        ):
            answers = [await post(target, completion(user=str(i))) for i in range(12)]
            assert [a.status for a in answers] == [200] * 12
            assert {a.headers["x-replica"] for a in answers} == {"good"}
            assert made.counters.events()["retries"] >= 5
            assert made.relay.in_flight == 0
            assert [row[IN_FLIGHT] for row in made.counters.replica_sums(2)] == [0, 0]
            ejected = behaviour != "unavailable"
            assert (made.monitor.members[0].state == "up") is not ejected
        await bad.stop()
        await good.stop()

    run(scenario())


def test_a_replica_that_answers_garbage_gives_a_clean_error_when_it_is_the_only_one() -> None:
    async def scenario() -> None:
        bad = await MockReplica(behaviour="garbage").start()
        async with gateway(bad.url, health=HealthPolicy(health_check_interval=60)) as (_, target):
            answer = await post(target)
            error = json.loads(answer.body)["error"]
            assert answer.status == 502
            assert "not HTTP/1.1" in error["message"]
            for number in range(8):  # the only replica is not ejected by requests alone
                again = await post(target, completion(user=str(number)))
                assert again.status == 502
                assert "not HTTP/1.1" in json.loads(again.body)["error"]["message"]
        await bad.stop()

    run(scenario())


def test_a_replica_that_dies_is_found_out_by_the_first_request_and_comes_back() -> None:
    """A check right after the failure decides, long before the next periodic one."""

    async def scenario() -> None:
        replica = await MockReplica().start()
        health = HealthPolicy(health_check_interval=0.3, backoff=0.2, slow_start=0.0)
        async with gateway(replica.url, health=health) as (made, target):
            assert (await post(target)).status == 200
            await replica.stop()
            began = time.monotonic()
            assert (await post(target)).status == 502
            await eventually(lambda: not made.replicas.available())
            assert time.monotonic() - began < 0.25
            back = await MockReplica().start(port=replica.port)
            await eventually(made.replicas.available)
            assert time.monotonic() - began > 0.2
            assert (await post(target)).status == 200
            await eventually(lambda: not made.monitor.members[0].failing)
            await back.stop()

    run(scenario())


def test_a_response_that_breaks_off_is_seen_as_broken() -> None:
    async def scenario() -> None:
        cut = await MockReplica(behaviour="cut").start()
        async with gateway(cut.url) as (made, target):
            with pytest.raises(ConnectionError, match="before the response was complete"):
                await post(target, completion(8))
            assert made.counters.events()["cut_off"] == 1
            assert made.relay.in_flight == 0
        await cut.stop()

    run(scenario())


def test_a_client_that_leaves_takes_its_request_along() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.05, gap_s=0.05).start()
        async with gateway(replica.url, health=HealthPolicy(health_check_interval=60)) as (
            made,
            target,
        ):
            connection = await connect(target)
            waiting = connection.send(
                encode_request(target, "POST", "/v1/completions", completion(1000))
            )
            await eventually(lambda: streamed(made) > 3)
            connection.close()
            assert (await waiting).error is not None
            await eventually(lambda: replica.disconnects == 1)
            assert (made.relay.in_flight, made.counters.events()["disconnects"]) == (0, 1)
            assert made.replicas.available()
        await replica.stop()

    run(scenario())


def test_a_request_leaves_nothing_behind_for_a_garbage_collection() -> None:
    """Walking through what circles leave would hold up every stream of the process."""

    async def scenario() -> None:
        replica = await MockReplica(kind="millrace").start()
        ended = []
        async with gateway(replica.url) as (made, target):
            made.relay.log = lambda exchange, status: ended.append(weakref.ref(exchange))
            for body in (b"", completion(stream=True), b'{"model": "none"}'):
                await post(target, body)
            await eventually(lambda: len(ended) == 3)
            await eventually(lambda: not any(one() for one in ended))
        await replica.stop()

    gc.disable()
    try:
        run(scenario())
    finally:
        gc.enable()


def test_a_stale_idle_connection_costs_no_request_and_no_ejection() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, health=HealthPolicy(health_check_interval=60)) as (
            made,
            target,
        ):
            assert (await post(target)).status == 200
            # The relay's idle connection dies in the very moment in which it is used again.
            (idle,) = made.relay.pool.idle(made.replicas.all[0])
            replica.abort_connections()
            assert idle.open
            assert (await post(target)).status == 200
            assert made.counters.replica_sums(1)[0][FAILURES] == 0
        await replica.stop()

    run(scenario())


def test_kill_9_of_a_replica_loses_no_request_that_has_no_byte_yet() -> None:
    async def scenario() -> None:
        process = subprocess.Popen(
            [sys.executable, str(MOCK), "--first", "30"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().rsplit(" ", 1)[1])
            good = await MockReplica(name="good").start()
            async with gateway(f"127.0.0.1:{port}", good.url) as (made, target):
                waiting = [asyncio.create_task(post(target)) for _ in range(10)]
                await eventually(lambda: made.counters.replica_sums(1)[0][IN_FLIGHT] == 5)
                await asyncio.sleep(0.1)
                process.send_signal(signal.SIGKILL)
                answers = await asyncio.gather(*waiting)
                assert [a.status for a in answers] == [200] * 10
                assert {a.headers["x-replica"] for a in answers} == {"good"}
            await good.stop()
        finally:
            process.kill()
            process.wait()

    run(scenario())


def test_a_replica_that_sends_nothing_gives_504() -> None:
    async def scenario() -> None:
        mute = await MockReplica(behaviour="hang").start()
        async with gateway(mute.url, limits=GatewayLimits(request_timeout=0.3)) as (made, target):
            answer = await post(target)
            assert answer.status == 504
            assert "0.3 s" in json.loads(answer.body)["error"]["message"]
            assert made.relay.in_flight == 0
        await mute.stop()

    run(scenario())


# --- limits and bad input ----------------------------------------------------------------------


def test_no_healthy_replica_gives_503_with_the_reason() -> None:
    async def scenario() -> None:
        warming = await MockReplica(healthy=False).start()
        async with gateway(warming.url, "127.0.0.1:9") as (_, target):
            for path in ("/health", "/v1/completions"):
                answer = await fetch(target, path)
                message = json.loads(answer.body)["error"]["message"]
                assert answer.status == 503
                assert "/health says 503 (warming)" in message
                assert "127.0.0.1:9: health check failed" in message
                assert answer.headers["retry-after"] == "1"
            warming.healthy = True
            await asyncio.sleep(0.2)
            assert (await post(target)).status == 200
        await warming.stop()

    run(scenario())


def test_more_requests_than_may_be_in_flight_get_429() -> None:
    async def scenario() -> None:
        slow = await MockReplica(first_s=0.3).start()
        async with gateway(
            slow.url, limits=GatewayLimits(max_concurrent_requests=2, queue_size=0)
        ) as (_, target):
            answers = await asyncio.gather(*(post(target) for _ in range(5)))
            assert sorted(a.status for a in answers) == [200, 200, 429, 429, 429]
            refused = next(a for a in answers if a.status == 429)
            assert refused.headers["retry-after"] == "1"
            assert json.loads(refused.body)["error"]["type"] == "rate_limit_error"
        await slow.stop()

    run(scenario())


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /x HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 200\r\n\r\n" + b"z" * 200, 413),
        (b"POST /x HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    ],
)
def test_a_malformed_or_oversized_request_is_refused(sent: bytes, status: int) -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, limits=GatewayLimits(max_body_bytes=100)) as (made, target):
            head, _, body = (await raw(target, sent)).partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status} ".encode())
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
            assert made.counters.statuses()[str(status)] == 1
        assert replica.bodies == []
        await replica.stop()

    run(scenario())


def test_a_client_that_expects_100_continue_gets_it() -> None:
    async def scenario() -> None:
        replica = await MockReplica(behaviour="plain").start()
        async with gateway(replica.url) as (_, target):
            body = completion()
            head = (
                b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
            )
            reader, writer = await asyncio.open_connection(target.host, target.port)
            writer.write(head)
            assert await reader.readexactly(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            writer.close()
        await replica.stop()

    run(scenario())


# --- telling -----------------------------------------------------------------------------------


def test_status_and_metrics_count_what_passed() -> None:
    async def scenario() -> None:
        replicas = [await MockReplica(name=str(i)).start() for i in range(3)]
        async with gateway(*(r.url for r in replicas)) as (_, target):
            for _ in range(9):
                await post(target)
            states = json.loads((await fetch(target, "/gateway/replicas")).body)["replicas"]
            assert [s["picks"] for s in states] == [3, 3, 3]
            assert all(s["healthy"] and s["in_flight"] == 0 for s in states)
            text = (await fetch(target, "/metrics")).body.decode()
            assert 'millrace_gateway_requests_total{status="200"} 10.0' in text
            port = replicas[0].port
            name = f'replica="127.0.0.1:{port}"'
            assert f'millrace_gateway_picks_total{{policy="least_loaded",{name}}} 3.0' in text
            assert f"millrace_gateway_replica_healthy{{{name}}} 1.0" in text
        for replica in replicas:
            await replica.stop()

    run(scenario())
