"""Tokens of chat turns that were encoded before, so that a long conversation is not encoded again.

A special token that ends turns is cut out of a text before anything else is done with it, so what
lies before it and what lies behind it are encoded apart. Turns of different salts share nothing,
not even the time that is saved. What a prompt is for is not known here.
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

TURN_END = "<|im_end|>"
MOST_BYTES = 64 << 20
_ENTRY = 300  # bytes of an entry besides its text and tokens
_PROBE = f"a b{TURN_END}\n c{TURN_END} d\u0301"


class Encoder(Protocol):
    """What it asks of a tokenizer."""

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written so, None if there is none."""

    def cuts_out(self, text: str) -> bool:
        """Whether a token is cut out of every text before the rest is encoded."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


class EncodedTurns:
    """Turns by text and salt, those that were used last. most_bytes: of texts and tokens."""

    def __init__(self, tokenizer: Encoder, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._end = tokenizer.token_id(TURN_END) if _is_separate(tokenizer) else None
        self._turns: OrderedDict[tuple[str, str], array[int]] = OrderedDict()
        self.bytes = 0

    def split(self, text: str) -> list[str]:
        """The turns of a text, each with its end; one, if its turns cannot be encoded apart."""
        if self._end is None:
            return [text]
        *turns, rest = text.split(TURN_END)
        return [*(turn + TURN_END for turn in turns), *([rest] if rest else [])]

    def known(self, turns: Iterable[str], salt: str) -> dict[str, array[int]]:
        """The tokens of those that are here."""
        found = {}
        for turn in turns:
            tokens = self._turns.get((salt, turn))
            if tokens is not None:
                found[turn] = tokens
                self._turns.move_to_end((salt, turn))
        return found

    def cut(self, turns: Sequence[str], tokens: Sequence[int]) -> dict[str, array[int]]:
        """The tokens of each turn. tokens: of all of them, one behind the other."""
        if self._end is None:
            return {turns[0]: array("I", tokens)}
        found, start, whole = {}, 0, list(tokens)
        for turn in turns:
            ends = turn.endswith(TURN_END)
            end = whole.index(self._end, start) + 1 if ends else len(whole)
            found[turn] = array("I", whole[start:end])
            start = end
        return found

    def keep(self, new: Mapping[str, array[int]], salt: str) -> None:
        """Keep the tokens of turns."""
        for turn, tokens in new.items():
            self._add(turn, salt, tokens)

    def _add(self, turn: str, salt: str, tokens: array[int]) -> None:
        size = _size(turn, tokens)
        if size > self._most_bytes // 8 or (salt, turn) in self._turns:
            return
        self._turns[salt, turn] = tokens
        self.bytes += size
        while self.bytes > self._most_bytes:
            (_, old), gone = self._turns.popitem(last=False)
            self.bytes -= _size(old, gone)


def _size(turn: str, tokens: array[int]) -> int:
    return sys.getsizeof(turn) + tokens.itemsize * len(tokens) + _ENTRY


def _is_separate(tokenizer: Encoder) -> bool:
    """Whether what is before and behind the end of a turn is encoded apart."""
    if tokenizer.token_id(TURN_END) is None or not tokenizer.cuts_out(TURN_END):
        return False
    *turns, rest = _PROBE.split(TURN_END)
    parts = [tokenizer.encode(turn + TURN_END) for turn in turns]
    apart = [token for part in [*parts, tokenizer.encode(rest)] for token in part]
    return not tokenizer.encode("") and apart == tokenizer.encode(_PROBE)
