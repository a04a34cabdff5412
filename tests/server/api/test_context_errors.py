"""A request that does not fit: the words, codes and numbers that clients look for, on every path.

The patterns are those of the clients themselves: they decide by them whether to shorten a
conversation, to ask for less output or to give up. LiteLLM 1.110 and langchain-openai 1.7 were run
against a server to find them; they are too heavy to be test packages.
"""

from __future__ import annotations

import json
import re
from typing import Any

import anthropic
import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import MAX_MODEL_LEN
from tests.support.live_server import LiveServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
PATHS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)
FAILS_LATER = (RESPONSES, True)  # the error is an event
OUTPUT = {
    CHAT: "max_completion_tokens",
    COMPLETIONS: "max_tokens",
    RESPONSES: "max_output_tokens",
    MESSAGES: "max_tokens",
}

LITELLM = ("this model's maximum context length is", "exceed context limit", "prompt is too long")
OVERFLOW = re.compile(  # opencode, pi and Kilo
    r"prompt is too long|exceeds the context window|maximum context length is \d+ tokens"
    r"|context[_ ]length[_ ]exceeded",
    re.IGNORECASE,
)
# Claude Code's: the numbers tell it how much to cut off, and how much output to ask for.
CLAUDE_PROMPT = re.compile(r"prompt is too long[^0-9]*(\d+)\s*tokens?\s*>\s*(\d+)", re.IGNORECASE)
CLAUDE_OUTPUT = re.compile(
    r"input length and `max_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)"
)


def body(path: str, text: str, output: int | None = None, **fields: Any) -> dict[str, Any]:
    """A request for that path with this text as its prompt."""
    if path == COMPLETIONS:
        fields["prompt"] = text
    elif path == RESPONSES:
        fields["input"] = text
    else:
        fields["messages"] = [{"role": "user", "content": text}]
    if output is not None or path == MESSAGES:
        fields[OUTPUT[path]] = 1 if output is None else output
    return fields


def check_words(path: str, answer: httpx.Response) -> str:
    """The message of an error, which every client must take for an overflow."""
    assert answer.status_code == 400
    error = answer.json()["error"]
    message: str = error["message"]
    assert any(words in message.lower() for words in LITELLM)
    if path == MESSAGES:
        assert answer.json()["type"] == "error"
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"type", "message"}
    else:
        assert OVERFLOW.search(message)
        assert f"maximum context length is {MAX_MODEL_LEN} tokens" in message
        assert error["code"] == "context_length_exceeded"
        assert "context_length_exceeded" in message  # LangChain looks for it there
        assert error["type"] == "invalid_request_error"
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("path", "stream"),
    [(path, stream) for path in PATHS for stream in (False, True) if (path, stream) != FAILS_LATER],
)
@pytest.mark.parametrize(
    "text",
    ["word " * 700, "w" * 3000, "🦊" * 60_000, "word " * 45_000],
    ids=["counted", "one word", "not encoded", "in the sandbox"],
)
def test_a_prompt_that_is_too_long(http: httpx.Client, path: str, stream: bool, text: str) -> None:
    answer = http.post(path, json=body(path, text, stream=stream))
    message = check_words(path, answer)
    if path == MESSAGES:
        found = CLAUDE_PROMPT.search(message)
        assert found
        assert int(found[1]) > int(found[2]) == MAX_MODEL_LEN - 1


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(words=st.integers(1, 200), more=st.integers(1, 10**9), path=st.sampled_from(PATHS))
def test_the_output_that_fits_is_told(http: httpx.Client, words: int, more: int, path: str) -> None:
    """The numbers in the message are true: with what they say, the request is served."""
    text = "a " * words
    message = check_words(path, http.post(path, json=body(path, text, MAX_MODEL_LEN + more)))
    if path == MESSAGES:
        found = CLAUDE_OUTPUT.search(message)
        assert found
        prompt, output, limit = map(int, found.groups())
    else:
        numbers = re.search(r"requested (\d+) tokens \((\d+) in the prompt, (\d+) in", message)
        assert numbers
        both, prompt, output = map(int, numbers.groups())
        assert both == prompt + output
        limit = MAX_MODEL_LEN
    assert (output, limit) == (MAX_MODEL_LEN + more, MAX_MODEL_LEN)
    assert f"an output of at most {limit - prompt} tokens fits" in message
    assert http.post(path, json=body(path, text, limit - prompt)).status_code == 200
    assert http.post(path, json=body(path, text, limit - prompt + 1)).status_code == 400


def test_a_streamed_response_fails_with_an_event(http: httpx.Client) -> None:
    """Codex finds the error only in `response.failed`; opencode and the SDKs in `error`."""
    with http.stream("POST", RESPONSES, json=body(RESPONSES, "word " * 700, stream=True)) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    error, failed = (json.loads(line[6:]) for line in text.splitlines() if line[:5] == "data:")
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["code"] == error["code"] == "context_length_exceeded"
    assert OVERFLOW.search(error["error"]["message"])
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "context_length_exceeded"
    assert [error["sequence_number"], failed["sequence_number"]] == [0, 1]


def test_a_streamed_response_that_is_wrong_otherwise_has_a_status(http: httpx.Client) -> None:
    wrong = body(RESPONSES, "hi", stream=True, temperature=-1)
    assert http.post(RESPONSES, json=wrong).status_code == 400


def test_the_prompt_that_is_too_long_is_named(http: httpx.Client) -> None:
    prompts = ["a", "b", "word " * 700]
    message = check_words(COMPLETIONS, http.post(COMPLETIONS, json={"prompt": prompts}))
    assert message.startswith("prompt[2]: This model's")


@pytest.mark.parametrize(
    ("kept", "output", "fits"),
    [(100, 10, True), (-1, 10, True), (MAX_MODEL_LEN, 10, False), (500, 100, False)],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("text", ["word " * 700, "word " * 45_000])
def test_a_truncated_prompt_fits_if_what_is_left_does(
    http: httpx.Client, path: str, text: str, kept: int, output: int, fits: bool
) -> None:
    answer = http.post(path, json=body(path, text, output, truncate_prompt_tokens=kept))
    if not fits:
        check_words(path, answer)
        return
    assert answer.status_code == 200, answer.text
    length = MAX_MODEL_LEN - output if kept == -1 else kept
    assert answer.json()["usage"]["prompt_tokens"] == length


@pytest.mark.parametrize("words", [700, 45_000])
def test_what_is_too_long_can_be_counted(http: httpx.Client, words: int) -> None:
    """Agents ask for the count to know how much to cut off."""
    chat = {"messages": [{"role": "user", "content": "word " * words}]}
    answer = http.post("/v1/messages/count_tokens", json=chat)
    assert answer.json()["input_tokens"] > words


def test_too_many_tokens_to_resume(http: httpx.Client) -> None:
    wanted = {"prompt": [71] * 500, "resume_token_ids": [71] * 20, "max_tokens": 20}
    check_words(COMPLETIONS, http.post(COMPLETIONS, json=wanted))


def test_tokens_that_are_too_many_to_show(http: httpx.Client) -> None:
    answer = http.post("/detokenize", json={"tokens": [71] * (MAX_MODEL_LEN + 1)})
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is" in answer.json()["error"]["message"]
    answer = http.post("/tokenize", json={"prompt": "🦊" * 60_000})
    check_words("/tokenize", answer)


# --- the official clients -----------------------------------------------------------------------


def test_the_exceptions_of_openai(client: openai.OpenAI) -> None:
    long: Any = "word " * 700
    chat: Any = [{"role": "user", "content": long}]
    calls: list[Any] = [
        lambda: client.chat.completions.create(model="fake", messages=chat),
        lambda: client.chat.completions.create(model="fake", messages=chat, stream=True),
        lambda: client.completions.create(model="fake", prompt=long),
        lambda: client.responses.create(model="fake", input=long),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIError) as failed:
        list(client.responses.create(model="fake", input=long, stream=True))
    assert failed.value.code == "context_length_exceeded"


def test_the_exceptions_of_anthropic(server: LiveServer) -> None:
    one = anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0)
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="prompt is too long: ") as caught:
            one.messages.create(
                model="fake", max_tokens=5, stream=stream,
                messages=[{"role": "user", "content": "word " * 700}],
            )  # fmt: skip
        assert caught.value.response.json()["error"]["type"] == "invalid_request_error"
