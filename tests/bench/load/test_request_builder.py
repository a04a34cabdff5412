"""Requests: the file's own work, in the form that the API takes, with each header once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from millrace.bench.flags.structs import ServeFlags
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.request_builder import make_job
from millrace.bench.runs.options_from_flags import ignored_proxy, metadata_fields, serve_options
from millrace.bench.workload.prompts import Prompt, RandomSpec
from millrace.common.http_client import encode_request, parse_url
from millrace.errors import UserError

WORKLOAD = RandomSpec(count=1, input_len=1, output_len=1)
CALL = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": "{}"}}


def sent(prompt: Prompt, backend: Any = "openai", **more: Any) -> dict[str, Any]:
    options = BenchOptions(
        target=parse_url("http://h:1"), workload=WORKLOAD, backend=backend, **more
    )
    body: dict[str, Any] = json.loads(make_job(options, "m", prompt).request.split(b"\r\n\r\n")[1])
    return body


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("a"), user("b")], "a\n\nb"),
        ([user([{"type": "text", "text": "Name "}, {"type": "text", "text": "one"}])], "Name one"),
        ([user("w?"), {"role": "assistant", "content": None}, user("x")], "w?\n\nx"),
        (
            [user("w?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            'w?\n\n[{"name":"w","arguments":"{}"}]',
        ),
    ],
)
def test_messages_become_the_text_that_they_hold(messages: list[Any], expected: str) -> None:
    assert sent(Prompt(messages, 1, 1))["prompt"] == expected
    assert sent(Prompt(messages, 1, 1), "openai-chat")["messages"] == messages


def test_a_part_that_is_no_text_is_sent_in_a_chat_and_refused_elsewhere() -> None:
    messages = [user([{"type": "image_url", "image_url": {"url": "data:"}}])]
    assert sent(Prompt(messages, 1, 1), "openai-chat")["messages"] == messages
    with pytest.raises(UserError, match="type 'image_url', which is no text"):
        sent(Prompt(messages, 1, 1))


def test_token_ids_are_no_chat_message() -> None:
    assert sent(Prompt([1, 2], 2, 1))["prompt"] == [1, 2]
    with pytest.raises(UserError, match="token ids cannot be sent as a chat message"):
        sent(Prompt([1, 2], 2, 1), "openai-chat")


def test_further_fields_of_a_files_request_are_sent_and_flags_win() -> None:
    prompt = Prompt("x", 1, 5, extra={"temperature": 0.5, "top_p": 0.9, "tools": [1]})
    body = sent(prompt, extra_body={"top_p": 0.1})
    assert (body["temperature"], body["top_p"], body["tools"]) == (0.5, 0.1, [1])
    assert (body["model"], body["max_tokens"], body["stream"]) == ("m", 5, True)


# --- headers -----------------------------------------------------------------------------------


def lines(headers: tuple[tuple[str, str], ...], body: bytes = b"{}") -> list[str]:
    request = encode_request(parse_url("http://h:1/p?v=2"), "POST", "/x", body, headers)
    return request.decode().split("\r\n\r\n")[0].split("\r\n")


def test_headers_of_the_caller_replace_our_own_and_are_sent_once() -> None:
    given = (("HOST", "other"), ("content-type", "a/b"), ("X-A", "1"), ("x-a", "2"))
    assert lines(given) == [
        *("POST /p/x?v=2 HTTP/1.1", "HOST: other", "content-type: a/b", "X-A: 1"),
        "Content-Length: 2",
    ]


def test_the_framing_is_not_the_callers() -> None:
    given = (("Content-Length", "9"), ("Transfer-Encoding", "chunked"))
    assert lines(given)[-1] == "Content-Length: 2"
    assert lines((), b"")[-1] == "Content-Length: 0"


def headers_of(monkeypatch: pytest.MonkeyPatch, key: str, *header: str) -> dict[str, str]:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    return dict(serve_options(ServeFlags(header=list(header))).headers)


def test_an_explicit_key_wins_over_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    explicit = headers_of(monkeypatch, "env", "authorization=Bearer mine")
    assert explicit == {"authorization": "Bearer mine"}
    assert headers_of(monkeypatch, "env") == {"Authorization": "Bearer env"}
    assert headers_of(monkeypatch, "") == {}


def test_a_key_with_a_line_end_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert headers_of(monkeypatch, " sk-abc\r\n") == {"Authorization": "Bearer sk-abc"}


@pytest.mark.parametrize(
    ("key", "header", "expected"),
    [
        ("a\r\nX-Evil: 1", "A=b", "OPENAI_API_KEY: there is a line end"),
        ("", "A=b\r\nX-Evil: 1", "--header A: its value has a line end"),
        ("", "A B=c", "use the form Name=Value"),
        ("", "Content-Length=5", "the load generator sets this header"),
    ],
)
def test_bad_headers_are_refused(
    monkeypatch: pytest.MonkeyPatch, key: str, header: str, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        headers_of(monkeypatch, key, header)


# --- addresses and names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1/v1", "POST /v1/completions HTTP/1.1"),
        ("http://h:1/v1/", "POST /v1/completions HTTP/1.1"),
        ("http://h:1/team/v1?api-version=3", "POST /team/v1/completions?api-version=3 HTTP/1.1"),
        ("h:1", "POST /v1/completions HTTP/1.1"),
        ("h:1/v1/chat/completions", "POST /v1/completions HTTP/1.1"),
        ("http://h:1/a/v1/completions", "POST /a/v1/completions HTTP/1.1"),
    ],
)
def test_a_base_url_may_have_a_path_and_a_query(url: str, expected: str) -> None:
    options = serve_options(ServeFlags(base_url=url))
    request = make_job(options, "m", Prompt([1], 1, 1)).request
    assert request.decode().split("\r\n")[0] == expected


def test_an_endpoint_is_a_path_behind_the_base_url() -> None:
    options = serve_options(ServeFlags(base_url="http://h:1/v1", endpoint="complete"))
    request = make_job(options, "m", Prompt([1], 1, 1)).request
    assert request.startswith(b"POST /v1/complete HTTP/1.1")


@pytest.mark.parametrize("url", ["http://me:key@h", "http://h/#x", "http://h/a b"])
def test_a_url_with_what_is_not_sent_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="neither user name, fragment nor white space"):
        parse_url(url)


def test_a_proxy_that_is_not_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    target = parse_url("http://h:1")
    assert ignored_proxy(target) is None
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert "http_proxy=http://proxy:3128 is ignored" in str(ignored_proxy(target))
    assert ignored_proxy(parse_url("https://h:1")) is None
    monkeypatch.setenv("no_proxy", "h")
    assert ignored_proxy(target) is None


def test_a_served_model_name_is_sent_and_the_models_name_is_kept() -> None:
    options = serve_options(ServeFlags(model="Qwen/Q", served_model_name="q", label="try"))
    assert (options.model, options.model_id, options.label) == ("q", "Qwen/Q", "try")
    assert serve_options(ServeFlags(model="q")).model_id is None


def test_metadata_are_names_with_values() -> None:
    assert metadata_fields(["a=1", " b = x=y "]) == {"a": "1", "b": "x=y"}
    with pytest.raises(UserError, match="NAME=VALUE"):
        metadata_fields(["a"])
