"""Reading an answer of an OpenAI-compatible server, once it has ended.

From timed pieces of body to the times of its chunks, its token counts and what went wrong. Runs
after the stream, so that no parsing stands between two timestamps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from millrace.http1 import Response, error_text

_DONE = b"[DONE]"


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def only_names_a_role(self) -> bool:
        """A chat's opening chunk, which brings no token."""
        delta = self.delta
        if delta is None or delta.role is None or self.finish_reason is not None:
            return False
        return not (delta.content or delta.reasoning_content or delta.tool_calls)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_chunks = msgspec.json.Decoder(_Chunk)


class Answer(msgspec.Struct):
    """What a response said. chunk_ns: arrival of each chunk that carries a choice; the token
    counts are None where the server told no usage; error: one line, None for a whole answer."""

    chunk_ns: list[int]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finished: bool = False
    error: str | None = None


def events(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The data of each server-sent event, with the time of the piece that completed it.

    Comments and fields other than `data` are passed over; an event without its blank line at the
    end of the stream is still given, so that a missing last newline loses nothing.
    """
    rest, at = b"", 0
    for at, piece in pieces:
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
    lines = [line[5:].lstrip(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def read_answer(response: Response) -> Answer:
    """Parse a streamed response. Never raises: what broke stands in `error`."""
    if response.status and response.status != 200:
        return Answer([], error=f"status {response.status}: {error_text(response.body)}")
    answer = Answer([])
    try:
        for at, data in events(response.pieces):
            _take(answer, at, data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        answer.error = f"a chunk that is not the JSON of a completion ({error})"
    answer.error = answer.error or response.error or _missing(answer)
    return answer


def _take(answer: Answer, at: int, data: bytes) -> None:
    if data == _DONE:
        answer.finished = True
        return
    chunk = _chunks.decode(data)
    if chunk.error is not None:
        answer.error = f"an error in the stream: {error_text(data)}"
    if chunk.usage is not None:
        answer.prompt_tokens = chunk.usage.prompt_tokens
        answer.completion_tokens = chunk.usage.completion_tokens
    if chunk.choices and not chunk.choices[0].only_names_a_role:
        answer.chunk_ns.append(at)
        answer.finished |= chunk.choices[0].finish_reason is not None


def _missing(answer: Answer) -> str | None:
    if not answer.finished:
        return "the stream ended before a finish_reason or [DONE]: it was cut off"
    if not answer.chunk_ns:
        return "the stream carried no choice"
    return None
