"""Whether a prompt and its output fit into the model's context: the one place that decides it.

The server and the Python API ask before a request is sent; the engine asks again, since it trusts
no message. All lengths are in tokens. This module knows numbers only, no request and no text.

The words of the error are those that clients look for: agents shorten a conversation, or ask for
less output, when they find them. docs/api.md lists which client looks for what.
"""

from __future__ import annotations

from millrace.errors import RequestError

TOO_LONG = "context_length_exceeded"  # the error code, as OpenAI's API has it


class ContextLengthError(RequestError):
    """A request that has more tokens than the model's context.

    prompt, output: tokens of the prompt, resumed ones among them, and those asked for; output is 0
    where the prompt alone is too long. limit: tokens of the context. counted: False where the
    prompt was not encoded, and has at least so many tokens.
    """

    def __init__(
        self, prompt: int, output: int, limit: int, *, param: str, counted: bool = True
    ) -> None:
        self.prompt, self.output, self.limit = prompt, output, limit
        self.counted = counted
        super().__init__(self._openai_words(), param=param, code=TOO_LONG)

    def _openai_words(self) -> str:
        """The message in the words of OpenAI's API and vLLM, and what would work.

        The code stands in it too: LangChain looks for it there.
        """
        known = f"This model's maximum context length is {self.limit} tokens. However, "
        if self.output:
            return (
                f"{known}you requested {self.prompt + self.output} tokens ({self.prompt} in the "
                f"prompt, {self.output} in the completion), which exceeds the context window. "
                f"Please reduce the length of the prompt or completion: {self._room()} ({TOO_LONG})"
            )
        least = "" if self.counted else "at least "
        return (
            f"{known}your prompt has {least}{self.prompt} tokens, which exceeds the context "
            f"window. Please reduce the length of the prompt: at most {self.limit - 1} tokens "
            f"leave room for the output ({TOO_LONG})"
        )

    def _room(self) -> str:
        return f"an output of at most {self.limit - self.prompt} tokens fits"

    @property
    def anthropic_words(self) -> str:
        """The message in the words of Anthropic's API, from which Claude Code reads the numbers."""
        if self.output:
            return (
                f"input length and `max_tokens` exceed context limit: {self.prompt} + "
                f"{self.output} > {self.limit}, decrease input length or `max_tokens` and try "
                f"again; {self._room()}"
            )
        more = "" if self.counted else " (at least; it was not counted to its end)"
        return f"prompt is too long: {self.prompt} tokens > {self.limit - 1} maximum{more}"


def check_lengths(prompt: int, resumed: int, max_model_len: int) -> None:
    """Raise RequestError unless the prompt, and the tokens resumed behind it, leave a request that
    can run: a prompt of at least one token, and room for at least one token of output."""
    if prompt == 0:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    if prompt >= max_model_len:
        raise ContextLengthError(prompt, 0, max_model_len, param="prompt")
    if prompt + resumed > max_model_len:
        raise ContextLengthError(prompt, resumed, max_model_len, param="resume_token_ids")


def check_least(least: int, max_model_len: int, param: str) -> None:
    """Raise RequestError where even the least number of tokens that a prompt can have is too many.
    It is asked before the prompt is encoded."""
    if least > max_model_len:
        raise ContextLengthError(least, 0, max_model_len, param=param, counted=False)


def output_length(prompt: int, max_tokens: int | None, default: int | None, limit: int) -> int:
    """The max_tokens that a request gets: its own, else the smaller of `default` and what fits.

    limit: max_model_len; the prompt has passed `check_lengths`. Raises RequestError where the
    request's own max_tokens does not fit.
    """
    room = limit - prompt
    if max_tokens is None:
        return min(room, default or room)
    if max_tokens > room:
        raise ContextLengthError(prompt, max_tokens, limit, param="max_tokens")
    return max_tokens
