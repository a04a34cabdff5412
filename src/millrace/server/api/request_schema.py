"""Bodies of the OpenAI API, as far as they are served: what comes in.

Field names and defaults follow OpenAI's reference, and vLLM's where it goes further. None means
the server's default. Fields that are known but not served stand in `field_table.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class StreamOptions(msgspec.Struct, frozen=True):
    """include_usage: a last chunk with the token counts; continuous: they are in every chunk."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What every body may hold: which model it is for."""

    model: str | None = None


class PromptRequest(ModelRequest, frozen=True, kw_only=True):
    """What every body with a prompt may hold. cache_salt: the prompt shares cached prefixes only
    with prompts of the same salt."""

    cache_salt: str | None = None


class SamplingRequest(PromptRequest, frozen=True, kw_only=True):
    """What every body that generates may hold, with one meaning in all APIs.

    stream_interval: tokens of a chunk, where the server's are fewer.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = False
    include_stop_str_in_output: bool | None = False
    skip_special_tokens: bool | None = True
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = 0
    speculative_method: str | None = None
    stream: bool | None = False
    stream_interval: int | None = None


SAMPLING_FIELDS = tuple(
    name for name in SamplingRequest.__struct_fields__ if name not in ModelRequest.__struct_fields__
)


class GenerationRequest(SamplingRequest, frozen=True, kw_only=True):
    """What both of OpenAI's older endpoints take.

    resume_token_ids: tokens that count as generated already; the answer holds what follows them.
    kv_transfer_params: as in `KvTransferParams`. guided_*: older names for the fields of
    structured_outputs. truncation_side: where a prompt is cut; left keeps its end.
    """

    n: int | None = 1
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    resume_token_ids: list[int] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = False


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """Body of /v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    max_tokens: int | UnsetType | None = UNSET
    best_of: int | None = None
    echo: bool | None = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class ChatOptions(GenerationRequest, frozen=True, kw_only=True):
    """What chats may hold beside their messages. chat_template_kwargs: variables for the template.

    tool_choice: none, auto, required, or {"type": "function", "function": {"name": ...}}. echo: the
    answer begins with the last message where that is the assistant's.
    thinking, reasoning: as in Anthropic's API and in /v1/responses.
    """

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    echo: bool | None = False
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool = True
    thinking_token_budget: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    return_prompt_text: bool | None = False
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(ChatOptions, frozen=True, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[dict[str, Any]]


class BatchChatRequest(ChatOptions, frozen=True, kw_only=True):
    """Body of /v1/chat/completions/batch: several conversations, an answer for each."""

    messages: list[list[dict[str, Any]]]


class TokenizeRequest(ModelRequest, frozen=True, kw_only=True):
    """Body of /tokenize: a prompt or messages. add_special_tokens: true for a prompt, as there."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(ModelRequest, frozen=True, kw_only=True):
    """Body of /detokenize."""

    tokens: list[int]
