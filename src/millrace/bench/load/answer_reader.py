"""Parsing an answer of an OpenAI-compatible server, once it has ended.

From timed pieces of the body to the arrival times of its chunks, its token counts and its error. It
runs after the stream, so that no parsing delays the time stamp of a chunk. What is a chunk, a count
or an error in an event that is not as usual is for `stream_events`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from millrace.bench.load.stream_events import (
    ErrorEvent,
    event_error,
    join_texts,
    lenient_object,
    token_count,
)
from millrace.common.http_client import Response, error_text

_DONE = b"[DONE]"
_BOM = b"\xef\xbb\xbf"  # a stream may begin with it
# With any other reason (abort, error, ...) the answer is not what was asked for. The first five are
# OpenAI's, the others those of servers for Hugging Face's API.
SUCCESS_REASONS = frozenset(
    {
        *("stop", "length", "tool_calls", "function_call", "content_filter"),
        *("eos_token", "stop_sequence"),
    }
)


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_content(self) -> bool:
        """Whether it has text, reasoning or a tool call."""
        if self.text:
            return True
        delta = self.delta
        return delta is not None and bool(
            delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls
        )

    @property
    def is_role_only(self) -> bool:
        """Whether it is the opening chunk of a chat, which has a role alone."""
        return self.delta is not None and self.delta.role is not None and not self.has_content

    @property
    def is_usual(self) -> bool:
        """Whether it cannot be a part of an error."""
        return self.has_content or self.is_role_only or self.finish_reason in SUCCESS_REASONS


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None
    sent_ns: int = 0
    received_ns: int = 0


_chunks = msgspec.json.Decoder(_Chunk)


class Answer(msgspec.Struct):
    """The content of a response.

    chunk_ns: arrival of each chunk with a choice, from the first one that has text or ends the
    answer: an opening chunk without text is not a token. Where no chunk has text at all (a server
    that does not detokenize), every chunk counts but a chat's opening role. text_chunks: those of
    them that have text, or all where none has. The token counts are None where the server sent
    none; cached_tokens is -1 then. text: the text of all chunks. sent_ns, received_ns: the stamps
    of a server that sends them. error: one line, None for a complete answer.
    """

    chunk_ns: list[int]
    text_chunks: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = -1
    finish_reason: str | None = None
    error: str | None = None
    text: str = ""
    sent_ns: list[int] = []
    received_ns: int = 0


def events(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The data of each server-sent event, with the time of the piece that completed it.

    The data of an event named "error" is an ErrorEvent. Comments and other fields are skipped. A
    last event without its blank line is given too, so that a missing last newline loses nothing.
    """
    rest, at = b"", 0
    for at, piece in pieces:
        whole_event = piece[:6] == b"data: " and piece[-2:] == b"\n\n"
        if whole_event and not rest and piece.find(b"\n") == len(piece) - 2:
            if data := piece[6:-2]:
                yield at, data  # as nearly all of them come
            continue
        rest += piece
        if b"\r" in rest:
            rest = rest.replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            if data := _data(event):
                yield at, data
    if data := _data(rest):
        yield at, data


def _data(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = event.removeprefix(_BOM).split(b"\n")
    data = b"\n".join(line[5:].lstrip(b" ") for line in lines if line.startswith(b"data:"))
    named_error = any(line[6:].strip() == b"error" for line in lines if line.startswith(b"event:"))
    return ErrorEvent(data or b"(no data)") if named_error else data


def read_answer(response: Response) -> Answer:
    """Parse a streamed response. Never raises: a failure is in `error`."""
    if response.status and response.status != 200:
        return Answer([], error=_status_error(response))
    reader = _Reader()
    found = list(events(response.pieces))
    for at, data in found[:-1] if found and found[-1][1] == _DONE else found:
        reader.add(at, data)
    answer = reader.close()
    if not found and response.pieces and response.error is None:
        answer.error = _not_a_stream(response)
    answer.error = answer.error or response.error or _why_incomplete(answer)
    return answer


def _not_a_stream(response: Response) -> str:
    coding = response.headers.get("content-encoding", "identity")
    if coding != "identity":
        return f"the server compressed its answer ({coding}), which it was not asked to do"
    return f"no event stream but: {error_text(response.body)}"


def _status_error(response: Response) -> str:
    where = response.headers.get("location")
    if where and 300 <= response.status < 400:
        return f"status {response.status}: the server redirects to {where}; give that address"
    first = next((data for _, data in events(response.pieces)), None)
    return f"status {response.status}: {error_text(response.body if first is None else first)}"


class _Reader:
    """Makes an Answer of the events of one stream."""

    def __init__(self) -> None:
        self.answer = Answer([])
        self._texts: list[str] = []
        self._opening: list[tuple[int, int]] = []  # (arrival, stamp) of chunks before any text

    def add(self, at: int, data: bytes) -> None:
        """Take one event. The first error is kept; later events still count."""
        answer = self.answer
        try:
            chunk = _chunks.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            self._add_unusual(at, data, str(error))
            return
        if chunk.usage is None and chunk.choices and chunk.error is None:
            choice = chunk.choices[0]
            if choice.text and choice.finish_reason is None:  # what nearly all of them are
                self._texts.append(choice.text)
                answer.chunk_ns.append(at)
                if chunk.sent_ns:
                    answer.sent_ns.append(chunk.sent_ns)
                    answer.received_ns = chunk.received_ns
                return
        self._add_chunk(at, data, chunk)

    def _add_unusual(self, at: int, data: bytes, problem: str) -> None:
        """An event that the strict decoder refuses: an error, odd but harmless, or no JSON."""
        if data == _DONE:
            return
        event = lenient_object(data)
        if event is None:
            if isinstance(data, ErrorEvent):
                problem = f"an error in the stream: {error_text(data)}"
            else:
                problem = f"a chunk that is not the JSON of a completion ({problem})"
            self.answer.error = self.answer.error or problem
            return
        self._add_chunk(at, data, _lenient_chunk(event))

    def _add_chunk(self, at: int, data: bytes, chunk: _Chunk) -> None:
        answer = self.answer
        choice = chunk.choices[0] if chunk.choices else None
        if choice is not None:
            self._add_choice(at, choice, chunk.sent_ns)
        if chunk.received_ns:
            answer.received_ns = chunk.received_ns
        usage = chunk.usage
        if isinstance(usage, dict):
            self._add_usage(usage)
        usual = isinstance(usage, dict) if choice is None else choice.is_usual
        if not usual or chunk.error is not None or isinstance(data, ErrorEvent):
            found = event_error(data)
            if found is not None:
                answer.error = answer.error or f"an error in the stream: {found}"

    def _add_choice(self, at: int, choice: _Choice, sent_ns: int) -> None:
        answer = self.answer
        if choice.finish_reason:
            answer.finish_reason = choice.finish_reason
        if choice.has_content:
            if choice.delta is None:
                self._texts.append(choice.text or "")
            else:
                self._texts.append(choice.delta.content or "")
        elif not self._texts:
            if not choice.is_role_only or choice.finish_reason is not None:
                self._opening.append((at, sent_ns))
            return
        answer.chunk_ns.append(at)
        if sent_ns:
            answer.sent_ns.append(sent_ns)

    def _add_usage(self, usage: dict[str, Any]) -> None:
        """Take the counts of a usage object; a count that it lacks stays unknown."""
        answer = self.answer
        for name in ("prompt_tokens", "completion_tokens"):
            if (count := token_count(usage.get(name))) is not None:
                setattr(answer, name, count)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            answer.cached_tokens = token_count(details.get("cached_tokens")) or 0

    def close(self) -> Answer:
        """The answer, after the last event."""
        answer = self.answer
        if not self._texts:
            answer.chunk_ns = [at for at, _ in self._opening]
            answer.sent_ns = [sent for _, sent in self._opening if sent]
        elif answer.completion_tokens == 0:
            answer.completion_tokens = None  # there is text: nobody counted it
        answer.text_chunks = len(self._texts or self._opening)
        answer.text = join_texts(self._texts)
        return answer


def _lenient_chunk(event: dict[str, Any]) -> _Chunk:
    """A chunk of the fields that are usable; the others are as if they were not there."""
    choices = []
    listed = event.get("choices")
    for choice in listed if isinstance(listed, list) else ():
        if isinstance(choice, dict):
            delta = choice.get("delta")
            choices.append(
                _Choice(
                    _text(choice.get("text")),
                    _lenient_delta(delta) if isinstance(delta, dict) else None,
                    _text(choice.get("finish_reason")),
                )
            )
    sent, received = (token_count(event.get(name)) or 0 for name in ("sent_ns", "received_ns"))
    return _Chunk(choices, event.get("usage"), event.get("error"), sent, received)


def _lenient_delta(delta: dict[str, Any]) -> _Delta:
    calls = delta.get("tool_calls")
    return _Delta(
        role=_text(delta.get("role")),
        content=_text(delta.get("content")),
        reasoning_content=_text(delta.get("reasoning_content")),
        reasoning=_text(delta.get("reasoning")),
        tool_calls=calls if isinstance(calls, list) else None,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _why_incomplete(answer: Answer) -> str | None:
    """Why an answer without an error is still no success; None for a success."""
    reason = answer.finish_reason
    if reason is None:
        return "the stream ended without a finish_reason: it was cut off"
    if reason not in SUCCESS_REASONS:
        return f"the server ended the answer with finish_reason {reason!r}"
    if not answer.chunk_ns:
        return "the stream carried no choice"
    return None
