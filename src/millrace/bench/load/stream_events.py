"""Events of a stream that are not as usual: how servers say "error", and odd but harmless fields.

Servers report an error in a stream in many ways: an `error` field, an event named error, an object
of their own without choices. All of them fail a request, with the words of the server.
"""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from millrace.common.http_client import error_text


class ErrorEvent(bytes):
    """The data of an event whose name is "error"."""


# Fields of an event without choices that say what went wrong, in servers' own shapes of errors.
_MESSAGES = ("message", "detail", "errors", "error_message", "error_msg", "msg", "reason")
_FAILED = ("error", "failed", "failure")  # as an object's kind or status


def event_error(data: bytes) -> str | None:
    """The words of an event that reports an error, on one line; None for any other event."""
    if isinstance(data, ErrorEvent):
        return error_text(data)
    event = lenient_object(data)
    if event is None:
        return None
    if event.get("error"):
        return _words(event["error"])
    if any(event.get(name) in _FAILED for name in ("object", "type", "event", "status")):
        return _words(event)
    choices = event.get("choices")
    if isinstance(choices, list) and choices:
        failed = [c["error"] for c in choices if isinstance(c, dict) and c.get("error")]
        return _words(failed[0]) if failed else None
    if choices is None and not event.get("usage"):
        named = next((event[name] for name in _MESSAGES if event.get(name)), None)
        return None if named is None else _words(named)
    return None


def _words(error: Any) -> str:
    """The words of an error in any shape: a text, or an object with a message."""
    if isinstance(error, dict) and not error.get("error"):
        error = next((error[name] for name in _MESSAGES if error.get(name)), error)
    try:
        return error_text(msgspec.json.encode(error))
    except (msgspec.MsgspecError, UnicodeEncodeError):  # half a surrogate pair
        return error_text(json.dumps(error).encode())


def lenient_object(data: bytes) -> dict[str, Any] | None:
    """A JSON object, also with things that the strict decoder refuses; None for anything else."""
    try:
        decoded = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return decoded if isinstance(decoded, dict) else None


def token_count(value: Any) -> int | None:
    """A count that a server sent; None for what is not one. 7.0 is a count."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) or value < 0 or value != int(value):
        return None
    return int(value)


def join_texts(texts: list[str]) -> str:
    """The texts of chunks as one; a surrogate pair that was cut in two is a character again."""
    joined = "".join(texts)
    try:
        joined.encode()
    except UnicodeEncodeError:
        return joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return joined
