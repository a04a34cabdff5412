"""Bodies of the OpenAI API, as far as they are served: what comes in and what goes out.

Field names, defaults and shapes follow OpenAI's reference, and vLLM's where it goes further
(token ids, stop_reason, max_model_len). Fields that are known but not served stand in `fields.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from millrace.protocol import FinishReason

# --- in ----------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, frozen=True):
    """include_usage: a last chunk with the token counts; continuous: they are in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What both endpoints take. None means the server's default."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = False


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int | UnsetType | None = UNSET
    add_special_tokens: bool = True


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of /v1/chat/completions. chat_template_kwargs: variables for the template."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


# --- out ---------------------------------------------------------------------------------------


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """cached_tokens: prompt tokens that were found in the prefix cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One output, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's answer. Where reasoning is split off, what is empty is None.

    reasoning: the same as reasoning_content, under the name that newer clients read.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType | None = UNSET
    reasoning: str | UnsetType | None = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a chat."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new in a chunk; the role stands in the first one. reasoning: as in ChatMessage."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One output's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk of a chat's stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One name under which the model is served. max_model_len: None while the engine loads.

    vocab_size: token ids are below it.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["millrace"] = "millrace"
    root: str
    parent: None = None
    max_model_len: int | None
    vocab_size: int


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(msgspec.Struct, frozen=True):
    """Answer of /health."""

    status: Literal["ok"]


class Version(msgspec.Struct, frozen=True):
    """Answer of /version."""

    version: str
