"""`truncation: "auto"`: a conversation that is too long loses its oldest messages.

The system message and the last message of the user stay, and so does the last message; a call of a
tool goes together with its results.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from millrace.errors import RequestError
from millrace.lengths import TOO_LONG, output_length
from millrace.protocol import Ready
from millrace.server.api.chat.endpoint import PreparedChat, chat_text, prepare_chat, tool_choice
from millrace.server.api.context import ApiContext
from millrace.server.api.request_schema import ChatRequest

_ROOM = 8  # the part of the context that is left for an output without a bound of its own


async def prepare_fitting(
    context: ApiContext, chat: ChatRequest, id: str, ready: Ready, *, truncates: bool
) -> PreparedChat:
    """As `prepare_chat`. truncates: drop the oldest messages of one that is too long, as few as
    fit. Raises RequestError or ApiError."""
    try:
        return await prepare_chat(context, chat, id, ready)
    except RequestError as error:
        if error.code != TOO_LONG or not truncates:
            raise
    output = chat.max_tokens or max(1, ready.max_model_len // _ROOM)
    choice = tool_choice(context, chat)
    parts = droppable(chat.messages)

    async def attempt(count: int) -> None:
        some = _without(chat, parts[:count])
        text = await context.run_in_thread(partial(chat_text, context, some, choice, ready), True)
        tokens = await context.token_ids(text, False, ready)
        output_length(len(tokens), output, None, ready.max_model_len)

    count = await _fewest(len(parts), attempt)
    return await prepare_chat(context, _without(chat, parts[:count]), id, ready)


def droppable(messages: Sequence[dict[str, Any]]) -> list[range]:
    """Which messages can be dropped together, oldest first."""
    users = [at for at, one in enumerate(messages) if one["role"] == "user"]
    kept = {users[-1]} if users else set()
    parts: list[range] = []
    for at, message in enumerate(messages):
        if message["role"] in ("system", "developer") or at in kept:
            continue
        if message["role"] == "tool" and parts and parts[-1].stop == at:
            parts[-1] = range(parts[-1].start, at + 1)
        else:
            parts.append(range(at, at + 1))
    if parts and parts[-1].stop == len(messages):
        parts.pop()
    return parts


def _without(chat: ChatRequest, parts: Sequence[range]) -> ChatRequest:
    dropped = {at for part in parts for at in part}
    kept = [one for at, one in enumerate(chat.messages) if at not in dropped]
    return msgspec.structs.replace(chat, messages=kept)


async def _fewest(most: int, attempt: Callable[[int], Awaitable[None]]) -> int:
    """The least count up to `most` at which an attempt is not too long; `most` if all are."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        try:
            await attempt(middle)
        except RequestError as error:
            if error.code != TOO_LONG:
                raise
            low = middle + 1
        else:
            high = middle
    return min(low, most)
