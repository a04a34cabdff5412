"""Each feature of the API with drafts and without, streamed and whole, on a real engine in fp32.

All four must say the same, token by token; and what they say must be what was asked for.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.test_choices import events
from tests.support.live_server import started
from tests.support.text_model import TOOLS as TEMPLATE

OPTIONS = (
    "--dtype=float32", "--max-model-len=1024", "--max-num-seqs=4", "--max-num-batched-tokens=64",
    "--kv-cache-memory-bytes=33554432", "--served-model-name=small",
    "--scheduling-policy=priority",
)  # fmt: skip
MTP = '--speculative-config={"method": "mtp", "num_speculative_tokens": 2}'


@pytest.fixture(scope="module")
def clients(
    small_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[httpx.Client]]:
    """A server without drafts and one with two, of the same weights."""
    folder = tmp_path_factory.mktemp("crossed")
    model = shutil.copytree(small_model, folder / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    command = [sys.executable, "-m", "millrace.cli", "serve", str(model), "--port=0", *OPTIONS]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(started([*command, *more], folder / f"log{len(more)}"))
            for more in ([], [MTP])
        ]
        for server in servers:
            server.wait_ready(120)
        yield [
            stack.enter_context(httpx.Client(base_url=server.url, timeout=60)) for server in servers
        ]


class Said:
    """What one answer says, whichever way it came."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.calls: dict[int, list[str]] = {}
        self.reason: str | None = None
        self.logprobs: list[tuple[float, dict[str, float]]] = []

    def add(self, choice: dict[str, Any]) -> None:
        part = choice.get("message") or choice.get("delta") or {"content": choice.get("text")}
        self.tokens += choice["token_ids"]
        self.text += part.get("content") or ""
        self.reason = choice["finish_reason"] or self.reason
        for at, call in enumerate(part.get("tool_calls") or []):
            one = self.calls.setdefault(call.get("index", at), ["", ""])
            one[0] += call["function"].get("name", "")
            one[1] += call["function"]["arguments"]
        known = choice.get("logprobs")
        if known:
            tops = known["top_logprobs"]
            self.logprobs += list(zip(known["token_logprobs"], tops, strict=True))

    def same_as(self, other: Said) -> bool:
        close = [
            abs(a[0] - b[0]) < 1e-3 and a[1].keys() == b[1].keys()
            for a, b in zip(self.logprobs, other.logprobs, strict=True)
        ]
        return all(close) and vars(self) | {"logprobs": 0} == vars(other) | {"logprobs": 0}


def ask(client: httpx.Client, path: str, body: dict[str, Any], stream: bool) -> list[Said]:
    body = {**body, "return_token_ids": True, "return_tokens_as_token_ids": True}
    if stream:
        chunks = events(client, path, {**body, "stream": True})
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
    else:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
    said = [Said() for _ in range(body.get("n", 1))]
    for choice in choices:
        said[choice["index"]].add(choice)
    return said


def everywhere(clients: list[httpx.Client], path: str, body: dict[str, Any]) -> list[Said]:
    """The answer, which is the same in all four ways."""
    first, *others = [ask(one, path, body, stream) for one in clients for stream in (False, True)]
    for other in others:
        assert all(a.same_as(b) for a, b in zip(first, other, strict=True)), (
            [vars(one) for one in first],
            [vars(one) for one in other],
        )
    return first


SAMPLED: dict[str, Any] = {
    "prompt": "Wer reitet", "temperature": 0.8, "seed": 11, "max_tokens": 24, "ignore_eos": True
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "on": {"type": "boolean"}},
    "required": ["name", "on"],
    "additionalProperties": False,
}
CITY = {"type": "string", "enum": ["Rio", "Rome"]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": CITY, "days": {"type": "integer", "maximum": 99}},
                "required": ["city", "days"],
            },
        },
    }
]


def plain(text: str) -> bool:
    return all(char in "abc" for char in text)


CASES: dict[str, tuple[dict[str, Any], Callable[[Said], Any]]] = {
    "plain": ({}, lambda said: len(said.tokens) == 24),
    "min_p": ({"min_p": 0.2}, lambda said: len(said.tokens) == 24),
    "top": ({"top_k": 7, "top_p": 0.6}, lambda said: len(said.tokens) == 24),
    "penalties": (
        {"presence_penalty": 1.5, "frequency_penalty": 1, "repetition_penalty": 1.3},
        lambda said: len(set(said.tokens)) > 12,
    ),
    "bias": ({"logit_bias": {"65": 100}}, lambda said: set(said.tokens) == {65}),
    "allowed": ({"allowed_token_ids": [64, 65, 66]}, lambda said: set(said.tokens) <= {64, 65, 66}),
    "bad_words": (
        {"allowed_token_ids": [64, 65, 66], "bad_words": ["bb", "ca"]},
        lambda said: plain(said.text) and "bb" not in said.text and "ca" not in said.text,
    ),
    "stop": (
        {"allowed_token_ids": [64, 65], "stop": ["bab"], "min_tokens": 4, "max_tokens": 200},
        lambda said: said.reason == "stop" and "bab" not in said.text[4:],
    ),
    "stop_token": (
        {
            "allowed_token_ids": [64, 65, 66],
            "logit_bias": {"66": 2},
            "stop_token_ids": [66],
            "min_tokens": 5,
        },
        lambda said: said.tokens[-1] == 66 and 66 not in said.tokens[5:-1],
    ),
    "logprobs": (
        {"logprobs": 3, "max_tokens": 10},
        lambda said: [len(top) in (3, 4) for _, top in said.logprobs] == [True] * 10,
    ),
    "priority": ({"priority": -3}, lambda said: len(said.tokens) == 24),
    "regex": (
        {"structured_outputs": {"regex": "[0-9]{4}-(ab|cd)+x"}, "max_tokens": 200},
        lambda said: re.fullmatch("[0-9]{4}-(ab|cd)+x", said.text),
    ),
    "choice": (
        {"guided_choice": ["rouge", "noir"]},
        lambda said: said.text in ("rouge", "noir"),
    ),
    "grammar": (
        {"guided_grammar": 'start: "(" start ")" | /[xy]/', "max_tokens": 200},
        lambda said: re.fullmatch(r"\(*[xy]\)*", said.text),
    ),
    "json_schema": (
        {
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "max_tokens": 400,
        },
        lambda said: set(json.loads(said.text)) == {"name", "on"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_completion_is_the_same_in_all_four_ways(clients: list[httpx.Client], name: str) -> None:
    fields, holds = CASES[name]
    (said,) = everywhere(clients, "/v1/completions", {**SAMPLED, **fields})
    assert holds(said), vars(said)


def test_outputs_of_one_prompt_are_those_of_their_seeds(clients: list[httpx.Client]) -> None:
    three = everywhere(clients, "/v1/completions", {**SAMPLED, "n": 3})
    assert len({tuple(said.tokens) for said in three}) == 3
    for at, said in enumerate(three):
        (alone,) = ask(clients[at % 2], "/v1/completions", {**SAMPLED, "seed": 11 + at}, False)
        assert alone.tokens == said.tokens


def test_the_best_is_the_likeliest(clients: list[httpx.Client]) -> None:
    body = {**SAMPLED, "max_tokens": 6, "logprobs": 0}
    all_four = ask(clients[0], "/v1/completions", {**body, "n": 4}, False)
    best = max(all_four, key=lambda said: sum(value for value, _ in said.logprobs))
    for client in clients:
        (found,) = ask(client, "/v1/completions", {**body, "best_of": 4}, False)
        assert found.tokens == best.tokens


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"presence_penalty": 1.0, "repetition_penalty": 1.2},
        {"stop": ["q"], "min_tokens": 12},
        {"structured_outputs": {"regex": "[a-z]{9}[0-9]{2}"}},
        {"logprobs": 1},
    ],
)
def test_a_resumed_output_is_the_same(clients: list[httpx.Client], fields: Any) -> None:
    body = {**SAMPLED, **fields}
    (whole,) = everywhere(clients, "/v1/completions", body)
    for cut, stream in ((1, True), (5, False), (len(whole.tokens) - 1, True)):
        resumed = {**body, "resume_token_ids": whole.tokens[:cut]}
        for client in clients:
            (rest,) = ask(client, "/v1/completions", resumed, stream)
            assert rest.tokens == whole.tokens[cut:]
            assert whole.text.endswith(rest.text)
            assert rest.reason == whole.reason


def test_prompt_logprobs_are_the_same(clients: list[httpx.Client]) -> None:
    body = {**SAMPLED, "max_tokens": 1, "prompt_logprobs": 2}
    for _ in range(2):  # the second time the prompt is in the cache
        tables = [
            one.post("/v1/completions", json=body).json()["choices"][0]["prompt_logprobs"]
            for one in clients
        ]
        assert len(tables[0]) == len(SAMPLED["prompt"])
        for one, other in zip(*tables, strict=True):
            assert (one or {}).keys() == (other or {}).keys()
            for token in one or {}:
                assert one[token]["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-3)


CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Wer reitet so spät?"}],
    "chat_template_kwargs": {"enable_thinking": False},
    "temperature": 0.8,
    "seed": 5,
    "max_tokens": 300,
}


def test_a_tool_is_called_where_it_must_be(clients: list[httpx.Client]) -> None:
    body = {**CHAT, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    (said,) = everywhere(clients, "/v1/chat/completions", body)
    assert said.text == ""
    assert said.reason == "tool_calls"
    ((name, arguments),) = said.calls.values()
    assert name == "weather"
    asked = json.loads(arguments)
    assert asked["city"] in CITY["enum"]
    assert isinstance(asked["days"], int)


def test_a_chat_of_two_structured_outputs(clients: list[httpx.Client]) -> None:
    body = {**CHAT, "n": 2, "structured_outputs": {"json": SCHEMA}}
    for said in everywhere(clients, "/v1/chat/completions", body):
        assert isinstance(json.loads(said.text)["on"], bool)


def test_nothing_is_left_behind(clients: list[httpx.Client]) -> None:
    for client in clients:
        page = client.get("/metrics").text
        for name in ("running", "waiting"):
            found = re.search(rf"^millrace:num_requests_{name}\{{.*\}} (\S+)$", page, re.M)
            assert found
            assert float(found[1]) == 0


@pytest.mark.parametrize("stream", [True, False])
def test_the_other_families_say_what_a_chat_says(clients: list[httpx.Client], stream: bool) -> None:
    body = {**CHAT, "temperature": 0, "max_tokens": 16}
    del body["seed"]
    (chat,) = everywhere(clients, "/v1/chat/completions", body)
    asked = CHAT["messages"]
    message = {"messages": asked, "max_tokens": 16, "temperature": 0, "stream": stream,
               "thinking": {"type": "disabled"}}  # fmt: skip
    response = {"input": asked, "max_output_tokens": 16, "temperature": 0, "stream": stream,
                "reasoning": {"effort": "none"}}  # fmt: skip
    for client in clients:
        for path, other in (("/v1/messages", message), ("/v1/responses", response)):
            answer = client.post(path, json=other)
            assert answer.status_code == 200, answer.text
            assert text_of(answer, path, stream) == chat.text


def text_of(answer: httpx.Response, path: str, stream: bool) -> str:
    """The words of a message or a response."""
    if not stream:
        body = answer.json()
        blocks = body["content"] if path == "/v1/messages" else body["output"][0]["content"]
        return str(blocks[0]["text"])
    kind, where = {
        "/v1/messages": ("content_block_delta", lambda event: event["delta"]["text"]),
        "/v1/responses": ("response.output_text.delta", lambda event: event["delta"]),
    }[path]
    lines = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    found = [json.loads(line.removeprefix("data: ")) for line in lines]
    return "".join(where(event) for event in found if event["type"] == kind)
