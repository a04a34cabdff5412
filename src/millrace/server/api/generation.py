"""One output between the engine and an answer: deltas come in, pieces of text and counts go out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any

from millrace.protocol import AddRequest, TokenLogprobs
from millrace.server.api.response_schema import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Usage,
)
from millrace.server.engine_link.client import EngineClient
from millrace.server.engine_link.stream import Stream
from millrace.server.http.errors import ClientGoneError
from millrace.text.detokenizer import Detokenizer, Piece
from millrace.text.reasoning import ReasoningCounter


class Generation:
    """One output, piece by piece. index: its position among the choices.

    resumed: text of the tokens of `request.resume`, which the client has already.
    completion_tokens: counts those tokens too. prompt_logprobs: known with the first piece.
    record_tokens: of the record that another engine may take; record_error: why there is none.
    reasoning: counts the tokens of the reasoning that the output begins with; None: of none.
    close: called with the stream when a stop text has ended the output.
    """

    def __init__(
        self,
        index: int,
        request: AddRequest,
        stream: Stream,
        output: Detokenizer,
        close: Callable[[Stream], None],
    ) -> None:
        self.index = index
        self.request = request
        self.stream = stream
        self.done = False
        self.completion_tokens = len(request.resume)
        self.cached_tokens = self.written_tokens = 0
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.record_tokens, self.record_error = 0, ""
        self.reasoning: ReasoningCounter | None = None
        self._output = output
        self._close = close
        self._resumed = output.push(list(request.resume))

    @property
    def resumed(self) -> str:
        return self._resumed.text

    async def next(self) -> Piece:
        """The next piece; `done` afterwards if it was the last. Raises what ended it early."""
        if self._output.ended_by_text and not self.done:  # a stop text in the resumed tokens
            self.done = True
            self._end_by_text()
            return Piece("", [], "stop", self._resumed.stop_reason)
        delta = await self.stream.take()
        piece = self._output.push(
            delta.token_ids, delta.finish_reason, delta.stop_token_id, delta.logprobs
        )
        if self._output.ended_by_text:
            self._end_by_text()
        self.completion_tokens += len(piece.token_ids)
        if self.reasoning is not None:
            self.reasoning.feed(piece.token_ids)
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if delta.cache is not None:
            self.written_tokens = delta.cache.written
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        self.record_tokens = self.record_tokens or delta.record
        self.record_error = self.record_error or delta.record_error
        self.done = piece.finish_reason is not None
        return piece

    def _end_by_text(self) -> None:
        """The engine knows no stop texts; it ends the request when it is told to."""
        self.stream.end_by_text()
        self._close(self.stream)

    async def read_all(self) -> Piece:
        """All of the output as one piece."""
        texts: list[str] = []
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        while True:
            piece = await self.next()
            texts.append(piece.text)
            token_ids += piece.token_ids
            logprobs += piece.logprobs or ()
            if self.done:
                known = None if self.request.params.logprobs is None else logprobs
                return Piece(
                    "".join(texts), token_ids, piece.finish_reason, piece.stop_reason, known
                )


class Generations:
    """All outputs of one HTTP request; a context manager that ends them all when it is left.

    receive: the ASGI channel that reports when the client disconnects. stream_interval: as in
    `EngineClient.open`.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Iterable[tuple[AddRequest, Detokenizer]],
        receive: Callable[[], Awaitable[Any]],
        stream_interval: int | None = None,
    ) -> None:
        self._client = client
        self._receive = receive
        self.all = [
            Generation(index, request, client.open(request, stream_interval), output, client.close)
            for index, (request, output) in enumerate(requests)
        ]

    async def __aenter__(self) -> Generations:
        self._disconnect_watch = asyncio.get_running_loop().create_task(self._watch_client())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._disconnect_watch.cancel()
        prompts: dict[str, list[Stream]] = {}
        for generation in self.all:
            self._client.close(generation.stream)
            first = generation.request.wait_for or generation.request.id
            prompts.setdefault(first, []).append(generation.stream)
        for streams in prompts.values():
            self._client.record_prompt(streams)

    async def each(self, work: Callable[[Generation], Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run `work` on all generations concurrently; the first error ends the others."""
        if len(self.all) == 1:
            return [await work(self.all[0])]
        tasks = [asyncio.ensure_future(work(generation)) for generation in self.all]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def count_reasoning(self, token_bytes: Mapping[int, bytes]) -> None:
        """Count the tokens of the reasoning that every output begins with."""
        for one in self.all:
            one.reasoning = ReasoningCounter(token_bytes)
            one.reasoning.feed(one.request.resume)

    def usage(self) -> Usage:
        """Token counts so far. A prompt counts once, however many outputs it has."""
        firsts = [one for one in self.all if one.request.wait_for is None]
        prompt = sum(len(one.request.prompt) for one in firsts)
        completion = sum(one.completion_tokens for one in self.all)
        cached = sum(one.cached_tokens for one in firsts)
        reasoning = sum(one.reasoning.tokens for one in self.all if one.reasoning is not None)
        return Usage(
            prompt,
            completion,
            prompt + completion,
            PromptTokensDetails(cached, sum(one.written_tokens for one in firsts)),
            CompletionTokensDetails(reasoning),
        )

    async def _watch_client(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        for generation in self.all:
            generation.stream.fail(ClientGoneError())
