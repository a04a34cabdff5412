"""How /v1/responses formats an answer: a list of items, whole or as a stream of numbered events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec

from millrace.common.api_errors import ApiError
from millrace.server.api.blocks import Action, Block, Blocks
from millrace.server.api.generation import Generation
from millrace.server.api.response_schema import Usage
from millrace.text.answer_parser import AnswerParser
from millrace.text.detokenizer import Piece
from millrace.text.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a whole response."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseBody(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/responses."""

    id: str
    object: str
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None
    incomplete_details: dict[str, str] | None
    error: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any] | None
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: str
    store: bool


class ResponseFormatter:
    """Answers of /v1/responses. heading: what of the body the answer repeats."""

    needs_usage = False

    def __init__(
        self, header: Mapping[str, Any], parser: AnswerParser, tokenizer: Tokenizer
    ) -> None:
        self.id = str(header["id"])
        self._header = header
        self._parser = parser
        self._tokenizer = tokenizer
        self._blocks = Blocks()
        self._ids: dict[int, str] = {}  # of items, by their block
        self._sequence = 0
        self._last = Piece("", [])

    def piece_events(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | None
    ) -> Iterable[bytes]:
        if first:
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self._body("in_progress", None))
        self._last = piece
        part = self._parser.feed_piece(piece)
        for event in self._blocks.add_part(part):
            yield from self._block_events(*event)

    def final_events(self, usage: Usage) -> Iterator[bytes]:
        for event in self._blocks.close():
            yield from self._block_events(*event)
        body = self._body(_status(self._last), usage)
        yield self._event(f"response.{body.status}", response=body)

    def error_events(self, error: ApiError) -> Iterable[bytes]:
        code = error.code if error.status < 500 and error.code else "server_error"
        body = msgspec.structs.replace(
            self._body("failed", None), error={"code": code, "message": str(error)}
        )
        return (self._event("response.failed", response=body),)

    def refusal_events(self, error: ApiError) -> Iterable[bytes]:
        """A stream that has nothing but its error, as OpenAI's API sends it."""
        info = error.body.error
        flat = {"code": info.code, "message": info.message, "param": info.param}
        yield self._event("error", error=info, **flat)
        yield from self.error_events(error)

    def full_response(
        self, generations: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> ResponseBody:
        (self._last,) = pieces
        for _ in self._blocks.add_part(self._parser.feed_piece(self._last)):
            pass
        return self._body(_status(self._last), usage)

    def _body(self, status: str, usage: Usage | None) -> ResponseBody:
        cut = status == "incomplete"
        done = status in ("completed", "incomplete")
        return ResponseBody(
            status=status,
            output=[self._item(block, "completed") for block in self._blocks.all] if done else [],
            usage=None if usage is None else self._usage(usage),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            error=None,
            **self._header,
        )

    def _usage(self, usage: Usage) -> ResponseUsage:
        thoughts = [block.text for block in self._blocks.all if block.kind == "reasoning"]
        reasoning = sum(len(self._tokenizer.encode(text, False)) for text in thoughts)
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details={"cached_tokens": cached, "cache_write_tokens": 0},
            output_tokens=usage.completion_tokens,
            output_tokens_details={"reasoning_tokens": min(reasoning, usage.completion_tokens)},
            total_tokens=usage.total_tokens,
        )

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        """A block as an item. One that is in progress has no content yet."""
        prefix = {"reasoning": "rs", "content": "msg", "call": "fc"}[block.kind]
        id = self._ids.setdefault(block.index, f"{prefix}_{uuid4().hex}")
        if block.kind == "call":
            return {
                "type": "function_call", "id": id, "call_id": block.id, "name": block.name,
                "arguments": block.text, "status": status,
            }  # fmt: skip
        content = [_part(block, block.text)] if status == "completed" else []
        if block.kind == "reasoning":
            return {
                "type": "reasoning", "id": id, "summary": [], "content": content,
                "status": status,
            }  # fmt: skip
        return {
            "type": "message", "id": id, "role": "assistant", "content": content, "status": status
        }  # fmt: skip

    def _block_events(self, action: Action, block: Block, text: str) -> Iterator[bytes]:
        if action == "open":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind == "content":
                yield self._inner("response.content_part.added", block, part=_part(block, ""))
        elif action == "add":
            kind, more = _DELTAS[block.kind]
            yield self._inner(f"{kind}.delta", block, delta=text, **more)
        else:
            kind, more = _DELTAS[block.kind]
            name = "arguments" if block.kind == "call" else "text"
            whole = {"name": block.name, **more} if block.kind == "call" else more
            yield self._inner(f"{kind}.done", block, **{name: block.text}, **whole)
            if block.kind == "content":
                part = _part(block, block.text)
                yield self._inner("response.content_part.done", block, part=part)
            item = self._item(block, "completed")
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _inner(self, kind: str, block: Block, **fields: Any) -> bytes:
        """An event of something inside an item."""
        place: dict[str, Any] = {"item_id": self._ids[block.index], "output_index": block.index}
        if block.kind != "call":
            place["content_index"] = 0
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), _encode(body))


_DELTAS: dict[str, tuple[str, dict[str, Any]]] = {
    "reasoning": ("response.reasoning_text", {}),
    "content": ("response.output_text", {"logprobs": []}),
    "call": ("response.function_call_arguments", {}),
}


def _part(block: Block, text: str) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(piece: Piece) -> str:
    return "incomplete" if piece.finish_reason == "length" else "completed"
