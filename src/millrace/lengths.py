"""Whether a prompt and its output fit into the model's context: the one place that decides it.

The server and the Python API ask before a request is sent; the engine asks again, since it trusts
no message. All lengths are in tokens. This module knows numbers only, no request and no text.
"""

from __future__ import annotations

from millrace.errors import RequestError

TOO_LONG = "context_length_exceeded"  # the error code, as OpenAI's API has it


def check_lengths(prompt: int, resumed: int, max_model_len: int) -> None:
    """Raise RequestError unless the prompt, and the tokens resumed behind it, leave a request that
    can run: a prompt of at least one token, and room for at least one token of output."""
    if prompt == 0:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    if prompt >= max_model_len:
        raise RequestError(
            f"the prompt has {prompt} tokens, but the model's context holds {max_model_len} "
            f"including the output; at most {max_model_len - 1} work",
            param="prompt",
            code=TOO_LONG,
        )
    if prompt + resumed > max_model_len:
        raise RequestError(
            f"the prompt and resume_token_ids have {prompt + resumed} tokens, but the model's "
            f"context holds {max_model_len}; at most {max_model_len - prompt} resumed tokens work",
            param="resume_token_ids",
            code=TOO_LONG,
        )


def output_length(prompt: int, max_tokens: int | None, default: int | None, limit: int) -> int:
    """The max_tokens that a request gets: its own, else the smaller of `default` and what fits.

    limit: max_model_len; the prompt has passed `check_lengths`. Raises RequestError where the
    request's own max_tokens does not fit.
    """
    room = limit - prompt
    if max_tokens is None:
        return min(room, default or room)
    if max_tokens > room:
        raise RequestError(
            f"max_tokens {max_tokens} and a prompt of {prompt} tokens are {max_tokens + prompt} "
            f"together, but the model's context holds {limit}; max_tokens {room} works",
            param="max_tokens",
            code=TOO_LONG,
        )
    return max_tokens
