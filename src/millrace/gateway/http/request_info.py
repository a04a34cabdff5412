"""What the gateway reads of a request, and the body that it sends to a replica.

A body is decoded once, and only the few fields that routing and resuming need; a body that cannot
be decoded is relayed unchanged. Responses are not handled here.

All text APIs are read, but only streams of completions and chat completions can be resumed on
another replica.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from millrace.common.prefix_hash import PROMPT_FIELDS, SALT_HEADER, combined_salt
from millrace.gateway.http.lenient import decode_leniently, find_model
from millrace.gateway.http.message import Request, header
from millrace.response_ids import PATH as RESPONSES
from millrace.response_ids import tag_of_id, tag_of_items

ServiceClass = Literal["interactive", "batch"]
Kind = Literal["millrace", "vllm", "other"]

BYTES_PER_TOKEN = 4  # of English text with current vocabularies; load reports correct the sum
_COMPLETIONS, _CHATS = "/v1/completions", "/v1/chat/completions"
_NO_JSON = Raw(b"")


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = False


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = False
    n: int | None = 1
    best_of: int | None = 1
    echo: bool | None = False
    prompt: Raw = _NO_JSON
    messages: Raw = _NO_JSON
    system: Raw = _NO_JSON
    instructions: Raw = _NO_JSON
    input: Raw = _NO_JSON
    tools: Raw = _NO_JSON
    max_tokens: int | None = None
    max_output_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | UnsetType | None = UNSET
    return_token_ids: bool | UnsetType | None = UNSET
    resume_token_ids: list[int] | UnsetType | None = UNSET
    prompt_cache_key: str | None = None
    cache_salt: str | None = None
    previous_response_id: str | None = None
    session_id: str | None = None
    user: str | None = None
    service_tier: str | None = None
    stream_options: _StreamOptions | None = None


_decode = msgspec.json.Decoder(_Body).decode


class RequestInfo(msgspec.Struct, kw_only=True):
    """The facts of one request. Requests other than for text keep the defaults, except `model`.

    prompt: the JSON of the prompt's fields, which are parts of the body. cache_salt: of whom the
    prompt shares cached prefixes with. prompt_tokens: estimated from all bytes of the prompt.
    max_tokens: None if the client set no bound. affinity_key: for consistent hashing. resumable: a
    stream that another replica can resume, if the first one sends token ids. resume_token_ids:
    output tokens that the client itself resumes from. response_tag: of the replica that keeps the
    stored response which it names; empty: any will do. seed: drawn here if the client set none, so
    that a resumed stream draws the same noise. single: one prompt with one answer.
    can_prepend_fields: the body has none of the fields that `body_for` adds. hand_over: whether two
    replicas may share the work.
    """

    request: Request
    chat: bool = False
    model: str | None = None
    stream: bool = False
    prompt: tuple[Raw, ...] = ()
    cache_salt: str = ""
    prompt_tokens: int = 1
    max_tokens: int | None = None
    affinity_key: bytes = b""
    service_class: ServiceClass = "interactive"
    resumable: bool = False
    wants_token_ids: bool = False
    resume_token_ids: tuple[int, ...] = ()
    response_tag: str = ""
    seed: int | None = None
    can_prepend_fields: bool = False
    has_tools: bool = False
    single: bool = False
    include_usage: bool = False
    hand_over: bool = True

    @property
    def for_text(self) -> bool:
        """Whether it asks for generated text."""
        return any(memoryview(piece).nbytes for piece in self.prompt)


def read_request_info(request: Request, keep: bool = True) -> RequestInfo:
    """Read a request; never raises. keep: whether streams are buffered to be resumed."""
    path = request.path.partition(b"?")[0].decode("latin-1")
    service_class = header(request.headers, b"x-service-class")
    batch: ServiceClass = "batch" if service_class.lower() == b"batch" else "interactive"
    key = header(request.headers, b"x-session-id")
    other = RequestInfo(
        request=request, service_class=batch, affinity_key=key, response_tag=_named_in(path)
    )
    if not request.body:
        return other
    body = _read_body(request)
    if request.method != b"POST" or path not in PROMPT_FIELDS:
        named = other.response_tag or (_named_by(body) if path.startswith(RESPONSES) else "")
        return msgspec.structs.replace(other, model=body.model, response_tag=named)
    info = _generation(request, body, path, batch, key)
    return info if keep else msgspec.structs.replace(info, resumable=False)


def _read_body(request: Request) -> _Body:
    """What can be read of a body, with any fields in it."""
    try:
        return _decode(request.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        lenient = decode_leniently(request.body, _Body)
        if lenient is not None:
            return lenient
        kind = header(request.headers, b"content-type")
        return _Body(model=find_model(request.body, kind))


def _named_in(path: str) -> str:
    """The tag of the stored response that a path names."""
    start, _, rest = path.partition(f"{RESPONSES}/")
    return tag_of_id(rest.partition("/")[0].encode("latin-1")) if rest and not start else ""


def _named_by(body: _Body) -> str:
    """The tag of what a new response goes on from: a stored one, or an item of one."""
    if body.previous_response_id:
        return tag_of_id(body.previous_response_id.encode("utf-8", "replace"))
    items = bytes(body.input)
    return tag_of_items(items) if b'"item_reference"' in items else ""


def _generation(
    request: Request, body: _Body, path: str, service_class: ServiceClass, key: bytes
) -> RequestInfo:
    pieces = tuple(getattr(body, name) for name in PROMPT_FIELDS[path])
    prompt = b"".join(pieces)
    sent = header(request.headers, SALT_HEADER.encode()).decode("latin-1")
    salt = combined_salt("", sent, body.cache_salt or "")
    chat, known = path == _CHATS, path in (_COMPLETIONS, _CHATS)
    bound = body.max_completion_tokens or body.max_tokens or body.max_output_tokens
    named = body.prompt_cache_key or body.session_id or body.user
    single = body.n in (None, 1) and body.best_of in (None, 1) and not body.echo
    one_prompt = _has_single_prompt(prompt, chat)
    return RequestInfo(
        request=request,
        chat=chat,
        model=body.model,
        stream=bool(body.stream),
        prompt=pieces,
        cache_salt=salt,
        prompt_tokens=estimate_tokens(prompt),
        max_tokens=bound or (16 if path == _COMPLETIONS else None),
        affinity_key=key or (named.encode() if named else salt.encode() + prompt[:1024]),
        service_class="batch" if body.service_tier in ("flex", "batch") else service_class,
        resumable=known and bool(body.stream) and single and one_prompt,
        single=single and one_prompt,
        response_tag=_named_by(body) if path == RESPONSES else "",
        wants_token_ids=body.return_token_ids is True,
        resume_token_ids=tuple(body.resume_token_ids or ()),
        seed=random.getrandbits(48) if body.seed is UNSET else None,
        can_prepend_fields=body.return_token_ids is UNSET and body.resume_token_ids is UNSET,
        has_tools=bool(body.tools),
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        hand_over=header(request.headers, b"x-hand-over").lower() != b"never",
    )


def estimate_tokens(prompt: bytes) -> int:
    """Tokens of a prompt given as JSON: exact for token ids, an estimate for text."""
    if prompt[:1] == b"[" and prompt[1:].lstrip()[:1].isdigit():
        return prompt.count(b",") + 1
    return max(1, len(prompt) // BYTES_PER_TOKEN)


def _has_single_prompt(prompt: bytes, chat: bool) -> bool:
    """Whether it is one prompt: a chat, a text, or one list of token ids."""
    return chat or prompt[:1] == b'"' or prompt[1:].lstrip()[:1].isdigit()


def body_for(info: RequestInfo, kind: Kind, resume: Sequence[int] = ()) -> bytes:
    """The body for a replica of this kind, with token ids requested where that allows resuming, and
    the tokens to resume from. New fields come first; the client's own bytes follow unchanged."""
    body = info.request.body
    if not info.resumable or kind == "other":
        return body
    extra: dict[str, Any] = {"return_token_ids": True}
    if kind == "millrace":
        if info.seed is not None:
            extra["seed"] = info.seed
        if resume or info.resume_token_ids:
            extra["resume_token_ids"] = [*info.resume_token_ids, *resume]
    if info.can_prepend_fields:
        return msgspec.json.encode(extra)[:-1] + b"," + body[body.index(b"{") + 1 :]
    fields = msgspec.json.decode(
        body, type=dict[str, Raw]
    )  # the prompt's bytes stay as they were hashed
    return msgspec.json.encode({**fields, **extra})
