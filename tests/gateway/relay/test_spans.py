"""One trace a request, from the gateway over each replica to the engine's phases, as a collector
gets it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from millrace.common.http_client import Response, Target, fetch
from millrace.errors import ConfigError
from millrace.gateway.common.limits import GatewayLimits
from tests.support.gateways import gateway
from tests.support.live_server import fake_server
from tests.support.mock_replica import MockReplica
from tests.support.observed.collector import Sent, Spans, collector
from tests.support.running import eventually, run

pytest.importorskip("opentelemetry.sdk.trace")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, DROPPED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


async def ask(target: Target, traceparent: str = "", model: str = "mock") -> Response:
    body = {"model": model, "prompt": [1, 2], "max_tokens": 6, "stream": True}
    headers = (("traceparent", traceparent),) if traceparent else ()
    return await fetch(
        target, "/v1/completions", method="POST", body=json.dumps(body).encode(), headers=headers
    )


async def relayed(
    replicas: Sequence[MockReplica], traceparent: str = "", count: int = 1, **options: Any
) -> None:
    """Send requests at once through a gateway, which has ended afterwards."""
    for one in replicas:
        await one.start()
    async with gateway(*(r.url for r in replicas), policy="round_robin", **options) as (made, to):
        await eventually(lambda: made.healthy == len(replicas))
        answers = await asyncio.gather(*(ask(to, traceparent) for _ in range(count)))
        assert {answer.status for answer in answers} == {200}
    for one in replicas:
        await one.stop()


def gateway_span(spans: Spans) -> Sent:
    (found,) = spans.named("gateway")
    assert found.service == "millrace-gateway"
    return found


def test_each_replica_that_a_request_was_sent_to_has_a_span(tmp_path: Path) -> None:
    """The first breaks off; the second resumes the stream. Both are told of their own spans."""
    replicas = [MockReplica(kind="millrace", cut_after=c) for c in (3, None)]
    log = tmp_path / "access"
    with collector() as spans:
        run(relayed(replicas, SAMPLED, otlp_traces_endpoint=spans.endpoint, access_log=str(log)))
    root = gateway_span(spans)
    assert (root.trace, root.parent, root.error) == (TRACE, PARENT, None)
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["millrace.resumptions"] == 1
    assert root.attributes["url.path"] == "/v1/completions"
    first, second = spans.below(root)
    assert first.name == second.name == "replica"
    assert first.error == "closed the connection before its response was complete"
    assert second.error is None
    assert first.events == ["first byte"]
    assert root.start <= first.start <= first.end <= second.start <= second.end <= root.end
    asked = [replica.headers[0]["traceparent"] for replica in replicas]
    assert sorted(asked) == sorted(f"00-{TRACE}-{one.id}-01" for one in (first, second))
    ports = {one.attributes["server.port"] for one in (first, second)}
    assert ports == {replica.port for replica in replicas}
    assert json.loads(log.read_text())["trace"] == TRACE


def test_a_wait_for_admission_has_a_span() -> None:
    limits = GatewayLimits(max_concurrent_requests=1)
    with collector() as spans:
        replica = MockReplica(first_s=0.05)
        run(relayed([replica], count=2, limits=limits, otlp_traces_endpoint=spans.endpoint))
    assert len({root.trace for root in spans.named("gateway")}) == 2
    (queue,) = spans.named("queue")
    (replica,) = [one for one in spans.named("replica") if one.parent == queue.parent]
    assert queue.end <= replica.start
    assert queue.end - queue.start > 20_000_000


def test_a_request_that_no_replica_answers_has_the_reason() -> None:
    with collector() as spans:

        async def scenario() -> None:
            replica = await MockReplica("silent").start()
            async with gateway(replica.url, otlp_traces_endpoint=spans.endpoint) as (made, target):
                await eventually(lambda: made.healthy == 1)
                assert (await ask(target)).status == 502
            await replica.stop()

        run(scenario())
    root = gateway_span(spans)
    assert root.error == "HTTP 502"
    assert "closed the connection" in str(spans.below(root)[0].error)


def test_what_the_caller_does_not_sample_is_not_sent() -> None:
    replica = MockReplica()
    with collector() as spans:
        run(relayed([replica], DROPPED, otlp_traces_endpoint=spans.endpoint))
    assert spans.all == []
    head, trace, _, flags = replica.headers[0]["traceparent"].split("-")
    assert (head, trace, flags) == ("00", TRACE, "00")  # so that the replica sends none either


def test_without_an_endpoint_the_callers_trace_goes_on_at_the_replica() -> None:
    replica = MockReplica()
    run(relayed([replica], SAMPLED))
    assert replica.headers[0]["traceparent"] == SAMPLED


def test_an_endpoint_that_cannot_be_is_refused_at_the_start() -> None:
    async def scenario() -> None:
        async with gateway("http://127.0.0.1:1", otlp_traces_endpoint="collector:4317"):
            pass

    with pytest.raises(ConfigError, match="--otlp-traces-endpoint 'collector:4317': use a URL"):
        run(scenario())


def test_a_trace_goes_from_the_gateway_to_the_engines_phases(
    text_model: Path, tmp_path: Path
) -> None:
    """Two gateway processes in front of a server, each a process that sends for itself."""
    with (
        collector() as spans,
        fake_server(text_model, tmp_path / "log", otlp_traces_endpoint=spans.endpoint) as server,
    ):

        async def scenario() -> None:
            options: dict[str, Any] = {"otlp_traces_endpoint": spans.endpoint, "processes": 2}
            async with gateway(server.url, **options) as (made, target):
                await eventually(lambda: made.healthy == 1)
                answer = await ask(target, model="fake")
                assert answer.status == 200, answer.body

        run(scenario())
        server.process.terminate()
        assert server.process.wait(20) == 0
    root = gateway_span(spans)
    (replica,) = spans.below(root)
    (request,) = spans.below(replica)
    assert (request.name, request.service) == ("llm_request", "millrace")
    names = [one.name for one in spans.below(request)]
    assert names == ["queue", "prefill", "decode"]
    assert {one.trace for one in spans.all} == {root.trace}
    assert len(spans.all) == 6
    assert root.attributes["gen_ai.request.id"] == request.attributes["gen_ai.request.id"]
