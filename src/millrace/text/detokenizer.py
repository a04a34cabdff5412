"""Tokens of one request to text, as they come: whole characters, and none past a stop text.

Tokens come in pieces of any size, and the text is the same however they are cut: characters that
cross tokens wait for their last byte, and text that may begin a stop text is held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import msgspec

from millrace.protocol import FinishReason, SamplingParams, TokenLogprobs
from millrace.text.tokenizer import Tokenizer


class Piece(msgspec.Struct, frozen=True):
    """What some tokens brought: the text that is certain by now and the tokens that count.

    stop_reason: the stop text or the stop token id that ended the request; None at its natural end.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None  # of token_ids, if asked for


class TextDecoder:
    """Token ids to text, never splitting a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens complete."""
        table, skipped = self._bytes, self._skipped
        return self._utf8.decode(b"".join([table[i] for i in token_ids if i not in skipped]))

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was cut off."""
        return self._utf8.decode(b"", final=True)


class _Matcher:
    """How much of one stop text the characters seen so far end with (Knuth, Morris, Pratt 1977)."""

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0] * (len(text) + 1)
        length = 0
        for at in range(1, len(text)):
            while length and text[at] != text[length]:
                length = self._fallback[length]
            length += text[at] == text[length]
            self._fallback[at + 1] = length

    def advance(self, char: str) -> bool:
        """Take one more character; True once the whole stop text is seen. Not called after that."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._fallback[self.matched]
        self.matched += self.text[self.matched] == char
        return self.matched == len(self.text)


class StopSearch:
    """Finds the stop text that is complete first; of several at one place, the longest.

    Holds back the longest end of the text that may still become a stop text.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        # Longest first, so that of those complete at the same character the longest is met first.
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that can be shown, the stop text found or None). Not called after a find."""
        text = self._held + text
        for at in range(len(self._held), len(text)):
            char = text[at]
            # Every matcher takes the character: the state of each counts for what is held back.
            found = [matcher.text for matcher in self._matchers if matcher.advance(char)]
            if found:
                self._held = ""
                end = at + 1 if self._include else at + 1 - len(found[0])
                return text[:end], found[0]
        shown = len(text) - max(matcher.matched for matcher in self._matchers)
        self._held = text[shown:]
        return text[:shown], None

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """The output side of one request: tokens in, `Piece`s out.

    Once a stop text is found the request has ended, whatever the engine still sends:
    `ended_by_text` tells the caller to abort it there.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._params = params
        self._decoder = TextDecoder(tokenizer, params.skip_special_tokens)
        stops = params.stop if params.detokenize else []
        self._search = StopSearch(stops, params.include_stop_str_in_output) if stops else None
        self._unsearched = params.min_tokens  # tokens to come in which no stop text counts
        self.ended_by_text = False

    def push(
        self,
        token_ids: list[int],
        finish_reason: FinishReason | None = None,
        stop_token_id: int | None = None,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> Piece:
        """Take the next tokens. A stop token is counted but shown only if that is asked for."""
        text, used, stop = self._text(token_ids, finish_reason is not None, stop_token_id)
        if stop is not None:
            self.ended_by_text = True
            known = None if logprobs is None else logprobs[:used]
            return Piece(text, token_ids[:used], "stop", stop, known)
        stop_reason = stop_token_id if stop_token_id in self._params.stop_token_ids else None
        return Piece(text, token_ids, finish_reason, stop_reason, logprobs)

    def _text(
        self, token_ids: list[int], last: bool, stop_token_id: int | None
    ) -> tuple[str, int, str | None]:
        """(text that is certain, tokens used, stop text found)."""
        if not self._params.detokenize:
            return "", len(token_ids), None
        hide_last = stop_token_id is not None and not self._params.include_stop_str_in_output
        shown = token_ids[:-1] if hide_last else token_ids
        if self._search is None:
            text = self._decoder.feed(shown)
            return text + (self._decoder.flush() if last else ""), len(token_ids), None
        text, used, stop = self._feed_searching(self._search, shown)
        if stop is None:
            used = len(token_ids)
            if last:
                tail, stop = self._finish(self._search)
                text += tail
        return text, used, stop

    def _feed_searching(
        self, search: StopSearch, token_ids: Sequence[int]
    ) -> tuple[str, int, str | None]:
        """(text, tokens used, stop text). Token by token, so that none past the stop is counted."""
        shown = []
        for used, token_id in enumerate(token_ids, 1):
            text, stop = self._decoder.feed((token_id,)), None
            if self._unsearched:
                self._unsearched -= 1
            else:
                text, stop = search.feed(text)
            shown.append(text)
            if stop is not None:
                return "".join(shown), used, stop
        return "".join(shown), len(token_ids), None

    def _finish(self, search: StopSearch) -> tuple[str, str | None]:
        tail = self._decoder.flush()
        text, stop = search.feed(tail) if tail else ("", None)
        return (text, stop) if stop is not None else (text + search.flush(), None)
