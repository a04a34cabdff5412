"""Requests of a workload as a gateway and an engine get them: HTTP bodies, tokens, output lengths.

The bodies are those that `millrace bench` sends, turn by turn. There is no tokenizer: a word is a
token, and equal words are equal tokens, so that prompts share what their texts share. This module
knows no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from zlib import crc32

import msgspec

from millrace.bench.load.load_driver import Job
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.request_builder import indices, make_job
from millrace.bench.workload.prompts import prompt_maker
from millrace.gateway.http.message import Request
from millrace.gateway.http.request_info import RequestInfo, read_request_info

_WORD_TOKENS = 1 << 20  # tokens from here on are words that no engine made
_ROLE_TOKENS = {"system": 30_100, "user": 30_101, "assistant": 30_102, "tool": 30_103}
_MADE = "w"  # a word of an answer is this and the number of its token


class _Body(msgspec.Struct):
    max_tokens: int
    prompt: list[int] | str | None = None
    messages: list[dict[str, Any]] = []


_decode = msgspec.json.Decoder(_Body).decode


class SimulatedRequest(msgspec.Struct, frozen=True):
    """One request. number: no other one has it. tokens: of its prompt. boundaries: ends of chat
    turns in it. output_tokens: of its answer."""

    number: int
    info: RequestInfo
    tokens: list[int]
    boundaries: list[int]
    output_tokens: int
    job: Job


class Requests:
    """The requests of a workload, numbered as they are made."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._made = 0

    def first_turns(self) -> Iterator[Job]:
        """The first request of each conversation, or the requests, in the workload's order."""
        options = self._options
        make = prompt_maker(options.workload, as_text=options.as_text)
        for index in indices(options.workload.count, 0, 1):
            yield make_job(options, "simulated", make(index), index)

    def prepare(self, job: Job) -> SimulatedRequest:
        """What the gateway and an engine get of it."""
        head, _, body = job.request.partition(b"\r\n\r\n")
        read = _decode(body)
        path = head.split(b" ", 2)[1]
        request = Request(b"POST", path, "1.1", [], body, True)
        tokens, boundaries = _tokens(read)
        self._made += 1
        return SimulatedRequest(
            self._made, read_request_info(request), tokens, boundaries, read.max_tokens, job
        )


def answer_text(tokens: list[int]) -> str:
    """An answer as the client reads it: a next turn brings the same tokens again."""
    return " ".join([f"{_MADE}{token}" for token in tokens])


def _tokens(body: _Body) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, and the boundaries in it."""
    if isinstance(body.prompt, list):
        return body.prompt, []
    if body.prompt is not None:
        return [_token(word) for word in body.prompt.split()] or [0], []
    found: list[int] = []
    boundaries = []
    for message in body.messages:
        found.append(_ROLE_TOKENS.get(str(message.get("role")), 30_104))
        found += [_token(word) for word in str(message.get("content", "")).split()]
        boundaries.append(len(found))
    return found, boundaries


def _token(word: str) -> int:
    if word[:1] == _MADE and word[1:].isdigit():
        return int(word[1:])
    return _WORD_TOKENS + (crc32(word.encode()) & 0x3FFFFFFF)
