"""The way of one request's tokens from the engine's messages to whoever waits for them.

A stream holds at most what its reader has not taken yet, merged into one delta: a slow client
costs memory for its own tokens and nothing else, and the engine never waits for it.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from millrace.protocol import AddRequest, Delta, FinishReason
from millrace.server.metrics import RequestMetrics


class Stream:
    """Deltas of one request. One writer (the engine client), one reader.

    ended: the engine holds nothing for this request any more.
    """

    def __init__(self, request: AddRequest, metrics: RequestMetrics) -> None:
        self.id = request.id
        self.ended = False
        self._metrics = metrics
        self._prompt_len = len(request.prompt)
        self._arrival = request.arrival
        self._first = self._last = 0.0
        self._tokens = 0
        self._pending: Delta | None = None
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: Delta, now: float) -> None:
        """The engine brought tokens or the end. now: seconds on the clock of `arrival`."""
        if delta.token_ids:
            self._note_tokens(len(delta.token_ids), now)
        if delta.queued is not None:
            self._metrics.queue_time.observe(delta.queued)
        if delta.finish_reason is not None:
            self._note_end(delta.finish_reason, now)
        self._pending = delta if self._pending is None else _merged(self._pending, delta)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will come: after what it has not taken the reader gets `error`."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def take(self) -> Delta:
        """All that has come since the last call; waits if that is nothing."""
        while self._pending is None and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._pending is None:
            assert self._failure is not None
            raise self._failure
        delta, self._pending = self._pending, None
        return delta

    def abandon(self) -> None:
        """The reader wants no more."""
        if not self.ended:
            self._note_end("abort", monotonic())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _note_tokens(self, count: int, now: float) -> None:
        if self._tokens:
            self._metrics.inter_token_latency.observe(now - self._last)
        else:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._arrival)
        self._last = now
        self._tokens += count

    def _note_end(self, reason: FinishReason, now: float) -> None:
        self.ended = True
        metrics = self._metrics
        metrics.finished[reason] += 1
        if reason not in ("stop", "length"):
            return
        metrics.end_to_end.observe(now - self._arrival)
        metrics.prompt_tokens.observe(self._prompt_len)
        metrics.generation_tokens.observe(self._tokens)
        if self._tokens > 1:
            metrics.time_per_output_token.observe((self._last - self._first) / (self._tokens - 1))


def _merged(one: Delta, other: Delta) -> Delta:
    one.token_ids.extend(other.token_ids)  # in place: a reader that stalls must not cost a copy
    return Delta(
        id=one.id,
        token_ids=one.token_ids,
        finish_reason=other.finish_reason,
        stop_token_id=other.stop_token_id,
        cached_tokens=max(one.cached_tokens, other.cached_tokens),
        error=other.error,
    )
