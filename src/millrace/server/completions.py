"""POST /v1/completions: a text, or several, continued."""

from __future__ import annotations

import time
from functools import partial
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.protocol import AddRequest, Grammar, Ready, SamplingParams
from millrace.server.fields import (
    COMPLETIONS,
    check_resume,
    sampling_params,
    structured_outputs,
)
from millrace.server.front import Front
from millrace.server.logprobs import LogprobWords
from millrace.server.prompts import Prompt, split_prompts
from millrace.server.replies import CompletionReply, Heading
from millrace.server.schema import CompletionRequest, StreamOptions
from millrace.text.codec import copies

COMPLETION_MAX_TOKENS = 16  # OpenAI's default here; a chat takes what fits


class Completions:
    """The endpoint for plain texts."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [Route("/v1/completions", self.create, methods=["POST"])]

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/completions"""
        front = self._front
        body, chain = await front.prompted(request, CompletionRequest, COMPLETIONS)
        ready = front.check(body)
        params = sampling_params(body, front.codec.defaults)
        made = _outputs(body, params)
        prompts = split_prompts(body.prompt)
        check_resume(body, outputs=len(prompts) * made)
        front.check_room(len(prompts) * made, ready)
        heading = Heading(
            id=f"cmpl-{uuid4().hex}",
            created=int(time.time()),
            model=front.name(body),
            with_ids=bool(body.return_token_ids),
            options=body.stream_options or StreamOptions(),
        )
        grammar = await self._grammar(body)
        every = msgspec.structs.replace(params, n=made)
        requests = [
            one
            for index, prompt in enumerate(prompts)
            for one in copies(
                await self._request(f"{heading.id}-{index}", prompt, body, every, ready, grammar)
            )
        ]
        reply = self._reply(heading, body, params, prompts, made)
        return front.answer(requests, params, reply, ready, bool(body.stream), chain)

    async def _grammar(self, body: CompletionRequest) -> Grammar | None:
        wanted = structured_outputs(body)
        if wanted is None:
            return None
        codec = self._front.codec
        return await self._front.apart(partial(codec.structured, *wanted, reasons=False), True)

    async def _request(
        self,
        id: str,
        prompt: Prompt,
        body: CompletionRequest,
        params: SamplingParams,
        ready: Ready,
        grammar: Grammar | None,
    ) -> AddRequest:
        front = self._front
        token_ids = await front.token_ids(prompt, body.add_special_tokens)
        return front.codec.request(
            id,
            front.truncated(token_ids, body, params, ready),
            params,
            ready.max_model_len,
            None if body.max_tokens is None else COMPLETION_MAX_TOKENS,
            resume=body.resume_token_ids or (),
            priority=body.priority or 0,
            grammar=grammar,
        )

    def _reply(
        self,
        heading: Heading,
        body: CompletionRequest,
        params: SamplingParams,
        prompts: list[Prompt],
        made: int,
    ) -> CompletionReply:
        tokenizer = self._front.codec.tokenizer
        echoes: list[str] = []
        if body.echo and not body.resume_token_ids:
            texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in prompts]
            echoes = [text for text in texts for _ in range(made)]
        return CompletionReply(
            heading,
            LogprobWords(tokenizer, bool(body.return_tokens_as_token_ids)),
            echoes=echoes,
            prompt_only=body.max_tokens == 0,
            best=(params.n, made) if made > params.n else None,
            shows_logprobs=body.logprobs is not None,
            shows_prompt=body.prompt_logprobs is not None,
        )


def _outputs(body: CompletionRequest, params: SamplingParams) -> int:
    """Outputs to generate for each prompt. Raises RequestError."""
    made = params.n if body.best_of is None else body.best_of
    if made < params.n:
        raise RequestError(f"best_of must be at least n, {params.n}, got {made}", param="best_of")
    if made > params.n and body.stream:
        raise RequestError(
            "best_of cannot be streamed: the best are known at the end; leave out stream",
            param="best_of",
        )
    return made
