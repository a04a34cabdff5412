"""Pages of several replicas as one, and the gateway's log and table."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from millrace.common.http_client import fetch
from millrace.errors import UserError
from millrace.gateway.admin.metrics_merge import merged
from millrace.gateway.admin.status import draw, read_status
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica
from tests.support.running import eventually, run

PAGE = """# HELP up Whether.
# TYPE up gauge
up 1.0
# HELP took Seconds.
# TYPE took histogram
took_bucket{le="1"} 2
took_bucket{le="+Inf"} 3
took_sum 4.5
took_count 3
# TYPE done_total counter
done_total{why="a \\"b\\" {c}"} 7
"""


def test_pages_are_merged_into_one_that_prometheus_reads() -> None:
    text = merged([("0", PAGE), ("1", PAGE.replace("up 1.0", "up 0.0"))]).decode()
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert {s.labels["replica"]: s.value for s in families["up"].samples} == {"0": 1.0, "1": 0.0}
    assert len(families["took"].samples) == 8
    assert text.count("# TYPE took histogram") == 1
    done = families["done"].samples
    assert [(s.labels["why"], s.value) for s in done] == [('a "b" {c}', 7.0)] * 2


def test_a_replicas_series_have_one_name_everywhere_and_a_dead_one_is_down() -> None:
    """The gateway's own series and those of replicas can be joined; ports are only in the info."""

    async def scenario() -> str:
        well, ill = await MockReplica().start(), await MockReplica().start()
        names = {well.url: "left", ill.url: "right"}
        async with gateway(*names, merge_metrics=True, labels=names) as (made, target):
            await eventually(lambda: made.healthy == 2)
            await ill.stop()
            await eventually(lambda: made.healthy == 1)
            text = (await fetch(target, "/metrics")).body.decode()
        await well.stop()
        return text

    text = run(scenario())
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert {s.labels["replica"]: s.value for s in families["millrace:engine_up"].samples} == {
        "left": 1.0, "right": 0.0,
    }  # fmt: skip
    for name in ("picks", "replica_healthy", "replica_in_flight", "failures", "replica_info"):
        labels = {s.labels["replica"] for s in families[f"millrace_gateway_{name}"].samples}
        assert labels == {"left", "right"}, name


def test_every_request_gets_a_line_in_the_access_log(tmp_path: Path) -> None:
    log = tmp_path / "access"

    async def scenario() -> None:
        some = [await MockReplica(kind="millrace", cut_after=c).start() for c in (3, None)]
        async with gateway(*(r.url for r in some), access_log=str(log), policy="round_robin") as (
            _,
            target,
        ):
            body = b'{"model": "mock", "prompt": [1, 2], "max_tokens": 9, "stream": true}'
            headers = (("X-Request-Id", "mine"),)
            answer = await fetch(
                target, "/v1/completions", method="POST", body=body, headers=headers
            )
            assert answer.headers["x-request-id"] == "mine"
            await fetch(target, "/v1/nothing")
        for replica in some:
            await replica.stop()

    run(scenario())
    first, second = [json.loads(line) for line in log.read_text().splitlines()]
    assert (first["id"], first["status"], first["resumed"]) == ("mine", 200, 1)
    assert (first["replica"], first["prompt_tokens"], first["class"]) == (
        first["replica"], 2, "interactive",
    )  # fmt: skip
    assert first["total_ms"] >= first["first_byte_ms"] > 0
    assert (second["status"], second["method"]) == (404, "GET")
    assert len(second["id"]) == 32


def test_the_table_shows_each_replica_and_its_problem() -> None:
    async def scenario() -> None:
        well, ill = await MockReplica().start(), await MockReplica(healthy=False).start()
        async with gateway(well.url, ill.url) as (made, target):
            await eventually(lambda: made.healthy == 1)
            now = await read_status(str(target))
            then = json.loads(json.dumps(now))
            then["replicas"][0]["picks"] -= 10
            out = io.StringIO()
            Console(file=out, width=100).print(draw(now, then, 2.0))
            text = out.getvalue()
            assert f"127.0.0.1:{well.port}" in text
            assert " 5.0 " in text
            assert "/health says 503 (warming)" in text
        with pytest.raises(UserError, match="this is not a millrace gateway"):
            await read_status(well.url)
        await well.stop()
        await ill.stop()
        with pytest.raises(UserError, match="no gateway answers"):
            await read_status(well.url)

    run(scenario())


def test_a_slow_client_of_a_buffered_stream_costs_bounded_memory() -> None:
    """The gateway stops reading from the replica while the client does not read."""

    async def scenario() -> None:
        replica = await MockReplica(kind="millrace").start()
        async with gateway(replica.url) as (made, target):
            reader, writer = await asyncio.open_connection(target.host, target.port, limit=2**14)
            body = b'{"prompt": [1], "stream": true, "max_tokens": 60000}'
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            seen = -1
            while seen != made.counters.gauge("kept_bytes"):
                seen = made.counters.gauge("kept_bytes")
                await asyncio.sleep(0.5)
            assert 0 < seen <= made.relay.limits.max_kept_bytes
            got = b""
            while not got.endswith(b"\r\n0\r\n\r\n"):
                got = got[-16:] + await reader.read(1 << 20)
            assert made.counters.events()["cut_off"] == 0
            writer.close()
        await replica.stop()

    run(scenario())
