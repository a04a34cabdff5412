"""What replicas answer when they are asked: each sort of answer, and none at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from millrace.common.http_client import Target, parse_url
from millrace.gateway.health.probes import UNCERTAIN, HealthProbe, Problem
from tests.support.mock_replica import MockReplica
from tests.support.running import run


def health_probe(target: Target, timeout: float = 5.0) -> HealthProbe:
    return HealthProbe(target, (), timeout=timeout, probe_timeout=timeout, misses=2)


@contextlib.asynccontextmanager
async def answering(status: str, body: bytes) -> AsyncIterator[tuple[HealthProbe, list[bytes]]]:
    """A checkup of a server that gives one answer to everything, and the heads that came there."""
    heads = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield health_probe(Target("127.0.0.1", server.sockets[0].getsockname()[1])), heads
    server.close()


def test_a_healthy_replica() -> None:
    async def scenario() -> None:
        replica = await MockReplica(kind="millrace", model="mine").start()
        one = health_probe(parse_url(replica.url))
        assert await one.check_health() is None
        offer = await one.read_models()
        assert offer is not None
        assert (offer.names, offer.kind, offer.cards[0]["id"]) == (("mine",), "millrace", "mine")
        assert await one.check_completion("mine") is None
        await replica.stop()

    run(scenario())


def test_a_replica_that_reports_a_problem() -> None:
    async def scenario() -> None:
        async with answering("503 No", b'{"error": {"message": "loading"}}') as (
            one,
            heads,
        ):
            assert await one.check_health() == Problem("/health says 503 (loading)")
            assert await one.read_models() is None
            assert await one.check_completion(None) == Problem(
                "a completion of one token got 503 (loading)"
            )
            assert len(heads) == 3
            assert all(b"X-Millrace-Probe: 1\r\n" in head for head in heads)

    run(scenario())


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"data": 3}', b'{"data": [{}]}', b"nonsense"])
def test_an_offer_that_cannot_be_read_is_none(body: bytes) -> None:
    async def scenario() -> None:
        async with answering("200 OK", body) as (one, _):
            assert await one.check_health() is None
            assert await one.read_models() is None

    run(scenario())


def test_a_refused_connection() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        await replica.stop()
        one = health_probe(parse_url(replica.url))
        problem = await one.check_health()
        assert problem is not None
        assert "connection refused" in problem.text
        assert problem.lost
        assert await one.read_models() is None
        assert "a completion of one token failed" in str(await one.check_completion(None))

    run(scenario())


def test_one_missing_answer_is_no_evidence_and_two_mean_lost() -> None:
    async def scenario() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(-1)
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        one = health_probe(Target("127.0.0.1", server.sockets[0].getsockname()[1]), timeout=0.05)
        assert await one.check_health() is UNCERTAIN
        expected = Problem("no answer to 2 health checks in a row", lost=True)
        assert await one.check_health() == expected
        server.close()

    run(scenario())
