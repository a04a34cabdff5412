"""How /v1/chat/completions formats outputs: reasoning, content and calls, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from millrace.server.api.formatters import OpenAiFormatter, ResponseHeader
from millrace.server.api.generation import Generation
from millrace.server.api.logprobs import LogprobFormatter
from millrace.server.api.response_schema import (
    CalledFunction,
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
from millrace.text.tools.parser import CallPart


class ChatFormatter(OpenAiFormatter):
    """Answers of /v1/chat/completions. parsers: one for each choice. prompt_text: None hides it.

    echo: what the content begins with, before the output.
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
    ) -> None:
        super().__init__(header, logprobs)
        self._echo = echo
        self._prompt_text = prompt_text
        self._parsers = parsers
        self._shows_reasoning = shows_reasoning

    def chunk(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> ChatChunk:
        parser = self._parsers[generation.index]
        if first:
            parser.feed(generation.resumed)
        part = parser.feed_piece(piece)
        if first and self._echo:
            part = msgspec.structs.replace(part, items=[self._echo, *part.items])
        choice = ChatChunkChoice(
            index=generation.index,
            delta=self._delta(part, parser, first),
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
        )

    def _choice(self, generation: Generation, piece: Piece) -> ChatChoice:
        parser = self._parsers[generation.index]
        part, calls = full_answer(parser, generation, piece)
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

    def _delta(self, part: AnswerPart, parser: AnswerParser, first: bool) -> ChatDelta:
        role: Literal["assistant"] | UnsetType = "assistant" if first else UNSET
        if not parser.splits:
            return ChatDelta(role=role, content=part.content)
        thought = part.reasoning if self._shows_reasoning and part.reasoning else UNSET
        return ChatDelta(
            role=role,
            content=part.content or UNSET,
            reasoning_content=thought,
            reasoning=thought,
            tool_calls=[_call_delta(one) for one in _by_index(part.calls)] or UNSET,
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
    parser: AnswerParser, generation: Generation, piece: Piece
) -> tuple[AnswerPart, list[ToolCall]]:
    """An answer's parts and its calls. A call begun in the resumed tokens is included whole."""
    parser.feed(generation.resumed)
    part = parser.feed_piece(piece)
    touched = sorted({call.index for call in part.calls})
    calls = [
        ToolCall(
            id=parser.calls[at].id,
            type="function",
            function=CalledFunction(
                name=parser.calls[at].name, arguments=parser.calls[at].arguments
            ),
        )
        for at in touched
    ]
    return part, calls


def finish_reason(piece: Piece, parser: AnswerParser) -> FinishReason | None:
    """Why the answer ended, under OpenAI's names."""
    return "tool_calls" if piece.finish_reason == "stop" and parser.calls else piece.finish_reason


def _by_index(parts: Sequence[CallPart]) -> list[CallPart]:
    """The parts of a chunk, one for each call: clients may read an index only once in a chunk."""
    merged: dict[int, CallPart] = {}
    for part in parts:
        before = merged.get(part.index)
        merged[part.index] = (
            part
            if before is None
            else CallPart(
                part.index,
                id=before.id or part.id,
                name=before.name or part.name,
                arguments=before.arguments + part.arguments,
            )
        )
    return list(merged.values())


def _call_delta(part: CallPart) -> ToolCall:
    if part.id is None or part.name is None:
        return ToolCall(index=part.index, function=CalledFunction(arguments=part.arguments))
    function = CalledFunction(name=part.name, arguments=part.arguments)
    return ToolCall(index=part.index, id=part.id, type="function", function=function)
