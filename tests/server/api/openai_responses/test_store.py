"""Stored responses by the official client: conversations, retrieval, ownership and bounds.

The fake engine echoes the prompt up to the first turn end, so conversations are told apart by the
number of their tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseItem

from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server
from tests.support.text_model import TOOLS, token_id, write_text_model

FUNCTION: Any = {"type": "function", "name": "now", "parameters": {"type": "object"}}
CALL = "</think>\n<tool_call>\n<function=now>\n</function>\n</tool_call>"


def respond(client: openai.OpenAI, input: Any, **fields: Any) -> Response:
    made: Response = client.responses.create(model="fake", input=input, **fields)
    return made


def prompt_tokens(response: Response) -> int:
    assert response.usage is not None
    return response.usage.input_tokens


def test_a_conversation_goes_on_behind_a_stored_response(client: openai.OpenAI) -> None:
    first = respond(client, CALL, tools=[FUNCTION])
    call: Any = first.output[-1]
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    second = respond(client, [result], previous_response_id=first.id, tools=[FUNCTION])
    assert second.previous_response_id == first.id
    whole = [{"role": "user", "content": CALL}, *first.output, result]
    assert prompt_tokens(second) == prompt_tokens(respond(client, whole, tools=[FUNCTION]))
    third = respond(client, "and now?", previous_response_id=second.id, tools=[FUNCTION])
    whole += [*second.output, {"role": "user", "content": "and now?"}]
    assert prompt_tokens(third) == prompt_tokens(respond(client, whole, tools=[FUNCTION]))
    branch = respond(client, "and now?", previous_response_id=second.id, tools=[FUNCTION])
    assert prompt_tokens(branch) == prompt_tokens(third)


def test_instructions_are_not_carried_over(client: openai.OpenAI) -> None:
    told = respond(client, "hi", instructions="Be brief.")
    whole: Any = [{"role": "user", "content": "hi"}, *told.output, {"role": "user", "content": "b"}]
    later = respond(client, "b", previous_response_id=told.id)
    assert prompt_tokens(later) == prompt_tokens(respond(client, whole))
    other = respond(client, "b", previous_response_id=told.id, instructions="Be long.")
    assert prompt_tokens(other) == prompt_tokens(respond(client, whole, instructions="Be long."))


def test_an_input_is_counted(client: openai.OpenAI) -> None:
    first = respond(client, "hi", tools=[FUNCTION])
    fields: Any = {"model": "fake", "input": "and?", "tools": [FUNCTION]}
    counted = client.responses.input_tokens.count(**fields, previous_response_id=first.id)
    later = respond(client, "and?", tools=[FUNCTION], previous_response_id=first.id)
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == prompt_tokens(later)
    long = client.responses.input_tokens.count(model="fake", input="spät " * 2000)
    assert long.input_tokens > 1024


def test_items_can_be_referred_to(client: openai.OpenAI) -> None:
    first = respond(client, "x </think> hello")
    reference: Any = {"type": "item_reference", "id": first.output[-1].id}
    again: Any = {"role": "user", "content": "again"}
    referred = respond(client, [reference, again])
    assert prompt_tokens(referred) == prompt_tokens(respond(client, [first.output[-1], again]))


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_retrieved_as_it_was_given(client: openai.OpenAI, stream: bool) -> None:
    if stream:
        events: list[Any] = list(client.responses.create(model="fake", input="hi", stream=True))
        given = events[-1].response
    else:
        given = respond(client, "hi", max_output_tokens=3)
    assert client.responses.retrieve(given.id) == given
    with pytest.raises(openai.BadRequestError, match="no stream to read"):
        client.responses.retrieve(given.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(given.id)


def test_a_deleted_response_is_gone(client: openai.OpenAI, http: httpx.Client) -> None:
    first = respond(client, "hi")
    second = respond(client, "there", previous_response_id=first.id)
    answer = http.delete(f"/v1/responses/{first.id}").json()
    assert answer == {"id": first.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError, match="not found"):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="not found") as caught:
        respond(client, "more", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"
    assert respond(client, "more", previous_response_id=second.id).status == "completed"


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    response = respond(client, "hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_input_items_are_listed_page_by_page(client: openai.OpenAI) -> None:
    item: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseItem)
    first = respond(client, CALL, tools=[FUNCTION])
    call: Any = first.output[-1]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    words: Any = {"role": "user", "content": [{"type": "input_text", "text": "so?"}], "id": "msg_7"}
    second = respond(client, [result, words], previous_response_id=first.id, tools=[FUNCTION])
    page = client.responses.input_items.list(second.id, limit=2)
    assert page.data[0].id == "msg_7"
    every: list[Any] = list(page)
    assert [one.type for one in every][:2] == ["message", "function_call_output"]
    assert every[-1].content[0].text == CALL
    assert every[1:-1][-1].id == first.output[0].id
    for one in every:
        item.validate_python(one.to_dict())
    forwards = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    assert [one.id for one in forwards] == [one.id for one in reversed(every)]
    for query, message in (("limit=0", "limit"), ("order=up", "order"), ("after=x", "after")):
        with pytest.raises(openai.BadRequestError, match=message):
            client.get(f"/responses/{second.id}/input_items?{query}", cast_to=httpx.Response)


# --- servers of their own -----------------------------------------------------------------------


@contextlib.contextmanager
def small_server(folder: Path, **options: Any) -> Iterator[LiveServer]:
    model = write_text_model(folder / "model", TOOLS)
    behaviour = Behaviour(eos=token_id(model, "<|im_end|>"), step=0.002)
    with fake_server(model, folder / "log", behaviour, max_model_len=512, **options) as server:
        yield server


def client_of(server: LiveServer, key: str = "unused") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_the_oldest_responses_are_dropped(tmp_path: Path) -> None:
    with small_server(tmp_path, max_stored_responses=2) as server:
        client = client_of(server)
        ids = [respond(client, "hi").id for _ in range(2)]
        client.responses.retrieve(ids[0])  # used again: not the oldest any more
        last = respond(client, "hi").id
        assert client.responses.retrieve(ids[0]).id == ids[0]
        assert client.responses.retrieve(last).id == last
        with pytest.raises(openai.NotFoundError, match="keeps the last 2 in memory"):
            client.responses.retrieve(ids[1])


def test_responses_are_dropped_for_their_bytes(tmp_path: Path) -> None:
    with small_server(tmp_path, max_stored_bytes=20_000) as server:
        client = client_of(server)
        first = respond(client, "a" * 300)
        later = [respond(client, "b", previous_response_id=first.id) for _ in range(12)]
        found = [one.id for one in later if _is_stored(client, one.id)]
        assert found == [one.id for one in later[-len(found) :]]
        assert 0 < len(found) < 12
        kept = len(found) + _is_stored(client, first.id)
        assert server.metric("millrace:stored_responses") == kept
        assert server.metric("millrace:stored_response_bytes") <= 20_000
        large = respond(client, "hi", metadata={str(at): "x" * 500 for at in range(48)})
        assert not _is_stored(client, large.id)
        assert _is_stored(client, later[-1].id)  # it pushes nothing out
        assert "is not kept" in server.log


def _is_stored(client: openai.OpenAI, id: str) -> bool:
    try:
        return client.responses.retrieve(id).id == id
    except openai.NotFoundError:
        return False


def test_a_server_may_keep_none(tmp_path: Path) -> None:
    with small_server(tmp_path, max_stored_responses=0) as server:
        client = client_of(server)
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        response: Any = respond(client, "hi")
        assert response.store is False
        with pytest.raises(openai.BadRequestError, match="keeps none"):
            respond(client, "more", previous_response_id=response.id)
        with pytest.raises(openai.BadRequestError, match="does not keep"):
            respond(client, "hi", background=True)


def test_a_key_sees_nothing_of_another_one(tmp_path: Path) -> None:
    with small_server(tmp_path, api_key=["one", "two"]) as server:
        one, two = client_of(server, "one"), client_of(server, "two")
        mine = respond(one, "x </think> secret")
        assert one.responses.retrieve(mine.id).id == mine.id
        for attempt in (
            lambda: two.responses.retrieve(mine.id),
            lambda: two.responses.delete(mine.id),
            lambda: two.responses.cancel(mine.id),
            lambda: two.responses.input_items.list(mine.id),
        ):
            with pytest.raises(openai.NotFoundError, match="not found"):
                attempt()
        for fields in (
            {"input": "go on", "previous_response_id": mine.id},
            {"input": [{"type": "item_reference", "id": mine.output[-1].id}]},
        ):
            with pytest.raises(openai.BadRequestError, match="not found"):
                respond(two, **fields)
        assert one.responses.retrieve(mine.id).id == mine.id
        forged = {"x-response-owner": "one"}
        with pytest.raises(openai.NotFoundError):
            two.with_options(default_headers=forged).responses.retrieve(mine.id)
