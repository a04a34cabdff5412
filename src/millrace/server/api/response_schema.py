"""Answers of the OpenAI API, whole and in chunks, and of the endpoints that only report.

Shapes follow OpenAI's reference, and vLLM's where it goes further (token ids, stop_reason,
prompt_logprobs, max_model_len).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]

# Of one position of a prompt: token id -> its log-probability, rank and text.
PromptLogprobs = list[dict[int, Any] | None]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """cached_tokens: prompt tokens that were found in the prefix cache. cache_write_tokens: those
    that were computed and stay there."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """reasoning_tokens: those before the end of the reasoning, where it is split off."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a whole request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a request with one output, in milliseconds, from its admission on. mean_itl_ms: of
    an output of several tokens. tokens_per_second: of the output, prefill included."""

    time_to_first_token_ms: float
    generation_time_ms: float
    queue_time_ms: float
    mean_itl_ms: float | UnsetType = UNSET
    tokens_per_second: float


class KvTransferAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """By what another engine takes the record of the prompt: its own kv_transfer_params."""

    do_remote_prefill: bool = True
    do_remote_decode: bool = False
    remote_engine_id: str
    remote_request_id: str
    remote_host: str
    remote_port: int
    remote_num_tokens: int
    tp_size: int = 1


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """One entry a token. None: the first token of an echoed prompt, which nothing predicts.

    text_offset: where each token's text begins in the choice's text.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """One token that might have stood at a position."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, frozen=True, kw_only=True):
    """The token that stands there, and the likeliest ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities of all of a choice's tokens, reasoning and markers included."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One output, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType | None = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/completions, and each chunk of its stream, which has no tier."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    service_tier: UnsetType | None = UNSET
    system_fingerprint: UnsetType | None = UNSET
    usage: Usage | UnsetType = UNSET
    metrics: RequestTimes | UnsetType = UNSET
    kv_transfer_params: KvTransferAnswer | UnsetType | None = UNSET
    kv_transfer_error: str | UnsetType = UNSET


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A call's function and its arguments as JSON text; in a stream, what is new of them."""

    name: str | UnsetType = UNSET
    arguments: str


class CalledCustom(msgspec.Struct, frozen=True, kw_only=True):
    """A call's custom tool and its input; in a stream, what is new of it."""

    name: str | UnsetType = UNSET
    input: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model makes. In a stream: index numbers the calls; id and type are sent with
    a call's first part only. function or custom: as the tool is.
    """

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function", "custom"] | UnsetType = UNSET
    function: CalledFunction | UnsetType = UNSET
    custom: CalledCustom | UnsetType = UNSET


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The assistant's answer. What is empty is None, except calls, which are then absent.

    reasoning: the same as reasoning_content, under the name that newer clients read. Refusals,
    annotations, audio and function_call stand in OpenAI's type; here they are never more.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a chat."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /v1/chat/completions. Keys that clients read are there also where they say nothing.

    prompt_text: what the chat template wrote, where the body asks for it.
    """

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    service_tier: None = None
    system_fingerprint: None = None
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    prompt_text: str | None = None
    metrics: RequestTimes | UnsetType = UNSET
    kv_transfer_params: KvTransferAnswer | None = None
    kv_transfer_error: str | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new in a chunk; the role stands in the first one. reasoning: as in ChatMessage."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One output's part of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
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
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_text: str | UnsetType = UNSET
    metrics: RequestTimes | UnsetType = UNSET


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


class RecordAddress(msgspec.Struct, frozen=True):
    """Where an engine hands over records, and its id."""

    engine: str
    host: str
    port: int


class Health(msgspec.Struct, frozen=True, omit_defaults=True):
    """Answer of /health. response_tag: stands in the ids of the responses that are stored here.
    role: in serving prompts and answers apart, if it has one. records: where its prompts' records
    are taken."""

    status: Literal["ok"]
    response_tag: str = ""
    role: Literal["", "prefill", "decode", "both"] = ""
    records: RecordAddress | None = None


class Version(msgspec.Struct, frozen=True):
    """Answer of /version."""

    version: str


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(msgspec.Struct, frozen=True):
    """Answer of /detokenize."""

    prompt: str
