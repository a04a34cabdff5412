"""Every wrong request: a status, an OpenAI-shaped body that names the fault, and no trace left."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.server.api.field_table import FIELDS as TABLE
from millrace.server.api.field_table import Refusal
from millrace.server.api.request_schema import ChatRequest, CompletionRequest
from tests.support.live_server import LiveServer, wait_for

MESSAGES = [{"role": "user", "content": "hi"}]
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


REFUSED = {
    name: fates["completions"]
    for name, fates in TABLE.items()
    if isinstance(fates["completions"], Refusal)
}


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a refused request, its shape checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (key,) = answer.json()
    assert key == "error"
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


@pytest.fixture(autouse=True)
def _server_is_well_afterwards(http: httpx.Client, server: LiveServer) -> Any:
    yield
    answer = http.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 1})
    assert answer.status_code == 200
    wait_for(lambda: server.open_in_engine() == 0)
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 512}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": 3, "stream": True}, "stream_options"),
        ({"model": 7}, "model"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_wrong_field_is_named(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    prompt = {"prompt": "hello"} if path == COMPLETIONS else {"messages": MESSAGES}
    error = refused(http.post(path, json={**prompt, **fields}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt is missing"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": ["hello", ""]}, "the prompt is empty"),
        ({"prompt": ["a", 1]}, "mixes"),
        ({"prompt": [1, [2]]}, "mixes"),
        ({"prompt": [[1, "a"]]}, "prompt"),
        ({"prompt": [1, 10**9]}, "1000000000 is out of vocabulary"),
        ({"prompt": [-5]}, "-5 is out of vocabulary"),
        ({"prompt": [2**70]}, f"{2**70} is out of vocabulary"),
        ({"prompt": [71] * 512}, "has 512 tokens"),
        ({"prompt": [71] * 600}, "at most 511 tokens leave room"),
        ({"prompt": [71] * 500, "max_tokens": 100}, "an output of at most 12 tokens fits"),
        ({"prompt": ["hello"] * 5000}, "5000 entries; at most 1024 work"),
        ({"prompt": "two words"}, "this prompt can never run"),
        ({"prompt": "two words", "stream": True}, "this prompt can never run"),
    ],
)
def test_a_wrong_prompt_is_refused(http: httpx.Client, body: dict[str, Any], message: str) -> None:
    assert message in refused(http.post(COMPLETIONS, json=body), 400)["message"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages"),
        ([], "messages is empty"),
        ("hello", "messages"),
        (["hello"], "messages"),
        ([{"role": "user"}], "messages[0].content is missing"),
        ([{"role": "wizard", "content": "x"}], "Unexpected role wizard"),
        ([{"role": "user", "content": "x" * 9000}], "maximum context length is 512 tokens"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "reads text only"),
    ],
)
def test_wrong_messages_are_refused(http: httpx.Client, messages: Any, message: str) -> None:
    answer = http.post(CHAT, json={"messages": messages})
    assert message in refused(answer, 400)["message"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_change_the_answer_is_refused(http: httpx.Client, name: str) -> None:
    body = {"prompt": "hello", name: [{"not": "neutral"}]}
    error = refused(http.post(COMPLETIONS, json=body), 400)
    assert error["param"] == name
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_changes_nothing_is_accepted(http: httpx.Client, name: str) -> None:
    for neutral in (None, *REFUSED[name].neutral):
        answer = http.post(COMPLETIONS, json={"prompt": "hello", name: neutral})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "field", "words"),
    [
        (COMPLETIONS, {"tools": [{"type": "function"}]}, f"it belongs to {CHAT}"),
        (COMPLETIONS, {"messages": MESSAGES}, f"it belongs to {CHAT}"),
        (COMPLETIONS, {"top_logprobs": 2}, "use logprobs"),
        (CHAT, {"best_of": 2}, "use n"),
        (CHAT, {"prompt": "hello"}, "use messages"),
    ],
)
def test_a_field_of_the_other_endpoint_is_refused(
    http: httpx.Client, path: str, field: dict[str, Any], words: str
) -> None:
    error = refused(http.post(path, json={**ASKED[path], **field}), 400)
    assert words in error["message"]
    neutral = {"tools": None, "echo": False, "add_generation_prompt": True}
    assert http.post(path, json={**ASKED[path], "max_tokens": 1, **neutral}).status_code == 200


def test_a_top_k_above_the_vocabulary_keeps_every_token(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, json={"prompt": "hello", "top_k": 2**70})
    assert answer.status_code == 200


def test_unknown_and_harmless_fields_are_ignored(http: httpx.Client, server: LiveServer) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "user": "me", "frobnicate": {"a": 1}}
    assert http.post(COMPLETIONS, json=body).status_code == 200
    assert "unknown field 'frobnicate' is ignored" in server.log
    assert "field 'user' has no effect here" in server.log


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}',
        b'{"prompt": "a"} trailing',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"}",
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
)
def test_rubbish_is_refused(http: httpx.Client, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    refused(http.post(COMPLETIONS, content=content, headers=headers), 400)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
FIELDS = sorted({*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__, *REFUSED})
PLAUSIBLE = {"max_tokens": 3, "model": "fake", "stream": True}
ASKED: dict[str, Any] = {COMPLETIONS: {"prompt": "hello"}, CHAT: {"messages": MESSAGES}}


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from([COMPLETIONS, CHAT]),
    odd=st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3),
)
def test_no_body_makes_the_server_fail(http: httpx.Client, path: str, odd: dict[str, Any]) -> None:
    answer = http.post(path, json={**PLAUSIBLE, **ASKED[path], **odd})
    if answer.status_code != 200:
        assert answer.status_code in (400, 404)
        refused(answer, answer.status_code)
    else:
        assert "error" not in answer.text


def test_a_large_body_is_refused_before_it_is_read(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * (1 << 20)})
    error = refused(http.post(COMPLETIONS, content=body), 413)
    assert "--max-body-bytes" in error["message"]


def test_a_large_body_of_unknown_length_is_refused(http: httpx.Client) -> None:
    parts = (b'{"prompt": "' if at == 0 else b"x" * 65536 for at in range(40))
    refused(http.post(COMPLETIONS, content=parts), 413)


def test_another_content_type_is_refused(http: httpx.Client) -> None:
    answer = http.post(COMPLETIONS, data={"prompt": "hello"})
    assert "send application/json" in refused(answer, 415)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", COMPLETIONS, 405), ("POST", "/health", 405)],
)
def test_a_wrong_path_or_method(http: httpx.Client, method: str, path: str, status: int) -> None:
    refused(http.request(method, path), status)


def test_a_body_that_ends_early_harms_nothing(server: LiveServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 500\r\n\r\n{"prompt": '
        )


def test_bytes_that_are_no_http_harm_nothing(server: LiveServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"\x16\x03\x01 hello \r\n\r\n")
        assert b" 400 " in connection.recv(1000)
