"""Lines of batch files: which can be sent, and how results are written."""

from __future__ import annotations

import json
from typing import Any

import pytest

from millrace.batch.lines import LineError, Usage, error_line, read_line, read_usage, response_line
from tests.batch.counting_server import chat_line


def line(**changes: Any) -> bytes:
    return json.dumps({**chat_line(1), **changes}).encode()


def test_a_line_of_each_endpoint_is_read() -> None:
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
        "/v1/completions": {"prompt": [1, 2, 3]},
        "/v1/responses": {"input": "a"},
    }
    for url, fields in bodies.items():
        body = {"model": "m", "temperature": 0.25, **fields}
        request = read_line(line(url=url, body=body))
        assert (request.custom_id, request.url) == ("id-1", url)
        assert json.loads(request.encoded_body()) == body


def test_the_model_can_be_replaced_and_streaming_is_taken_out() -> None:
    body = {"messages": ["a"], "model": "theirs", "stream": False, "stream_options": None}
    request = read_line(line(body=body), model="ours")
    assert json.loads(request.encoded_body()) == {"messages": ["a"], "model": "ours"}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"{", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b"{}", "custom_id is missing"),
        (line(custom_id=5), "custom_id must be a text"),
        (line(custom_id=""), "1 to 512"),
        (line(method="GET"), "only POST"),
        (line(url="/v1/embeddings"), "use an embedding server"),
        (line(url="/v1/messages"), "is unknown; there are /v1/chat/completions"),
        (line(body=None), "body must be a JSON object"),
        (line(body={"messages": ["a"]}), "model is missing"),
        (line(body={"model": "", "messages": ["a"]}), "model is empty"),
        (line(body={"model": "m", "messages": []}), "body.messages is missing or empty"),
        (line(body={"model": "m", "messages": ["a"], "stream": True}), "are not streamed"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(LineError, match=reason):
        read_line(data)


def test_one_batch_can_be_bound_to_one_endpoint() -> None:
    with pytest.raises(LineError, match="differs from the batch's endpoint /v1/responses"):
        read_line(line(), url="/v1/responses")


def test_prompts_that_begin_alike_have_neighbouring_groups() -> None:
    def group(*texts: str) -> bytes:
        messages = [{"role": "user", "content": text} for text in texts]
        return read_line(line(body={"model": "m", "messages": messages})).group()

    one, two = "first rules. " * 200, "second rules. " * 200
    keys = sorted((group(rules, str(index)), rules) for index in range(5) for rules in (one, two))
    assert [rules for _, rules in keys] in ([one] * 5 + [two] * 5, [two] * 5 + [one] * 5)


def test_a_result_is_one_line_whatever_the_server_wrote() -> None:
    pretty = json.dumps({"choices": ["a\nb"]}, indent=2).encode()
    written = response_line("id-1", 200, "r1", pretty)
    assert written.count(b"\n") == 1
    row = json.loads(written)
    assert row["response"] == {
        "status_code": 200, "request_id": "r1", "body": {"choices": ["a\nb"]},
    }  # fmt: skip
    assert (row["custom_id"], row["error"]) == ("id-1", None)
    html = json.loads(response_line("id-1", 502, "", b"<html>\nbad gateway"))
    assert html["response"]["body"]["error"]["message"] == "<html> bad gateway"
    failed = json.loads(error_line("id-2", "no_answer", "gone"))
    assert failed["response"] is None
    assert failed["error"] == {"code": "no_answer", "message": "gone"}


def test_usage_is_read_in_the_words_of_both_apis() -> None:
    chat = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}
    assert read_usage(json.dumps({"usage": chat}).encode()) == Usage(5, 2, 0)
    responses = {
        "input_tokens": 5, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip
    assert read_usage(json.dumps({"usage": responses}).encode()) == Usage(5, 2, 4)
    assert read_usage(b"{}") == Usage()
    assert read_usage(b"<html>") is None
