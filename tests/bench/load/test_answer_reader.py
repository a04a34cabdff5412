"""Reading answers: events out of pieces, chunks out of events, and what can be wrong with them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.load.answer_reader import Answer, events, read_answer
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


def test_a_complete_answer() -> None:
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
        (response(b"[DONE]"), "without a finish_reason"),
        (response(text(), b"{oops"), "not the JSON"),
        (response(text(), {"error": {"message": "out of\nmemory"}}), "stream: out of memory"),
        (response(text(), error="the server closed"), "the server closed"),
        (response(b"", status=500), "status 500: "),
        (response(text(), {"choices": [{"text": 5}]}), "cut off"),
    ],
)
def test_an_error_is_named_and_the_chunks_before_it_count(made: Response, expected: str) -> None:
    answer = read_answer(made)
    assert answer.error is not None
    assert expected in answer.error
    if made.status == 200 and "finish_reason" not in expected:
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


# --- what counts as a success ------------------------------------------------------------------

DONE = b"data: [DONE]\n\n"


def read(*pieces: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    made = Response()
    made.status, made.headers = status, headers or {}
    made.pieces = list(enumerate(pieces))
    return read_answer(made)


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


ERRORS = [
    event({"error": {"message": "it broke", "code": 500}}),
    event({"error": "it broke"}),
    event({"error": {"code": 500, "message": "it broke"}, "choices": []}),
    event({"error": {"message": "it broke"}, "choices": [{"text": "x", "finish_reason": None}]}),
    event({"object": "error", "message": "it broke", "code": 500}),
    event({"type": "error", "error": {"type": "overloaded_error", "message": "it broke"}}),
    event({"type": "error", "message": "it broke"}),
    event({"message": "it broke", "code": 500}),
    event({"detail": "it broke"}),
    event({"error_message": "it broke"}),
    event({"errors": [{"message": "it broke"}]}),
    event({"status": "error", "reason": "it broke"}),
    event({"event": "error", "msg": "it broke"}),
    event({"object": "error", "detail": "it broke", "choices": []}),
    event({"choices": [{"delta": {}, "finish_reason": "error", "error": {"message": "it broke"}}]}),
    event({"choices": [{"text": "", "finish_reason": "it broke"}]}),
    b'event: error\ndata: {"message":"it broke"}\n\n',
    b"event: error\ndata: it broke\n\n",
    b"event:error\r\ndata:it broke\r\n\r\n",
    b'event: error\ndata: {"error":{"message":"it broke"}}\n\n',
    b"data: it broke\n\n",
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("ending", [[DONE], [], [event(text("stop")), DONE]])
def test_an_error_in_a_stream_fails_the_request_with_the_servers_words(
    error: bytes, ending: list[bytes]
) -> None:
    if b'"finish_reason": "it broke"' in error:
        ending = [piece for piece in ending if b"stop" not in piece]
    answer = read(event(text()), event(text()), error, *ending)
    assert answer.error is not None
    if b"data: it broke" not in error or b"event" in error:
        assert "it broke" in answer.error
    assert answer.chunk_ns[:2] == [0, 1]


def test_a_bare_error_event_is_an_error() -> None:
    assert "(no data)" in str(read(event(text("stop")), b"event: error\n\n").error)


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls", "content_filter", "eos_token"])
def test_known_finish_reasons_are_successes(reason: str) -> None:
    assert read(event(text()), event(text(reason)), DONE).error is None
    assert read(event(text()), event(text(reason))).error is None  # without [DONE]


@pytest.mark.parametrize("reason", ["abort", "error", "cancelled", "STOP"])
def test_other_finish_reasons_are_failures(reason: str) -> None:
    assert f"finish_reason {reason!r}" in str(read(event(text()), event(text(reason)), DONE).error)


def test_done_alone_is_no_success() -> None:
    assert "without a finish_reason" in str(read(event(text()), event(text()), DONE).error)


@pytest.mark.parametrize(
    "harmless",
    [
        event({"type": "ping"}),
        event({"choices": [], "prompt_filter_results": [{"message": "fine"}]}),
        event({"choices": [], "usage": {"prompt_tokens": 1}, "message": "done"}),
        event({"choices": None, "error": None}),
        event({"error": None, "choices": [{"text": "x", "finish_reason": None}]}),
        b": keep-alive\n\n",
        b"event: ping\ndata: {}\n\n",
    ],
)
def test_other_events_are_harmless(harmless: bytes) -> None:
    assert read(event(text()), harmless, event(text("stop")), DONE).error is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "quota exceeded"}}', "quota exceeded"),
        (b'{"detail": "no"}', "no"),
        (b"<html>busy</html>", "busy"),
        (b'{"choices": [{"text": "all at once", "finish_reason": "stop"}]}', "all at once"),
    ],
)
def test_a_body_that_is_no_stream_is_quoted(body: bytes, expected: str) -> None:
    answer = read(body)
    assert "no event stream" in str(answer.error)
    assert expected in str(answer.error)


def test_a_compressed_body_is_named() -> None:
    answer = read(b"\x1f\x8b...", headers={"content-encoding": "gzip"})
    assert "compressed its answer (gzip)" in str(answer.error)


def test_an_error_status_is_said_with_its_words() -> None:
    assert read(b"", status=307, headers={"location": "https://b/"}).error == (
        "status 307: the server redirects to https://b/; give that address"
    )
    assert read(event({"error": {"message": "full"}}), status=429).error == "status 429: full"


# --- odd but harmless fields, and counts -------------------------------------------------------


def usage(**counts: Any) -> bytes:
    return event({"choices": [], "usage": counts})


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (event({"choices": None, "usage": {"prompt_tokens": 7, "completion_tokens": 3}}), (7, 3)),
        (usage(prompt_tokens=7.0, completion_tokens=3.0), (7, 3)),
        (usage(prompt_tokens=7), (7, None)),
        (usage(completion_tokens=3), (None, 3)),
        (usage(prompt_tokens=None, completion_tokens=True), (None, None)),
        (usage(prompt_tokens="7", completion_tokens=-3), (None, None)),
        (usage(prompt_tokens=7.5, completion_tokens=1), (None, 1)),
        (event({"choices": [], "usage": None}), (None, None)),
        (usage(prompt_tokens=9, completion_tokens=0), (9, None)),  # there was text
        (event({"choices": [], "usage": []}), (None, None)),
        (
            b'data: {"choices":[],"usage":{"prompt_tokens":NaN,"completion_tokens":3}}\n\n',
            (None, 3),
        ),
    ],
)
def test_counts_are_what_the_server_says_and_missing_where_it_does_not(
    counts: bytes, expected: tuple[int | None, int | None]
) -> None:
    answer = read(event(text("stop")), counts, DONE)
    assert answer.error is None
    assert (answer.prompt_tokens, answer.completion_tokens) == expected


def test_without_counts_the_chunks_with_text_are_counted() -> None:
    last = event({"choices": [{"text": "", "finish_reason": "length"}]})
    answer = read(event(text()), event(text()), event(text()), last, DONE)
    assert (answer.text_chunks, len(answer.chunk_ns)) == (3, 4)
    silent = event({"choices": [{"text": "", "finish_reason": None}]})
    assert read(silent, silent, last).text_chunks == 3  # a server that does not detokenize


def test_cached_tokens_may_be_missing() -> None:
    def cached(details: Any) -> int:
        counts = usage(prompt_tokens=9, prompt_tokens_details=details)
        return read(event(text("stop")), counts).cached_tokens

    assert [cached(d) for d in ({"cached_tokens": 4.0}, {}, None, [])] == [4, 0, -1, -1]


@pytest.mark.parametrize(
    "odd",
    [
        b'{"choices":[{"text":"\\ud83d"}]}',  # half of an emoji
        b'{"choices":[{"text":"x","finish_reason":0}],"id":1e400}',
        b'{"choices":[{"delta":{"content":"x","tool_calls":{}}}],"sent_ns":"soon"}',
        b'{"choices":[{"text":"x","logprobs":NaN}]}',
    ],
)
def test_odd_fields_fail_nothing(odd: bytes) -> None:
    answer = read(b"data: " + odd + b"\n\n", event(text("stop")), DONE)
    assert (answer.error, answer.text_chunks) == (None, 2)
    answer.text.encode()


def test_a_character_that_is_cut_in_two_is_whole_again() -> None:
    halves = [
        b'data: {"choices":[{"text":"\\ud83d"}]}\n\n',
        b'data: {"choices":[{"text":"\\ude00"}]}\n\n',
    ]
    assert read(*halves, event(text("stop"))).text == "\U0001f600x"


def test_a_stream_may_begin_with_a_byte_order_mark() -> None:
    assert read(b"\xef\xbb\xbf" + event(text()), event(text("stop"))).text_chunks == 2
