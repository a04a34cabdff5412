"""POST /v1/responses: the basics of OpenAI's newer API over the same engine.

A body becomes a chat body. Nothing is stored after the answer, so each request brings its whole
conversation. The format of the answer is in `formatter`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.lengths import ContextLengthError
from millrace.server.api.chat.endpoint import PreparedChat, prepare_chat
from millrace.server.api.context import ApiContext
from millrace.server.api.fields import HARMLESS, REFUSED, FieldRules, field_rules
from millrace.server.api.openai_responses.formatter import ResponseFormatter
from millrace.server.api.request_schema import ChatRequest, PromptRequest
from millrace.server.api.transport import stream_response
from millrace.server.http.errors import as_api_error
from millrace.text.answer_parser import AnswerParser

_STATELESS = "the server keeps no conversations; send the whole input"
_TEXT_ONLY = "the model reads and writes text only"
_TEXTS = ("input_text", "output_text", "text")

_OWN = FieldRules(
    refused={
        **REFUSED,
        "previous_response_id": ((), _STATELESS),
        "conversation": ((), _STATELESS),
        "prompt": ((), "there are no stored prompts; send instructions and input"),
        "background": ((False,), "answers come on the connection that asked for them"),
        "truncation": (("disabled",), "an input that is too long is refused, not cut"),
        "include": (([], ["reasoning.encrypted_content"]), "there is nothing more to include"),
        "max_tool_calls": ((), "the server calls no tools itself"),
        "top_logprobs": ((0,), "use /v1/chat/completions"),
        "context_management": ((), _STATELESS),
        "n": ((1,), "use /v1/chat/completions"),
        "logprobs": ((False,), "use /v1/chat/completions"),
        "response_format": ((), "use text.format"),
    },
    harmless=HARMLESS | {"stream_options"},
)


class ResponsesRequest(PromptRequest, frozen=True, kw_only=True):
    """Body of /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = False
    # vLLM's, beside OpenAI's
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


RULES = field_rules(ResponsesRequest, _OWN)


class Responses:
    """The endpoint."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/responses"""
        context = self._context
        body, prefix_hashes = await context.read_prompt_body(request, ResponsesRequest, RULES)
        ready = context.check_ready(body)
        id = f"resp_{uuid4().hex}"
        try:
            prepared = await prepare_chat(context, as_chat(body), id, ready)
        except ContextLengthError as error:
            if not body.stream:
                raise
            # Codex finds this error in no other place than an event of the stream.
            formatter = self._formatter(id, body, None)
            return stream_response(formatter.refusal_events(as_api_error(error)))
        formatter = self._formatter(id, body, prepared)
        return context.respond(
            prepared.requests, prepared.params, formatter, ready, bool(body.stream), prefix_hashes
        )

    def _formatter(
        self, id: str, body: ResponsesRequest, prepared: PreparedChat | None
    ) -> ResponseFormatter:
        """What formats the answer to a chat, or the error where there is none."""
        context = self._context
        sampling = context.processor.defaults if prepared is None else prepared.params
        header = {
            "id": id,
            "object": "response",
            "created_at": int(time.time()),
            "model": context.model_name(body),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": body.reasoning,
            "temperature": sampling.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "store": False,
        }
        parser = AnswerParser(None, None) if prepared is None else prepared.parsers[0]
        return ResponseFormatter(header, parser, context.processor.tokenizer)


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request as a chat. Raises RequestError for what is not served."""
    messages = _messages(body)
    shared = {name: getattr(body, name) for name in _SHARED}
    return ChatRequest(
        messages=messages,
        max_tokens=body.max_output_tokens,
        tools=[_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or [])] or None,
        tool_choice=_tool_choice(body.tool_choice),
        reasoning_effort=_effort(body.reasoning),
        response_format=_response_format(body.text),
        **shared,
    )


_SHARED = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "seed", "stop", "parallel_tool_calls", "stream", "chat_template_kwargs",
    "cache_salt",
)  # fmt: skip


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise RequestError("input is empty; give a text or at least one item", param="input")
    thought = ""
    for at, item in enumerate(body.input):
        kind = item.get("type", "message")
        where = f"input[{at}]"
        if kind == "reasoning":
            thought += _thought(item)
            continue
        message = _item(item, kind, where)
        last = messages[-1] if messages else {}
        if kind == "function_call" and last.get("role") == "assistant" and not thought:
            last.setdefault("tool_calls", []).extend(message["tool_calls"])
            continue
        messages += _with_thought(message, thought)
        thought = ""
    if thought:
        messages.append({"role": "assistant", "content": "", "reasoning_content": thought})
    return messages


def _with_thought(message: dict[str, Any], thought: str) -> list[dict[str, Any]]:
    """A message behind reasoning; an answer that was cut off has nothing but that."""
    if not thought:
        return [message]
    if message["role"] == "assistant":
        return [{**message, "reasoning_content": thought}]
    return [{"role": "assistant", "content": "", "reasoning_content": thought}, message]


def _item(item: Mapping[str, Any], kind: Any, where: str) -> dict[str, Any]:
    if kind == "message":
        content = item.get("content")
        if content is None and item.get("role") == "assistant":
            content = ""
        return {"role": item.get("role"), "content": _content(content, where)}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if kind == "function_call_output":
        output = item.get("output")
        text = _content(output, where) if output is not None else ""
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
    if kind == "item_reference":
        raise RequestError(f"{where}: {_STATELESS}", param="input")
    raise RequestError(
        f"{where}.type must be message, reasoning, function_call or function_call_output, "
        f"got {str(kind)[:60]!r}",
        param="input",
    )


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: content must be a text or a list of parts", param="input")
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind else None
        if kind not in (*_TEXTS, "refusal") or not isinstance(text, str):
            raise RequestError(
                f"{where}: part {at} must be of type {' or '.join(_TEXTS)}; {_TEXT_ONLY}",
                param="input",
            )
        texts.append(text)
    return "\n".join(texts)


def _thought(item: Mapping[str, Any]) -> str:
    """The text of a reasoning item; a summary if that is all there is."""
    for name in ("content", "summary"):
        parts = item.get(name)
        texts = [
            part["text"]
            for part in (parts if isinstance(parts, list) else ())
            if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        ]
        if texts:
            return "\n".join(texts)
    return ""


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"{where}: the server runs no tools such as {str(tool.get('type'))[:60]!r}; describe "
            "it as a function and run it yourself",
            param="tools",
        )
    named = ("name", "description", "parameters", "strict")
    function = {key: tool[key] for key in named if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _tool_choice(given: Any) -> Any:
    """A named tool, as chats write it."""
    if not isinstance(given, Mapping):
        return given
    if given.get("type") == "function":
        return {"type": "function", "function": {"name": given.get("name")}}
    if given.get("type") == "allowed_tools" and isinstance(given.get("tools"), list):
        some = {**given, "tools": [_tool_choice(one) for one in given["tools"]]}
        return {"type": "allowed_tools", "allowed_tools": some}
    return dict(given)


def _effort(given: Mapping[str, Any] | None) -> str | None:
    effort = (given or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise RequestError("reasoning.effort must be a text", param="reasoning")
    return effort


def _response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """text.format, which has the schema one level higher than response_format has it."""
    wanted = (given or {}).get("format")
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
        return dict(wanted) if isinstance(wanted, Mapping) else None
    return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
