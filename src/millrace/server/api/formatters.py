"""How OpenAI's API words outputs, whole or in chunks; chats have a module of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from millrace.protocol import TokenLogprobs
from millrace.server.api.generation import Generation
from millrace.server.api.logprobs import LogprobWords
from millrace.server.api.request_schema import StreamOptions
from millrace.server.api.response_schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptLogprobs,
    Usage,
)
from millrace.server.http.errors import ApiError
from millrace.text.detokenizer import Piece

_encode = msgspec.json.Encoder().encode


class Formatter(Protocol):
    """The wording of one answer. Events are bytes as they go over the wire.

    wants_counts: every event tells the token counts so far.
    """

    id: str
    wants_counts: bool

    def events(
        self, one: Generation, piece: Piece, first: bool, usage: Usage | None
    ) -> Iterable[bytes]:
        """What a piece looks like in a stream. first: it is the first of its choice."""

    def ending(self, usage: Usage) -> Iterable[bytes]:
        """What follows the last piece of a stream."""

    def failure(self, error: ApiError) -> Iterable[bytes]:
        """What ends a stream that has begun and cannot go on."""

    def whole(
        self, ones: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> msgspec.Struct:
        """The answer that is not streamed; each generation's output is one piece."""


class Heading(msgspec.Struct, frozen=True, kw_only=True):
    """What every chunk repeats, and what the body asked to see beside the text."""

    id: str
    created: int
    model: str
    with_ids: bool = False
    options: StreamOptions = StreamOptions()


def data_event(body: msgspec.Struct) -> bytes:
    """A server-sent event without a name."""
    return b"data: %b\n\n" % _encode(body)


class OpenAiFormatter:
    """What both endpoints' streams have in common."""

    def __init__(self, heading: Heading, logprobs: LogprobWords) -> None:
        self.id = heading.id
        self.wants_counts = heading.options.continuous_usage_stats
        self._heading = heading
        self._logprobs = logprobs

    def chunk(
        self, one: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> msgspec.Struct:
        raise NotImplementedError

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        raise NotImplementedError

    def events(
        self, one: Generation, piece: Piece, first: bool, usage: Usage | None
    ) -> Iterable[bytes]:
        return (data_event(self.chunk(one, piece, first, UNSET if usage is None else usage)),)

    def ending(self, usage: Usage) -> Iterable[bytes]:
        if self._heading.options.include_usage:
            yield data_event(self.usage_chunk(usage))
        yield b"data: [DONE]\n\n"

    def failure(self, error: ApiError) -> Iterable[bytes]:
        return data_event(error.body), b"data: [DONE]\n\n"

    def _token_ids(self, piece: Piece) -> list[int] | UnsetType:
        return piece.token_ids if self._heading.with_ids else UNSET

    def _prompt_ids(self, one: Generation) -> list[int] | UnsetType:
        return one.request.prompt if self._heading.with_ids else UNSET

    def _prompt_logprobs(self, one: Generation) -> PromptLogprobs | UnsetType:
        if one.request.params.prompt_logprobs is None:
            return UNSET
        return self._logprobs.prompt(one.prompt_logprobs or ())


class CompletionFormatter(OpenAiFormatter):
    """Answers of /v1/completions.

    echoes: for each choice the prompt's text that precedes it, or nothing. prompt_only: the
    output itself is not wanted. best: of each prompt's outputs so many are shown, the likeliest
    ones; None shows all. shows_logprobs, shows_prompt: they are asked for, not just needed.
    """

    def __init__(
        self,
        heading: Heading,
        logprobs: LogprobWords,
        *,
        echoes: Sequence[str] = (),
        prompt_only: bool = False,
        best: tuple[int, int] | None = None,
        shows_logprobs: bool = False,
        shows_prompt: bool = False,
    ) -> None:
        super().__init__(heading, logprobs)
        self._echoes = echoes
        self._prompt_only = prompt_only
        self._best = best
        self._shows_logprobs = shows_logprobs
        self._shows_prompt = shows_prompt
        self._offsets: dict[int, int] = {}  # of each choice, characters worded in logprobs so far

    def chunk(
        self, one: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> Completion:
        return self._completion([self._choice(one, piece, first)], usage)

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(
        self, ones: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> Completion:
        kept = list(range(len(ones)))
        if self._best is not None:
            kept = _likeliest(pieces, *self._best)
        choices = [self._choice(ones[at], pieces[at], True, index) for index, at in enumerate(kept)]
        return self._completion(choices, usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType) -> Completion:
        head = self._heading
        return Completion(
            id=head.id, created=head.created, model=head.model, choices=choices, usage=usage
        )

    def _choice(
        self, one: Generation, piece: Piece, first: bool, index: int | None = None
    ) -> CompletionChoice:
        echo = self._echoes[one.index] if first and self._echoes else ""
        if self._prompt_only:
            piece = msgspec.structs.replace(piece, text="", token_ids=[], logprobs=[])
        return CompletionChoice(
            index=one.index if index is None else index,
            text=echo + piece.text,
            logprobs=self._worded(one, piece, first) if self._shows_logprobs else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=self._token_ids(piece),
            prompt_token_ids=self._prompt_ids(one) if first else UNSET,
            prompt_logprobs=self._prompt_logprobs(one) if first and self._shows_prompt else UNSET,
        )

    def _worded(self, one: Generation, piece: Piece, first: bool) -> CompletionLogprobs:
        positions: list[TokenLogprobs] = list(piece.logprobs or ())
        unpredicted = None
        if first and self._echoes:
            positions = [*(one.prompt_logprobs or ()), *positions]
            unpredicted = one.request.prompt[0]
        words, self._offsets[one.index] = self._logprobs.completion(
            positions, self._offsets.get(one.index, 0), unpredicted
        )
        return words


def _likeliest(pieces: Sequence[Piece], shown: int, made: int) -> list[int]:
    """Of every `made` outputs the `shown` with the greatest mean log-probability, best first."""

    def mean(at: int) -> float:
        known = pieces[at].logprobs or ()
        return sum(one.logprobs[0] for one in known) / max(len(known), 1)

    groups = (range(start, start + made) for start in range(0, len(pieces), made))
    return [at for group in groups for at in sorted(group, key=mean, reverse=True)[:shown]]
