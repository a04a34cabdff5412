"""POST /v1/chat/completions: a conversation continued, through the checkpoint's chat template.

`prepare` turns a chat's body into engine requests; the other families of chat APIs put theirs into
the same body and use it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.protocol import AddRequest, Grammar, Ready, SamplingParams
from millrace.server.chat_reply import ChatReply
from millrace.server.fields import CHATS, check_resume, sampling_params, structured_outputs
from millrace.server.front import Front
from millrace.server.logprobs import LogprobWords
from millrace.server.replies import Heading
from millrace.server.schema import ChatRequest, StreamOptions
from millrace.text.answer import AnswerParser
from millrace.text.codec import copies
from millrace.text.reasoning import START, ReasoningSplit, begins_reasoning
from millrace.text.tools import ToolParser
from millrace.text.toolset import ToolChoice, choose_tools, read_tools

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Turn(msgspec.Struct, frozen=True):
    """A chat made ready for the engine. parsers: one for each of the requests."""

    requests: list[AddRequest]
    params: SamplingParams
    parsers: list[AnswerParser]


class Chat:
    """The endpoint for conversations."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [Route("/v1/chat/completions", self.create, methods=["POST"])]

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions"""
        front = self._front
        body, chain = await front.prompted(request, ChatRequest, CHATS)
        ready = front.check(body)
        heading = Heading(
            id=f"chatcmpl-{uuid4().hex}",
            created=int(time.time()),
            model=front.name(body),
            with_ids=bool(body.return_token_ids),
            options=body.stream_options or StreamOptions(),
        )
        turn = await prepare(front, body, heading.id, ready)
        words = LogprobWords(front.codec.tokenizer, bool(body.return_tokens_as_token_ids))
        reply = ChatReply(heading, words, turn.parsers, shows_reasoning=body.include_reasoning)
        return front.answer(turn.requests, turn.params, reply, ready, bool(body.stream), chain)


async def prepare(front: Front, body: ChatRequest, id: str, ready: Ready) -> Turn:
    """The engine requests of a chat. Raises RequestError or ApiError."""
    params = sampling_params(body, front.codec.defaults)
    check_resume(body, outputs=params.n)
    front.check_room(params.n, ready)
    choice = tool_choice(front, body)
    text = await front.apart(partial(chat_text, front, body, choice), len(body.messages) > 8)
    variables = _variables(front, body)
    thinks = begins_reasoning(front.reasoning_parser, text, variables)
    reasons = thinks or text.rstrip().endswith(START)  # also where nobody tells it apart
    build = _grammar(front, body, choice, reasons)
    grammar = await front.apart(build, True) if build else None
    token_ids = await front.token_ids(text, body.add_special_tokens)
    request = front.codec.request(
        id,
        front.truncated(token_ids, body, params, ready),
        params,
        ready.max_model_len,
        resume=body.resume_token_ids or (),
        priority=body.priority or 0,
        grammar=grammar,
        reasoning=front.codec.reasoning_bound(body.thinking_token_budget, reasons),
    )
    requests = copies(request)
    parser = partial(_parser, front, choice, thinks)
    return Turn(requests, params, [parser() for _ in requests])


def chat_text(front: Front, body: ChatRequest, choice: ToolChoice) -> str:
    """The prompt's text. Raises RequestError."""
    return front.codec.chat_prompt(
        body.messages,
        tools=choice.offered,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=_variables(front, body),
    )


def tool_choice(front: Front, body: ChatRequest) -> ToolChoice:
    """Which tools the answer may call."""
    tools = read_tools(body.tools)
    choice = choose_tools(tools, body.tool_choice, body.parallel_tool_calls is not False)
    if choice.mode == "required" and front.tool_call_parser == "none":
        raise RequestError(
            "tool_choice needs a --tool-call-parser; this server has none", param="tool_choice"
        )
    return choice


def _variables(front: Front, body: ChatRequest) -> dict[str, Any]:
    """The template's variables, those that have fields of their own among them."""
    given: dict[str, Any] = {}
    if body.documents is not None:
        given["documents"] = body.documents
    effort = body.reasoning_effort
    template = front.codec.template
    if effort is not None and template is not None and "reasoning_effort" in template.source:
        given["reasoning_effort"] = effort
    elif effort is not None:  # the model reasons or does not; it knows no degrees
        if effort not in EFFORTS:
            known = ", ".join(EFFORTS)
            message = f"reasoning_effort must be one of {known}, got {effort!r}"
            raise RequestError(message, param="reasoning_effort")
        given["enable_thinking"] = effort != "none"
    return {**given, **(body.chat_template_kwargs or {})}


def _grammar(
    front: Front, body: ChatRequest, choice: ToolChoice, reasons: bool
) -> Callable[[], Grammar] | None:
    """What makes the grammar that the answer must match, if there is one."""
    codec, parser = front.codec, front.tool_call_parser
    wanted = structured_outputs(body)
    if choice.mode == "required" and wanted is not None:
        raise RequestError(
            f"{wanted[1]} and tool_choice exclude each other; give one", param=wanted[1]
        )
    if choice.mode == "required" or (codec.binds_freely(choice) and wanted is None):
        return partial(codec.calls, choice, parser, reasons)
    if wanted is not None and choice.mode == "auto" and parser != "none":
        return partial(codec.calls, choice, parser, reasons, wanted)
    return wanted and partial(codec.structured, *wanted, reasons)


def _parser(front: Front, choice: ToolChoice, thinks: bool) -> AnswerParser:
    calls = choice.mode != "none" and front.tool_call_parser != "none"
    return AnswerParser(
        ReasoningSplit() if thinks else None,
        ToolParser(choice.offered, front.tool_call_parser) if calls else None,
    )
