"""/tokenize, /detokenize and /tokenizer_info: what a prompt is made of, in vLLM's shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from millrace.errors import RequestError
from millrace.lengths import TOO_LONG
from millrace.protocol import Ready
from millrace.server.api.chat.endpoint import chat_text, tool_choice
from millrace.server.api.context import ApiContext
from millrace.server.api.request_schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from millrace.server.api.response_schema import Text, Tokens
from millrace.server.api.transport import json_response

_FILES = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path")  # of whoever made it


class Tokenize:
    """The three endpoints."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: a prompt, or messages as the chat template writes them."""
        context = self._context
        body = await context.body(request, TokenizeRequest)
        ready = context.check_ready(body)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            text, special = body.prompt, body.add_special_tokens is not False
        else:
            text, special = await self._chat_text(body, ready), bool(body.add_special_tokens)
        tokens = await context.token_ids(text, special, ready)
        texts = None
        if body.return_token_strs:
            texts = await context.run_in_thread(partial(self._token_texts, tokens), long=True)
        return json_response(
            Tokens(
                count=len(tokens),
                max_model_len=ready.max_model_len,
                tokens=tokens,
                token_strs=texts,
            )
        )

    def _token_texts(self, tokens: list[int]) -> list[str]:
        found: list[str | None] = self._context.processor.tokenizer.convert_ids_to_tokens(tokens)
        return [token or "" for token in found]

    async def _chat_text(self, body: TokenizeRequest, ready: Ready) -> str:
        chat = ChatRequest(
            messages=body.messages or [],
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        work = partial(chat_text, self._context, chat, tool_choice(self._context, chat), ready)
        return await self._context.run_in_thread(work, long=True)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids, special ones included."""
        context = self._context
        body = await context.body(request, DetokenizeRequest)
        ready = context.check_ready(body)
        if len(body.tokens) > ready.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {ready.max_model_len} tokens. However, "
                f"tokens has {len(body.tokens)} ids; send them in parts",
                param="tokens",
                code=TOO_LONG,
            )
        context.processor.check_token_ids(body.tokens, "tokens")
        decode = partial(context.processor.tokenizer.decode, body.tokens, False)
        return json_response(Text(await context.run_in_thread(decode, len(body.tokens) > 1000)))

    async def info(self, _: Request) -> Response:
        """GET /tokenizer_info: what the checkpoint says of its tokenizer, and the chat template."""
        processor = self._context.processor
        config = {
            key: _plain(value)
            for key, value in processor.tokenizer_config.items()
            if key not in _FILES
        }
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if processor.template is not None:
            config["chat_template"] = processor.template.source
        return json_response(config)


def _plain(value: Any) -> Any:
    """A special token that is described by an object, as its text."""
    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return value.get("content")
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
