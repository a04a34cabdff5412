"""The answer of /v1/responses as OpenAI's type has it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
RUNNING: tuple[Status, ...] = ("queued", "in_progress")


class ResponseUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a whole response."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class RawMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt or an output as the model has it, under vLLM's names."""

    message: str
    tokens: list[int]
    type: Literal["raw_message_tokens"] = "raw_message_tokens"


class ResponseBody(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/responses, and what the events of its stream tell of it.

    What of the request changes no answer is repeated, as clients expect. input_messages,
    output_messages: of vLLM's enable_response_messages.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status = "in_progress"
    background: bool = False
    model: str
    output: list[dict[str, Any]] = []
    usage: ResponseUsage | None = None
    incomplete_details: dict[str, str] | None = None
    error: dict[str, str] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: None = None
    prompt: None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = {}
    parallel_tool_calls: bool = True
    reasoning: dict[str, Any] | None = None
    temperature: float
    top_p: float
    top_logprobs: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    text: dict[str, Any]
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    truncation: str = "disabled"
    store: bool = False
    service_tier: Literal["default"] = "default"
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    input_messages: list[RawMessage] | UnsetType = UNSET
    output_messages: list[RawMessage] | UnsetType = UNSET
