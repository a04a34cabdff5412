"""Builds requests: the bytes of a prompt's request, and of the next turn after an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count as count_up
from typing import Any

import msgspec

from millrace.bench.load.load_driver import Job
from millrace.bench.load.options import ENDPOINTS, BenchOptions
from millrace.bench.workload.prompts import Content, Prompt, Turn
from millrace.common.http_client import encode_request


def indices(count: int | None, process: int, processes: int) -> Iterator[int]:
    """The numbers of the workload's items that one process sends."""
    if count is None:
        return count_up(process, processes)
    return iter(range(process, count, processes))


def make_job(options: BenchOptions, model: str, prompt: Prompt, index: int = -1) -> Job:
    """The request of a prompt; its `then` makes the turns that follow."""
    content = prompt.content
    if options.chat and not _is_messages(content):
        content = [{"role": "user", "content": content}]
    elif not options.chat and not isinstance(content, str) and _is_messages(content):
        content = "\n\n".join(str(message.get("content", "")) for message in content)
    return _job(options, model, content, prompt, index, 0)


def _job(
    options: BenchOptions, model: str, content: Content, prompt: Prompt, index: int, turn: int
) -> Job:
    then: Callable[[str], Job | None] | None = None
    if prompt.later_turns:

        def then(answer: str) -> Job | None:
            following, *rest = prompt.later_turns
            longer = _with_next_turn(content, answer, following)
            words = prompt.input_tokens + len(answer.split()) + len(following.text.split())
            next_prompt = Prompt(longer, words, following.output_tokens, tuple(rest))
            return _job(options, model, longer, next_prompt, index, turn + 1)

    body = _body(options, model, content, prompt.output_tokens)
    path = options.endpoint or ENDPOINTS[options.backend]
    request = encode_request(
        options.target, "POST", path, msgspec.json.encode(body), options.headers
    )
    return Job(request, prompt.input_tokens, index, turn, then)


def _with_next_turn(content: Content, answer: str, following: Turn) -> Content:
    """The conversation so far, then the answer, then the user's next turn."""
    if isinstance(content, str):
        return f"{content}\n{answer}\n{following.text}"
    assert _is_messages(content)
    said = [{"role": "assistant", "content": answer}, {"role": "user", "content": following.text}]
    return [*content, *said]


def _is_messages(content: Content) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)


def _body(
    options: BenchOptions, model: str, content: Content, output_tokens: int
) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages" if options.chat else "prompt": content,
        "max_tokens": output_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    return body | options.extra_body
