"""Everything between a user's text and token ids for one model: what the server and `LLM` share.

A `TextProcessor` turns text, messages or token ids into an `AddRequest` that is known to fit, and
gives each request its `Detokenizer`. How requests reach an engine is not its business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Any

import msgspec

from millrace.errors import RequestError
from millrace.lengths import check_least, check_lengths, output_length
from millrace.protocol import (
    MAX_LOGPROBS,
    AddRequest,
    Grammar,
    ReasoningBound,
    RecordSource,
    SamplingParams,
    StructuredOutputs,
)
from millrace.text.checkpoint.files import (
    SamplingDefaults,
    read_json,
    sampling_defaults,
    vocab_size,
)
from millrace.text.detokenizer import Detokenizer
from millrace.text.grammar_jobs import OutputGrammar, ToolCallGrammar
from millrace.text.messages import Message, least_tokens, normalize_messages, text_length
from millrace.text.reasoning import END
from millrace.text.template import ChatTemplate, load_template
from millrace.text.tokenizer import NoTokenizer, Tokenizer
from millrace.text.tool_grammar import can_constrain_auto_calls
from millrace.text.tools.call_tags import CALL, CALL_END, FUNCTION
from millrace.text.tools.parser import ToolCallParser
from millrace.text.tools.schema import Tool, ToolChoice
from millrace.text.tools.schema_dialects import Strictness


class TextProcessor:
    """The text side of one model.

    vocab_size: token ids are below it (the embedding may have more rows than the tokenizer tokens).
    tokenizer_config: what the checkpoint says of its tokenizer. max_logprobs: how many
    log-probabilities are reported at a position at most; -1: the whole vocabulary.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        defaults: SamplingDefaults,
        vocab_size: int,
        template_variables: Mapping[str, Any] = MappingProxyType({}),
        tokenizer_config: Mapping[str, Any] = MappingProxyType({}),
        max_logprobs: int = MAX_LOGPROBS,
    ) -> None:
        self._max_logprobs = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
        self.tokenizer_config = tokenizer_config
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self.vocab_size = vocab_size
        self._template_variables = template_variables

    @classmethod
    def load(
        cls,
        model: Path,
        tokenizer: Path,
        generation_config: str = "auto",
        *,
        sampling: Mapping[str, Any] = MappingProxyType({}),
        skip_tokenizer: bool = False,
        template: str | None = None,
        template_variables: Mapping[str, Any] = MappingProxyType({}),
        max_logprobs: int = MAX_LOGPROBS,
    ) -> TextProcessor:
        """Read what the directories hold. Raises CheckpointError.

        generation_config: auto takes the checkpoint's sampling defaults, vllm takes none. sampling:
        defaults that come before these. skip_tokenizer: prompts are token ids. template: a chat
        template, or its file, instead of the checkpoint's. template_variables: what it gets where
        a request says nothing.
        """
        if skip_tokenizer:
            tokens: Tokenizer = NoTokenizer("the server runs with --skip-tokenizer-init")
        else:
            tokens = Tokenizer.load(tokenizer)
        auto = generation_config == "auto"
        return cls(
            tokens,
            load_template(tokenizer, template),
            sampling_defaults(model if auto else None, sampling),
            vocab_size(model) or tokens.vocab_size,
            template_variables,
            {} if skip_tokenizer else read_json(tokenizer / "tokenizer_config.json"),
            max_logprobs,
        )

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as prompt text. Raises RequestError.

        continue_final_message: the prompt ends where the last message's content does.
        """
        if self.template is None:
            raise RequestError(
                "this model has no chat template; send text to /v1/completions", param="messages"
            )
        variables = {**self._template_variables, **(variables or {})}
        if tools:
            if not self.template.takes_tools:
                raise RequestError("this model's chat template knows no tools", param="tools")
            variables = {**variables, "tools": [tool.given for tool in tools]}
        return self.template.render(
            normalize_messages(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError for a text that cannot be encoded."""
        try:
            return self.tokenizer.encode(text, add_special_tokens)
        except (UnicodeError, TypeError):
            raise RequestError(
                "the prompt holds half of a surrogate pair, which is not a character",
                param="prompt",
            ) from None

    def check_text(self, text: str, max_model_len: int, param: str = "prompt") -> None:
        """Raise RequestError for a text that cannot fit into the model's context, whatever its
        tokens are. It costs nothing, so it comes before a text is encoded."""
        self._check_characters(len(text), max_model_len, param)

    def check_chat(self, messages: Sequence[Message], max_model_len: int) -> None:
        """As `check_text`, of messages before they are rendered."""
        check_least(least_tokens(messages), max_model_len, "messages")
        self._check_characters(text_length(messages), max_model_len, "messages")

    def most_characters(self, max_model_len: int) -> int:
        """Characters that a text of so many tokens can have at most."""
        return max_model_len * self.tokenizer.longest_token

    def _check_characters(self, count: int, max_model_len: int, param: str) -> None:
        if isinstance(self.tokenizer, NoTokenizer):
            raise self.tokenizer.refusal()
        check_least(-(-count // self.tokenizer.longest_token), max_model_len, param)

    def request(
        self,
        id: str,
        prompt: list[int],
        params: SamplingParams,
        max_model_len: int,
        default_max_tokens: int | None = None,
        *,
        resume: Sequence[int] = (),
        priority: int = 0,
        cache_salt: str = "",
        grammar: Grammar | None = None,
        reasoning: ReasoningBound | None = None,
        pins: tuple[float, float] = (0.0, 0.0),
        hand_over: str = "",
        source: RecordSource | None = None,
    ) -> AddRequest:
        """A request that fits, with max_tokens settled and turn ends marked.

        Where params.max_tokens is None it becomes what fits, or default_max_tokens if that is less.
        resume: tokens that count as generated; max_tokens bounds them and what follows together.

        Raises RequestError if none can.
        """
        check_lengths(len(prompt), 0, max_model_len)
        self.check_token_ids(prompt, "prompt")
        self.check_token_ids(params.stop_token_ids, "stop_token_ids")
        self.check_token_ids(list(params.logit_bias or ()), "logit_bias")
        self.check_token_ids(params.allowed_token_ids or (), "allowed_token_ids")
        self.check_token_ids(params.logprob_token_ids or (), "logprob_token_ids")
        self.check_token_ids(resume, "resume_token_ids")
        defaults = [n for n in (default_max_tokens, self.defaults.max_tokens) if n]
        params = msgspec.structs.replace(
            params,
            max_tokens=output_length(
                len(prompt), params.max_tokens, min(defaults, default=None), max_model_len
            ),
            top_k=0 if params.top_k > self.vocab_size else params.top_k,
            logprobs=self._logprobs("logprobs", params.logprobs),
            prompt_logprobs=self._logprobs("prompt_logprobs", params.prompt_logprobs),
            structured_outputs=None,
        )
        if len(resume) > (params.max_tokens or 0):
            raise RequestError(
                f"resume_token_ids has {len(resume)} tokens, but max_tokens is {params.max_tokens}",
                param="resume_token_ids",
            )
        return AddRequest(
            id=id,
            prompt=prompt,
            params=params,
            boundaries=self.tokenizer.turn_ends(prompt),
            arrival=monotonic(),
            resume=list(resume),
            priority=priority,
            bad_words=[ids for word in params.bad_words for ids in self._bad_word_tokens(word)],
            cache_salt=cache_salt,
            grammar=grammar,
            reasoning=reasoning,
            pins=pins,
            hand_over=hand_over,
            source=source,
        )

    def _logprobs(self, name: str, wanted: int | None) -> int | None:
        """How many to report at a position. Raises RequestError for more than are allowed."""
        most = self._max_logprobs
        count = self.vocab_size if wanted == -1 else wanted
        if count is None or count <= most:
            return count
        raise RequestError(
            f"{name} must be from 0 to {most}, got {wanted}; a server started with "
            "--max-logprobs allows more",
            param=name,
        )

    def reasoning_bound(self, tokens: int | None, reasons: bool) -> ReasoningBound | None:
        """What ends reasoning after `tokens`; None without reasoning, and for -1, which sets no
        limit. Raises RequestError."""
        if tokens == -1:
            return None
        if tokens is not None and tokens < 0:
            raise RequestError(
                f"thinking_token_budget must be at least 0, or -1 for no limit, got {tokens}",
                param="thinking_token_budget",
            )
        if tokens is None or not reasons:
            return None
        end = self.tokenizer.token_id(END)
        if end is None:
            raise RequestError(
                f"{END} is not a token of this model, so reasoning cannot be ended with it",
                param="thinking_token_budget",
            )
        return ReasoningBound(min(tokens, 2**31), end)

    def _bad_word_tokens(self, word: str) -> list[list[int]]:
        """A word's tokens at the beginning of a text and, if there are as many, inside a text."""
        bare = self.encode(word.lstrip(), add_special_tokens=False)
        spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
        if not bare:  # nothing but white space
            return [self.encode(word, add_special_tokens=False)]
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            return [bare, spaced]
        return [bare]

    def output_grammar(
        self,
        wanted: StructuredOutputs,
        field: str,
        reasons: bool,
        strictness: Strictness = "plain",
    ) -> OutputGrammar:
        """The grammar job of `structured_outputs`. field: the client's name for it. reasons: the
        answer begins with reasoning, to which the grammar does not apply. strictness: of a schema.
        """
        return OutputGrammar(wanted, field, reasons, strictness)

    def tool_call_grammar(
        self,
        choice: ToolChoice,
        parser: ToolCallParser,
        reasons: bool,
        output: OutputGrammar | None = None,
    ) -> ToolCallGrammar:
        """The grammar job of an answer that may or must call tools. output: what an answer without
        calls must match. Otherwise as `output_grammar`.
        """
        ids = {text: self.tokenizer.token_id(text) for text in (CALL, CALL_END)}
        return ToolCallGrammar(
            choice,
            self._writes_json_calls(parser),
            gap=reasons,
            token_ids={text: token for text, token in ids.items() if token is not None},
            output=output,
        )

    def grammar(self, source: str, reasons: bool) -> Grammar:
        """A built grammar as the engine takes it. Raises RequestError if reasoning precedes it that
        has no end the engine could see."""
        return Grammar(source, self._reasoning_end(reasons))

    def constrains_auto_calls(self, choice: ToolChoice) -> bool:
        """Whether a grammar constrains the calls of an answer that may have none.

        Raises RequestError for strict tools if none can: calls would look like text.
        """
        strict = [tool.name for tool in choice.tools if tool.strict]
        if choice.mode != "auto" or not strict:
            return False
        if not can_constrain_auto_calls(self.tokenizer.token_id):
            raise RequestError(
                f"tools: {strict[0]} is strict, but {CALL} is not a token of this model, so no "
                "grammar can tell its calls from text; leave strict out, or force a call with "
                "tool_choice",
                param="tools",
                code="invalid_grammar",
            )
        return True

    def _writes_json_calls(self, parser: ToolCallParser) -> bool:
        if parser == "auto":
            return self.template is None or FUNCTION not in self.template.source
        return parser == "hermes"

    def _reasoning_end(self, reasons: bool) -> int | None:
        if not reasons:
            return None
        token = self.tokenizer.token_id(END)
        if token is None:
            raise RequestError(
                f"{END} is not a token of this model, so no grammar can begin behind the "
                'reasoning; send chat_template_kwargs {"enable_thinking": false}'
            )
        return token

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raise RequestError for the first that is out of vocabulary."""
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise RequestError(
                f"token id {wrong} is out of vocabulary; use 0 to {self.vocab_size - 1} "
                f"({self.vocab_size} tokens)",
                param=param,
            )

    def detokenizer(self, params: SamplingParams) -> Detokenizer:
        """What turns the tokens of a request with these parameters into text."""
        return Detokenizer(self.tokenizer, params)


def split_outputs(request: AddRequest) -> list[AddRequest]:
    """A request for n outputs as n requests; all but the first wait for its prompt to be cached."""
    params = request.params
    made = []
    for at in range(params.n):
        seed = params.seed if params.seed is None else _wrapped(params.seed + at)
        made.append(
            msgspec.structs.replace(
                request,
                id=f"{request.id}-{at}" if at else request.id,
                params=msgspec.structs.replace(params, n=1, seed=seed),
                wait_for=request.id if at else None,
            )
        )
    return made


def _wrapped(seed: int) -> int:
    return seed if seed < 2**64 else seed - 2**64
