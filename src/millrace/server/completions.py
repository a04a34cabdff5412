"""POST /v1/completions: a text, or several, continued."""

from __future__ import annotations

import time
from uuid import uuid4

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from millrace.server.fields import sampling_params
from millrace.server.front import Front
from millrace.server.prompts import split_prompts
from millrace.server.replies import CompletionReply
from millrace.server.schema import CompletionRequest

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
        body = await front.body(request, CompletionRequest)
        ready = front.check(body)
        params = sampling_params(body, front.codec.defaults)
        prompts = split_prompts(body.prompt)
        front.check_room(len(prompts), ready)
        unsaid = None if body.max_tokens is None else COMPLETION_MAX_TOKENS
        reply = CompletionReply(
            f"cmpl-{uuid4().hex}", int(time.time()), front.name(body), bool(body.return_token_ids)
        )
        requests = [
            front.codec.request(
                f"{reply.id}-{index}",
                await front.token_ids(prompt, body.add_special_tokens),
                params,
                ready.max_model_len,
                unsaid,
            )
            for index, prompt in enumerate(prompts)
        ]
        return front.answer(body, requests, params, reply, ready)
