"""The gateway's live page: its files, its stream, and what it makes of the replicas' samples."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from millrace.common.http_client import fetch
from millrace.dashboard.sample import FIELDS, Sample
from millrace.gateway.health.vllm_samples import VllmSamples
from millrace.gateway.relay.access import Access
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

BUSY = Sample(at=2_000_000_000, tokens_out=50, running=2, waiting=1, pages=(1, 4), ttft=[(3, 2)])


class Viewer:
    """A connection that follows the stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer

    async def head(self) -> bytes:
        return await self._reader.readuntil(b"\r\n\r\n")

    async def event(self) -> tuple[str, str, dict[str, Any]]:
        """Kind, id and data of the next event."""
        lines = (await self._reader.readuntil(b"\n\n")).decode().splitlines()
        kind, id, data = (line.partition(": ")[2] for line in lines[:3])
        return kind, id, msgspec.json.decode(data)

    async def ended(self) -> bool:
        return await self._reader.read(1 << 20) is not None and self._reader.at_eof()


@contextlib.asynccontextmanager
async def viewer(port: int, *headers: str) -> AsyncIterator[Viewer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    head = "\r\n".join(("GET /dashboard/events HTTP/1.1", "Host: a", *headers))
    writer.write(f"{head}\r\n\r\n".encode())
    try:
        yield Viewer(reader, writer)
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def mock(**options: Any) -> AsyncIterator[MockReplica]:
    replica = await MockReplica(**options).start()
    try:
        yield replica
    finally:
        await replica.stop()


def as_dict(row: list[Any]) -> dict[str, Any]:
    return dict(zip(FIELDS, row, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_samples_of_replicas_come_to_viewers(processes: int) -> None:
    load = {"requests": 2, "tokens": 9, "samples": [msgspec.to_builtins(BUSY)]}

    async def scenario() -> None:
        async with (
            mock(kind="millrace", load=load) as replica,
            gateway(replica.url, processes=processes) as (made, target),
        ):
            await eventually(lambda: any("samples_since=0" in q for q in replica.load_questions))
            async with viewer(target.port) as seen:
                head = (await seen.head()).lower()
                assert b"200 ok" in head
                assert b"content-type: text/event-stream" in head
                kind, id, data = await seen.event()
                assert kind == "all"
                assert data["about"]["kind"] == "gateway"
                assert [event["kind"] for event in data["events"]] == ["added", "up"]
                name = replica.url.removeprefix("http://")
                while not (data["replicas"] and (row := data["replicas"][0])[4]):
                    kind, id, data = await seen.event()
                assert row[1:4] == [name, "up", ""]
                assert as_dict(row[4])["running"] == 2
                kind, later, data = await seen.event()
                assert (kind, "about" in data) == ("new", False)
                assert later != id
            async with viewer(target.port, f"Last-Event-ID: {later}") as again:
                await again.head()
                kind, _, data = await again.event()
                assert (kind, data["events"]) == ("new", [])
            id = made.monitor.members[0].id
            history = await fetch(target, f"/dashboard/replica?id={id}", timeout=5)
            assert history.status == 200
            assert isinstance(msgspec.json.decode(history.body), list)
            for wrong in ("99", "x", ""):
                answer = await fetch(target, f"/dashboard/replica?id={wrong}", timeout=5)
                assert answer.status == 404

    run(scenario())


def test_files_need_no_key_and_figures_do() -> None:
    async def scenario() -> None:
        async with (
            mock() as replica,
            gateway(replica.url, access=Access(api_key=["k"])) as (_, target),
        ):
            for path in ("/", "/docs", "/dashboard", "/dashboard/page.js"):
                answer = await fetch(target, path, timeout=5)
                assert answer.status == 200
                assert "default-src 'none'" in answer.headers["content-security-policy"]
            for path in ("/dashboard/events", "/dashboard/replica?id=1"):
                assert (await fetch(target, path, timeout=5)).status == 401
            async with viewer(target.port, "Authorization: Bearer k") as seen:
                assert b"200 OK" in await seen.head()
            posted = await fetch(target, "/dashboard", method="POST", body=b"{}", timeout=5)
            assert posted.status in (401, 404)

    run(scenario())


def test_viewers_end_with_the_gateway_and_are_counted() -> None:
    async def scenario() -> None:
        async with gateway(replicas=[]) as (made, target), contextlib.AsyncExitStack() as stack:
            made.relay.viewers = 31
            seen = await stack.enter_async_context(viewer(target.port))
            await seen.head()
            async with viewer(target.port) as late:
                assert b"503" in await late.head()
            seen.writer.close()
            await eventually(lambda: made.relay.viewers == 31)
            last = await stack.enter_async_context(viewer(target.port))
            await last.head()
            await made.stop(drain=5.0)
            assert await asyncio.wait_for(last.ended(), 10)

    run(scenario())


PAGE = """\
vllm:num_requests_running{model_name="m"} 3
vllm:num_requests_waiting{model_name="m"} 1
vllm:kv_cache_usage_perc{model_name="m"} 0.25
vllm:prompt_tokens_total{model_name="m"} %d
vllm:generation_tokens_total{model_name="m"} %d
vllm:spec_decode_num_drafts_total{model_name="m"} %d
vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="m",position="0"} %d
vllm:time_to_first_token_seconds_bucket{le="0.001",model_name="m"} 0
vllm:time_to_first_token_seconds_bucket{le="0.25",model_name="m"} %d
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} %d
"""


def test_a_sample_of_vllm_is_the_difference_of_two_pages() -> None:
    samples = VllmSamples()
    assert samples.read((PAGE % (10, 100, 5, 2, 1, 1)).encode()) == []
    (sample,) = samples.read((PAGE % (30, 160, 9, 5, 4, 6)).encode())
    assert (sample.tokens_in, sample.tokens_out, sample.drafts) == (20, 60, 4)
    assert (sample.accepted, sample.running, sample.waiting) == ([3], 3, 1)
    assert sample.pages == (250, 1000)
    assert [count for _, count in sample.ttft] == [3, 2]
    assert samples.read((PAGE % (1, 2, 0, 0, 0, 0)).encode()) == []  # it was started again


def test_other_servers_show_the_requests_that_are_counted_here() -> None:
    async def scenario() -> None:
        async with (
            mock() as replica,
            gateway(replica.url) as (_, target),
            viewer(target.port) as seen,
        ):
            await seen.head()
            row = None
            while row is None:
                rows = (await seen.event())[2]["replicas"]
                row = rows[0][4] if rows else None
            assert as_dict(row)["running"] == 0
            for _ in range(2):  # an idle replica's row does not change
                assert (await seen.event())[2]["replicas"] == []

    run(scenario())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_head_gets_what_a_get_gets_without_its_body(processes: int) -> None:
    """Also of the stream, whose head alone is sent, and of paths that are not there."""
    paths = ("/", "/docs", "/dashboard", "/health", "/v1/models", "/gateway/status", "/gateway/x")

    async def scenario() -> None:
        replica = await MockReplica().start()
        async with gateway(replica.url, processes=processes) as (_, target):
            for path in paths:
                whole = await fetch(target, path)
                reader, writer = await asyncio.open_connection(target.host, target.port)
                for _ in range(2):  # the connection goes on
                    writer.write(f"HEAD {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                    head = await reader.readuntil(b"\r\n\r\n")
                    assert head.startswith(b"HTTP/1.1 %d " % whole.status), path
                    assert b"Content-Length: %d" % len(whole.body) in head or "status" in path
                writer.close()
            reader, writer = await asyncio.open_connection(target.host, target.port)
            writer.write(b"HEAD /dashboard/events HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert body == b""
            writer.close()
        await replica.stop()

    run(scenario())
