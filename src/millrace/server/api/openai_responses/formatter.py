"""How /v1/responses formats an answer: a list of items, whole or as a stream of numbered events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

import msgspec

from millrace.common.api_errors import ApiError
from millrace.server.api.blocks import Action, Block, Blocks
from millrace.server.api.generation import Generation
from millrace.server.api.openai_responses.response_body import (
    RawMessage,
    ResponseBody,
    ResponseUsage,
    Status,
)
from millrace.server.api.openai_responses.token_logprobs import TextLogprobs
from millrace.server.api.openai_responses.tools import OfferedTool
from millrace.server.api.response_schema import Usage
from millrace.text.answer_parser import AnswerParser, AnswerPart
from millrace.text.detokenizer import Piece
from millrace.text.reasoning import END
from millrace.text.tools.call_tags import CALL_END
from millrace.text.tools.custom import InputReader

_encode = msgspec.json.Encoder().encode


class ResponseFormatter:
    """Answers of /v1/responses.

    body: the answer so far; at first what it repeats of the request. item_tag: what the ids of
    items begin with behind their prefix. tools: by the names that the model knows. logprobs: finds
    those of messages; None: they are not shown. decode: makes text of the output's tokens, which
    are then shown as well; None: they are not. on_end: called with the answer that has ended.
    """

    needs_usage = False

    def __init__(
        self,
        body: ResponseBody,
        parser: AnswerParser,
        *,
        item_tag: str = "",
        tools: Mapping[str, OfferedTool] | None = None,
        logprobs: TextLogprobs | None = None,
        shows_reasoning: bool = True,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        self.id = body.id
        self.body = body
        self._parser = parser
        self._item_tag = item_tag
        self._tools = tools or {}
        self._logprobs = logprobs
        self._shows_reasoning = shows_reasoning
        self.on_end: Callable[[ResponseBody], None] = lambda body: None
        self._blocks = Blocks()
        self._cut: Block | None = None  # the block that was open when the answer was cut off
        self._ids: dict[int, str] = {}  # of items, by their block
        self._inputs: dict[int, InputReader] = {}  # of custom tools, by block
        self._shown: dict[int, list[dict[str, Any]]] = {}  # log-probabilities, by block
        self._sequence = 0
        self._last = Piece("", [])
        self._decode = decode
        self._tokens: list[int] = []  # of the output, if they are to be shown

    # --- as the server asks ----------------------------------------------------------------------

    def queued_events(self) -> Iterator[bytes]:
        """The events of a response that waits before its first piece."""
        self.body = msgspec.structs.replace(self.body, status="queued")
        for kind in ("response.created", "response.queued"):
            yield self._event(kind, response=self.body)

    def piece_events(
        self, generation: Generation, piece: Piece, first: bool, usage: Usage | None
    ) -> Iterable[bytes]:
        if first:
            kinds = ["response.created"] if self.body.status != "queued" else []
            self.body = msgspec.structs.replace(self.body, status="in_progress")
            for kind in (*kinds, "response.in_progress"):
                yield self._event(kind, response=self.body)
        for change in self._changes(piece):
            yield from self._block_events(*change)

    def final_events(self, usage: Usage) -> Iterator[bytes]:
        status = self._final_status()
        for action, block, text in self._closing(status):
            yield from self._block_events(action, block, text, [])
        yield self._end(status, usage)

    def cancel_events(self, usage: Usage) -> Iterator[bytes]:
        """The end of a response that the client cancelled."""
        for action, block, text in self._closing("cancelled"):
            yield from self._block_events(action, block, text, [])
        yield self._end("cancelled", usage)

    def error_events(self, error: ApiError) -> Iterable[bytes]:
        code = error.code if error.status < 500 and error.code else "server_error"
        for _ in self._closing("failed"):
            pass
        return (self._end("failed", None, error={"code": code, "message": str(error)}),)

    def refusal_events(self, error: ApiError) -> Iterable[bytes]:
        """A stream that has nothing but its error, as OpenAI's API sends it."""
        info = error.body.error
        flat = {"code": info.code, "message": info.message, "param": info.param}
        yield self._event("error", error=info, **flat)
        yield from self.error_events(error)

    def full_response(
        self, generations: Sequence[Generation], pieces: Sequence[Piece], usage: Usage
    ) -> ResponseBody:
        (piece,) = pieces
        for _ in self._changes(piece):
            pass
        status = self._final_status()
        for _ in self._closing(status):
            pass
        self._end(status, usage)
        return self.body

    def snapshot(self) -> ResponseBody:
        """The answer so far."""
        return msgspec.structs.replace(self.body, output=self._items())

    # --- the answer ------------------------------------------------------------------------------

    def _changes(self, piece: Piece) -> Iterator[tuple[Action, Block, str, list[dict[str, Any]]]]:
        """What a piece changes: as `Blocks.add_part`, with the log-probabilities of the text."""
        self._last = piece
        if self._decode is not None:
            self._tokens += piece.token_ids
        part = self._parser.feed_piece(piece)
        if self._logprobs is not None:
            self._logprobs.add(piece.logprobs or [])
            self._logprobs.skip(part.reasoning)
        if not self._shows_reasoning:
            part = AnswerPart("", part.items)
        for action, block, text in self._with_inputs(self._blocks.add_part(part)):
            found: list[dict[str, Any]] = []
            if self._logprobs is not None and block.kind == "content":
                if action == "open":
                    self._skip_marker(self._logprobs, block)
                elif action == "add":
                    found = self._logprobs.take(text)
                    self._shown.setdefault(block.index, []).extend(found)
            yield action, block, text, found

    def _with_inputs(
        self, changes: Iterable[tuple[Action, Block, str]]
    ) -> Iterator[tuple[Action, Block, str]]:
        """The changes, where a call of a custom tool has its input in place of arguments."""
        for action, block, text in changes:
            if self._is_custom(block):
                reader = self._input(block)
                if action == "add":
                    text = reader.feed(text)
                elif action == "close" and (rest := reader.finish()):
                    yield "add", block, rest
            yield action, block, text

    def _skip_marker(self, logprobs: TextLogprobs, block: Block) -> None:
        """A message begins behind the tag that ends reasoning or a call."""
        before = self._blocks.all[: block.index]
        if before and before[-1].kind == "call":
            logprobs.skip(CALL_END)
        elif self._parser.reasons and not any(one.kind != "reasoning" for one in before):
            logprobs.skip(END)

    def _final_status(self) -> Status:
        if self._last.finish_reason == "abort":  # the server was paused
            return "cancelled"
        return "incomplete" if self._last.finish_reason == "length" else "completed"

    def _closing(self, status: Status) -> Iterator[tuple[Action, Block, str]]:
        """The changes when nothing follows. What is open stays incomplete unless all completed."""
        if status != "completed":
            self._cut = self._blocks.open
        yield from self._with_inputs(self._blocks.close())

    def _end(
        self, status: Status, usage: Usage | None, error: dict[str, str] | None = None
    ) -> bytes:
        """Settle the answer; returns the last event."""
        self.body = msgspec.structs.replace(
            self.body,
            status=status,
            output=self._items(),
            usage=usage and _usage(usage),
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            error=error,
        )
        if self._decode is not None:
            whole = RawMessage(message=self._decode(self._tokens), tokens=self._tokens)
            self.body = msgspec.structs.replace(self.body, output_messages=[whole])
        self.on_end(self.body)
        kind = "incomplete" if status == "cancelled" else status  # there is no event for it
        return self._event(f"response.{kind}", response=self.body)

    # --- items -----------------------------------------------------------------------------------

    def _items(self) -> list[dict[str, Any]]:
        return [self._item(block) for block in self._blocks.all]

    def _item(self, block: Block) -> dict[str, Any]:
        """A block as an item."""
        status = "completed"
        if block is self._blocks.open or block is self._cut:
            status = "incomplete" if block is self._cut else "in_progress"
        if block.kind == "call":
            return self._call(block, status)
        content = [self._part(block, block.text)] if block.text else []
        if block.kind == "reasoning":
            return {
                "type": "reasoning", "id": self._id(block, "rs"), "summary": [],
                "content": content, "status": status,
            }  # fmt: skip
        return {
            "type": "message", "id": self._id(block, "msg"), "role": "assistant",
            "content": content, "status": status,
        }  # fmt: skip

    def _call(self, block: Block, status: str) -> dict[str, Any]:
        tool = self._tool(block)
        named: dict[str, Any] = {"call_id": block.id, "name": tool.name}
        if tool.namespace is not None:
            named["namespace"] = tool.namespace
        if tool.kind == "custom":
            id, given = self._id(block, "ctc"), self._input(block).text
            return {"type": "custom_tool_call", "id": id, **named, "input": given, "status": status}
        return {
            "type": "function_call", "id": self._id(block, "fc"), **named,
            "arguments": block.text, "status": status,
        }  # fmt: skip

    def _id(self, block: Block, prefix: str) -> str:
        new = f"{prefix}_{self._item_tag}{uuid4().hex[:24]}"
        return self._ids.setdefault(block.index, new)

    def _tool(self, block: Block) -> OfferedTool:
        return self._tools.get(block.name) or OfferedTool("function", block.name)

    def _is_custom(self, block: Block) -> bool:
        return block.kind == "call" and self._tool(block).kind == "custom"

    def _input(self, block: Block) -> InputReader:
        return self._inputs.setdefault(block.index, InputReader())

    def _part(self, block: Block, text: str) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._shown.get(block.index, []) if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    # --- events ----------------------------------------------------------------------------------

    def _block_events(
        self, action: Action, block: Block, text: str, logprobs: list[dict[str, Any]]
    ) -> Iterator[bytes]:
        if action == "open":
            item = self._item(block)
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "call":
                part = self._part(block, "")
                yield self._inner("response.content_part.added", block, part=part)
        elif action == "add":
            if text:
                yield self._delta(block, text, logprobs)
        else:
            yield from self._done_events(block)

    def _delta(self, block: Block, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        more = {"logprobs": logprobs} if block.kind == "content" else {}
        return self._inner(f"{self._event_kind(block)}.delta", block, delta=text, **more)

    def _done_events(self, block: Block) -> Iterator[bytes]:
        kind = self._event_kind(block)
        if self._is_custom(block):
            yield self._inner(f"{kind}.done", block, input=self._input(block).text)
        elif block.kind == "call":
            name = self._tool(block).name
            yield self._inner(f"{kind}.done", block, name=name, arguments=block.text)
        else:
            part = self._part(block, block.text)
            more = {"logprobs": part["logprobs"]} if block.kind == "content" else {}
            yield self._inner(f"{kind}.done", block, text=block.text, **more)
            yield self._inner("response.content_part.done", block, part=part)
        item = self._item(block)
        yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _event_kind(self, block: Block) -> str:
        if self._is_custom(block):
            return "response.custom_tool_call_input"
        return _EVENTS[block.kind]

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


_EVENTS = {
    "reasoning": "response.reasoning_text",
    "content": "response.output_text",
    "call": "response.function_call_arguments",
}


def _usage(usage: Usage) -> ResponseUsage:
    reasoning = usage.completion_tokens_details.reasoning_tokens
    found = usage.prompt_tokens_details
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details={
            "cached_tokens": found.cached_tokens,
            "cache_write_tokens": found.cache_write_tokens,
        },
        output_tokens=usage.completion_tokens,
        output_tokens_details={"reasoning_tokens": reasoning},
        total_tokens=usage.total_tokens,
    )
