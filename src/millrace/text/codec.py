"""Everything between a user's words and token ids for one model: what the server and `LLM` share.

A `Codec` turns text, messages or token ids into an `AddRequest` that is known to fit, and gives
each request its `OutputText`. How requests reach an engine is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from millrace.errors import RequestError
from millrace.protocol import AddRequest, SamplingParams
from millrace.text.files import SamplingDefaults, sampling_defaults, vocab_size
from millrace.text.output import OutputText
from millrace.text.template import ChatTemplate, Message, load_template
from millrace.text.tokenizer import Tokenizer


class Codec:
    """The text side of one model.

    vocab_size: token ids are below it (the embedding may have more rows than the tokenizer tokens).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        defaults: SamplingDefaults,
        vocab_size: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self.vocab_size = vocab_size

    @classmethod
    def load(cls, model: Path, tokenizer: Path, generation_config: str = "auto") -> Codec:
        """Read what the directories hold. Raises CheckpointError.

        generation_config: auto takes the checkpoint's sampling defaults, vllm takes none.
        """
        tokens = Tokenizer.load(tokenizer)
        auto = generation_config == "auto"
        return cls(
            tokens,
            load_template(tokenizer),
            sampling_defaults(model) if auto else SamplingDefaults(),
            vocab_size(model) or tokens.vocab_size,
        )

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as prompt text. Raises RequestError."""
        if self.template is None:
            raise RequestError(
                "this model has no chat template; send text to /v1/completions", param="messages"
            )
        if not messages:
            raise RequestError("messages is empty; give at least one", param="messages")
        check_messages(messages)
        return self.template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError for a text that is no valid Unicode."""
        try:
            return self.tokenizer.encode(text, add_special_tokens)
        except (UnicodeError, TypeError):
            raise RequestError(
                "the prompt holds half of a surrogate pair, which is no character", param="prompt"
            ) from None

    def request(
        self,
        id: str,
        prompt: list[int],
        params: SamplingParams,
        max_model_len: int,
        unsaid_max_tokens: int | None = None,
    ) -> AddRequest:
        """A request that fits, with max_tokens settled and turn ends marked.

        Where params.max_tokens is None it becomes what fits, or unsaid_max_tokens if that is less.

        Raises RequestError if none can.
        """
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        self._check_ids(prompt, "prompt")
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        if params.top_k > self.vocab_size:
            params = msgspec.structs.replace(params, top_k=0)
        room = _room(len(prompt), max_model_len)
        if params.max_tokens is None:
            bounds = (room, unsaid_max_tokens or room, self.defaults.max_tokens or room)
            params = msgspec.structs.replace(params, max_tokens=min(bounds))
        elif params.max_tokens > room:
            raise _too_long(len(prompt), params.max_tokens, max_model_len)
        return AddRequest(
            id=id,
            prompt=prompt,
            params=params,
            boundaries=self.tokenizer.turn_ends(prompt),
            arrival=monotonic(),
        )

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise RequestError(
                f"token id {wrong} is not in the vocabulary; use 0 to {self.vocab_size - 1}",
                param=param,
            )

    def output(self, params: SamplingParams) -> OutputText:
        """What turns the tokens of a request with these parameters into text."""
        return OutputText(self.tokenizer, params)


def _room(prompt_len: int, limit: int) -> int:
    """Tokens that the output may have. Raises RequestError if that is none."""
    if prompt_len >= limit:
        raise RequestError(
            f"the prompt has {prompt_len} tokens, but the model's context holds {limit} "
            f"including the output; at most {limit - 1} work",
            param="prompt",
            code="context_length_exceeded",
        )
    return limit - prompt_len


def _too_long(prompt_len: int, wanted: int, limit: int) -> RequestError:
    return RequestError(
        f"max_tokens {wanted} and a prompt of {prompt_len} tokens are {wanted + prompt_len} "
        f"together, but the model's context holds {limit}; max_tokens {limit - prompt_len} works",
        param="max_tokens",
        code="context_length_exceeded",
    )


def check_messages(messages: Sequence[Message]) -> None:
    """Raise RequestError for the first message that no template could read."""
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} must be an object with role and content", param=where)
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise RequestError(f"{where}.role must be a text such as user", param=f"{where}.role")
        content = message.get("content")
        if isinstance(content, list):
            _check_parts(content, f"{where}.content")
        elif content is None and message["role"] != "assistant":
            raise RequestError(f"{where}.content is missing", param=f"{where}.content")
        elif content is not None and not isinstance(content, str):
            raise RequestError(
                f"{where}.content must be a text or a list of parts", param=f"{where}.content"
            )


def _check_parts(parts: list[Any], where: str) -> None:
    for at, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'{where}[{at}] must be {{"type": "text", "text": ...}}; '
                f"this model reads text only",
                param=f"{where}[{at}]",
            )
