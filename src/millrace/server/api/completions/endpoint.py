"""POST /v1/completions: a text, or several, continued."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from millrace.errors import RequestError
from millrace.protocol import AddRequest, Grammar, Ready, SamplingParams
from millrace.server.api.context import ApiContext
from millrace.server.api.fields import (
    COMPLETIONS,
    check_resume,
    sampling_params,
    structured_outputs,
)
from millrace.server.api.formatters import CompletionFormatter, ResponseHeader
from millrace.server.api.hand_over import HandOver, read_hand_over
from millrace.server.api.prompts import Prompt, naming_prompt, split_prompts
from millrace.server.api.request_schema import CompletionRequest
from millrace.text.processor import split_outputs

PROMPTS_IN_A_ROW = 16
COMPLETION_MAX_TOKENS = 16  # OpenAI's default here; a chat takes what fits


class Completions:
    """The endpoint for plain texts."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/completions"""
        context = self._context
        body, prefix_hashes = await context.read_prompt_body(
            request, CompletionRequest, COMPLETIONS
        )
        ready = context.check_ready(body)
        params = sampling_params(body, context.processor.defaults)
        made = _outputs(body, params)
        prompts = split_prompts(body.prompt)
        check_resume(body, outputs=len(prompts) * made)
        hand_over = read_hand_over(body, len(prompts) * made, ready)
        context.check_capacity(len(prompts) * made, ready)
        header = context.response_header(body, "cmpl")
        grammar = await self._grammar(body)
        every = msgspec.structs.replace(params, n=made)
        requests: list[AddRequest] = []
        for index, prompt in enumerate(prompts):
            request_id = f"{header.id}-{index}"
            with naming_prompt(index, len(prompts)):
                one = await self._request(
                    request_id, prompt, body, every, ready, grammar, hand_over
                )
            requests += split_outputs(one)
            if index % PROMPTS_IN_A_ROW == PROMPTS_IN_A_ROW - 1:
                await asyncio.sleep(0)  # other requests go on between short prompts
        formatter = self._formatter(header, body, params, prompts, made)
        return context.respond(
            requests,
            params,
            formatter,
            ready,
            bool(body.stream),
            prefix_hashes,
            stream_interval=body.stream_interval,
        )

    async def _grammar(self, body: CompletionRequest) -> Grammar | None:
        wanted = structured_outputs(body)
        if wanted is None:
            return None
        outputs, field, strictness = wanted
        job = self._context.processor.output_grammar(outputs, field, False, strictness)
        return await self._context.grammar(job, reasons=False)

    async def _request(
        self,
        id: str,
        prompt: Prompt,
        body: CompletionRequest,
        params: SamplingParams,
        ready: Ready,
        grammar: Grammar | None,
        hand_over: HandOver,
    ) -> AddRequest:
        context = self._context
        token_ids = await context.token_ids(prompt, body.add_special_tokens, ready, body)
        return context.processor.request(
            id,
            context.truncate(token_ids, body, params, ready),
            params,
            ready.max_model_len,
            None if body.max_tokens is None else COMPLETION_MAX_TOKENS,
            resume=body.resume_token_ids or (),
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            grammar=grammar,
            **hand_over.arguments(id),
        )

    def _formatter(
        self,
        header: ResponseHeader,
        body: CompletionRequest,
        params: SamplingParams,
        prompts: list[Prompt],
        made: int,
    ) -> CompletionFormatter:
        tokenizer = self._context.processor.tokenizer
        echoes: list[str] = []
        if body.echo and not body.resume_token_ids:
            texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in prompts]
            echoes = [text for text in texts for _ in range(made)]
        return CompletionFormatter(
            header,
            self._context.logprob_formatter(body),
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
