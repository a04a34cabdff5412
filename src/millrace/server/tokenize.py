"""POST /tokenize and /detokenize: what a prompt is made of, in vLLM's shapes."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millrace.errors import RequestError
from millrace.server.answers import Text, Tokens
from millrace.server.chat import chat_text, tool_choice
from millrace.server.front import Front
from millrace.server.responses import json_response
from millrace.server.schema import ChatRequest, DetokenizeRequest, TokenizeRequest


class Tokenize:
    """The two endpoints."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def routes(self) -> list[Route]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: a prompt, or messages as the chat template writes them."""
        front = self._front
        body = await front.body(request, TokenizeRequest)
        ready = front.check(body)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            text, special = body.prompt, body.add_special_tokens is not False
        else:
            text, special = await self._chat_text(body), bool(body.add_special_tokens)
        tokens = await front.token_ids(text, special)
        texts = None
        if body.return_token_strs:
            texts = [front.codec.tokenizer.token_text(token) for token in tokens]
        return json_response(
            Tokens(
                count=len(tokens),
                max_model_len=ready.max_model_len,
                tokens=tokens,
                token_strs=texts,
            )
        )

    async def _chat_text(self, body: TokenizeRequest) -> str:
        chat = ChatRequest(
            messages=body.messages or [],
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        work = partial(chat_text, self._front, chat, tool_choice(self._front, chat))
        return await self._front.apart(work, long=True)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids, special ones included."""
        front = self._front
        body = await front.body(request, DetokenizeRequest)
        front.check(body)
        front.codec.check_ids(body.tokens, "tokens")
        return json_response(Text(front.codec.tokenizer.decode(body.tokens, False)))
