"""How outputs are worded: as a chat or as a plain completion, whole or in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from millrace.server.generation import Generation
from millrace.server.schema import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    Usage,
)
from millrace.text.output import Piece
from millrace.text.reasoning import ReasoningSplit


class Reply(Protocol):
    """The wording of one answer."""

    id: str

    def chunk(
        self, one: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> msgspec.Struct:
        """What a piece looks like in a stream. first: it is the first of its choice."""

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The chunk without choices that ends a stream."""

    def whole(
        self, ones: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> msgspec.Struct:
        """The answer that is not streamed; each generation's output is one piece."""


class _Heading:
    """What every chunk repeats. with_ids: answers carry token ids."""

    def __init__(self, id: str, created: int, model: str, with_ids: bool) -> None:
        self.id = id
        self._created = created
        self._model = model
        self._with_ids = with_ids


class CompletionReply(_Heading):
    """Answers of /v1/completions."""

    def chunk(
        self, one: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> Completion:
        return self._completion([self._choice(one, piece, first)], usage)

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(
        self, ones: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> Completion:
        choices = [self._choice(one, piece, True) for one, piece in zip(ones, pieces, strict=True)]
        return self._completion(choices, usage)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType) -> Completion:
        return Completion(
            id=self.id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _choice(self, one: Generation, piece: Piece, first: bool) -> CompletionChoice:
        return CompletionChoice(
            index=one.index,
            text=piece.text,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._with_ids else UNSET,
            prompt_token_ids=one.request.prompt if self._with_ids and first else UNSET,
        )


class ChatReply(_Heading):
    """Answers of /v1/chat/completions. split: takes the reasoning off; None if there is none.

    It splits one answer, so a chat has one choice.
    """

    def __init__(
        self, id: str, created: int, model: str, with_ids: bool, split: ReasoningSplit | None
    ) -> None:
        super().__init__(id, created, model, with_ids)
        self._split = split

    def chunk(
        self, one: Generation, piece: Piece, first: bool, usage: Usage | UnsetType
    ) -> ChatChunk:
        choice = ChatChunkChoice(
            index=one.index,
            delta=self._delta(piece, first),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._with_ids else UNSET,
        )
        return ChatChunk(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=[choice],
            usage=usage,
            prompt_token_ids=one.request.prompt if self._with_ids and first else UNSET,
        )

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(
            id=self.id, created=self._created, model=self._model, choices=[], usage=usage
        )

    def whole(
        self, ones: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=one.index,
                message=self._message(piece),
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
                token_ids=piece.token_ids if self._with_ids else UNSET,
            )
            for one, piece in zip(ones, pieces, strict=True)
        ]
        return ChatCompletion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=ones[0].request.prompt if self._with_ids else UNSET,
        )

    def _delta(self, piece: Piece, first: bool) -> ChatDelta:
        role: Literal["assistant"] | UnsetType = "assistant" if first else UNSET
        if self._split is None:
            return ChatDelta(role=role, content=piece.text)
        reasoning, content = self._split.feed(piece.text, piece.finish_reason is not None)
        thought = reasoning or UNSET
        return ChatDelta(
            role=role, content=content or UNSET, reasoning_content=thought, reasoning=thought
        )

    def _message(self, piece: Piece) -> ChatMessage:
        if self._split is None:
            return ChatMessage(content=piece.text)
        reasoning, content = self._split.feed(piece.text, last=True)
        thought = reasoning or None
        return ChatMessage(content=content or None, reasoning_content=thought, reasoning=thought)
