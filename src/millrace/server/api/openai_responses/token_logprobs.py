"""Which of an output's tokens make the text of its messages, for their log-probabilities.

An answer is split as text, so tokens are found again by their bytes. Where that fails (a character
that was cut off, hidden special tokens) a text has the log-probabilities of all tokens up to it.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from millrace.protocol import TokenLogprobs
from millrace.server.api.logprobs import LogprobFormatter
from millrace.text.tokenizer import Tokenizer


class TextLogprobs:
    """Takes tokens as they come and gives them to the texts that they make, in order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._format = LogprobFormatter(tokenizer, tokens_as_ids=False)
        self._tokens: deque[tuple[int, TokenLogprobs]] = deque()  # with the place of their ends
        self._raw = b""  # of the output, from `_start` on
        self._start = 0

    def add(self, positions: list[TokenLogprobs]) -> None:
        """The output's next tokens."""
        end = self._start + len(self._raw)
        pieces = []
        for one in positions:
            pieces.append(self._bytes[one.token_ids[0]])
            end += len(pieces[-1])
            self._tokens.append((end, one))
        self._raw += b"".join(pieces)

    def skip(self, text: str) -> None:
        """This text of the output, a marker or reasoning, belongs to no message."""
        at = self._raw.find(text.encode())
        if at >= 0:
            self._forget(at + len(text.encode()))

    def take(self, text: str) -> list[dict[str, Any]]:
        """The log-probabilities of a message's next text, as the API has them."""
        wanted = text.encode()
        at = self._raw.find(wanted)
        if at < 0:
            at, wanted = 0, self._raw
        self._forget(at)
        end, taken, last = self._start + len(wanted), [], self._start
        while self._tokens and last < end:
            last, one = self._tokens.popleft()
            taken.append(one)
        self._forget(len(wanted))
        return [msgspec.to_builtins(one) for one in self._format.chat(taken).content]

    def _forget(self, count: int) -> None:
        """Drop bytes, and the tokens that end within them."""
        self._start += count
        self._raw = self._raw[count:]
        while self._tokens and self._tokens[0][0] <= self._start:
            self._tokens.popleft()
