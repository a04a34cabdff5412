"""Stored responses behind a gateway: each request goes to the replica that keeps what it names."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from millrace.common.http_client import Target
from millrace.gateway.app import Gateway
from millrace.gateway.relay.access import Access
from tests.server.api.openai_responses.response_events import checked
from tests.support.fake_engine import Behaviour
from tests.support.gateways import gateway
from tests.support.live_server import LiveServer, fake_server
from tests.support.running import eventually, run
from tests.support.text_model import TOOLS, token_id, write_text_model

KEY = "of the replicas"


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LiveServer]]:
    folder = tmp_path_factory.mktemp("replicas")
    model = write_text_model(folder / "model", TOOLS)
    behaviour = Behaviour(eos=token_id(model, "<|im_end|>"), step=0.002)
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                fake_server(
                    model, folder / name, behaviour, max_model_len=1024, api_key=[KEY],
                    max_server_restarts=0,
                )
            )
            for name in ("one", "two")
        ]  # fmt: skip


@contextlib.asynccontextmanager
async def fleet(replicas: list[LiveServer], **access: Any) -> AsyncIterator[tuple[Gateway, Target]]:
    """A gateway that gives each request to the next replica, unless it must not."""
    urls = [replica.url for replica in replicas]
    made = Access(worker_api_key=KEY, **access)
    async with gateway(*urls, policy="round_robin", access=made) as (one, target):
        await eventually(lambda: len(one.replicas.available()) == len(urls))
        yield one, target


def client_of(target: Target, key: str = "unused") -> openai.AsyncOpenAI:
    url = f"http://{target.host}:{target.port}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0)


def test_a_conversation_stays_at_its_replica(replicas: list[LiveServer]) -> None:
    async def check() -> None:
        async with fleet(replicas) as (_, target):
            client = client_of(target)
            made: list[Any] = [
                await client.responses.create(model="fake", input=f"x </think> {at}")
                for at in range(4)
            ]
            assert len({one.id[5:13] for one in made}) == 2  # both replicas answered
            for one in [*made, *reversed(made)]:
                assert (await client.responses.retrieve(one.id)).output == one.output
                more: Any = await client.responses.create(
                    model="fake", input="more", previous_response_id=one.id
                )
                assert more.id[5:13] == one.id[5:13]
                items = await client.responses.input_items.list(more.id, order="asc")
                assert items.data[1].id == one.output[0].id
                item: Any = {"type": "item_reference", "id": one.output[-1].id}
                words: Any = {"role": "user", "content": "and?"}
                again = await client.responses.create(model="fake", input=[item, words])
                assert again.id[5:13] == one.id[5:13]
            for one in made:
                await client.responses.delete(one.id)
                with pytest.raises(openai.NotFoundError):
                    await client.responses.retrieve(one.id)

    run(check())


def test_a_stream_in_the_background_is_read_again(replicas: list[LiveServer]) -> None:
    async def check() -> None:
        begins = ("response.created", "response.queued", "response.in_progress")
        async with fleet(replicas) as (_, target):
            client = client_of(target)
            for _ in range(3):
                stream = await client.responses.create(
                    model="fake", input="x </think> " + "spät " * 50, stream=True, background=True
                )
                seen: list[Any] = [await anext(stream) for _ in range(5)]
                await stream.close()
                rest = await client.responses.retrieve(
                    seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
                )
                events = [*seen, *[event async for event in rest]]
                final = checked([event.to_dict() for event in events], begins)
                assert final["status"] == "completed"
                assert (await client.responses.cancel(final["id"])).status == "completed"

    run(check())


def test_a_key_sees_nothing_of_another_one(replicas: list[LiveServer]) -> None:
    async def check() -> None:
        async with fleet(replicas, api_key=["one", "two"]) as (_, target):
            one, two = client_of(target, "one"), client_of(target, "two")
            mine = await one.responses.create(model="fake", input="x </think> secret")
            assert (await one.responses.retrieve(mine.id)).id == mine.id
            with pytest.raises(openai.NotFoundError):
                await two.responses.retrieve(mine.id)
            with pytest.raises(openai.BadRequestError, match="not found"):
                await two.responses.create(model="fake", input="more", previous_response_id=mine.id)
            known = "x-response-owner"
            forged = two.with_options(default_headers={known: "any", known.upper(): "one"})
            with pytest.raises(openai.NotFoundError):
                await forged.responses.delete(mine.id)

    run(check())


def test_without_its_replica_the_reason_is_told(replicas: list[LiveServer]) -> None:
    async def check() -> None:
        async with fleet(replicas) as (made, target):
            client = client_of(target)
            mine = await client.responses.create(model="fake", input="x")
            (holder,) = [
                one for one in made.replicas.all if one.member.response_tag == mine.id[5:13]
            ]
            made.monitor.drain(holder.member.id, then_remove=False)
            await eventually(lambda: len(made.replicas.available()) == 1)
            with pytest.raises(openai.InternalServerError, match="keeps this stored response"):
                await client.responses.retrieve(mine.id)
            made.monitor.remove(holder.member.id)
            await eventually(lambda: len(made.replicas.all) == 1)
            with pytest.raises(openai.NotFoundError, match="not found"):
                await client.responses.retrieve(mine.id)
            assert (await client.responses.create(model="fake", input="x")).status == "completed"

    run(check())
