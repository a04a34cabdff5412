"""Several conversations in one request, and answers that begin with the last message."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

CHAT = "/v1/chat/completions"
BATCH = "/v1/chat/completions/batch"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_each_conversation_has_its_choice(http: httpx.Client) -> None:
    texts = ["alpha", "beta and more", "gamma"]
    body = {"messages": [user(text) for text in texts], "max_tokens": 12}
    answer = http.post(BATCH, json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    alone = [http.post(CHAT, json={"messages": user(t), "max_tokens": 12}).json() for t in texts]
    for choice, one in zip(answer["choices"], alone, strict=True):
        assert choice["message"] == one["choices"][0]["message"]
    for count in ("prompt_tokens", "completion_tokens"):
        assert answer["usage"][count] == sum(one["usage"][count] for one in alone)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"stream": True}, "stream"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": user("not a list of conversations")}, "messages"),
        ({"logprobs": True, "top_logprobs": 99}, "logprobs"),
    ],
)
def test_what_a_batch_cannot_have_is_refused(
    http: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    refused = http.post(BATCH, json={"messages": [user("a")], **fields})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_begins_with_the_last_message(http: httpx.Client, stream: bool) -> None:
    messages = [*user("say"), {"role": "assistant", "content": "An apple a day"}]
    body = {
        "messages": messages,
        "max_tokens": 5,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "stream": stream,
    }

    def content(**more: Any) -> str:
        answer = http.post(CHAT, json={**body, **more})
        if not stream:
            text: str = answer.json()["choices"][0]["message"]["content"]
            return text
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        return "".join(delta.get("content") or "" for delta in deltas)

    assert content(echo=True) == "An apple a day" + content()


def test_an_echo_without_a_last_answer_is_nothing(http: httpx.Client) -> None:
    body = {"messages": user("hello"), "max_tokens": 5}
    answers = [http.post(CHAT, json={**body, "echo": echo}).json() for echo in (True, False)]
    assert answers[0]["choices"][0]["message"] == answers[1]["choices"][0]["message"]
