"""Every kind of stream against OpenAI's types, and the same answer without a stream.

The fake engine echoes the prompt up to the user's turn end, so the user's words are the answer.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.api.openai_responses.response_events import checked, read_events

FUNCTION: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = (
    "<tool_call>\n<function=weather>\n"
    "<parameter=city>\nRio\n</parameter>\n</function>\n</tool_call>"
)
ANSWER = f"hm\n</think>\n\nSo 🦊:\n\n{CALL}"
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def without_names(response: dict[str, Any]) -> Any:
    """A response less ids and times, which differ each time."""
    text = json.dumps({**response, "created_at": 0, "completed_at": 0}, sort_keys=True)
    for item in response["output"]:
        for key in ("id", "call_id"):
            text = text.replace(str(item.get(key)), key)
    return json.loads(text.replace(response["id"], "id"))


@pytest.mark.parametrize(
    "fields",
    [
        {"input": ANSWER, "tools": [FUNCTION]},
        {"input": ANSWER, "tools": [FUNCTION], **LOGPROBS},
        {"input": ANSWER, "tools": [FUNCTION], "include_reasoning": False, **LOGPROBS},
        {"input": "only thoughts"},
        {"input": "hello", "max_output_tokens": 2},
        {"input": ANSWER, "tools": [FUNCTION], "max_output_tokens": 60},
        {"input": "</think> hello", "stop": ["lo"], **LOGPROBS},
        {"input": ANSWER, "tools": [FUNCTION], "stream_interval": 3, **LOGPROBS},
        {"input": ANSWER, "tools": [FUNCTION], "stream_interval": 17, "stop": ["Rio"]},
    ],
)
def test_a_stream_is_as_the_types_say_and_as_the_whole_answer(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    body = {"model": "fake", "metadata": {"a": "b"}, "seed": 1, **fields}
    streamed = checked(read_events(http.post("/v1/responses", json={**body, "stream": True})))
    whole = http.post("/v1/responses", json=body).json()
    assert without_names(streamed) == without_names(whole)


@pytest.mark.parametrize(
    ("limit", "kinds"), [(2, ["reasoning"]), (16, ["reasoning", "message"]), (62, None)]
)
def test_an_item_that_is_cut_off_is_incomplete(
    http: httpx.Client, limit: int, kinds: list[str] | None
) -> None:
    body = {"input": ANSWER, "tools": [FUNCTION], "max_output_tokens": limit}
    answer = http.post("/v1/responses", json=body).json()
    assert answer["status"] == "incomplete"
    *before, last = answer["output"]
    assert last["status"] == "incomplete"
    assert all(item["status"] == "completed" for item in before)
    if kinds:
        assert [item["type"] for item in answer["output"]] == kinds
    else:
        assert last["type"] == "function_call"


def test_log_probabilities_are_those_of_the_text(client: openai.OpenAI) -> None:
    response = client.responses.create(model="fake", input=ANSWER, tools=[FUNCTION], **LOGPROBS)
    message: Any = response.output[1]
    text = message.content[0]
    assert bytes(b for one in text.logprobs for b in one.bytes).decode().strip() == text.text
    assert all(len(one.top_logprobs) == 2 for one in text.logprobs)
    plain = client.responses.create(model="fake", input=ANSWER, top_logprobs=2)
    assert plain.top_logprobs == 2
    assert plain.output[-1].content[0].logprobs == []  # type: ignore[union-attr, index]
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        client.responses.create(model="fake", input="a", **{**LOGPROBS, "top_logprobs": 99})


def test_what_changes_nothing_is_repeated(client: openai.OpenAI) -> None:
    fields: Any = {
        "metadata": {"a": "b"},
        "max_tool_calls": 3,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "user": "u",
        "truncation": "auto",
        "instructions": "Be brief.",
    }
    response = client.responses.create(model="fake", input="hello", max_output_tokens=3, **fields)
    assert {name: getattr(response, name) for name in fields} == fields
    assert (response.service_tier, response.background, response.conversation) == (
        "default",
        False,
        None,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conversation": "conv_1"}, "there are no conversation objects; use previous_response_id"),
        ({"conversation": {"id": "conv_1"}}, "there are no conversation objects"),
        ({"prompt": {"id": "p"}}, "there are no stored prompts"),
        ({"max_tool_calls": 0}, "max_tool_calls must be at least 1"),
        ({"include": ["the.moon"]}, "'the.moon' is not known"),
        ({"truncation": "some"}, "truncation"),
        ({"previous_input_messages": [{}]}, "use previous_response_id"),
        ({"watermarking": True}, "texts are not marked"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(
    http: httpx.Client, fields: dict[str, Any], message: str
) -> None:
    answer = http.post("/v1/responses", json={"input": "hello", **fields})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_what_the_model_reads_and_writes_is_shown_on_request(http: httpx.Client) -> None:
    body = {"input": "x </think> hello", "enable_response_messages": True}
    whole = http.post("/v1/responses", json=body).json()
    streamed = checked(read_events(http.post("/v1/responses", json={**body, "stream": True})))
    for shown in (whole, streamed):
        (prompt,), (output,) = shown["input_messages"], shown["output_messages"]
        assert prompt["message"].startswith("<|im_start|>user\nx </think> hello<|im_end|>")
        assert output["message"] == "<|im_start|>user\nx </think> hello<|im_end|>"
        assert prompt["type"] == output["type"] == "raw_message_tokens"
        assert len(prompt["tokens"]) == shown["usage"]["input_tokens"]
        assert len(output["tokens"]) == shown["usage"]["output_tokens"]
    assert "input_messages" not in http.post("/v1/responses", json={"input": "x"}).json()


def test_fields_of_vllm_mean_what_they_mean_in_chats(http: httpx.Client) -> None:
    body = {"input": "</think> END. and more", "ignore_eos": True, "max_output_tokens": 30}
    stop = http.post("/v1/responses", json={**body, "include_stop_str_in_output": True,
                                            "stop": ["END"]}).json()  # fmt: skip
    assert stop["output"][-1]["content"][0]["text"] == "END"
    shown = http.post("/v1/responses", json={**body, "skip_special_tokens": False}).json()
    assert "<|im_end|>" in shown["output"][-1]["content"][0]["text"]


def test_an_input_too_long_loses_its_oldest_messages(http: httpx.Client) -> None:
    old = [
        {"role": role, "content": f"{role} {at} " + "spät " * 30}
        for at in range(20)
        for role in ("user", "assistant")
    ]
    body = {"input": [*old, {"role": "user", "content": "last </think> one"}], "instructions": "I"}
    refused = http.post("/v1/responses", json=body)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    answer = http.post("/v1/responses", json={**body, "truncation": "auto"}).json()
    assert answer["status"] == "completed"
    used = answer["usage"]["input_tokens"]
    assert 600 < used <= 1024 - 128  # as much as fits, with room for an answer
    bounded = {**body, "truncation": "auto", "max_output_tokens": 500}
    assert http.post("/v1/responses", json=bounded).json()["usage"]["input_tokens"] <= 524
    alone = {"input": "spät " * 2000, "truncation": "auto"}
    assert http.post("/v1/responses", json=alone).json()["error"]["code"] == (
        "context_length_exceeded"
    )
