"""Responses in the background by the official client: polling, cancelling, streams read again."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from tests.server.api.openai_responses.response_events import checked, read_events
from tests.server.api.openai_responses.test_store import client_of, respond, small_server
from tests.support.live_server import LiveServer, wait_for

BEGINS = ("response.created", "response.queued", "response.in_progress")
LONG: Any = {"extra_body": {"ignore_eos": True}, "max_output_tokens": 900}


def ended(client: openai.OpenAI, id: str) -> Response:
    wait_for(lambda: client.responses.retrieve(id).status not in ("queued", "in_progress"))
    return client.responses.retrieve(id)


def test_a_response_is_polled_for(client: openai.OpenAI) -> None:
    begun = respond(client, "x </think> hello", background=True)
    assert begun.status == "queued"
    assert begun.output == []
    whole = ended(client, begun.id)
    assert (whole.status, whole.output_text) == ("completed", "hello")
    assert whole.background
    assert whole.usage == respond(client, "x </think> hello").usage
    assert respond(client, "more", previous_response_id=begun.id).status == "completed"


def test_what_runs_shows_how_far_it_is(client: openai.OpenAI) -> None:
    begun = respond(client, "x", background=True, **LONG)

    def has_output() -> bool:
        found = client.responses.retrieve(begun.id)
        return found.status == "in_progress" and bool(found.output)

    wait_for(has_output)
    found: Any = client.responses.retrieve(begun.id)
    assert found.output[0].status == "in_progress"
    with pytest.raises(openai.BadRequestError, match="only one that has ended"):
        respond(client, "more", previous_response_id=begun.id)
    cancelled: Any = client.responses.cancel(begun.id)
    assert cancelled.status == "cancelled"
    assert cancelled.output[0].status == "incomplete"
    assert client.responses.cancel(begun.id) == cancelled  # again, with no effect
    assert client.responses.retrieve(begun.id) == cancelled


def test_a_cancelled_response_leaves_the_engine(client: openai.OpenAI, server: LiveServer) -> None:
    begun = respond(client, "x", background=True, **LONG)
    wait_for(lambda: server.open_in_engine() > 0)
    client.responses.cancel(begun.id)
    wait_for(lambda: server.open_in_engine() == 0)
    other = respond(client, "x", background=True, **LONG)
    client.responses.delete(other.id)
    wait_for(lambda: server.open_in_engine() == 0)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(other.id)


def test_a_stream_in_the_background_is_as_the_types_say(http: httpx.Client) -> None:
    body = {"input": "x </think> hello", "stream": True, "background": True}
    events = read_events(http.post("/v1/responses", json=body))
    final = checked(events, BEGINS)
    assert final["status"] == "completed"
    again = http.get(f"/v1/responses/{final['id']}", params={"stream": "true"})
    assert read_events(again) == events
    for after in (0, 3, len(events) - 2):
        query = {"stream": "true", "starting_after": str(after)}
        rest = read_events(http.get(f"/v1/responses/{final['id']}", params=query))
        assert rest == events[after + 1 :]
    assert http.get(f"/v1/responses/{final['id']}").json() == final
    wrong = http.get(
        f"/v1/responses/{final['id']}", params={"stream": "true", "starting_after": "x"}
    )
    assert wrong.status_code == 400


def test_a_stream_goes_on_without_its_client(client: openai.OpenAI) -> None:
    stream = client.responses.create(
        model="fake", input="x </think> hello " + "spät " * 60, stream=True, background=True
    )
    seen: list[Any] = [next(stream) for _ in range(6)]
    stream.close()
    id = seen[0].response.id
    rest: list[Any] = list(
        client.responses.retrieve(id, stream=True, starting_after=seen[-1].sequence_number)
    )
    events = [*seen, *rest]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text.startswith("hello")


def test_two_read_one_stream(client: openai.OpenAI) -> None:
    stream = client.responses.create(model="fake", input="x", stream=True, background=True, **LONG)
    id = next(stream).response.id
    other = client.responses.retrieve(id, stream=True, starting_after=2)
    assert next(other).sequence_number == 3
    client.responses.cancel(id)
    ends = [list(one)[-1] for one in (stream, other)]
    assert ends[0] == ends[1]
    assert ends[0].response.status == "cancelled"


def test_a_run_without_a_stream_has_none_to_read(client: openai.OpenAI) -> None:
    begun = respond(client, "x", background=True)
    with pytest.raises(openai.BadRequestError, match="both background and stream"):
        client.responses.retrieve(begun.id, stream=True)


def test_a_run_whose_engine_dies_has_failed(tmp_path: Path) -> None:
    with small_server(tmp_path, max_engine_restarts=3) as server:
        client = client_of(server)
        begun = respond(client, "x", background=True, extra_body={"ignore_eos": True})
        server.engine().kill()
        failed = ended(client, begun.id)
        assert failed.status == "failed"
        assert failed.error is not None
        assert failed.error.code == "server_error"


def test_the_queue_bounds_what_runs(tmp_path: Path) -> None:
    with small_server(tmp_path, max_num_seqs=1, max_queue=1) as server:
        client = client_of(server)
        fields: Any = {"background": True, "extra_body": {"ignore_eos": True}}
        begun = [respond(client, "x" * 50, **fields) for _ in range(2)]
        with pytest.raises(openai.RateLimitError):
            respond(client, "x", **fields)
        for one in begun:
            client.responses.cancel(one.id)
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            try:
                respond(client, "x", background=True)
                return
            except openai.RateLimitError:
                time.sleep(0.05)
        raise AssertionError("the queue stayed full")


def test_the_oldest_events_are_dropped_for_their_bytes(tmp_path: Path) -> None:
    with small_server(tmp_path, max_stored_bytes=30_000) as server:
        client = client_of(server)
        stream = client.responses.create(
            model="fake", input="x", stream=True, background=True,
            extra_body={"ignore_eos": True}, max_output_tokens=300,
        )  # fmt: skip
        seen: list[Any] = list(stream)  # who reads at once gets them all
        assert [event.sequence_number for event in seen] == list(range(len(seen)))
        id = seen[0].response.id
        with pytest.raises(openai.BadRequestError, match="no longer kept") as caught:
            client.responses.retrieve(id, stream=True, starting_after=0)
        found = re.search(r"starting_after=(\d+)", caught.value.message)
        assert found
        after = int(found.group(1))
        rest: list[Any] = list(client.responses.retrieve(id, stream=True, starting_after=after))
        assert rest == seen[after + 1 :]
        assert server.metric("millrace:stored_response_bytes") <= 30_000


@pytest.mark.parametrize("after", [None, 4])
def test_the_clients_own_helper_reads_on(client: openai.OpenAI, after: int | None) -> None:
    stream = client.responses.create(
        model="fake", input="x </think> hello", stream=True, background=True
    )
    whole: list[Any] = list(stream)
    id = whole[0].response.id
    more: Any = {} if after is None else {"starting_after": after}
    with client.responses.stream(response_id=id, **more) as again:
        seen: list[Any] = list(again)
        final = again.get_final_response()
    assert final.output_text == "hello"
    numbers = [event.sequence_number for event in seen]
    assert numbers == list(range(0 if after is None else after + 1, len(whole)))


def test_runs_and_their_readers_leave_nothing_behind(
    client: openai.OpenAI, server: LiveServer
) -> None:
    def tasks() -> float:
        return server.metric("millrace:front_tasks")

    respond(client, "x", background=True)
    wait_for(lambda: server.open_in_engine() == 0)
    before = tasks()
    for at in range(8):
        stream = client.responses.create(
            model="fake", input="x", stream=True, background=True, **LONG
        )
        id = next(stream).response.id
        stream.close()
        if at % 2:
            client.responses.cancel(id)
    wait_for(lambda: server.open_in_engine() == 0)
    wait_for(lambda: tasks() <= before)
