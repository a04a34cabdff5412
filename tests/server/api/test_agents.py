"""What clients of agents send, in every chat API: lines of their own, efforts, refused chats."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.fake_engine import Behaviour
from tests.support.live_server import fake_server
from tests.support.text_model import TEMPLATE, token_id, write_text_model

LINE = "x-anthropic-billing-header: cc_version=2.1.37.1ab; cc_entrypoint=cli; cch={};"
REFUSING = (
    """\
{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}
    {{- raise_exception('No user query found in messages.') }}
{%- endif %}
{%- set effort = reasoning_effort | default('medium') %}
{%- if effort not in ['low', 'medium', 'xhigh'] %}
    {{- raise_exception('Unknown effort ' ~ effort) }}
{%- endif %}
{{- '<|im_start|>effort ' ~ effort ~ '<|im_end|>\\n' }}
"""
    + TEMPLATE
)
PATHS = {
    "chat": "/v1/chat/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
    "count": "/v1/messages/count_tokens",
    "input_tokens": "/v1/responses/input_tokens",
    "tokenize": "/tokenize",
}


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A fake engine that echoes its prompt."""
    folder = tmp_path_factory.mktemp("agents")
    model = write_text_model(folder / "model", REFUSING)
    behaviour = Behaviour(eos=token_id(model, "<|endoftext|>"))
    with (
        fake_server(model, folder / "log", behaviour, max_model_len=512) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield client


def body(api: str, system: str, role: str = "user", **more: Any) -> dict[str, Any]:
    message = {"role": role, "content": "hello"}
    if api in ("messages", "count"):
        limit = {"max_tokens": 90} if api == "messages" else {}
        return {"system": system, "messages": [message], **limit, **more}
    if api in ("responses", "input_tokens"):
        return {"instructions": system, "input": [message], **more}
    return {"messages": [{"role": "system", "content": system}, message], **more}


def prompt_of(http: httpx.Client, api: str, given: dict[str, Any]) -> Any:
    """What the API shows of a prompt: what was echoed, or its tokens."""
    answer = http.post(PATHS[api], json=given)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    if api == "chat":
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]
    if api == "messages":
        return found["content"][0]["text"], found["usage"]["input_tokens"]
    if api == "responses":
        return found["output"][0]["content"][0]["text"], found["usage"]["input_tokens"]
    return found.get("input_tokens") or found["tokens"]


@pytest.mark.parametrize("api", PATHS)
def test_a_line_of_the_client_does_not_reach_the_prompt(http: httpx.Client, api: str) -> None:
    plain = prompt_of(http, api, body(api, "Be brief."))
    for number in ("a1b2c", "00fff"):
        system = f"{LINE.format(number)}\nBe brief."
        assert prompt_of(http, api, body(api, system)) == plain
    if api in ("messages", "count"):
        blocks = [{"type": "text", "text": t} for t in (LINE.format(9), "Be brief.")]
        assert prompt_of(http, api, {**body(api, ""), "system": blocks}) == plain


@pytest.mark.parametrize("api", PATHS)
def test_a_chat_that_the_template_refuses_gets_its_words(http: httpx.Client, api: str) -> None:
    answer = http.post(PATHS[api], json=body(api, "Be brief.", role="assistant"))
    assert answer.status_code == 400
    assert "No user query found in messages." in answer.json()["error"]["message"]


EFFORT = {
    "chat": lambda word: {"reasoning_effort": word},
    "messages": lambda word: {"output_config": {"effort": word}},
    "responses": lambda word: {"reasoning": {"effort": word}},
}


@pytest.mark.parametrize("api", EFFORT)
@pytest.mark.parametrize(
    ("word", "told"),
    [("minimal", "low"), ("low", "low"), ("medium", "medium"), ("high", "xhigh"), ("max", "xhigh")],
)
def test_every_word_of_effort_becomes_one_that_the_template_knows(
    http: httpx.Client, api: str, word: str, told: str
) -> None:
    text, _ = prompt_of(http, api, body(api, "Be brief.", **EFFORT[api](word)))
    assert f"effort {told}" in text


@pytest.mark.parametrize("api", EFFORT)
def test_an_effort_that_nobody_knows_is_refused(http: httpx.Client, api: str) -> None:
    answer = http.post(PATHS[api], json=body(api, "Be brief.", **EFFORT[api]("huge")))
    assert answer.status_code == 400
    assert "must be one of none, minimal, low" in answer.json()["error"]["message"]
    chosen = {"chat_template_kwargs": {"reasoning_effort": "max"}}
    text, _ = prompt_of(http, api, body(api, "Be brief.", **chosen))
    assert "effort xhigh" in text
