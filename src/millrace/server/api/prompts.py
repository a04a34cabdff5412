"""The `prompt` of /v1/completions, which comes in four shapes, as a list of prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

from millrace.errors import RequestError

Prompt = str | list[int]
MAX_PROMPTS = 1024  # in one body


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """One entry a choice: texts or lists of token ids. Raises RequestError for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is empty; give a text or token ids", param="prompt")
    if len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
        message = f"prompt has {len(prompt)} entries; at most {MAX_PROMPTS} work"
        raise RequestError(message, param="prompt")
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return [cast(list[int], prompt)]
    if kinds in ({str}, {list}):
        return cast(list[Prompt], prompt)
    raise RequestError(
        "prompt mixes kinds; give a text, a list of texts, token ids, or a list of token id lists",
        param="prompt",
    )


@contextlib.contextmanager
def naming_prompt(index: int, count: int) -> Iterator[None]:
    """Errors of one of several prompts say which."""
    try:
        yield
    except RequestError as error:
        if count > 1 and error.param == "prompt":
            error.args = (f"prompt[{index}]: {error}",)
        raise
