"""Parsing an answer of an OpenAI-compatible server, once it has ended.

From timed pieces of the body to the arrival times of its chunks, its token counts and its error. It
runs after the stream, so that no parsing delays the time stamp of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from millrace.common.http_client import Response, error_text

_DONE = b"[DONE]"


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


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


class _Chunk(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    sent_ns: int = 0
    received_ns: int = 0


_chunks = msgspec.json.Decoder(_Chunk)


class Answer(msgspec.Struct):
    """The content of a response.

    chunk_ns: arrival of each chunk with a choice, from the first one that has text or ends the
    answer: an opening chunk without text is not a token. Where no chunk has text at all (a server
    that does not detokenize), every chunk counts but a chat's opening role. The token counts are
    None where the server sent no usage; cached_tokens is -1 then. text: the text of all chunks.
    sent_ns, received_ns: the stamps of a server that sends them. error: one line, None for a
    complete answer.
    """

    chunk_ns: list[int]
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int = -1
    finished: bool = False
    error: str | None = None
    text: str = ""
    sent_ns: list[int] = []
    received_ns: int = 0


def events(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The data of each server-sent event, with the time of the piece that completed it.

    Comments and fields other than `data` are skipped. A last event without its blank line is given
    too, so that a missing last newline loses nothing.
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
    lines = [line[5:].lstrip(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def read_answer(response: Response) -> Answer:
    """Parse a streamed response. Never raises: a failure is in `error`."""
    if response.status and response.status != 200:
        return Answer([], error=f"status {response.status}: {error_text(response.body)}")
    reader = _Reader()
    try:
        for at, data in events(response.pieces):
            reader.add(at, data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reader.answer.error = f"a chunk that is not the JSON of a completion ({error})"
    answer = reader.close()
    answer.error = answer.error or response.error or _why_incomplete(answer)
    return answer


class _Reader:
    """Makes an Answer of the events of one stream."""

    def __init__(self) -> None:
        self.answer = Answer([])
        self._texts: list[str] = []
        self._opening: list[tuple[int, int]] = []  # (arrival, stamp) of chunks before any text

    def add(self, at: int, data: bytes) -> None:
        answer = self.answer
        if data == _DONE:
            answer.finished = True
            return
        chunk = _chunks.decode(data)
        if chunk.usage is None and chunk.choices and chunk.error is None:
            choice = chunk.choices[0]
            if choice.text and choice.finish_reason is None:  # what nearly all of them are
                self._texts.append(choice.text)
                answer.chunk_ns.append(at)
                if chunk.sent_ns:
                    answer.sent_ns.append(chunk.sent_ns)
                    answer.received_ns = chunk.received_ns
                return
        if chunk.choices:
            self._add_choice(at, chunk.choices[0], chunk.sent_ns)
        if chunk.received_ns:
            answer.received_ns = chunk.received_ns
        if chunk.error is not None:
            answer.error = f"an error in the stream: {error_text(data)}"
        if (usage := chunk.usage) is not None:
            answer.prompt_tokens = usage.prompt_tokens
            answer.completion_tokens = usage.completion_tokens
            if (details := usage.prompt_tokens_details) is not None:
                answer.cached_tokens = details.cached_tokens or 0

    def _add_choice(self, at: int, choice: _Choice, sent_ns: int) -> None:
        answer = self.answer
        if choice.finish_reason is not None:
            answer.finished = True
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

    def close(self) -> Answer:
        """The answer, once there is nothing more to add."""
        answer = self.answer
        if not self._texts:
            answer.chunk_ns = [at for at, _ in self._opening]
            answer.sent_ns = [sent for _, sent in self._opening if sent]
        answer.text = "".join(self._texts)
        return answer


def _why_incomplete(answer: Answer) -> str | None:
    if not answer.finished:
        return "the stream ended before a finish_reason or [DONE]: it was cut off"
    if not answer.chunk_ns:
        return "the stream carried no choice"
    return None
