"""The model that ships, by the official client: grammars of custom tools and conversations."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.server.api.openai_responses.response_events import checked, read_events
from tests.support.live_server import LiveServer, started

ASKED = "What is 12 plus 30?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    command = [sys.executable, "-m", "millrace.cli", "serve", "millrace-mini", "--port=0"]
    flags = ["--max-model-len=1024", "--max-num-seqs=4"]
    with started([*command, *flags], tmp_path_factory.mktemp("mini") / "log") as running:
        running.wait_ready(120)
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.mark.parametrize("effort", ["none", "low"])
@pytest.mark.parametrize(
    ("syntax", "definition", "whole"),
    [
        ("regex", "SELECT [a-z]{1,4};", "SELECT [a-z]{1,4};"),
        ("lark", 'start: ("+" WORD "\\n"){2}\nWORD: /[a-z]{1,3}/', r"(\+[a-z]{1,3}\n){2}"),
    ],
)
def test_a_custom_tool_gets_what_its_grammar_allows(
    server: LiveServer, syntax: str, definition: str, whole: str, effort: str
) -> None:
    grammar = {"type": "grammar", "syntax": syntax, "definition": definition}
    body: dict[str, Any] = {
        "input": ASKED,
        "tools": [{"type": "custom", "name": "edit", "format": grammar}],
        "tool_choice": {"type": "custom", "name": "edit"},
        "reasoning": {"effort": effort},
        "seed": 3,
    }
    path = f"{server.url}/v1/responses"
    answer = httpx.post(path, json=body, timeout=60).json()
    assert answer["status"] == "completed"
    assert [item["type"] for item in answer["output"][:-1]] == ["reasoning"] * (effort == "low")
    assert re.fullmatch(whole, answer["output"][-1]["input"])
    events = read_events(httpx.post(path, json={**body, "stream": True}, timeout=60))
    assert checked(events)["output"][-1]["input"] == answer["output"][-1]["input"]


def test_a_conversation_in_the_background(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="millrace-mini",
        input=ASKED,
        temperature=0,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    message: Any = first.output[-1]
    shown = message.content[0]
    assert shown.text == "42"
    assert [one.token for one in shown.logprobs] == ["4", "2"]
    with client.responses.stream(
        model="millrace-mini", input="Thanks", previous_response_id=first.id, background=True
    ) as stream:
        seen: list[Any] = list(stream)
    last = seen[-1].response
    assert last.status == "completed"
    assert last.usage.input_tokens > first.usage.input_tokens  # type: ignore[union-attr]
    assert client.responses.retrieve(last.id).output_text == last.output_text
