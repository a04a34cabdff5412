"""Log-probabilities in the shapes of OpenAI's two endpoints, and of vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millrace.protocol import TokenLogprobs
from millrace.server.api.response_schema import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from millrace.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # as vLLM says it


class LogprobFormatter:
    """Words log-probabilities for one answer. tokens_as_ids: tokens are written `token_id:17`."""

    def __init__(self, tokenizer: Tokenizer, tokens_as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._tokens_as_ids = tokens_as_ids

    def chat(self, positions: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """As /v1/chat/completions shows them."""
        return ChatLogprobs(content=[self._position(one) for one in positions])

    def _position(self, one: TokenLogprobs) -> TokenLogprob:
        first, *others = [self._entry(*row) for row in _rows(one)]
        return TokenLogprob(
            token=first.token, logprob=first.logprob, bytes=first.bytes, top_logprobs=others
        )

    def _entry(self, token: int, logprob: float) -> TopLogprob:
        text = list(self._tokenizer.token_bytes[token])
        return TopLogprob(token=self._text(token), logprob=logprob, bytes=text)

    def completion(
        self,
        positions: Sequence[TokenLogprobs],
        offset: int,
        first: int | None = None,
    ) -> tuple[CompletionLogprobs, int]:
        """As /v1/completions shows them, and the offset behind them.

        offset: characters of the choice before these tokens. first: the token of an echoed prompt
        that nothing predicts, before them.
        """
        entries = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if first is not None:
            self._add(entries, first, None, None, offset)
            offset += len(self._tokenizer.token_text(first))
        for one in positions:
            rows = _rows(one)
            top: dict[str, float] = {}  # the token itself comes first
            for token, logprob in rows:
                top.setdefault(self._text(token), logprob)
            self._add(entries, *rows[0], top, offset)
            offset += len(self._tokenizer.token_text(one.token_ids[0]))
        return entries, offset

    def _add(
        self,
        entries: CompletionLogprobs,
        token: int,
        logprob: float | None,
        top: dict[str, float] | None,
        offset: int,
    ) -> None:
        entries.tokens.append(self._text(token))
        entries.token_logprobs.append(logprob)
        entries.top_logprobs.append(top)
        entries.text_offset.append(offset)

    def prompt(self, positions: Sequence[TokenLogprobs]) -> PromptLogprobs:
        """As vLLM's prompt_logprobs: nothing predicts the first token."""
        return [None, *(self._ranked(one) for one in positions)]

    def _ranked(self, one: TokenLogprobs) -> dict[int, Any]:
        found: dict[int, Any] = {}
        for at, (token, value) in enumerate(_rows(one)):
            text = self._tokenizer.token_text(token)
            entry = {"logprob": value, "rank": at or one.rank, "decoded_token": text}
            found.setdefault(token, entry)
        return found

    def _text(self, token: int) -> str:
        return f"token_id:{token}" if self._tokens_as_ids else self._tokenizer.token_text(token)


def _rows(one: TokenLogprobs) -> list[tuple[int, float]]:
    """(token, log-probability) of a position. JSON knows no infinity; what cannot be is -9999."""
    return [
        (token, max(logprob, MIN_LOGPROB))
        for token, logprob in zip(one.token_ids, one.logprobs, strict=True)
    ]
