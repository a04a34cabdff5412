"""A conversation that this server answered is taken back, however an answer of it ended."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
HI = {"role": "user", "content": "hi"}
CUT = '{"city": "Par'


def chat_call(arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [chat_call(CUT)]},
        {"content": None, "tool_calls": [chat_call("")]},
        {"content": None, "tool_calls": [chat_call("{}"), chat_call("{}")]},
        {"content": None, "reasoning_content": "cut off in thought", "reasoning": "so it is"},
        {"content": None, "refusal": None, "tool_calls": None, "function_call": None},
        {"content": ""},
    ],
)
def test_chat_answers_go_back(http: httpx.Client, message: dict[str, Any]) -> None:
    results = [{"role": "tool", "tool_call_id": "c", "content": None}] * 2
    messages = [HI, {"role": "assistant", **message}, *results, HI]
    answer = http.post(CHAT, json={"messages": messages, "max_tokens": 1})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "tool_use", "id": "c", "name": "f", "input": {}}],
        [{"type": "tool_use", "id": "c", "name": "f", "input": CUT}],
        [{"type": "thinking", "thinking": "cut off", "signature": ""}],
        [{"type": "text", "text": ""}],
        [],
        "",
        None,
    ],
)
def test_messages_go_back(http: httpx.Client, content: Any) -> None:
    result = {"type": "tool_result", "tool_use_id": "c"}
    messages = [
        HI,
        {"role": "assistant", "content": content},
        {"role": "user", "content": [result]},
    ]
    body = {"model": "fake", "max_tokens": 1, "messages": messages}
    answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text


def test_an_empty_message_of_the_assistant_is_continued(http: httpx.Client) -> None:
    for content in ("", [], [{"type": "text", "text": ""}]):
        messages = [HI, {"role": "assistant", "content": content}]
        body = {"model": "fake", "max_tokens": 1, "messages": messages}
        answer = http.post("/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
    calls = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    messages = [HI, {"role": "assistant", "content": [calls]}]
    answer = http.post("/v1/messages", json={**body, "messages": messages})
    assert answer.status_code == 400
    assert "calls tools" in answer.json()["error"]["message"]


def test_items_go_back(http: httpx.Client) -> None:
    thought = {"type": "reasoning", "id": "r", "summary": [], "status": "incomplete",
               "content": [{"type": "reasoning_text", "text": "cut off"}]}  # fmt: skip
    call = {"type": "function_call", "id": "i", "call_id": "c", "name": "f", "arguments": CUT,
            "status": "incomplete"}  # fmt: skip
    text = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    said = {"type": "message", "id": "m", "role": "assistant", "content": [text]}
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    for items in ([thought], [call], [call, output, output], [thought, call, output],
                  [thought, said, call], [output, call], [{**said, "content": None}]):  # fmt: skip
        body = {"input": [HI, *items, HI], "max_output_tokens": 1}
        answer = http.post("/v1/responses", json=body)
        assert answer.status_code == 200, (items, answer.text)


def test_arguments_that_are_none_are_refused(http: httpx.Client) -> None:
    for wrong in ("Paris", "[1]", "{broken"):
        messages = [HI, {"role": "assistant", "content": None, "tool_calls": [chat_call(wrong)]}]
        answer = http.post(CHAT, json={"messages": messages})
        assert answer.status_code == 400
        where = "messages[1].tool_calls[0].function.arguments"
        assert answer.json()["error"]["param"] == where
