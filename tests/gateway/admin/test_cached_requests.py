"""The latest requests of all replicas, for the key that sent them and no other."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.common.http_client import Response, Target, fetch
from millrace.gateway.relay.access import Access
from tests.support.fake_engine import Behaviour
from tests.support.gateways import gateway
from tests.support.live_server import LiveServer, fake_server
from tests.support.running import eventually, run
from tests.support.text_model import TOOLS, write_text_model

KEY = "of the replicas"


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LiveServer]]:
    folder: Path = tmp_path_factory.mktemp("replicas")
    model = write_text_model(folder / "model", TOOLS)
    behaviour = Behaviour(explains=True)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(fake_server(model, folder / name, behaviour, api_key=[KEY]))
            for name in ("one", "two")
        ]


async def ask(target: Target, key: str, path: str, body: object = None) -> Response:
    headers = (("Authorization", f"Bearer {key}"), ("Content-Type", "application/json"))
    method = "GET" if body is None else "POST"
    content = b"" if body is None else json.dumps(body).encode()
    return await fetch(target, path, method=method, body=content, headers=headers)


async def send(target: Target, key: str, text: str) -> None:
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": text}]
    answer = await ask(target, key, "/v1/chat/completions", {"messages": messages, "max_tokens": 2})
    assert answer.status == 200


def test_a_key_sees_its_requests_at_all_replicas_and_no_others(replicas: list[LiveServer]) -> None:
    async def check() -> None:
        access = Access(worker_api_key=KEY, api_key=["mine", "other"])
        urls = [replica.url for replica in replicas]
        async with gateway(*urls, policy="round_robin", access=access) as (one, target):
            await eventually(lambda: len(one.replicas.available()) == 2)
            for number in range(4):
                await send(target, "mine", f"question {number}")
            await send(target, "other", "secret words")
            answer = await ask(target, "mine", "/cache/explain")
            assert answer.status == 200
            listed = json.loads(answer.body)["requests"]
            assert len(listed) == 4
            assert len({found["conversation"] for found in listed}) == 4
            for replica in replicas:  # the gateway named its clients: of nobody they are not
                own = json.loads((await direct(replica)).body)["requests"]
                assert not {one["id"] for one in own} & {one["id"] for one in listed}
            assert (
                len(json.loads((await ask(target, "other", "/cache/explain")).body)["requests"])
                == 1
            )
            assert (await ask(target, "wrong", "/cache/explain")).status == 401
            for found in listed:  # each at its own replica
                path = f"/cache/explain?request_id={found['id']}"
                assert (await ask(target, "mine", path)).status == 200
                assert (await ask(target, "other", path)).status == 404

    run(check())


async def direct(replica: LiveServer) -> Response:
    host, port = replica.url.removeprefix("http://").split(":")
    return await ask(Target(host, int(port)), KEY, "/cache/explain")


def test_replicas_that_do_not_answer_are_left_out(replicas: list[LiveServer]) -> None:
    async def check() -> None:
        urls = [replicas[0].url, "http://127.0.0.1:9"]
        async with gateway(*urls, access=Access(worker_api_key=KEY)) as (one, target):
            await eventually(lambda: len(one.replicas.available()) == 1)
            await send(target, "unused", "another question")
            answer = await ask(target, "unused", "/cache/explain?request_id=")
            assert len(json.loads(answer.body)["requests"]) >= 1

    run(check())
