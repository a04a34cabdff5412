"""POST /v1/chat/completions: a conversation continued, through the checkpoint's chat template."""

from __future__ import annotations

import time
from uuid import uuid4

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from millrace.server.fields import sampling_params
from millrace.server.front import Front
from millrace.server.replies import ChatReply
from millrace.server.schema import ChatRequest
from millrace.text.reasoning import ReasoningSplit, begins_reasoning


class Chat:
    """The endpoint for conversations."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [Route("/v1/chat/completions", self.create, methods=["POST"])]

    async def create(self, request: Request) -> ASGIApp:
        """POST /v1/chat/completions"""
        front = self._front
        body = await front.body(request, ChatRequest)
        ready = front.check(body)
        params = sampling_params(body, front.codec.defaults)
        front.check_room(1, ready)
        text = front.codec.chat_prompt(
            body.messages,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )
        thinks = begins_reasoning(front.reasoning_parser, text, body.chat_template_kwargs)
        reply = ChatReply(
            f"chatcmpl-{uuid4().hex}",
            int(time.time()),
            front.name(body),
            bool(body.return_token_ids),
            ReasoningSplit() if thinks else None,
        )
        token_ids = await front.token_ids(text, add_special_tokens=False)
        engine_request = front.codec.request(reply.id, token_ids, params, ready.max_model_len)
        return front.answer(body, [engine_request], params, reply, ready)
