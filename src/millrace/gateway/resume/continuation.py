"""Resuming a stream on another replica: the request to it, and the rewriting of its events.

The client must see one stream: the same id, no second first event, no token twice, usage of the
whole. A millrace replica takes `resume_token_ids` and sends only what comes after them. A vllm
replica gets the tokens of prompt and output as its prompt; what is lost: a stop text across the
resumption point is not found, penalties and seeds start again, and a chat is continued as plain
text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from millrace.gateway.http.request_info import Kind, RequestInfo, body_for
from millrace.gateway.resume.journal import Progress, parse_events

_CHAT = b"/v1/chat/completions"
_COMPLETIONS = b"/v1/completions"
_CHAT_ONLY = (
    "messages", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "max_completion_tokens", "chat_template", "documents", "tools", "tool_choice", "logprobs",
    "top_logprobs", "reasoning_effort", "response_format",
)  # fmt: skip


def can_continue(info: RequestInfo, progress: Progress, kind: Kind) -> bool:
    """Whether a replica of this kind can resume from here."""
    if kind == "millrace":
        return progress.resumable
    if kind == "vllm":
        known = bool(progress.prompt_token_ids) or not progress.token_ids
        known = known and not info.resume_token_ids
        return progress.resumable and known and not (progress.has_reasoning or info.has_tools)
    return False


def continuation_request(
    info: RequestInfo, progress: Progress, kind: Kind
) -> tuple[bytes | None, bytes]:
    """(path, body) of the request that resumes the stream; path None for the client's own."""
    if kind == "millrace" or not progress.token_ids:
        return None, body_for(info, kind, progress.token_ids)
    body: dict[str, Any] = msgspec.json.decode(info.request.body)
    for name in _CHAT_ONLY if info.chat else ():
        body.pop(name, None)
    body["prompt"] = [*progress.prompt_token_ids, *progress.token_ids]
    body["return_token_ids"] = True
    made = len(progress.token_ids)
    if info.max_tokens is not None:
        body["max_tokens"] = info.max_tokens - made
    elif info.chat:
        body["max_tokens"] = None
    if isinstance(body.get("min_tokens"), int):
        body["min_tokens"] = max(0, body["min_tokens"] - made)
    return _COMPLETIONS, msgspec.json.encode(body)


def is_complete(info: RequestInfo, progress: Progress) -> bool:
    """Whether no token is missing, only the stream's end."""
    made = len(info.resume_token_ids) + len(progress.token_ids)
    spent = info.max_tokens is not None and made >= info.max_tokens
    return progress.finished or spent


class Continuation:
    """Rewrites the events of a resumed stream for its client. failure: why it broke, or None."""

    def __init__(self, info: RequestInfo, progress: Progress, kind: Kind) -> None:
        self._info = info
        self._progress = progress
        self._kind = kind
        self._tokens_before = len(progress.token_ids)
        self._partial = b""
        self.failure: str | None = None

    def feed(self, text: bytes) -> bytes:
        """Bytes of the new stream's body, without chunk framing -> bytes for the client."""
        complete, cut, self._partial = (self._partial + text).rpartition(b"\n\n")
        out = [] if cut else [b""]
        try:
            found = parse_events(complete)
        except ValueError:
            self.failure = "sent a stream that is not JSON events"
            return b""
        for event in found:
            if event is None:
                self._progress.done = True
                out.append(_chunk(b"data: [DONE]\n\n"))
            elif "error" in event and "choices" not in event:
                self.failure = f"sent an error in mid-stream ({event['error']})"
                break
            else:
                out.append(self._event(event))
        return b"".join(out)

    def final_events(self, include_usage: bool) -> bytes:
        """The end of a stream whose tokens were all sent, with usage if it was requested."""
        out, progress = [], self._progress
        if not progress.finished:  # it reached max_tokens just as the replica failed
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "token_ids": []}
            choice["delta" if self._info.chat else "text"] = {} if self._info.chat else ""
            out.append(self._event({**progress.first_event, "choices": [choice], "usage": None}))
        if include_usage and not progress.usage:
            prompt, made = len(progress.prompt_token_ids), len(progress.token_ids)
            made += len(self._info.resume_token_ids)
            usage = {"prompt_tokens": prompt, "completion_tokens": made}
            usage["total_tokens"] = prompt + made
            out.append(self._event({**progress.first_event, "choices": [], "usage": usage}))
        if not progress.done:
            out.append(_chunk(b"data: [DONE]\n\n"))
        return b"".join(out) + b"0\r\n\r\n"

    def _event(self, event: dict[str, Any]) -> bytes:
        first = self._progress.first_event
        for name in ("id", "object", "created", "model", "system_fingerprint"):
            if name in first:
                event[name] = first[name]
        if self._kind == "vllm":
            self._adjust_usage(event)
        choices = event.get("choices") or ()
        if first and self._info.chat:
            for choice in choices:
                self._to_chat_choice(choice)
        self._progress.record(event)
        # The prompt's ids came with the first event, if they were requested.
        unasked = () if self._info.wants_token_ids else ("token_ids",)
        already_sent = ("prompt_token_ids",) if first or not self._info.wants_token_ids else ()
        for part in (event, *choices):
            for name in (*unasked, *already_sent):
                part.pop(name, None)
        return _chunk(b"data: %b\n\n" % msgspec.json.encode(event))

    def _to_chat_choice(self, choice: dict[str, Any]) -> None:
        if "delta" not in choice:
            choice["delta"] = {"content": choice.pop("text", "")}
            choice["logprobs"] = None
        choice["delta"].pop("role", None)

    def _adjust_usage(self, event: dict[str, Any]) -> None:
        """vllm counts the resumed output as prompt; correct its usage."""
        usage = event.get("usage")
        if usage:
            usage["prompt_tokens"] -= self._tokens_before
            usage["completion_tokens"] = usage.get("completion_tokens", 0) + self._tokens_before


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)
