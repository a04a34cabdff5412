"""What the gateway reads of a request for text, and how it words that request for a replica.

A body is decoded once, and only the few fields that picking and resuming need; whatever cannot be
decoded is relayed as it is, for the replica to judge. Responses never come here.

All APIs for text are understood alike, but only streams of OpenAI's completions and chats can be
resumed on another replica.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from millrace.common.prefix_hash import BLOCK, MAX_BLOCKS, PROMPT_FIELDS
from millrace.gateway.http.message import Request, header

ServiceClass = Literal["interactive", "batch"]
Kind = Literal["millrace", "vllm", "other"]

BYTES_PER_TOKEN = 4  # of English text under today's vocabularies; load reports correct the sum
_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"
_NOTHING = Raw(b"")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = False
    n: int | None = 1
    best_of: int | None = 1
    echo: bool | None = False
    prompt: Raw = _NOTHING
    messages: Raw = _NOTHING
    system: Raw = _NOTHING
    instructions: Raw = _NOTHING
    input: Raw = _NOTHING
    tools: Raw = _NOTHING
    max_tokens: int | None = None
    max_output_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | UnsetType | None = UNSET
    return_token_ids: bool | UnsetType | None = UNSET
    resume_token_ids: list[int] | UnsetType | None = UNSET
    prompt_cache_key: str | None = None
    user: str | None = None
    service_tier: str | None = None
    stream_options: _StreamOptions | None = None


_decode = msgspec.json.Decoder(_Body).decode


class RequestInfo(msgspec.Struct, kw_only=True):
    """The facts of one request. For what is no request for text all but `request` keep defaults.

    prompt: the JSON of the fields that make it, as far as it is hashed. prompt_tokens: estimated
    from all its bytes. max_tokens: None where the client set no bound. key: what consistent hashing
    goes by.
    resumable: a stream that another replica can go on with, if it tells token ids.
    seed: drawn here when the client named none, so that a continuation draws the same noise.
    """

    request: Request
    chat: bool = False
    model: str | None = None
    stream: bool = False
    prompt: bytes = b""
    prompt_tokens: int = 1
    max_tokens: int | None = None
    key: bytes = b""
    service: ServiceClass = "interactive"
    resumable: bool = False
    wants_ids: bool = False
    given: tuple[int, ...] = ()
    seed: int | None = None
    plain: bool = False
    has_tools: bool = False
    include_usage: bool = False

    @property
    def for_text(self) -> bool:
        """Whether it asks for generated text."""
        return bool(self.prompt)


def read_request_info(request: Request, keep: bool = True) -> RequestInfo:
    """The facts of a request; it never raises. keep: streams are kept, to be resumed."""
    path = request.path.partition(b"?")[0].decode("latin-1")
    service = header(request.headers, b"x-service-class")
    batch: ServiceClass = "batch" if service.lower() == b"batch" else "interactive"
    key = header(request.headers, b"x-session-id")
    if request.method != b"POST" or not path.startswith("/v1/"):
        return RequestInfo(request=request, service=batch, key=key)
    try:
        body = _decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return RequestInfo(request=request, service=batch, key=key)
    if path not in PROMPT_FIELDS:
        return RequestInfo(request=request, service=batch, key=key, model=body.model)
    info = _generation(request, body, path, batch, key)
    return info if keep else msgspec.structs.replace(info, resumable=False)


def _generation(
    request: Request, body: _Body, path: str, service: ServiceClass, key: bytes
) -> RequestInfo:
    prompt = b"".join(bytes(getattr(body, name)) for name in PROMPT_FIELDS[path])
    chat, known = path == _CHATS, path in (_COMPLETIONS, _CHATS)
    bound = body.max_completion_tokens or body.max_tokens or body.max_output_tokens
    named = body.prompt_cache_key or body.user
    single = body.n in (None, 1) and body.best_of in (None, 1) and not body.echo
    return RequestInfo(
        request=request,
        chat=chat,
        model=body.model,
        stream=bool(body.stream),
        prompt=prompt[: BLOCK * MAX_BLOCKS],
        prompt_tokens=estimate_tokens(prompt),
        max_tokens=bound or (16 if path == _COMPLETIONS else None),
        key=key or (named.encode() if named else prompt[:1024]),
        service="batch" if body.service_tier in ("flex", "batch") else service,
        resumable=known and bool(body.stream) and single and _one_prompt(prompt, chat),
        wants_ids=body.return_token_ids is True,
        given=tuple(body.resume_token_ids or ()),
        seed=random.getrandbits(48) if body.seed is UNSET else None,
        plain=body.return_token_ids is UNSET and body.resume_token_ids is UNSET,
        has_tools=bool(body.tools),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
    )


def estimate_tokens(prompt: bytes) -> int:
    """Tokens of a prompt, from the JSON that says it: exact for ids, a guess for text."""
    if prompt[:1] == b"[" and prompt[1:].lstrip()[:1].isdigit():
        return prompt.count(b",") + 1
    return max(1, len(prompt) // BYTES_PER_TOKEN)


def _one_prompt(prompt: bytes, chat: bool) -> bool:
    """Whether the prompt asks for one choice: a chat, a text, or one list of ids."""
    return chat or prompt[:1] == b'"' or prompt[1:].lstrip()[:1].isdigit()


def worded(info: RequestInfo, kind: Kind, resume: Sequence[int] = ()) -> bytes:
    """The body for a replica of this kind: with token ids asked for where that allows resuming,
    and with the tokens to go on from. Fields are put in front; the client's own bytes follow."""
    body = info.request.body
    if not info.resumable or kind == "other":
        return body
    extra: dict[str, Any] = {"return_token_ids": True}
    if kind == "millrace":
        if info.seed is not None:
            extra["seed"] = info.seed
        if resume or info.given:
            extra["resume_token_ids"] = [*info.given, *resume]
    if info.plain:
        return msgspec.json.encode(extra)[:-1] + b"," + body[body.index(b"{") + 1 :]
    said = msgspec.json.decode(body, type=dict[str, Raw])  # the prompt stays as it was hashed
    return msgspec.json.encode({**said, **extra})
