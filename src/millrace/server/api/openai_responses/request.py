"""The body of /v1/responses, and what becomes of fields that are not served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from millrace.errors import RequestError
from millrace.server.api.field_table import field_rules
from millrace.server.api.request_schema import SamplingRequest

LOGPROBS = "message.output_text.logprobs"
# Of what the server's tools, or pictures, would bring: there is nothing of it to include.
_INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "reasoning.encrypted_content",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "message.input_image.image_url",
        "computer_call_output.output.image_url",
        "code_interpreter_call.outputs",
    }
)


class ResponsesRequest(SamplingRequest, frozen=True, kw_only=True):
    """Body of /v1/responses."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    background: bool | None = False
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    # They change nothing, and the answer repeats them.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    # vLLM's, beside OpenAI's
    include_reasoning: bool = True
    enable_response_messages: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


RULES = field_rules("responses")
# By the names of a chat's fields: those of this API.
NAMES = {
    "messages": "input",
    "prompt": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}


def check_body(body: ResponsesRequest) -> None:
    """Raise RequestError for values that no answer could honour."""
    for name in body.include or ():
        if name not in _INCLUDABLE:
            known = ", ".join(sorted(_INCLUDABLE))
            raise RequestError(
                f"include: {name[:100]!r} is not known; {known} are", param="include"
            )
    if body.top_logprobs is not None and body.top_logprobs < 0:
        message = f"top_logprobs must be at least 0, got {body.top_logprobs}"
        raise RequestError(message, param="top_logprobs")
    if body.max_tool_calls is not None and body.max_tool_calls < 1:
        message = f"max_tool_calls must be at least 1, got {body.max_tool_calls}"
        raise RequestError(message, param="max_tool_calls")
    if body.background and body.store is False:
        raise RequestError("background can only be used when `store` is true", param="background")


def shown_logprobs(body: ResponsesRequest) -> int | None:
    """How many of the likeliest tokens are shown at each position of a message's text; None if no
    log-probabilities are."""
    return (body.top_logprobs or 0) if LOGPROBS in (body.include or ()) else None


def response_format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """text.format, which has the schema one level higher than response_format has it."""
    wanted = (given or {}).get("format")
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
        return dict(wanted) if isinstance(wanted, Mapping) else None
    described = {name: wanted[name] for name in ("schema", "strict") if name in wanted}
    return {"type": "json_schema", "json_schema": described}


class InputTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class Deleted(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of DELETE /v1/responses/ID."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
