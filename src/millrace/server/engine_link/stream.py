"""The path of one request's tokens from the engine's messages to their reader.

A stream holds at most what its reader has not read yet, merged into one delta: a slow client costs
memory for its own tokens only, and the engine never waits for it.
"""

from __future__ import annotations

import asyncio
from array import array
from hashlib import blake2b
from time import monotonic
from typing import TypeVar

from millrace.errors import ModelError, RequestError, TransferError
from millrace.protocol import AddRequest, CacheReport, Delta, FinishReason
from millrace.server.telemetry.metrics import RequestMetrics

_Item = TypeVar("_Item")


class Stream:
    """Deltas of one request. One writer (the engine client), one reader.

    interval: tokens that the reader waits for between the first and the last.
    ended: the engine holds nothing for this request any more. generated_tokens, cached_tokens:
    generated, and found in the prefix cache, so far. cache: what that had of the prompt; None
    before the first tokens. queue_time: seconds from arrival to admission.
    first_token_time, last_token_time: when tokens came, in seconds on the clock of `arrival`; 0
    before. counts_prompt: of several outputs for one prompt, the first counts it.
    conversation: the same for prompts that begin with the same two turns; empty for shorter ones.
    """

    def __init__(self, request: AddRequest, metrics: RequestMetrics, interval: int = 1) -> None:
        self.id = request.id
        self.params = request.params
        self.ended = False
        self.prompt_len = len(request.prompt)
        self.conversation = _conversation(request)
        self.counts_prompt = request.wait_for is None
        self.arrival = request.arrival
        self.first_token_time = self.last_token_time = self.queue_time = 0.0
        self.generated_tokens = self.cached_tokens = 0
        self.preemptions = 0
        self.cache: CacheReport | None = None
        self.finish_reason: FinishReason | None = None
        self._metrics = metrics
        self._interval = interval
        self._was_read = False
        self._pending: Delta | None = None
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, delta: Delta, now: float) -> None:
        """Add tokens or the end. now: seconds on the clock of `arrival`.

        After the end nothing is added: an engine that is told to abort a request may have sent
        more of it before, which would take the place of an end that is not read yet.
        """
        if self.ended or self._failure is not None:
            return
        if delta.token_ids:
            self._record_tokens(len(delta.token_ids), now)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if delta.queued is not None:
            self.queue_time = delta.queued
            self.cache = delta.cache
            self._metrics.queue_time.observe(delta.queued)
        if delta.finish_reason is not None:
            self.ended = True
            self.preemptions = delta.preemptions
            self._record_finish(delta.finish_reason, now)
        if delta.error is not None:
            self.fail(_error(delta, delta.error))
            return
        self._pending = delta if self._pending is None else _merged(self._pending, delta)
        if self._readable():
            self._wake()

    def fail(self, error: Exception) -> None:
        """Nothing more will come: the reader gets `error` after what it has not read yet."""
        if self._failure is None:
            self._failure = error
            self._wake()

    def engine_died(self, error: Exception) -> None:
        """The engine has died with all that it held; the reader gets `error`."""
        if not self.ended:
            self.ended = True
            self._record_finish("error", monotonic())
            self.fail(error)

    async def take(self) -> Delta:
        """All that has come since the last call; waits until there is enough to send."""
        while not self._readable():
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._pending is None:
            assert self._failure is not None
            raise self._failure
        delta, self._pending = self._pending, None
        self._was_read = True
        return delta

    def abandon(self) -> None:
        """The reader has gone."""
        self.ended = True
        self._record_finish("abort", monotonic())

    def end_by_text(self) -> None:
        """The reader has found a stop text: the request has ended, though the engine may not know
        it yet."""
        self._record_finish("stop", monotonic())

    def _readable(self) -> bool:
        """Whether the reader gets something now."""
        if self._failure is not None:
            return True
        waiting = self._pending
        return waiting is not None and (
            self._interval == 1
            or not self._was_read
            or len(waiting.token_ids) >= self._interval
            or waiting.finish_reason is not None
        )

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _record_tokens(self, count: int, now: float) -> None:
        if self.generated_tokens:
            self._metrics.inter_token_latency.observe(now - self.last_token_time)
        else:
            self.first_token_time = now
            self._metrics.time_to_first_token.observe(now - self.arrival)
        self.last_token_time = now
        self.generated_tokens += count

    def _record_finish(self, reason: FinishReason, now: float) -> None:
        if self.finish_reason is not None:
            return
        self.finish_reason = reason
        metrics = self._metrics
        metrics.finished[reason] += 1
        if reason not in ("stop", "length"):
            return
        admitted = self.arrival + self.queue_time
        metrics.end_to_end.observe(now - self.arrival)
        metrics.inference_time.observe(now - admitted)
        metrics.prefill_time.observe(self.first_token_time - admitted)
        metrics.decode_time.observe(self.last_token_time - self.first_token_time)
        metrics.prompt_tokens.observe(self.prompt_len)
        metrics.generation_tokens.observe(self.generated_tokens)
        metrics.prefill_computed_tokens.observe(self.prompt_len - self.cached_tokens)
        metrics.preemptions.observe(self.preemptions)
        if self.params.max_tokens is not None:
            metrics.max_tokens.observe(self.params.max_tokens)
        after_first = self.generated_tokens - 1
        mean = (self.last_token_time - self.first_token_time) / max(after_first, 1)
        metrics.time_per_output_token_or_zero.observe(mean)
        if after_first > 0:
            metrics.time_per_output_token.observe(mean)


def _error(delta: Delta, text: str) -> Exception:
    if delta.transfer_failed:
        return TransferError(text)
    return ModelError(text) if delta.model_failed else RequestError(text)


def _conversation(request: AddRequest) -> str:
    if len(request.boundaries) < 2:
        return ""
    first = array("i", request.prompt[: request.boundaries[1]]).tobytes()
    return blake2b(first + request.cache_salt.encode(), digest_size=8).hexdigest()


def _merged(one: Delta, other: Delta) -> Delta:
    one.token_ids.extend(other.token_ids)  # in place: a reader that stalls must not cost a copy
    return Delta(
        id=one.id,
        token_ids=one.token_ids,
        finish_reason=other.finish_reason,
        stop_token_id=other.stop_token_id,
        cached_tokens=max(one.cached_tokens, other.cached_tokens),
        logprobs=_joined(one.logprobs, other.logprobs),
        prompt_logprobs=_joined(one.prompt_logprobs, other.prompt_logprobs),
        cache=one.cache or other.cache,
        record=one.record or other.record,
        record_error=one.record_error or other.record_error,
    )


def _joined(one: list[_Item] | None, other: list[_Item] | None) -> list[_Item] | None:
    if one is None or other is None:
        return other if one is None else one
    one.extend(other)
    return one
