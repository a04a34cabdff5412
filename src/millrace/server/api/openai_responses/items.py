"""Items of /v1/responses: from an input to a chat's messages, and how they are listed.

What the model answers becomes items in `formatter`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.errors import RequestError
from millrace.server.api.openai_responses.request import (
    ResponsesRequest,
    response_format,
    shown_logprobs,
)
from millrace.server.api.openai_responses.tools import (
    OfferedTool,
    chat_tool_choice,
    chat_tools,
    flat_name,
)
from millrace.server.api.request_schema import SAMPLING_FIELDS, ChatRequest
from millrace.text.chat.media import not_text
from millrace.text.tools.custom import INPUT

Item = Mapping[str, Any]

_TEXTS = ("input_text", "output_text", "text")
_KINDS = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
)


def as_chat(
    body: ResponsesRequest, items: Sequence[Item]
) -> tuple[ChatRequest, dict[str, OfferedTool]]:
    """The same request as a chat, and the tools behind the names that the model knows.

    items: of the conversation so far and of the body. Raises RequestError for what is not served.
    """
    tools, offered = chat_tools(body.tools)
    shared = {name: getattr(body, name) for name in SAMPLING_FIELDS}
    logprobs = shown_logprobs(body)
    chat = ChatRequest(
        messages=_messages(body.instructions, items),
        max_tokens=body.max_output_tokens,
        tools=tools or None,
        tool_choice=chat_tool_choice(body.tool_choice, offered),
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning=body.reasoning,
        response_format=response_format(body.text),
        chat_template_kwargs=body.chat_template_kwargs,
        logprobs=logprobs is not None,
        top_logprobs=logprobs,
        **shared,
    )
    return chat, offered


def input_items(given: str | list[dict[str, Any]]) -> list[Item]:
    """An input as items. Raises RequestError for one that is empty."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not given:
        raise RequestError("input is empty; give a text or at least one item", param="input")
    return list(given)


def _messages(instructions: str | None, items: Sequence[Item]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    thought = ""
    for at, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "reasoning":
            thought += _thought(item)
            continue
        message = _message(item, kind, f"input[{at}]")
        last = messages[-1] if messages else {}
        if "tool_calls" in message and last.get("role") == "assistant" and not thought:
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


def _message(item: Item, kind: Any, where: str) -> dict[str, Any]:
    if kind == "message":
        content = item.get("content")
        if content is None and item.get("role") == "assistant":
            content = ""
        return {"role": item.get("role"), "content": _content(content, where)}
    if kind == "function_call":
        return _call(item, item.get("arguments"))
    if kind == "custom_tool_call":
        given = item.get("input")
        return _call(item, json.dumps({INPUT: given if isinstance(given, str) else ""}))
    if kind in ("function_call_output", "custom_tool_call_output"):
        output = item.get("output")
        text = _content(output, where) if output is not None else ""
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
    raise RequestError(
        f"{where}.type must be {', '.join(_KINDS[:-1])} or {_KINDS[-1]}, got {str(kind)[:60]!r}",
        param="input",
    )


def _call(item: Item, arguments: Any) -> dict[str, Any]:
    name = flat_name(item.get("name"), item.get("namespace"))
    function = {"name": name, "arguments": arguments}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


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
                f"{where}: part {at} must be of type {' or '.join(_TEXTS)}; {not_text(kind)}",
                param="input",
            )
        texts.append(text)
    return "\n".join(texts)


def _thought(item: Item) -> str:
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


# --- listing ------------------------------------------------------------------------------------

_PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}


def listed_item(item: Item, id: str) -> Item:
    """An input item with all that lists of items have. id: what it gets behind its kind's prefix,
    where the client gave none."""
    kind = str(item.get("type", "message"))
    made = {"id": f"{_PREFIXES.get(kind, 'item')}_{id}", **item, "type": kind}
    if kind == "reasoning":
        return {**made, "summary": item.get("summary") or []}
    if kind == "message" and isinstance(item.get("content"), str):
        role = item.get("role")
        part: dict[str, Any] = {"type": "input_text", "text": item["content"]}
        if role == "assistant":
            part = {"type": "output_text", "text": item["content"], "annotations": []}
        made["content"] = [part]
    return {"status": "completed", **made}
