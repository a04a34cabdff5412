"""Requests in rows: each row gets its own answer, whatever their order, servers and faults."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.batch.endpoint import Answer
from millrace.batch.options import DispatchOptions
from millrace.batch.rows import RESULT_COLUMNS, answer_rows
from tests.batch.counting_server import answer, chat_line


class Echoing:
    """Answers with what it was asked; refuses what holds "bad"."""

    def __init__(self) -> None:
        self.name = "echo"
        self.paths: list[str] = []
        self.bodies: list[dict[str, Any]] = []

    async def send(self, path: str, body: bytes, key: str, timeout: float) -> Answer:
        self.paths.append(path)
        self.bodies.append(json.loads(body))
        content = self.bodies[-1]["messages"][-1]["content"]
        await asyncio.sleep(0)
        if "bad" in content:
            return Answer(400, b'{"error": {"message": "a bad request"}}')
        return Answer(200, json.dumps(answer(content)).encode())

    async def close(self) -> None: ...


def answered(
    rows: Sequence[dict[str, Any]], endpoint: Echoing, model: str | None = None
) -> list[dict[str, Any]]:
    columns = asyncio.run(answer_rows(rows, [endpoint], DispatchOptions(max_in_flight=3), model))
    assert tuple(columns) == RESULT_COLUMNS
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


@settings(max_examples=25, deadline=None)
@given(
    contents=st.lists(st.sampled_from(["a", "b", "a longer text", "bad", "bad too"]), max_size=9)
)
def test_each_row_has_its_own_answer(contents: list[str]) -> None:
    rows = [chat_line(number, content) for number, content in enumerate(contents)]
    for number, row in enumerate(rows):
        row["body"] = json.dumps(row["body"]) if number % 2 else row["body"]
    for content, got in zip(contents, answered(rows, Echoing()), strict=True):
        if "bad" in content:
            assert got["status_code"] == 400
            assert "a bad request" in got["error"]
            assert got["response"] == ""
        else:
            assert (got["status_code"], got["error"], got["prompt_tokens"]) == (200, "", 7)
            assert json.loads(got["response"]) == answer(content)


def test_rows_that_are_no_requests_are_named_and_not_sent() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    rows = [
        {"custom_id": "a"},
        {"custom_id": "b", "body": "no json"},
        {"custom_id": "c", "body": {**body, "stream": True}},
        {"custom_id": "d", "body": body, "url": "/v1/embeddings"},
        {"custom_id": "e", "body": body},
    ]
    endpoint = Echoing()
    found = answered(rows, endpoint)
    words = ["column body is missing", "not a JSON object", "body.stream", "embedding server"]
    for got, word in zip(found, words, strict=False):
        assert got["status_code"] == 0
        assert word in got["error"], got
    assert found[-1]["status_code"] == 200
    assert endpoint.paths == ["/v1/chat/completions"]


def test_a_model_takes_the_place_of_the_rows_own() -> None:
    endpoint = Echoing()
    answered([chat_line(1)], endpoint, model="other")
    assert endpoint.bodies[0]["model"] == "other"
