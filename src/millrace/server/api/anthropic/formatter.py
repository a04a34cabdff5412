"""How Anthropic's API formats an answer: a list of blocks, whole or as a stream of named events."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from millrace.common.api_errors import ApiError
from millrace.server.api.blocks import Action, Block, Blocks
from millrace.server.api.generation import Generation
from millrace.server.api.response_schema import Usage
from millrace.text.answer_parser import AnswerParser
from millrace.text.detokenizer import Piece
from millrace.text.tools.json_repair import completed

_KINDS = {"reasoning": "thinking", "content": "text", "call": "tool_use"}

_encode = msgspec.json.Encoder().encode


class MessageUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts. Those found in the prefix cache, and those that were computed and stay there,
    are not among input_tokens."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens_details: dict[str, int] | None = None
    service_tier: Literal["standard"] = "standard"


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/messages."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None = None
    usage: MessageUsage


class MessageFormatter:
    """Answers of /v1/messages."""

    needs_usage = True

    def __init__(self, id: str, model: str, parser: AnswerParser, prompt_tokens: int) -> None:
        self.id = id
        self._model = model
        self._parser = parser
        self._prompt_tokens = prompt_tokens
        self._blocks = Blocks()
        self._last = Piece("", [])

    def piece_events(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | None
    ) -> Iterable[bytes]:
        assert usage is not None
        if first:
            message = self._message([], None, None, _usage(usage, 0))
            yield _event("message_start", message=message)
        self._last = piece
        part = self._parser.feed_piece(piece)
        for event in self._blocks.add_part(part):
            yield from self._block_events(*event)

    def final_events(self, usage: Usage) -> Iterator[bytes]:
        for event in self._blocks.close():
            yield from self._block_events(*event)
        reason, sequence = _stop(self._last, self._parser)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        counts = _usage(usage, usage.completion_tokens)
        yield _event("message_delta", delta=delta, usage=counts)
        yield _event("message_stop")

    def error_events(self, error: ApiError) -> Iterable[bytes]:
        return (_event("error", error=error.anthropic_body["error"]),)

    def full_response(
        self, generations: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> Message:
        (piece,) = pieces
        for _ in self._blocks.add_part(self._parser.feed_piece(piece)):
            pass
        content = [_content(block) for block in self._blocks.all]
        counts = _usage(usage, usage.completion_tokens)
        return self._message(content, *_stop(piece, self._parser), counts)

    def _message(
        self,
        content: list[dict[str, Any]],
        stop_reason: str | None,
        stop_sequence: str | None,
        usage: MessageUsage,
    ) -> Message:
        return Message(
            id=self.id,
            model=self._model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=usage,
        )

    def _block_events(self, action: Action, block: Block, text: str) -> Iterator[bytes]:
        if action == "open":
            empty = _content(Block(block.index, block.kind, "", block.id, block.name))
            yield _event("content_block_start", index=block.index, content_block=empty)
            return
        if action == "close":
            if block.kind == "reasoning":
                delta = {"type": "signature_delta", "signature": _signature(block)}
                yield _event("content_block_delta", index=block.index, delta=delta)
            yield _event("content_block_stop", index=block.index)
            return
        if block.kind == "reasoning":
            delta = {"type": "thinking_delta", "thinking": text}
        elif block.kind == "content":
            delta = {"type": "text_delta", "text": text}
        else:
            delta = {"type": "input_json_delta", "partial_json": text}
        yield _event("content_block_delta", index=block.index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode({"type": kind, **fields}))


def _usage(usage: Usage, output_tokens: int) -> MessageUsage:
    found = usage.prompt_tokens_details
    return MessageUsage(
        input_tokens=usage.prompt_tokens - found.cached_tokens - found.cache_write_tokens,
        output_tokens=output_tokens,
        cache_read_input_tokens=found.cached_tokens,
        cache_creation_input_tokens=found.cache_write_tokens,
        output_tokens_details={"thinking_tokens": usage.completion_tokens_details.reasoning_tokens},
    )


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": _signature(block)}
    if block.kind == "content":
        return {"type": "text", "text": block.text}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(block.text)}


def _signature(block: Block) -> str:
    """The signature of a block's reasoning; empty before there is any.

    Clients send it back and some insist on one. Nothing is checked with it here.
    """
    return hashlib.sha256(block.text.encode()).hexdigest() if block.text else ""


def _input(arguments: str) -> Mapping[str, Any]:
    """Arguments as an object. Those that were cut off are closed, as they are when the call comes
    back as history."""
    try:
        found = json.loads(completed(arguments) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _stop(piece: Piece, parser: AnswerParser) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence)."""
    if piece.finish_reason == "length":
        return "max_tokens", None
    if piece.finish_reason == "abort":  # the server was paused; sent back, the answer goes on
        return "pause_turn", None
    if isinstance(piece.stop_reason, str):
        return "stop_sequence", piece.stop_reason
    return "tool_use" if parser.calls else "end_turn", None
