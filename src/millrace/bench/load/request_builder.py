"""Builds requests: the bytes of a prompt's request, and of the next turn after an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count as count_up
from typing import Any, cast

import msgspec

from millrace.bench.load.load_driver import Job
from millrace.bench.load.options import ENDPOINTS, BenchOptions
from millrace.bench.workload.agent import (
    KINDS,
    AgentTurn,
    Continuation,
    Exchange,
    Messages,
    continuation,
)
from millrace.bench.workload.messages import is_messages, messages_text
from millrace.bench.workload.prompts import Content, Prompt, Turn
from millrace.common.http_client import encode_request
from millrace.errors import UserError


def indices(count: int | None, process: int, processes: int) -> Iterator[int]:
    """The numbers of the workload's items that one process sends."""
    if count is None:
        return count_up(process, processes)
    return iter(range(process, count, processes))


def make_job(options: BenchOptions, model: str, prompt: Prompt, index: int = -1) -> Job:
    """The request of a prompt; its `then` makes the turns that follow.

    Raises UserError for a content that the API cannot take.
    """
    if prompt.later_turns and isinstance(prompt.later_turns[0], AgentTurn):
        first = Continuation(cast("Messages", prompt.content), (), -1, prompt.fresh)
        return _agent_job(options, model, prompt, index, 0, first)
    return _job(options, model, _fitting(options, prompt.content), prompt, index, 0)


def _fitting(options: BenchOptions, content: Content) -> Content:
    """The content as the API takes it: messages for a chat, a text or token ids otherwise."""
    if is_messages(content):
        return content if options.chat else messages_text(cast("list[dict[str, Any]]", content))
    if not options.chat:
        return content
    if not isinstance(content, str):
        raise UserError(
            "token ids cannot be sent as a chat message; use --backend openai, or a file with text"
        )
    return [{"role": "user", "content": content}]


def _job(
    options: BenchOptions, model: str, content: Content, prompt: Prompt, index: int, turn: int
) -> Job:
    then: Callable[[str], Job | None] | None = None
    if prompt.later_turns:

        def then(answer: str) -> Job | None:
            following, *rest = prompt.later_turns
            longer = _with_next_turn(content, answer, following)
            words = prompt.input_tokens + len(answer.split()) + len(following.text.split())
            next_prompt = Prompt(longer, words, following.output_tokens, tuple(rest), prompt.extra)
            return _job(options, model, longer, next_prompt, index, turn + 1)

    body = _body(options, model, content, prompt)
    path = options.endpoint or ENDPOINTS[options.backend]
    request = encode_request(
        options.target, "POST", path, msgspec.json.encode(body), options.headers
    )
    return Job(request, prompt.input_tokens, index, turn, then, fresh=prompt.fresh)


def _agent_job(
    options: BenchOptions, model: str, prompt: Prompt, index: int, turn: int, given: Continuation
) -> Job:
    """Request number `turn` of a session. prompt: the session as it was made."""
    now = cast("AgentTurn", prompt.later_turns[turn - 1]) if turn else AgentTurn("", 0)
    output_tokens = now.output_tokens if turn else prompt.output_tokens
    count = sum(len(str(message["content"]).split()) for message in given.messages)
    content = _fitting(options, given.messages)
    body = _body(options, model, content, Prompt(content, count, output_tokens))
    path = options.endpoint or ENDPOINTS[options.backend]
    request = encode_request(
        options.target, "POST", path, msgspec.json.encode(body), options.headers
    )

    def then(answer: str) -> Job | None:
        if turn == len(prompt.later_turns):
            return None
        line = given.line
        if now.kind != "aux":
            line = (*line, Exchange(turn, given.messages, answer))
        following = cast("AgentTurn", prompt.later_turns[turn])
        system = cast("Messages", prompt.content)[:1]
        after = continuation(line, system, following)
        return _agent_job(options, model, prompt, index, turn + 1, after)

    return Job(
        request, count, index, turn, then, now.pause, KINDS.index(now.kind), given.base, given.fresh
    )


def _with_next_turn(content: Content, answer: str, following: Turn) -> Content:
    """The conversation so far, then the answer, then the user's next turn."""
    if isinstance(content, str):
        return f"{content}\n{answer}\n{following.text}"
    assert isinstance(content, list)
    said = [{"role": "assistant", "content": answer}, {"role": "user", "content": following.text}]
    return [*content, *said]


def _body(options: BenchOptions, model: str, content: Content, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages" if options.chat else "prompt": content,
        "max_tokens": prompt.output_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    return body | prompt.extra | options.extra_body
