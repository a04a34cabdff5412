"""Reasoning in chat answers, by the official client.

The fake engine echoes the prompt up to the user's turn end, so the user's words are the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from millrace.model_lookup import find_model
from tests.support.fake_engine import Behaviour
from tests.support.live_server import LiveServer, fake_server, started
from tests.support.text_model import THINKING, token_id, write_text_model

OFF = {"chat_template_kwargs": {"enable_thinking": False}}


def _server(folder: Path, **options: Any) -> Any:
    model = write_text_model(folder / "model", THINKING)
    behaviour = Behaviour(eos=token_id(model, "<|im_end|>"))
    return fake_server(model, folder / "log", behaviour, max_model_len=512, **options)


def _client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("thinking")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[openai.OpenAI]:
    with _server(folder) as server:
        yield _client(server)


@pytest.fixture
def end(client: openai.OpenAI, folder: Path) -> int:
    """The token that ends reasoning."""
    return token_id(folder / "model", "</think>")


def ask(client: openai.OpenAI, words: str, **more: Any) -> Any:
    return client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": words}], **more
    )


def streamed(chunks: list[Any], name: str) -> str | None:
    """All of one part; None where no chunk has it."""
    parts = [getattr(chunk.choices[0].delta, name, None) for chunk in chunks]
    known = [part for part in parts if part is not None]
    return "".join(known) if known else None


@pytest.mark.parametrize(
    ("words", "more", "reasoning", "content"),
    [
        ("So spät.\n</think>\n\nHello 🦊", {}, "user\nSo spät.", "Hello 🦊"),
        ("no end", {}, "user\nno end", None),
        ("a </think> b STOP c", {"stop": ["STOP"]}, "user\na", "b "),
        ("a STOP </think> b", {"stop": ["STOP"]}, "user\na ", None),
        ("a </think> b", {"extra_body": OFF}, None, "user\na </think> b"),
    ],
)
def test_both_parts_whole_and_streamed(
    client: openai.OpenAI, words: str, more: Any, reasoning: str | None, content: str | None
) -> None:
    whole = ask(client, words, **more)
    message = whole.choices[0].message
    assert message.content == content
    for name in ("reasoning_content", "reasoning"):
        assert getattr(message, name, None) == reasoning
    options = {"include_usage": True}
    *chunks, last = list(ask(client, words, stream=True, stream_options=options, **more))
    assert streamed(chunks, "content") == content
    for name in ("reasoning_content", "reasoning"):
        assert streamed(chunks, name) == reasoning
    assert last.usage == whole.usage
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].stop_reason == whole.choices[0].stop_reason


def test_token_ids_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    whole = ask(client, "a </think> b", extra_body=extra)
    chunks = list(ask(client, "a </think> b", extra_body=extra, stream=True))
    ids = whole.choices[0].token_ids
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == ids
    assert len(ids) == whole.usage.completion_tokens


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    with _server(tmp_path, reasoning_parser="none") as server:
        answer = ask(_client(server), "a </think> b")
    assert answer.choices[0].message.content == "user\na </think> b"
    assert answer.choices[0].message.reasoning_content is None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


def test_the_model_that_ships_answers_without_its_marker(tmp_path: Path) -> None:
    model = str(find_model("millrace-mini"))
    command = [sys.executable, "-m", "millrace.cli", "serve", model, "--port=0",
               "--served-model-name=fake", "--max-model-len=256", "--max-num-seqs=2",
               "--kv-cache-memory-bytes=16777216"]  # fmt: skip
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    with started(command, tmp_path / "log") as server:
        server.wait_ready(120)
        client = _client(server)
        content = ask(client, "hello", **greedy).choices[0].message.content
        chunks = list(ask(client, "hello", stream=True, **greedy))
    assert content.startswith("Hello")
    assert "think>" not in content
    assert streamed(chunks, "content") == content


def closed_at(answer: Any, end: int) -> int | None:
    """How many tokens stand before the end of the reasoning."""
    ids = answer.choices[0].token_ids
    return ids.index(end) if end in ids else None


@pytest.mark.parametrize("budget", [0, 5, 2**70])
def test_a_budget_is_taken(client: openai.OpenAI, end: int, budget: int) -> None:
    wanted = {"thinking_token_budget": budget, "return_token_ids": True}
    answer = ask(client, "so it is", extra_body=wanted)
    assert closed_at(answer, end) == (budget if budget < 100 else None)
    assert (answer.choices[0].message.content is None) == (budget > 100)
    assert bool(answer.choices[0].message.reasoning) == (budget > 0)
    off = ask(client, "so it is", extra_body={**wanted, **OFF})
    assert closed_at(off, end) is None


def test_a_budget_holds_where_reasoning_is_not_told_apart(tmp_path: Path) -> None:
    with _server(tmp_path, reasoning_parser="none") as server:
        wanted = {"thinking_token_budget": 3, "return_token_ids": True}
        answer = ask(_client(server), "so it is", extra_body=wanted)
    assert closed_at(answer, token_id(tmp_path / "model", "</think>")) == 3


def test_a_budget_of_minus_one_is_no_limit(client: openai.OpenAI, end: int) -> None:
    wanted = {"thinking_token_budget": -1, "return_token_ids": True}
    free = ask(client, "so it is", extra_body={"return_token_ids": True})
    assert (
        ask(client, "so it is", extra_body=wanted).choices[0].token_ids == free.choices[0].token_ids
    )


def test_the_tokens_of_reasoning_are_counted(client: openai.OpenAI, end: int) -> None:
    ids = {"return_token_ids": True}
    answer = ask(client, "So spät </think> Hello", extra_body=ids)
    count = answer.usage.completion_tokens_details.reasoning_tokens
    assert count == closed_at(answer, end)
    unclosed = ask(client, "no end", n=2)
    details = unclosed.usage.completion_tokens_details
    assert details.reasoning_tokens == unclosed.usage.completion_tokens
    resumed = {"resume_token_ids": answer.choices[0].token_ids[:-2]}
    again = ask(client, "So spät </think> Hello", extra_body=resumed)
    assert again.usage.completion_tokens_details.reasoning_tokens == count
    options = {"include_usage": True}
    *_, last = ask(client, "So spät </think> Hello", stream=True, stream_options=options)
    assert last.usage == answer.usage


def test_a_budget_below_zero_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="thinking_token_budget must be at least 0"):
        ask(client, "x", extra_body={"thinking_token_budget": -2})
    with pytest.raises(openai.BadRequestError, match="thinking_token_budget must be at least 0"):
        ask(client, "x", extra_body={"thinking_token_budget": -2, **OFF})


WAYS_OFF: list[dict[str, Any]] = [
    OFF,
    {"enable_thinking": False},
    {"thinking": {"type": "disabled"}},
    {"reasoning_effort": "none"},
    {"reasoning": {"effort": "none"}},
    {"enable_thinking": False, "reasoning_effort": "high"},
    {"thinking": {"type": "enabled"}, **OFF},
]
WAYS_ON: list[dict[str, Any]] = [
    {},
    {"enable_thinking": True},
    {"thinking": {"type": "enabled", "budget_tokens": 500}},
    {"thinking": {"type": "adaptive"}},
    {"reasoning": {"effort": "low", "summary": "auto"}},
    {"enable_thinking": None, "thinking": None, "reasoning": None},
]


@pytest.mark.parametrize(
    ("more", "reasons"), [*((one, False) for one in WAYS_OFF), *((one, True) for one in WAYS_ON)]
)
def test_every_way_to_turn_thinking_on_or_off(
    client: openai.OpenAI, more: dict[str, Any], reasons: bool
) -> None:
    message = ask(client, "a </think> b", extra_body=more).choices[0].message
    assert message.content == ("b" if reasons else "user\na </think> b")


def test_the_budget_of_thinking_is_the_same_under_both_names(client: openai.OpenAI) -> None:
    words = "one two three four five six </think> seven"
    told = [
        ask(client, words, extra_body=more).choices[0].message.model_dump()
        for more in (
            {"thinking_token_budget": 4},
            {"thinking": {"type": "enabled", "budget_tokens": 4}},
        )
    ]
    assert told[0] == told[1] != ask(client, words).choices[0].message.model_dump()
