"""Keys, classes, queues, models: who may ask, who waits, who goes where."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.common.http_client import Response, Target, fetch, parse_url
from millrace.common.prefix_hash import key_salt
from millrace.errors import UserError
from millrace.gateway.admin.status import read_status
from millrace.gateway.app import Gateway
from millrace.gateway.common.limits import GatewayLimits
from millrace.gateway.health.health_monitor import HealthPolicy, ReplicaSpec
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import body_for, estimate_tokens, read_request_info
from millrace.gateway.processes.options import GatewayOptions
from millrace.gateway.relay.access import Access
from tests.support.gateways import gateway
from tests.support.mock_replica import MockReplica, ScriptedServer
from tests.support.running import eventually, run

QUIET = HealthPolicy(health_check_interval=60, slow_start=0.0)


async def post(target: Target, tokens: int = 2, *headers: tuple[str, str], **more: Any) -> Response:
    body = {"prompt": [1, 2], "max_tokens": tokens, "stream": True, **more}
    return await fetch(
        target,
        "/v1/completions",
        method="POST",
        body=json.dumps(body).encode(),
        headers=headers,
        timeout=30,
    )


# --- keys --------------------------------------------------------------------------------------


def test_a_gateway_with_keys_admits_them_and_does_not_pass_them_on() -> None:
    async def scenario() -> None:
        replica = await MockReplica().start()
        access = Access(api_key=["one", "two"], worker_api_key="inner", admin_key="root")
        async with gateway(replica.url, health=QUIET, access=access) as (_, target):
            for headers in ((), (("Authorization", "Bearer no"),), (("Authorization", "two"),)):
                refused = await post(target, 2, *headers)
                assert refused.status == 401
                assert json.loads(refused.body)["error"]["type"] == "authentication_error"
            assert (await fetch(target, "/v1/models")).status == 401
            assert (await fetch(target, "/gateway/status")).status == 401
            with pytest.raises(UserError, match="give it with --api-key"):
                await read_status(str(target))
            assert len((await read_status(str(target), "root"))["replicas"]) == 1
            assert (await fetch(target, "/health")).status == 200
            answer = await post(target, 2, ("Authorization", "Bearer two"))
            assert answer.status == 200
            assert replica.headers[-1]["authorization"] == "Bearer inner"
        await replica.stop()

    run(scenario())


def test_requests_say_whose_cached_prefixes_they_share() -> None:
    async def scenario() -> list[dict[str, str]]:
        replica = await MockReplica().start()
        access = Access(api_key=["one", "two"], worker_api_key="inner", cache_salt_by_api_key=True)
        async with gateway(replica.url, health=QUIET, access=access) as (_, target):
            for key in ("one", "two", "one"):
                headers = (("x-api-key", key), ("X-Cache-Salt", "forged"))
                assert (await post(target, 2, *headers)).status == 200
        await replica.stop()
        return replica.headers

    sent = run(scenario())
    salts = [headers["x-cache-salt"] for headers in sent]
    assert salts == [key_salt(b"one"), key_salt(b"two"), key_salt(b"one")]
    assert salts[0] != salts[1]
    assert not any("x-api-key" in headers for headers in sent)


def test_https_for_clients(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext"
    subprocess.run(
        [
            *("openssl", *options.split(), "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )

    async def scenario() -> None:
        replica = await MockReplica(kind="millrace", cut_after=3).start()
        other = await MockReplica(kind="millrace").start()
        async with gateway(
            replica.url,
            other.url,
            health=QUIET,
            policy="round_robin",
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
        ) as (made, target):
            context = ssl.create_default_context(cafile=str(certificate))
            reader, writer = await asyncio.open_connection(
                target.host, target.port, ssl=context, server_hostname="localhost"
            )
            body = b'{"prompt": [1], "max_tokens": 8, "stream": true}'
            writer.write(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 48\r\n\r\n" + body)
            answer = await reader.readuntil(b"\r\n0\r\n\r\n")
            assert answer.count(b'"text":"w') == 8
            assert made.counters.events()["resumed"] == 1
            writer.close()
        await replica.stop()
        await other.stop()

    run(scenario())
    with pytest.raises(UserError, match="go together"):
        Gateway(GatewayOptions(ssl_certfile=str(certificate)))
    with pytest.raises(UserError, match="--ssl-certfile"):
        Gateway(GatewayOptions(ssl_certfile=str(key), ssl_keyfile=str(key)))


# --- queues and classes ------------------------------------------------------------------------


def test_requests_above_the_limit_wait_and_above_the_queue_are_refused() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.1).start()
        limits = GatewayLimits(max_concurrent_requests=2, queue_size=3)
        async with gateway(replica.url, health=QUIET, limits=limits) as (made, target):
            answers = await asyncio.gather(*(post(target) for _ in range(8)))
            assert sorted(a.status for a in answers) == [200] * 5 + [429] * 3
            refused = next(a for a in answers if a.status == 429)
            assert int(refused.headers["retry-after"]) >= 1
            assert "3 wait already" in json.loads(refused.body)["error"]["message"]
            assert made.counters.events()["queue_refused"] == 3
            assert (
                made.counters.gauge("interactive") == made.counters.gauge("queued_interactive") == 0
            )
        await replica.stop()

    run(scenario())


def test_a_gateway_with_keys_answers_browsers_and_probes_like_a_single_server() -> None:
    async def scenario() -> None:
        server = await ScriptedServer([b"HTTP/1.1 204 Gone\r\n\r\n"]).start()
        page = ("Origin", "http://app.example")
        access = Access(api_key=["k"], allowed_origins=["http://app.example"])
        async with gateway(server.url, access=access) as (_, target):
            for path in ("/ping", "/version", "/openapi.json?x=1"):
                assert (await fetch(target, path)).status == 204
            preflight = (page, ("Access-Control-Request-Method", "POST"))
            path = "/v1/chat/completions"
            answer = await fetch(target, path, method="OPTIONS", headers=preflight)
            assert answer.status == 204
            assert (await fetch(target, path, method="OPTIONS", headers=(page,))).status == 401
            for headers in ((page, ("Authorization", "Bearer k")), (page,)):
                answer = await fetch(target, "/v1/models", headers=headers)
                assert answer.status == (200 if len(headers) == 2 else 401)
                assert answer.headers["access-control-allow-origin"] == "http://app.example"
                assert answer.headers["vary"] == "Origin"
            other = await fetch(target, "/v1/models", headers=(("Origin", "http://evil.example"),))
            assert "access-control-allow-origin" not in other.headers
        await server.stop()

    run(scenario())


def test_a_request_that_waits_too_long_gets_429() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.5).start()
        limits = GatewayLimits(max_concurrent_requests=1, queue_timeout=0.1)
        async with gateway(replica.url, health=QUIET, limits=limits) as (made, target):
            answers = await asyncio.gather(*(post(target) for _ in range(2)))
            assert sorted(a.status for a in answers) == [200, 429]
            assert (
                b"the request waited 0.1 s in the queue"
                in min(answers, key=lambda a: -a.status).body
            )
            assert made.relay.in_flight == 0
        await replica.stop()

    run(scenario())


def test_a_client_that_leaves_the_queue_leaves_no_trace() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.3).start()
        limits = GatewayLimits(max_concurrent_requests=1)
        async with gateway(replica.url, health=QUIET, limits=limits) as (made, target):
            first = asyncio.create_task(post(target))
            await eventually(lambda: made.counters.gauge("interactive") == 1)
            second = asyncio.create_task(post(target))
            await eventually(lambda: made.counters.gauge("queued_interactive") == 1)
            second.cancel()
            await eventually(lambda: made.counters.gauge("queued_interactive") == 0)
            assert (await first).status == 200
            assert len(replica.bodies) == 1
        await replica.stop()

    run(scenario())


def test_batch_has_its_own_limit_and_interactive_is_admitted_first() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.1).start()
        limits = GatewayLimits(
            max_concurrent_requests=8, max_concurrent_batch=1, batch_queue_size=2
        )
        batch = ("X-Service-Class", "batch")
        async with gateway(replica.url, health=QUIET, limits=limits) as (made, target):
            slow = [asyncio.create_task(post(target, 2, batch)) for _ in range(3)]
            slow.append(asyncio.create_task(post(target, 2, service_tier="flex")))
            await eventually(lambda: made.counters.gauge("queued_batch") == 2)
            quick = await asyncio.gather(*(post(target) for _ in range(4)))
            assert [a.status for a in quick] == [200] * 4
            assert not all(task.done() for task in slow)
            answers = await asyncio.gather(*slow)
            assert sorted(a.status for a in answers) == [200, 200, 200, 429]
        await replica.stop()

    run(scenario())


def test_a_replica_carries_no_more_requests_than_it_may() -> None:
    async def scenario() -> None:
        some = [await MockReplica(first_s=0.1, name=str(i)).start() for i in range(2)]
        specs = [
            ReplicaSpec(target=parse_url(replica.url), limit=limit)
            for replica, limit in zip(some, (1, 2), strict=True)
        ]
        async with gateway(replicas=specs, health=QUIET) as (made, target):
            waiting = [asyncio.create_task(post(target)) for _ in range(9)]
            await eventually(lambda: made.counters.gauge("queued_interactive") == 6)
            made.replicas.refresh_load(made.replicas.all)
            assert [r.in_flight for r in made.replicas.all] == [1, 2]
            assert [a.status for a in await asyncio.gather(*waiting)] == [200] * 9
        for replica in some:
            await replica.stop()

    run(scenario())


# --- models ------------------------------------------------------------------------------------


def test_requests_go_to_replicas_of_their_model() -> None:
    async def scenario() -> None:
        some = [await MockReplica(model=name, name=name).start() for name in ("a", "b", "b")]
        async with gateway(*(r.url for r in some), health=QUIET) as (_, target):
            for name in ("a", "b", "b", "a"):
                assert (await post(target, model=name)).headers["x-replica"] == name
            unknown = await post(target, model="c")
            error = json.loads(unknown.body)["error"]
            assert (unknown.status, error["code"]) == (404, "model_not_found")
            assert "served are: a, b" in error["message"]
            cards = json.loads((await fetch(target, "/v1/models")).body)["data"]
            assert [card["id"] for card in cards] == ["a", "b"]
        for replica in some:
            await replica.stop()

    run(scenario())


def test_the_models_of_a_replica_that_is_down_give_503_not_404() -> None:
    async def scenario() -> None:
        gone = await MockReplica(model="a").start()
        other = await MockReplica(model="b").start()
        health = HealthPolicy(health_check_interval=0.02, slow_start=0.0)
        async with gateway(gone.url, other.url, health=health) as (made, target):
            gone.healthy = False
            await eventually(lambda: made.monitor.members[0].state == "down")
            assert (await post(target, model="a")).status == 503
            assert (await post(target, model="b")).status == 200
        await gone.stop()
        await other.stop()

    run(scenario())


# --- what is read of a request -----------------------------------------------------------------


def asked(body: bytes, path: bytes = b"/v1/completions") -> Any:
    return read_request_info(Request(b"POST", path, "1.1", [], body, True))


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (b"[1,2,3]", 3),
        (b"[ 15 ]", 1),
        (b'"%b"' % (b"x" * 398), 100),
        (b'["a", "b"]', 2),
    ],
)
def test_prompt_tokens_are_estimated(body: bytes, tokens: int) -> None:
    assert estimate_tokens(body) == tokens


def test_a_long_prompt_stays_a_part_of_its_body() -> None:
    one = asked(b'{"prompt": [%s]}' % b",".join([b"7"] * 100_000))
    assert one.prompt_tokens == 100_000
    [piece] = one.prompt
    body, part = (np.frombuffer(of, np.uint8) for of in (one.request.body, memoryview(piece)))
    assert part.ctypes.data - body.ctypes.data == len(b'{"prompt": ')  # no copy


def test_a_request_is_worded_for_its_replica() -> None:
    one = asked(b' {"prompt": "hi", "stream": true, "seed": 5}')
    assert one.resumable
    assert body_for(one, "other") == b' {"prompt": "hi", "stream": true, "seed": 5}'
    assert json.loads(body_for(one, "millrace")) == {
        "return_token_ids": True, "prompt": "hi", "stream": True, "seed": 5,
    }  # fmt: skip
    assert json.loads(body_for(one, "millrace", [7]))["resume_token_ids"] == [7]
    unseeded = asked(b'{"prompt": "hi", "stream": true, "return_token_ids": null}')
    seeds = {json.loads(body_for(unseeded, "millrace", r))["seed"] for r in ((), (1,))}
    assert len(seeds) == 1  # a continuation draws the same noise
    assert "seed" not in json.loads(body_for(unseeded, "vllm"))


@pytest.mark.parametrize(
    ("path", "body", "prompt", "most"),
    [
        (
            b"/v1/messages",
            b'{"max_tokens": 5, "messages": [{"role": "user"}], "system": "s", "stream": true}',
            b'"s"[{"role": "user"}]',
            5,
        ),
        (b"/v1/messages?beta=true", b'{"messages": [{"a": 1}]}', b'[{"a": 1}]', None),
        (
            b"/v1/responses",
            b'{"input": "what?", "instructions": "s", "max_output_tokens": 7, "stream": true}',
            b'"s""what?"',
            7,
        ),
    ],
)
def test_every_api_for_text_is_understood(
    path: bytes, body: bytes, prompt: bytes, most: int | None
) -> None:
    """Their tokens count and their prompts have prefixes; only their streams cannot be resumed."""
    one = asked(body, path)
    assert one.for_text
    assert (b"".join(one.prompt), one.max_tokens) == (prompt, most)
    assert one.prompt_tokens == max(1, len(prompt) // 4)
    assert not one.resumable
    assert body_for(one, "millrace") == body


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"nonsense", b'{"prompt": 5, "stream": "yes"}', b'{"model": 3}', b"\xff\xfe"],
)
def test_what_cannot_be_read_is_left_to_the_replica(body: bytes) -> None:
    one = asked(body)
    assert not one.resumable
    assert body_for(one, "millrace") == body
