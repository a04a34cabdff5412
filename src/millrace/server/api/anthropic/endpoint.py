"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same engine.

A body is converted to the chat body of OpenAI's API. The format of the answer is in `formatter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.server.api.anthropic.formatter import MessageFormatter
from millrace.server.api.chat.cache_marks import cache_pins
from millrace.server.api.chat.endpoint import (
    count_chat_tokens,
    prepare_chat,
    respond_to_chat,
)
from millrace.server.api.context import ApiContext
from millrace.server.api.field_table import counting_rules, field_rules
from millrace.server.api.fields import naming_fields, note_tool_keys
from millrace.server.api.request_schema import (
    SAMPLING_FIELDS,
    ChatRequest,
    SamplingRequest,
)
from millrace.server.api.transport import json_response
from millrace.text.chat.effort import EFFORTS
from millrace.text.chat.media import not_text
from millrace.text.messages import is_long
from millrace.text.tools.schema import nested_tool


class CountRequest(SamplingRequest, frozen=True, kw_only=True):
    """Body of /v1/messages/count_tokens, where sampling has no effect. output_format: the older
    name of output_config.format.
    """

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    cache_control: dict[str, Any] | None = None


RULES = field_rules("messages")
# By the names of a chat's fields: those of this API.
_NAMES = {"response_format": "output_config.format", "prompt": "messages"}
_STOPS = {"stop": "stop_sequences"}  # where they came by that name


class TokenCount(msgspec.Struct, frozen=True):
    """Answer of /v1/messages/count_tokens."""

    input_tokens: int


class Anthropic:
    """The endpoints of Anthropic's API."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/messages"""
        context = self._context
        body, prefix_hashes = await context.read_prompt_body(request, MessagesRequest, RULES)
        ready = context.check_ready(body)
        id = f"msg_{uuid4().hex}"
        with naming_fields({**_NAMES, **(_STOPS if body.stop is None else {})}):
            chat = await context.run_in_thread(partial(as_chat, body), is_long(body.messages))
            pins = cache_pins(
                body.messages, system=body.system, tools=body.tools, whole=body.cache_control
            )
            prepared = await prepare_chat(context, chat, id, ready, pins)
        formatter = MessageFormatter(
            id, context.model_name(body), prepared.parsers[0], len(prepared.requests[0].prompt)
        )
        return respond_to_chat(context, body, prepared, formatter, ready, prefix_hashes)

    async def count(self, request: Request) -> ASGIApp:
        """POST /v1/messages/count_tokens"""
        context = self._context
        body = await context.body(request, CountRequest, counting_rules("messages"))
        ready = context.check_ready(body)
        chat = await context.run_in_thread(partial(as_chat, body), is_long(body.messages))
        return json_response(TokenCount(await count_chat_tokens(context, chat, ready)))


# --- from Anthropic's body to OpenAI's ----------------------------------------------------------


def as_chat(body: CountRequest) -> ChatRequest:
    """The same request as a chat. Raises RequestError for what is not served."""
    messages = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for at, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{at}]")
    prefilled = bool(body.messages) and body.messages[-1].get("role") == "assistant"
    chat = ChatRequest(
        messages=messages,
        tools=[dict(_tool(tool, f"tools[{at}]")) for at, tool in enumerate(body.tools or [])]
        or None,
        tool_choice=body.tool_choice,
        parallel_tool_calls=_is_parallel(body.tool_choice),
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        response_format=_response_format(body),
        chat_template_kwargs=_variables(body),
        thinking=body.thinking,
    )
    if not isinstance(body, MessagesRequest):
        return chat
    shared = {name: getattr(body, name) for name in SAMPLING_FIELDS}
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    shared["stop"] = [*(body.stop_sequences or ()), *stop] or None
    return msgspec.structs.replace(chat, max_tokens=body.max_tokens, **shared)


def _messages(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One message as chat messages; results of tools become messages of their own, in front."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise RequestError(f"{where}.role must be user or assistant, got {role!r}", param=where)
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"{where}.content must be a text or a list of blocks", param=where)
    results, texts, thoughts, calls = [], [], [], []
    for at, block in enumerate(content):
        place = f"{where}.content[{at}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind in _TEXT_BLOCKS:
            texts.append(_text([block], place))
        elif kind == "tool_result" and role == "user":
            results.append(_result(block, place))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":  # encrypted by Anthropic: no template can read it
            known = "text, document, search_result, tool_result, tool_use or thinking"
            raise RequestError(
                f"{place} must be a block of type {known}, where they belong; {not_text(kind)}",
                param=where,
            )
    if results and not texts:
        return results
    spoken: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
    if thoughts:
        spoken["reasoning_content"] = "\n".join(thoughts)
    if calls:
        spoken["tool_calls"] = calls
    return [*results, spoken]


def _result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool's result. Templates have no field for a failure, so its text says it."""
    text = _text(block.get("content") or "", f"{where}.content")
    failed = block.get("is_error")
    if not isinstance(failed, bool | None):
        raise RequestError(f"{where}.is_error must be true or false", param=where.split(".")[0])
    if failed:
        text = f"Error: {text}" if text else "Error: the tool failed and said nothing."
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": block.get("input") or {}}
    return {"id": block.get("id"), "type": "function", "function": function}


def _text(content: Any, where: str) -> str:
    """A text, or text blocks joined."""
    if isinstance(content, str):
        return content
    texts = []
    for at, block in enumerate(content if isinstance(content, list) else [content]):
        text = _block_text(block) if isinstance(block, Mapping) else None
        if text is None:
            kind = block.get("type") if isinstance(block, Mapping) else None
            raise RequestError(
                f'{where}: block {at} must be {{"type": "text", "text": ...}}; {not_text(kind)}',
                param=where.split(".")[0],
            )
        texts.append(text)
    return "\n".join(texts)


_TEXT_BLOCKS = ("text", "document", "search_result")


def _block_text(block: Mapping[str, Any]) -> str | None:
    """What a block of text, a document of text or a search result says; None for others."""
    kind, source = block.get("type"), block.get("source")
    if kind == "text":
        text = block.get("text")
        return text if isinstance(text, str) else None
    if kind == "document" and isinstance(source, Mapping):
        text = source.get("data") if source.get("type") == "text" else None
        if source.get("type") == "content":
            text = _texts(source.get("content"))
    elif kind == "search_result":
        text = _texts(block.get("content"))
    else:
        return None
    head = [block.get("title"), block.get("context"), source if kind == "search_result" else None]
    told = [one for one in head if isinstance(one, str) and one]
    return "\n".join([*told, text]) if isinstance(text, str) else None


def _texts(content: Any) -> str | None:
    """Text blocks joined; None if there are others."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else [content]
    texts = [one.get("text") if isinstance(one, Mapping) else None for one in blocks]
    found = [text for text in texts if isinstance(text, str)]
    return "\n".join(found) if len(found) == len(texts) else None


def _tool(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom", "function"):
        raise RequestError(
            f"{where}: the server runs no tools such as {kind!r:.60}; describe it with name and "
            "input_schema and run it yourself",
            param="tools",
        )
    note_tool_keys(tool)
    return nested_tool({**tool, "type": "function"})


def _is_parallel(choice: str | Mapping[str, Any] | None) -> bool:
    return not (isinstance(choice, Mapping) and choice.get("disable_parallel_tool_use"))


def _variables(body: CountRequest) -> dict[str, Any] | None:
    """Template variables: output_config.effort is one, for templates that know it."""
    effort = (body.output_config or {}).get("effort")
    if effort is None:
        return body.chat_template_kwargs
    if effort not in EFFORTS:
        message = f"output_config.effort must be one of {', '.join(EFFORTS)}, got {effort!r:.60}"
        raise RequestError(message, param="output_config")
    return {"reasoning_effort": effort, **(body.chat_template_kwargs or {})}


def _response_format(body: CountRequest) -> dict[str, Any] | None:
    """output_config.format, or output_format."""
    wanted, where = (body.output_config or {}).get("format"), "output_config"
    if wanted is None:
        wanted, where = body.output_format, "output_format"
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
        name = "output_config.format" if where == "output_config" else where
        raise RequestError(f'{name} must be {{"type": "json_schema", "schema": ...}}', param=where)
    described = {key: wanted[key] for key in wanted.keys() - {"type"}}
    return {"type": "json_schema", "json_schema": described}
