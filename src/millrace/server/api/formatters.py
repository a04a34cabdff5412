"""How OpenAI's API formats outputs, whole or in chunks. Chats have their own module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from millrace.common.api_errors import ApiError
from millrace.protocol import Ready, TokenLogprobs
from millrace.server.api.generation import Generation
from millrace.server.api.hand_over import transfer_answer
from millrace.server.api.logprobs import LogprobFormatter
from millrace.server.api.request_schema import StreamOptions
from millrace.server.api.response_schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    KvTransferAnswer,
    PromptLogprobs,
    RequestTimes,
    Usage,
)
from millrace.server.engine_link.stream import Stream
from millrace.text.detokenizer import Piece

_encode = msgspec.json.Encoder().encode


class Formatter(Protocol):
    """The format of one answer. Events are the bytes that go over the wire.

    needs_usage: every event holds the token counts so far.
    """

    id: str
    needs_usage: bool

    def piece_events(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | None
    ) -> Iterable[bytes]:
        """The events of one piece of a stream. first: it is the first piece of its choice."""

    def final_events(self, usage: Usage) -> Iterable[bytes]:
        """The events after the last piece of a stream."""

    def error_events(self, error: ApiError) -> Iterable[bytes]:
        """The events that end a stream which has begun and cannot go on."""

    def full_response(
        self, generations: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> msgspec.Struct:
        """The answer of a request that is not streamed; each generation's output is one piece."""


class ResponseHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What every chunk repeats, and what the body asked for beside the text. ready: of the engine,
    by which others take records of prompts."""

    id: str
    created: int
    model: str
    with_ids: bool = False
    with_times: bool = False
    ready: Ready | None = None
    options: StreamOptions = StreamOptions()


class AnswerDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What answers hold where requests say nothing. usage: the token counts in every chunk of a
    stream, and behind it. tokens_as_ids: tokens in log-probabilities read `token_id:17`. times: of
    requests."""

    usage: bool = False
    tokens_as_ids: bool = False
    times: bool = False


def data_event(body: msgspec.Struct) -> bytes:
    """A server-sent event without a name."""
    return b"data: %b\n\n" % _encode(body)


class OpenAiFormatter:
    """What the answers of both OpenAI endpoints share."""

    def __init__(self, header: ResponseHeader, logprobs: LogprobFormatter) -> None:
        self.id = header.id
        self.needs_usage = bool(header.options.continuous_usage_stats)
        self._header = header
        self._logprobs = logprobs
        self._streamed: dict[int, Generation] = {}  # by choice, for their times

    def chunk(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> msgspec.Struct:
        raise NotImplementedError

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        raise NotImplementedError

    def piece_events(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | None
    ) -> Iterable[bytes]:
        if self._header.with_times:
            self._streamed[generation.index] = generation
        return (
            data_event(self.chunk(generation, piece, first, UNSET if usage is None else usage)),
        )

    def final_events(self, usage: Usage) -> Iterable[bytes]:
        if self._header.options.include_usage:
            yield data_event(self.usage_chunk(usage))
        yield b"data: [DONE]\n\n"

    def error_events(self, error: ApiError) -> Iterable[bytes]:
        return data_event(error.body), b"data: [DONE]\n\n"

    def _times(self, generations: Iterable[Generation]) -> RequestTimes | UnsetType:
        """The times of a request with one output, if answers hold them."""
        found = list(generations) if self._header.with_times else []
        return _request_times(found[0].stream) if len(found) == 1 else UNSET

    def _hand_over(
        self, generations: Sequence[Generation]
    ) -> tuple[KvTransferAnswer | UnsetType | None, str | UnsetType]:
        """kv_transfer_params of a whole answer, and why there are none."""
        return transfer_answer(generations, self._header.ready)

    def _token_ids(self, piece: Piece) -> list[int] | UnsetType:
        return piece.token_ids if self._header.with_ids else UNSET

    def _prompt_ids(self, generation: Generation) -> list[int] | UnsetType:
        return generation.request.prompt if self._header.with_ids else UNSET

    def _prompt_logprobs(self, generation: Generation) -> PromptLogprobs | UnsetType:
        if generation.request.params.prompt_logprobs is None:
            return UNSET
        return self._logprobs.prompt(generation.prompt_logprobs or ())


class CompletionFormatter(OpenAiFormatter):
    """Answers of /v1/completions.

    echoes: for each choice the prompt's text that precedes it, or nothing. prompt_only: the
    output itself is left out. best: (shown, made): of each prompt's outputs only the most likely
    ones are shown; None shows all. shows_logprobs, shows_prompt: whether the body asked for
    log-probabilities of the output and of the prompt.
    """

    def __init__(
        self,
        header: ResponseHeader,
        logprobs: LogprobFormatter,
        *,
        echoes: Sequence[str] = (),
        prompt_only: bool = False,
        best: tuple[int, int] | None = None,
        shows_logprobs: bool = False,
        shows_prompt: bool = False,
    ) -> None:
        super().__init__(header, logprobs)
        self._echoes = echoes
        self._prompt_only = prompt_only
        self._best = best
        self._shows_logprobs = shows_logprobs
        self._shows_prompt = shows_prompt
        self._offsets: dict[int, int] = {}  # by choice: characters whose logprobs were sent

    def chunk(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> Completion:
        return self._completion([self._choice(generation, piece, first)], usage)

    def usage_chunk(self, usage: Usage) -> Completion:
        chunk = self._completion([], usage)
        return msgspec.structs.replace(chunk, metrics=self._times(self._streamed.values()))

    def full_response(
        self, generations: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> Completion:
        kept = list(range(len(generations)))
        if self._best is not None:
            kept = _most_likely(pieces, *self._best)
        choices = [
            _with_nulls(self._choice(generations[at], pieces[at], True, index))
            for index, at in enumerate(kept)
        ]
        whole = self._completion(choices, usage)
        params, why = self._hand_over(generations)
        return msgspec.structs.replace(
            whole, service_tier=None, system_fingerprint=None, metrics=self._times(generations),
            kv_transfer_params=params, kv_transfer_error=why,
        )  # fmt: skip

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType) -> Completion:
        head = self._header
        return Completion(
            id=head.id, created=head.created, model=head.model, choices=choices, usage=usage
        )

    def _choice(
        self, generation: Generation, piece: Piece, first: bool, index: int | None = None
    ) -> CompletionChoice:
        echo = self._echoes[generation.index] if first and self._echoes else ""
        if self._prompt_only:
            piece = msgspec.structs.replace(piece, text="", token_ids=[], logprobs=[])
        return CompletionChoice(
            index=generation.index if index is None else index,
            text=echo + piece.text,
            logprobs=self._format_logprobs(generation, piece, first)
            if self._shows_logprobs
            else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=self._token_ids(piece),
            prompt_token_ids=self._prompt_ids(generation) if first else UNSET,
            prompt_logprobs=self._prompt_logprobs(generation)
            if first and self._shows_prompt
            else UNSET,
        )

    def _format_logprobs(
        self, generation: Generation, piece: Piece, first: bool
    ) -> CompletionLogprobs:
        positions: list[TokenLogprobs] = list(piece.logprobs or ())
        unpredicted = None
        if first and self._echoes:
            positions = [*(generation.prompt_logprobs or ()), *positions]
            unpredicted = generation.request.prompt[0]
        words, self._offsets[generation.index] = self._logprobs.completion(
            positions, self._offsets.get(generation.index, 0), unpredicted
        )
        return words


def _with_nulls(choice: CompletionChoice) -> CompletionChoice:
    """A choice of a whole answer: keys that clients read are there also where they say nothing."""
    names = ("token_ids", "prompt_token_ids", "prompt_logprobs")
    missing = {name: None for name in names if getattr(choice, name) is UNSET}
    return msgspec.structs.replace(choice, **missing)


def _request_times(stream: Stream) -> RequestTimes:
    admitted = stream.arrival + stream.queue_time
    first, last = stream.first_token_time or admitted, stream.last_token_time or admitted
    after_first = stream.generated_tokens - 1
    return RequestTimes(
        time_to_first_token_ms=(first - admitted) * 1000,
        generation_time_ms=(last - first) * 1000,
        queue_time_ms=stream.queue_time * 1000,
        mean_itl_ms=(last - first) * 1000 / after_first if after_first > 0 else UNSET,
        tokens_per_second=stream.generated_tokens / max(last - admitted, 1e-6),
    )


def _most_likely(pieces: Sequence[Piece], shown: int, made: int) -> list[int]:
    """Of every `made` outputs the `shown` with the greatest mean log-probability, best first."""

    def mean(at: int) -> float:
        known = pieces[at].logprobs or ()
        return sum(one.logprobs[0] for one in known) / max(len(known), 1)

    groups = (range(start, start + made) for start in range(0, len(pieces), made))
    return [at for group in groups for at in sorted(group, key=mean, reverse=True)[:shown]]
