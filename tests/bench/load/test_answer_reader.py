"""Reading answers: events out of pieces, chunks out of events, and what can be wrong with them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.load.answer_reader import events, read_answer
from millrace.common.http_client import Response, error_text


def response(*events: Any, status: int = 200, error: str | None = None) -> Response:
    made = Response()
    made.status, made.error = status, error
    for at, event in enumerate(events):
        data = event if isinstance(event, bytes) else json.dumps(event).encode()
        made.pieces.append((at, b"data: " + data + b"\n\n"))
    return made


def text(finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": "x", "finish_reason": finish}]}


@given(
    bodies=st.lists(st.text("ab\u00e9 {}:", min_size=1, max_size=12).filter(str.strip), max_size=6),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    newline=st.sampled_from([b"\n", b"\r\n"]),
)
def test_events_are_found_wherever_the_bytes_are_cut(
    bodies: list[str], cuts: list[int], newline: bytes
) -> None:
    sent = [body.strip().encode() for body in bodies]
    whole = b"".join(b"data: " + data + newline * 2 for data in sent)
    edges = sorted({0, len(whole), *(min(cut, len(whole)) for cut in cuts)})
    pieces = [(i, whole[a:b]) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    found = list(events(pieces))
    assert [data for _, data in found] == sent
    # An event's time is that of the piece in which its data and the newline after it were whole.
    end = 0
    for at, data in found:
        end += len(b"data: " + data + newline * 2)
        assert pieces[at][0] == next(i for i, b in enumerate(edges[1:]) if b >= end)


def test_comments_other_fields_and_split_data_lines() -> None:
    stream = b": ping\n\nevent: x\ndata: a\ndata: b\nid: 7\n\ndata:c"
    assert [data for _, data in events([(0, stream)])] == [b"a\nb", b"c"]


def test_a_whole_answer() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}
    answer = read_answer(response(text(), text("length"), usage, b"[DONE]"))
    assert answer.error is None
    assert answer.chunk_ns == [0, 1]
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 4)


def test_the_chunk_that_only_names_a_role_is_no_token() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    word = {"choices": [{"delta": {"role": "assistant", "content": "a"}}]}
    thought = {"choices": [{"delta": {"role": "assistant", "reasoning_content": "a"}}]}
    last = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    assert read_answer(response(role, word, thought, last)).chunk_ns == [1, 2, 3]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (response(text(), text()), "cut off"),
        (response(b"[DONE]"), "no choice"),
        (response(text(), b"{oops"), "not the JSON"),
        (response(text(), {"error": {"message": "out of\nmemory"}}), "stream: out of memory"),
        (response(text(), error="the server closed"), "the server closed"),
        (response(b"", status=500), "status 500: "),
        (response(text(), {"choices": [{"text": 5}]}), "not the JSON"),
    ],
)
def test_what_is_wrong_is_said_and_the_chunks_before_it_are_kept(
    made: Response, expected: str
) -> None:
    answer = read_answer(made)
    assert answer.error is not None
    assert expected in answer.error
    if made.status == 200 and expected != "no choice":
        assert answer.chunk_ns[0] == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "no such model", "code": 404}}', "no such model"),
        (b'{"error": "plain"}', "plain"),
        (b'{"message": "top"}', "top"),
        (b"<html>\n  nginx", "<html> nginx"),
        (b"[1]", "[1]"),
        (b"", "(empty body)"),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_the_message_of_any_error_body_fits_on_a_line(body: bytes, expected: str) -> None:
    assert error_text(body) == expected
