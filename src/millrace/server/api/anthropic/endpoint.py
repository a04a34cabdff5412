"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same engine.

A body is converted to the chat body of OpenAI's API. The format of the answer is in `formatter`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.server.api.anthropic.formatter import MessageFormatter
from millrace.server.api.chat.endpoint import chat_text, prepare_chat, tool_choice
from millrace.server.api.context import ApiContext
from millrace.server.api.fields import REFUSED, FieldRules, field_rules
from millrace.server.api.request_schema import ChatRequest, PromptRequest
from millrace.server.api.transport import json_response

_TEXT_ONLY = "the model reads and writes text only"
_NOTHING_CLEARED: tuple[Any, ...] = (
    {"edits": []},
    {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
)
_OWN = FieldRules(
    refused={
        **{name: REFUSED[name] for name in ("watermarking", "vllm_xargs")},
        **{name: REFUSED[name] for name in ("kv_transfer_params", "ec_transfer_params")},
        "mcp_servers": (([],), "the server calls no tools itself; offer them as tools"),
        "container": ((), "the server runs no code"),
        "context_management": (_NOTHING_CLEARED, "the server leaves conversations as they are"),
        "speed": (("standard",), "there is one speed"),
    },
    harmless=frozenset(
        {"metadata", "service_tier", "cache_control", "betas", "inference_geo", "diagnostics"}
        | {"user_profile_id", "workspace_id", "mm_payload", "return_mm_kwargs"}
    ),
)


class CountRequest(PromptRequest, frozen=True, kw_only=True):
    """Body of /v1/messages/count_tokens."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountRequest, frozen=True, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = False


RULES = field_rules(MessagesRequest, _OWN)


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
        prepared = await prepare_chat(context, as_chat(body), id, ready)
        formatter = MessageFormatter(
            id, context.model_name(body), prepared.parsers[0], len(prepared.requests[0].prompt)
        )
        return context.respond(
            prepared.requests,
            prepared.params,
            formatter,
            ready,
            bool(body.stream),
            prefix_hashes,
            reasons=prepared.reasons,
        )

    async def count(self, request: Request) -> ASGIApp:
        """POST /v1/messages/count_tokens"""
        context = self._context
        body = await context.body(request, CountRequest, _OWN)
        ready = context.check_ready(body)
        chat = as_chat(body)
        choice = tool_choice(context, chat)
        work = partial(chat_text, context, chat, choice, ready, must_fit=False)
        text = await context.run_in_thread(work, long=True)
        return json_response(TokenCount(await context.count_tokens(text, ready)))


# --- from Anthropic's body to OpenAI's ----------------------------------------------------------


def as_chat(body: CountRequest) -> ChatRequest:
    """The same request as a chat. Raises RequestError for what is not served."""
    messages = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for at, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{at}]")
    prefilled = bool(body.messages) and body.messages[-1].get("role") == "assistant"
    choice, parallel = _tool_choice(body.tool_choice)
    chat = ChatRequest(
        messages=messages,
        tools=[_tool(tool, f"tools[{at}]") for at, tool in enumerate(body.tools or [])] or None,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        add_generation_prompt=not prefilled,
        continue_final_message=prefilled,
        response_format=_response_format(body.output_config),
        chat_template_kwargs=_variables(body),
        thinking_token_budget=_budget(body.thinking),
    )
    if not isinstance(body, MessagesRequest):
        return chat
    return msgspec.structs.replace(
        chat,
        max_tokens=body.max_tokens,
        stop=body.stop_sequences or None,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stream=body.stream,
        cache_salt=body.cache_salt,
    )


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
        if kind == "text":
            texts.append(_text([block], place))
        elif kind == "tool_result" and role == "user":
            results.append(_result(block, place))
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block))
        elif kind == "thinking" and role == "assistant":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":  # encrypted by Anthropic: no template can read it
            known = "text, tool_result, tool_use or thinking, where they belong"
            raise RequestError(
                f"{place} must be a block of type {known}; {_TEXT_ONLY}", param=where
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
        text = block.get("text") if isinstance(block, Mapping) else None
        if not isinstance(text, str) or block.get("type") != "text":
            raise RequestError(
                f'{where}: block {at} must be {{"type": "text", "text": ...}}; {_TEXT_ONLY}',
                param=where.split(".")[0],
            )
        texts.append(text)
    return "\n".join(texts)


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"{where}: the server runs no tools such as {tool['type']!r}; describe it with "
            "name and input_schema and run it yourself",
            param="tools",
        )
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
    if tool.get("description"):
        function["description"] = tool["description"]
    return {"type": "function", "function": function}


def _tool_choice(given: Mapping[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool]:
    """(OpenAI's tool_choice, parallel_tool_calls)."""
    if given is None:
        return None, True
    kind = given.get("type")
    modes: dict[Any, Literal["auto", "required", "none"]] = {
        "auto": "auto",
        "any": "required",
        "none": "none",
    }
    parallel = not given.get("disable_parallel_tool_use")
    if kind == "tool":
        return {"type": "function", "function": {"name": given.get("name")}}, parallel
    if not isinstance(kind, str) or kind not in modes:
        message = f"tool_choice.type must be auto, any, tool or none, got {kind!r}"
        raise RequestError(message, param="tool_choice")
    return modes[kind], parallel


def _variables(body: CountRequest) -> dict[str, Any] | None:
    """Template variables, those of `thinking` among them."""
    thinking = _thinking(body.thinking)
    given = body.chat_template_kwargs
    return thinking if given is None else {**(thinking or {}), **given}


def _thinking(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Template variables that turn reasoning on or off; None leaves it to the template."""
    if given is None:
        return None
    kind = given.get("type")
    if kind not in ("enabled", "adaptive", "disabled"):
        message = f"thinking.type must be enabled, adaptive or disabled, got {kind!r}"
        raise RequestError(message, param="thinking")
    return {"enable_thinking": kind != "disabled"}


def _budget(given: Mapping[str, Any] | None) -> int | None:
    """The most tokens that the reasoning may have; None sets no limit."""
    budget = (given or {}).get("budget_tokens")
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        message = f"thinking.budget_tokens must be an integer of at least 1, got {budget!r}"
        raise RequestError(message, param="thinking")
    return budget


def _response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    wanted = (given or {}).get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
        raise RequestError(
            'output_config.format must be {"type": "json_schema", "schema": ...}',
            param="output_config",
        )
    return {"type": "json_schema", "json_schema": {"schema": wanted.get("schema")}}
