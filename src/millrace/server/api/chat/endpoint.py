"""POST /v1/chat/completions: a conversation continued, through the checkpoint's chat template.

`prepare_chat` turns a chat's body into engine requests. The other chat APIs convert their bodies
to this one and use it too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.protocol import AddRequest, Ready, SamplingParams
from millrace.server.api.chat.cache_marks import Pins, cache_pins
from millrace.server.api.chat.formatter import ChatFormatter
from millrace.server.api.chat.thinking import thinking_budget, thinking_variables
from millrace.server.api.context import ApiContext, cache_salt
from millrace.server.api.fields import (
    CHATS,
    check_resume,
    naming_fields,
    sampling_params,
    structured_outputs,
)
from millrace.server.api.formatters import Formatter
from millrace.server.api.hand_over import read_hand_over
from millrace.server.api.prompts import naming_prompt
from millrace.server.api.request_schema import (
    BatchChatRequest,
    ChatOptions,
    ChatRequest,
    SamplingRequest,
)
from millrace.text.answer_parser import AnswerParser
from millrace.text.chat.client_lines import without_client_lines
from millrace.text.chat.effort import EFFORTS, VARIABLE, nearest_effort
from millrace.text.grammar_jobs import GrammarJob
from millrace.text.messages import is_long
from millrace.text.processor import split_outputs
from millrace.text.reasoning import START, ReasoningSplitter, opens_reasoning
from millrace.text.tools.parser import ToolParser
from millrace.text.tools.schema import ToolChoice, choose_tools, read_tools


class PreparedChat(msgspec.Struct, frozen=True):
    """A chat as engine requests. parsers: one for each of the requests. text: of the prompt, as the
    template wrote it. reasons: the answers begin with reasoning, which is split off. custom_tools:
    names of those that take one text."""

    requests: list[AddRequest]
    params: SamplingParams
    parsers: list[AnswerParser]
    text: str
    reasons: bool
    custom_tools: frozenset[str]


class Chat:
    """The endpoint for conversations."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions"""
        context = self._context
        body, prefix_hashes = await context.read_prompt_body(request, ChatRequest, CHATS)
        ready = context.check_ready(body)
        header = context.response_header(body, "chatcmpl")
        with naming_fields(_own_names(body)):
            prepared = await prepare_chat(context, body, header.id, ready)
        formatter = ChatFormatter(
            header,
            context.logprob_formatter(body),
            prepared.parsers,
            shows_reasoning=body.include_reasoning,
            prompt_text=prepared.text if body.return_prompt_text else None,
            echo=_last_answer(body.messages) if body.echo else "",
            custom_tools=prepared.custom_tools,
        )
        return respond_to_chat(context, body, prepared, formatter, ready, prefix_hashes)

    async def create_batch(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions/batch: a choice for each conversation, in their order."""
        context = self._context
        body = await context.body(request, BatchChatRequest, CHATS)
        body = msgspec.structs.replace(body, cache_salt=cache_salt(request, body) or None)
        ready = context.check_ready(body)
        _check_batch(body)
        context.check_capacity(len(body.messages), ready)
        header = context.response_header(body, "chatcmpl")
        chats = []
        for index, messages in enumerate(body.messages):
            with naming_prompt(index, len(body.messages)):
                chat = _one_of(body, messages)
                chats.append(await prepare_chat(context, chat, f"{header.id}-{index}", ready))
            await asyncio.sleep(0)  # other requests go on between conversations
        formatter = ChatFormatter(
            header,
            context.logprob_formatter(body),
            [parser for chat in chats for parser in chat.parsers],
            shows_reasoning=body.include_reasoning,
            custom_tools=chats[0].custom_tools,
        )
        requests = [one for chat in chats for one in chat.requests]
        return context.respond(requests, chats[0].params, formatter, ready, stream=False)


def _check_batch(body: BatchChatRequest) -> None:
    """Raise RequestError for what several conversations cannot have together."""
    if not body.messages:
        raise RequestError("messages holds no conversation", param="messages")
    for name, wanted in (
        ("stream", body.stream), ("tools", body.tools), ("echo", body.echo),
        ("kv_transfer_params", body.kv_transfer_params),
    ):  # fmt: skip
        if wanted:
            raise RequestError(f"{name} is not served for a batch; leave it out", param=name)
    if body.n not in (None, 1):
        raise RequestError("n is 1 for a batch; repeat a conversation instead", param="n")


def _one_of(body: BatchChatRequest, messages: list[dict[str, Any]]) -> ChatRequest:
    """One conversation of a batch as a body of its own."""
    fields = {name: getattr(body, name) for name in ChatOptions.__struct_fields__}
    return ChatRequest(messages=messages, **fields)


def _last_answer(messages: list[dict[str, Any]]) -> str:
    """The text of a last message of the assistant, which the answer continues."""
    last = messages[-1] if messages else {}
    content = last.get("content") if last.get("role") == "assistant" else None
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _own_names(body: ChatRequest) -> dict[str, str]:
    """What fields are called that have other names in completions, or two names."""
    newer = body.max_completion_tokens is not None
    return {"prompt": "messages"} | ({"max_tokens": "max_completion_tokens"} if newer else {})


async def prepare_chat(
    context: ApiContext, body: ChatRequest, id: str, ready: Ready, pins: Pins | None = None
) -> PreparedChat:
    """The engine requests of a chat. pins: None: as marks in its messages say. Raises RequestError
    or ApiError."""
    params = sampling_params(body, context.processor.defaults)
    check_resume(body, outputs=params.n)
    hand_over = read_hand_over(body, params.n, ready)
    context.check_capacity(params.n, ready)
    choice = tool_choice(context, body)
    text = await context.run_in_thread(
        partial(chat_text, context, body, choice, ready), is_long(body.messages)
    )
    variables = _variables(context, body)
    starts_with_reasoning = opens_reasoning(context.reasoning_parser, text, variables)
    reasons = starts_with_reasoning or text.rstrip().endswith(START)  # also where the parser is off
    job = _grammar_job(context, body, choice, reasons)
    grammar = await context.grammar(job, reasons) if job else None
    token_ids = await context.token_ids(text, body.add_special_tokens, ready, body)
    request = context.processor.request(
        id,
        context.truncate(token_ids, body, params, ready),
        params,
        ready.max_model_len,
        resume=body.resume_token_ids or (),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        grammar=grammar,
        reasoning=context.processor.reasoning_bound(_thinking_budget(body), reasons),
        pins=cache_pins(body.messages, tools=body.tools) if pins is None else pins,
        **hand_over.arguments(id),
    )
    requests = split_outputs(request)
    parser = partial(_parser, context, choice, starts_with_reasoning)
    parsers = [parser() for _ in requests]
    custom = frozenset(tool.name for tool in choice.tools if tool.custom)
    return PreparedChat(requests, params, parsers, text, starts_with_reasoning, custom)


def respond_to_chat(
    context: ApiContext,
    body: SamplingRequest,
    prepared: PreparedChat,
    formatter: Formatter,
    ready: Ready,
    prefix_hashes: Sequence[int],
) -> ASGIApp:
    """The application that runs a prepared chat, as the body of its API asks for it.

    prefix_hashes: of its prompt. Raises RequestError for a stream_interval of less than one.
    """
    return context.respond(
        prepared.requests,
        prepared.params,
        formatter,
        ready,
        bool(body.stream),
        prefix_hashes,
        stream_interval=body.stream_interval,
        reasons=prepared.reasons,
    )


async def count_chat_tokens(context: ApiContext, body: ChatRequest, ready: Ready) -> int:
    """How many tokens a chat's prompt has, more than the model's context too. Raises RequestError
    or ApiError."""
    choice = tool_choice(context, body)
    work = partial(chat_text, context, body, choice, ready, must_fit=False)
    text = await context.run_in_thread(work, long=True)
    return await context.count_tokens(text, ready)


def chat_text(
    context: ApiContext,
    body: ChatRequest,
    choice: ToolChoice,
    ready: Ready,
    *,
    must_fit: bool = True,
) -> str:
    """The prompt's text. Raises RequestError, for messages that are too long before they are
    rendered; must_fit: whether they can be."""
    if must_fit and body.truncate_prompt_tokens is None:
        context.processor.check_chat(body.messages, ready.max_model_len)
    return context.processor.chat_prompt(
        without_client_lines(body.messages),
        tools=choice.offered,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        variables=_variables(context, body),
    )


def tool_choice(context: ApiContext, body: ChatRequest) -> ToolChoice:
    """Which tools the answer may call."""
    tools = read_tools(body.tools)
    choice = choose_tools(tools, body.tool_choice, body.parallel_tool_calls is not False)
    if choice.mode == "required" and context.tool_call_parser == "none":
        raise RequestError(
            "tool_choice needs a --tool-call-parser; this server has none", param="tool_choice"
        )
    return choice


def _variables(context: ApiContext, body: ChatRequest) -> dict[str, Any]:
    """The template's variables, those that have fields of their own among them."""
    given: dict[str, Any] = {}
    if body.documents is not None:
        given["documents"] = body.documents
    effort, template = _effort(body), context.processor.template
    known = None if template is None else template.efforts
    if effort is not None:
        if known != ():  # else any word is right
            nearest_effort(effort, known or EFFORTS)
        if known is None or effort == "none":  # no degrees: the model reasons or not
            given["enable_thinking"] = effort != "none"
        if known is not None and (effort != "none" or effort in known):
            given[VARIABLE] = effort
    given |= thinking_variables(body.thinking)
    if body.enable_thinking is not None:
        given["enable_thinking"] = body.enable_thinking
    given |= body.chat_template_kwargs or {}
    if known and isinstance(word := given.get(VARIABLE), str):
        given[VARIABLE] = nearest_effort(word, known)
    return given


def _thinking_budget(body: ChatRequest) -> int | None:
    """thinking_token_budget, or thinking.budget_tokens."""
    own = thinking_budget(body.thinking)
    return own if body.thinking_token_budget is None else body.thinking_token_budget


def _effort(body: ChatRequest) -> str | None:
    """reasoning_effort, or reasoning.effort."""
    effort = body.reasoning_effort or (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise RequestError("reasoning.effort must be a text", param="reasoning")
    return effort


def _grammar_job(
    context: ApiContext, body: ChatRequest, choice: ToolChoice, reasons: bool
) -> GrammarJob | None:
    """The grammar that the answer must match, if there is one, to be built."""
    processor, parser = context.processor, context.tool_call_parser
    wanted = structured_outputs(body)
    output = None
    if wanted is not None:
        outputs, field, strictness = wanted
        output = processor.output_grammar(outputs, field, reasons, strictness)
    if parser != "none" and (
        choice.mode == "required"
        or (choice.mode == "auto" and output is not None)
        or processor.constrains_auto_calls(choice)
    ):
        return processor.tool_call_grammar(choice, parser, reasons, output)
    return output


def _parser(context: ApiContext, choice: ToolChoice, starts_with_reasoning: bool) -> AnswerParser:
    calls = choice.mode != "none" and context.tool_call_parser != "none"
    return AnswerParser(
        ReasoningSplitter() if starts_with_reasoning else None,
        ToolParser(choice.offered, context.tool_call_parser) if calls else None,
    )
