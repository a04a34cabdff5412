"""How /v1/chat/completions formats outputs: reasoning, content and calls, whole or in chunks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from millrace.server.api.chat.calls import CallFormatter
from millrace.server.api.formatters import OpenAiFormatter, ResponseHeader
from millrace.server.api.generation import Generation
from millrace.server.api.logprobs import LogprobFormatter
from millrace.server.api.response_schema import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    FinishReason,
    PromptLogprobs,
    ToolCall,
    Usage,
)
from millrace.text.answer_parser import AnswerParser, AnswerPart
from millrace.text.detokenizer import Piece


class ChatFormatter(OpenAiFormatter):
    """Answers of /v1/chat/completions. parsers: one for each choice. prompt_text: None hides it.

    echo: what the content begins with, before the output. custom_tools: names of them.
    """

    def __init__(
        self,
        header: ResponseHeader,
        logprobs: LogprobFormatter,
        parsers: Sequence[AnswerParser],
        *,
        shows_reasoning: bool = True,
        prompt_text: str | None = None,
        echo: str = "",
        custom_tools: Collection[str] = (),
    ) -> None:
        super().__init__(header, logprobs)
        self._calls = [CallFormatter(custom_tools) for _ in parsers]
        self._echo = echo
        self._prompt_text = prompt_text
        self._parsers = parsers
        self._shows_reasoning = shows_reasoning

    def chunk(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> ChatChunk:
        parser, shown = self._parsers[generation.index], self._calls[generation.index]
        if first:
            shown.deltas(parser.feed(generation.resumed).calls, last=False)
        part = parser.feed_piece(piece)
        calls = shown.deltas(part.calls, last=piece.finish_reason is not None)
        if first and self._echo:
            part = msgspec.structs.replace(part, items=[self._echo, *part.items])
        choice = ChatChunkChoice(
            index=generation.index,
            delta=self._delta(part, calls, parser, first),
            logprobs=self._format_logprobs(piece),
            finish_reason=finish_reason(piece, parser),
            stop_reason=piece.stop_reason,
            token_ids=self._token_ids(piece),
        )
        return self._chunk(
            [choice],
            usage,
            self._prompt_ids(generation) if first else UNSET,
            self._prompt_logprobs(generation) if first else UNSET,
            self._prompt_text if first and self._prompt_text is not None else UNSET,
        )

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        chunk = self._chunk([], usage)
        return msgspec.structs.replace(chunk, metrics=self._times(self._streamed.values()))

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType,
        prompt_token_ids: list[int] | UnsetType = UNSET,
        prompt_logprobs: PromptLogprobs | UnsetType = UNSET,
        prompt_text: str | UnsetType = UNSET,
    ) -> ChatChunk:
        head = self._header
        return ChatChunk(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            prompt_text=prompt_text,
        )

    def full_response(
        self, generations: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> ChatCompletion:
        head = self._header
        params, why = self._hand_over(generations)
        return ChatCompletion(
            id=head.id,
            created=head.created,
            model=head.model,
            choices=[
                self._choice(generation, piece)
                for generation, piece in zip(generations, pieces, strict=True)
            ],
            usage=usage,
            prompt_token_ids=self._prompt_ids(generations[0]) or None,
            prompt_logprobs=self._prompt_logprobs(generations[0]) or None,
            prompt_text=self._prompt_text,
            metrics=self._times(generations),
            kv_transfer_params=params or None,
            kv_transfer_error=why,
        )

    def _choice(self, generation: Generation, piece: Piece) -> ChatChoice:
        parser = self._parsers[generation.index]
        part, calls = full_answer(parser, generation, piece, self._calls[generation.index])
        if self._echo:
            part = msgspec.structs.replace(part, items=[self._echo, *part.items])
        return ChatChoice(
            index=generation.index,
            message=self._message(part, calls, parser),
            logprobs=self._format_logprobs(piece),
            finish_reason=finish_reason(piece, parser),
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._header.with_ids else None,
        )

    def _delta(
        self, part: AnswerPart, calls: list[ToolCall], parser: AnswerParser, first: bool
    ) -> ChatDelta:
        role: Literal["assistant"] | UnsetType = "assistant" if first else UNSET
        if not parser.splits:
            return ChatDelta(role=role, content=part.content)
        thought = part.reasoning if self._shows_reasoning and part.reasoning else UNSET
        return ChatDelta(
            role=role,
            content=part.content or UNSET,
            reasoning_content=thought,
            reasoning=thought,
            tool_calls=calls or UNSET,
        )

    def _message(
        self, part: AnswerPart, calls: Sequence[ToolCall], parser: AnswerParser
    ) -> ChatMessage:
        if not parser.splits:
            return ChatMessage(content=part.content)
        thought = (part.reasoning or None) if self._shows_reasoning else None
        return ChatMessage(
            content=part.content or None,
            reasoning_content=thought,
            reasoning=thought,
            tool_calls=list(calls) or UNSET,
        )

    def _format_logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return None if piece.logprobs is None else self._logprobs.chat(piece.logprobs)


def full_answer(
    parser: AnswerParser, generation: Generation, piece: Piece, shown: CallFormatter
) -> tuple[AnswerPart, list[ToolCall]]:
    """An answer's parts and its calls. A call begun in the resumed tokens is included whole."""
    parser.feed(generation.resumed)
    part = parser.feed_piece(piece)
    touched = sorted({call.index for call in part.calls})
    return part, [shown.whole(parser.calls[at]) for at in touched]


def finish_reason(piece: Piece, parser: AnswerParser) -> FinishReason | None:
    """Why the answer ended, under OpenAI's names."""
    return "tool_calls" if piece.finish_reason == "stop" and parser.calls else piece.finish_reason
