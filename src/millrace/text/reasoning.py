"""Separates a chat model's reasoning from its answer, as the text comes.

Models of the Qwen kind reason between `<think>` and `</think>` and answer after that; most
templates write the first marker into the prompt. This module knows text only, so a marker may come
in one token or in several, and the split is the same however the text is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

START = "<think>"
END = "</think>"

ReasoningParser = Literal["auto", "qwen3", "none"]


def opens_reasoning(
    parser: ReasoningParser, prompt: str, variables: Mapping[str, Any] | None = None
) -> bool:
    """Whether the answer to a rendered chat prompt begins with reasoning.

    auto: if the prompt ends with an opened block. qwen3: also if the model is to open it itself,
    that is unless the prompt ends with a closed one or enable_thinking is false. none: never.
    """
    ending = prompt.rstrip()
    if parser == "none":
        return False
    if parser == "auto" or ending.endswith(START):
        return ending.endswith(START)
    return not ending.endswith(END) and (variables or {}).get("enable_thinking") is not False


class ReasoningSplitter:
    """Splits one answer at the first `</think>`. White space around a marker belongs to neither
    part. What may still turn out to be that, or the beginning of a marker, is held back.
    """

    def __init__(self) -> None:
        self._held = ""
        self._feed = self._opening
        self._tags: tuple[str, ...] = ()
        self.unclosed = ""

    def hold_from(self, tags: tuple[str, ...]) -> None:
        """Hold the reasoning back from the first of these tags on, until it closes.

        If it never does, `unclosed` is what was held, which then belongs to neither part yet.
        """
        self._tags = tags

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """(reasoning, answer) that the text adds. last: nothing follows."""
        text, self._held = self._held + text, ""
        return self._feed(text, last)

    def _opening(self, text: str, last: bool) -> tuple[str, str]:
        """Until the first word, past a marker that the model may have written, too."""
        begun = text.lstrip()
        thought = begun.removeprefix(START).lstrip()
        if (not thought or START.startswith(begun)) and not last:
            self._held = text
            return "", ""
        self._feed = self._reasoning
        return self._reasoning(thought, last)

    def _reasoning(self, text: str, last: bool) -> tuple[str, str]:
        before, marker, after = text.partition(END)
        if marker:
            self._feed = self._gap
            return before.rstrip(), self._gap(after, last)[1]
        at = min((at for at in map(text.find, self._tags) if at >= 0), default=-1)
        if last and at >= 0:
            self.unclosed = text
            return "", ""
        if last:
            return text, ""
        shown = text[:at].rstrip() if at >= 0 else _certain(text, (END, *self._tags))
        self._held = text[len(shown) :]
        return shown, ""

    def _gap(self, text: str, last: bool) -> tuple[str, str]:
        text = text.lstrip()
        if text:
            self._feed = self._answer
        return "", text

    def _answer(self, text: str, last: bool) -> tuple[str, str]:
        return "", text


class ReasoningCounter:
    """Counts the tokens before `</think>`. token_bytes: the bytes of each token id.

    tokens: those so far; all of the output's while it has not closed its reasoning. The marker is
    found across tokens, too.
    """

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._bytes = token_bytes
        self._tail = b""
        self._closed = False
        self.tokens = 0

    def feed(self, token_ids: Iterable[int]) -> None:
        """Take the next tokens of the output."""
        for token in () if self._closed else token_ids:
            self._tail = self._tail[1 - len(END) :] + self._bytes[token]
            if _END_BYTES in self._tail:
                self._closed = True
                return
            self.tokens += 1


_END_BYTES = END.encode()


def _certain(text: str, markers: tuple[str, ...]) -> str:
    """The text less an end that may begin a marker, and less white space before that."""
    for length in range(min(max(map(len, markers)) - 1, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return text[:-length].rstrip()
    return text.rstrip()
