"""What all endpoints share: one model, one engine, and the limits on both.

An endpoint reads its own bodies and formats its own answers. Checking names and capacity, encoding
text outside the event loop, and opening requests in the engine are done here.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from time import time
from typing import TypeVar
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive

from millrace.batch.jobs.api import BatchApi
from millrace.common.api_errors import ApiError, shutting_down
from millrace.common.framing import FramingError
from millrace.common.prefix_hash import PROMPT_FIELDS, SALT_HEADER, combined_salt
from millrace.errors import RequestError
from millrace.lengths import check_lengths
from millrace.protocol import AddRequest, Grammar, Ready, SamplingParams
from millrace.server.api.field_table import FieldRules
from millrace.server.api.fields import COUNTING, parse_body, warn_once
from millrace.server.api.formatters import AnswerDefaults, Formatter, ResponseHeader
from millrace.server.api.generation import Generations
from millrace.server.api.logprobs import LogprobFormatter
from millrace.server.api.prompts import Prompt
from millrace.server.api.request_schema import (
    GenerationRequest,
    ModelRequest,
    PromptRequest,
    StreamOptions,
)
from millrace.server.api.transport import FullResponse, StreamingResponse
from millrace.server.engine_link.client import EngineClient
from millrace.server.engine_link.control import EngineControl
from millrace.server.http.access import client_of
from millrace.server.http.bodies import BodyReader
from millrace.server.sandbox.jobs import (
    Answer,
    EncodeText,
    Job,
    KeptTokens,
    Refused,
    Source,
    TokenIds,
)
from millrace.server.sandbox.pool import Sandbox, SandboxBusyError, SandboxFailedError
from millrace.server.telemetry.metrics import RequestMetrics
from millrace.text.chat.encoded_turns import EncodedTurns
from millrace.text.grammar_jobs import GrammarJob, OutputGrammar
from millrace.text.processor import TextProcessor
from millrace.text.reasoning import ReasoningParser
from millrace.text.tools.parser import ToolCallParser

# Characters. The tokenizer releases the interpreter, but needs some 130 bytes a character.
THREAD_TEXT = 2000  # texts from this length on are encoded on a thread
SANDBOX_TEXT = 200_000  # and from this length on in a process of their own
THREAD_BODY = 1 << 20  # bytes; larger bodies are decoded on a thread, in steps of some 30 ms

MAX_SALT = 1024  # characters of a cache_salt

_SALT = re.compile("[0-9A-Za-z]{1,64}")
_Body = TypeVar("_Body", bound=ModelRequest)
_PromptBody = TypeVar("_PromptBody", bound=PromptRequest)
_Result = TypeVar("_Result")


class ApiContext:
    """One replica as its endpoints see it.

    names: what the model may be called, the first being its name in answers.
    reasoning_parser: how chats are split into reasoning and content. tool_call_parser: how the
    model calls tools.
    max_queue: requests that may wait beyond those that the engine runs at once.
    grammars, encoder: the processes that build grammars and encode long texts. control: what
    pauses the engine and puts it to sleep. answers: what they hold where requests say nothing.
    batches: the API of files and batches, where they are kept.
    max_stored_responses, max_stored_bytes: bounds of the responses that are kept. response_tag:
    stands in their ids.
    """

    def __init__(
        self,
        client: EngineClient,
        processor: TextProcessor,
        metrics: RequestMetrics,
        *,
        names: Sequence[str],
        reasoning_parser: ReasoningParser,
        tool_call_parser: ToolCallParser,
        max_queue: int,
        body_reader: BodyReader,
        grammars: Sandbox,
        encoder: Sandbox,
        control: EngineControl,
        answers: AnswerDefaults | None = None,
        batches: BatchApi | None = None,
        max_stored_responses: int = 0,
        max_stored_bytes: int = 0,
    ) -> None:
        self.client = client
        self.control = control
        self._answers = answers or AnswerDefaults()
        self.processor = processor
        self.names = names
        self.reasoning_parser = reasoning_parser
        self.tool_call_parser = tool_call_parser
        self._metrics = metrics
        self._max_queue = max_queue
        self.batches = batches
        self.body_reader = body_reader
        self._grammars = grammars
        self._encoder = encoder
        self._encoded_turns = EncodedTurns(processor.tokenizer)
        self.max_stored_responses = max_stored_responses
        self.max_stored_bytes = max_stored_bytes
        self.response_tag = ""
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="server")

    async def body(
        self, request: Request, kind: type[_Body], rules: FieldRules = COUNTING
    ) -> _Body:
        """The request's body. Raises RequestError or ApiError."""
        body, _ = await self._parse(request, kind, rules)
        return body

    async def _parse(
        self, request: Request, kind: type[_Body], rules: FieldRules
    ) -> tuple[_Body, Mapping[str, msgspec.Raw]]:
        data = await self.body_reader.read(request)
        return await self.run_in_thread(
            partial(parse_body, data, kind, rules), len(data) >= THREAD_BODY
        )

    async def read_prompt_body(
        self, request: Request, kind: type[_PromptBody], rules: FieldRules
    ) -> tuple[_PromptBody, list[int]]:
        """The body of a request for text, and its prompt's hashes, computed as gateways do.

        The body's cache_salt is then that of its client and its gateway as well. Raises
        RequestError or ApiError.
        """
        body, given = await self._parse(request, kind, rules)
        fields = PROMPT_FIELDS[request.scope["path"]]
        pieces = [given[name] for name in fields if name in given]
        salt = cache_salt(request, body)
        body = msgspec.structs.replace(body, cache_salt=salt or None)
        return body, self.client.prefix_reporter.prefix_hashes(pieces, salt)

    def check_ready(self, body: ModelRequest) -> Ready:
        """The engine's Ready message. Raises ApiError: not ready, or another model."""
        if body.model:
            self.check_model(body.model)
        if isinstance(body, GenerationRequest) and body.stream_options and not body.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        if self.client.ready is None or not self.client.healthy:
            raise unavailable(self.client)
        return self.client.ready

    def check_model(self, name: str) -> None:
        """Raise ApiError unless the model is called so."""
        if name not in self.names:
            raise ApiError(
                404,
                f"model {name!r} is not served here; {' or '.join(self.names)} is",
                param="model",
                code="model_not_found",
            )

    def check_capacity(self, count: int, ready: Ready) -> None:
        """Raise ApiError unless `count` more requests may run or wait."""
        limit = ready.max_num_seqs + self._max_queue
        if count > limit:
            raise RequestError(f"{count} outputs in one request; at most {limit} work", param="n")
        if self.client.open_requests + count > limit:
            self._metrics.rejected += count
            raise ApiError(
                429,
                f"the queue is full: {self.client.open_requests} requests are open, {limit} may "
                f"be ({ready.max_num_seqs} running, {self._max_queue} waiting); try again later",
                code="queue_full",
            )

    def response_header(self, body: GenerationRequest, prefix: str) -> ResponseHeader:
        """What every chunk of the answer repeats. prefix: of its id."""
        options = body.stream_options or StreamOptions()
        if self._answers.usage:
            options = StreamOptions(include_usage=True, continuous_usage_stats=True)
        return ResponseHeader(
            id=f"{prefix}-{uuid4().hex}",
            created=int(time()),
            model=self.model_name(body),
            with_ids=bool(body.return_token_ids),
            with_times=self._answers.times,
            ready=self.client.ready,
            options=options,
        )

    def logprob_formatter(self, body: GenerationRequest) -> LogprobFormatter:
        """What words log-probabilities as the body, or else the server, wants them."""
        as_ids = body.return_tokens_as_token_ids
        if as_ids is None:
            as_ids = self._answers.tokens_as_ids
        return LogprobFormatter(self.processor.tokenizer, as_ids)

    def model_name(self, body: ModelRequest) -> str:
        """The model's name in the answer."""
        return body.model or self.names[0]

    async def token_ids(
        self,
        prompt: Prompt,
        add_special_tokens: bool,
        ready: Ready,
        body: GenerationRequest | None = None,
    ) -> list[int]:
        """A prompt's tokens. Raises RequestError or ApiError, for a text that is certainly too long
        before it is encoded.

        body: if `truncate` is to cut the tokens, no text is too long; it loses what would be cut
        off.
        """
        if not isinstance(prompt, str):
            return prompt
        kept: KeptTokens = "all"
        if body is not None and body.truncate_prompt_tokens is not None:
            kept = "first" if body.truncation_side == "right" else "last"
            most = self.processor.most_characters(ready.max_model_len)
            prompt = prompt[:most] if kept == "first" else prompt[-most:]
        self.processor.check_text(prompt, ready.max_model_len, "prompt")
        if body is None or kept != "all":
            return await self._encode(prompt, add_special_tokens, ready, kept)
        return await self._encode_new_turns(
            prompt, add_special_tokens, ready, body.cache_salt or ""
        )

    async def _encode_new_turns(
        self, text: str, special: bool, ready: Ready, salt: str
    ) -> list[int]:
        """A text's tokens, of which only turns are encoded that have not been before."""
        turns = self._encoded_turns.split(text)
        found = self._encoded_turns.known(turns, salt)
        if missing := [turn for turn in dict.fromkeys(turns) if turn not in found]:
            tokens = await self._encode("".join(missing), special, ready, "all")
            new = self._encoded_turns.cut(missing, tokens)
            self._encoded_turns.keep(new, salt)
            found |= new
        return [token for turn in turns for token in found[turn]]

    async def _encode(self, text: str, special: bool, ready: Ready, kept: KeptTokens) -> list[int]:
        """A text's tokens. Raises RequestError or ApiError, unless so many are allowed."""
        if len(text) >= SANDBOX_TEXT:
            answer = await self._encode_in_sandbox(text, special, ready, kept)
            if kept == "all" and answer.count > ready.max_model_len:
                check_lengths(answer.count, 0, ready.max_model_len)
            return array("I", answer.ids).tolist()
        encode = partial(self.processor.encode, text, special)
        return await self.run_in_thread(encode, len(text) >= THREAD_TEXT)

    async def count_tokens(self, text: str, ready: Ready) -> int:
        """How many tokens a text has, more than the model's context too. Raises RequestError or
        ApiError."""
        if len(text) >= SANDBOX_TEXT:
            return (await self._encode_in_sandbox(text, False, ready, "all")).count
        encode = partial(self.processor.encode, text, False)
        return len(await self.run_in_thread(encode, len(text) >= THREAD_TEXT))

    async def _encode_in_sandbox(
        self, text: str, special: bool, ready: Ready, kept: KeptTokens
    ) -> TokenIds:
        job = EncodeText(text, special, most=ready.max_model_len, kept=kept)
        answer = await self._run_sandboxed(
            self._encoder,
            job,
            "prompt",
            "the prompt cannot be encoded within the limits of time and memory; shorten it",
        )
        assert isinstance(answer, TokenIds)
        return answer

    async def grammar(self, job: GrammarJob, reasons: bool) -> Grammar:
        """A grammar, built and checked in a process of its own. Raises RequestError or ApiError.

        reasons: the answer begins with reasoning, to which the grammar does not apply.
        """
        field = job.field if isinstance(job, OutputGrammar) else "tools"
        answer = await self._run_sandboxed(
            self._grammars,
            job,
            field,
            f"{field}: the grammar cannot be compiled within the limits of time, memory and "
            "stack; make it smaller or nest it less deeply",
            code="invalid_grammar",
        )
        assert isinstance(answer, Source)
        for note in answer.notes:
            warn_once(f"{field}: this part of a schema that is not strict binds nothing: {note}")
        return self.processor.grammar(answer.text, reasons)

    async def _run_sandboxed(
        self, sandbox: Sandbox, job: Job, param: str, failure: str, code: str | None = None
    ) -> Answer:
        try:
            answer = await sandbox.run(job)
        except UnicodeError:
            raise RequestError(
                f"{param} holds half of a surrogate pair, which is not a character", param=param
            ) from None
        except OverflowError:
            message = f"{param} holds an integer of more than 64 bits"
            raise RequestError(message, param=param) from None
        except (SandboxFailedError, FramingError, RecursionError):
            raise RequestError(failure, param=param, code=code) from None
        except SandboxBusyError as error:
            raise ApiError(
                429, f"{error}; try again later", code="queue_full", headers={"Retry-After": "1"}
            ) from None
        if isinstance(answer, Refused):
            raise RequestError(answer.message, param=answer.param, code=answer.code)
        return answer

    async def run_in_thread(self, work: Callable[[], _Result], long: bool) -> _Result:
        """The result of `work`; on a thread if it may take long."""
        if not long:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def truncate(
        self, prompt: list[int], body: GenerationRequest, params: SamplingParams, ready: Ready
    ) -> list[int]:
        """`truncate_prompt_tokens` of a prompt, its last ones unless the side says otherwise; -1:
        what leaves room for the output.

        What is left may still be too long for the output; the check of its length tells so.
        """
        kept, limit = body.truncate_prompt_tokens, ready.max_model_len
        if kept is None:
            return prompt
        if not (kept == -1 or 1 <= kept <= limit):
            raise RequestError(
                f"truncate_prompt_tokens must be -1 or from 1 to {limit}, got {kept}",
                param="truncate_prompt_tokens",
            )
        count = max(1, limit - (params.max_tokens or 1)) if kept == -1 else kept
        return prompt[:count] if body.truncation_side == "right" else prompt[-count:]

    def respond(
        self,
        requests: list[AddRequest],
        params: SamplingParams,
        formatter: Formatter,
        ready: Ready,
        stream: bool,
        prefix_hashes: Sequence[int] = (),
        *,
        stream_interval: int | None = None,
        reasons: bool = False,
    ) -> ASGIApp:
        """The application that runs the requests and sends what `formatter` makes of them.

        prefix_hashes: of their prompt. stream_interval: tokens of a chunk, if the server's are
        fewer. reasons: the outputs begin with reasoning, whose tokens are counted. Raises
        RequestError for an interval of less than one.
        """
        if stream_interval is not None and stream_interval < 1:
            message = f"stream_interval must be at least 1, got {stream_interval}"
            raise RequestError(message, param="stream_interval")

        interval = stream_interval if stream else None

        def open_generations(receive: Receive) -> Generations:
            return self.open_generations(
                requests, params, ready, receive, prefix_hashes,
                stream_interval=interval, reasons=reasons,
            )  # fmt: skip

        return (
            StreamingResponse(open_generations, formatter)
            if stream
            else FullResponse(open_generations, formatter)
        )

    def open_generations(
        self,
        requests: list[AddRequest],
        params: SamplingParams,
        ready: Ready,
        receive: Receive,
        prefix_hashes: Sequence[int] = (),
        *,
        stream_interval: int | None = None,
        reasons: bool = False,
    ) -> Generations:
        """The requests, handed to the engine; arguments as of `respond`. Raises ApiError."""
        self.check_capacity(len(requests), ready)  # again: encoding took time
        tag = self.client.prefix_reporter.add(prefix_hashes)
        tagged = [msgspec.structs.replace(one, tag=tag) for one in requests] if tag else requests
        pairs = [(one, self.processor.detokenizer(params)) for one in tagged]
        opened = Generations(self.client, pairs, receive, stream_interval)
        if reasons:
            opened.count_reasoning(self.processor.tokenizer.token_bytes)
        return opened


def cache_salt(request: Request, body: PromptRequest) -> str:
    """The salt of everything that names whose request it is. Raises RequestError."""
    own = body.cache_salt
    if own is not None and not 1 <= len(own) <= MAX_SALT:
        raise RequestError(
            f"cache_salt must have 1 to {MAX_SALT} characters, got {len(own)}", param="cache_salt"
        )
    sent = request.headers.get(SALT_HEADER, "")
    if sent and not _SALT.fullmatch(sent):
        raise RequestError(f"the header {SALT_HEADER} takes 1 to 64 letters and digits")
    return combined_salt(client_of(request.scope).salt, sent, own or "")


def unavailable(client: EngineClient) -> ApiError:
    """Why no request can be served now."""
    if client.died is not None:
        # Not "engine_dead": this request never was in the engine, so it did not cause the death.
        return ApiError(503, f"the engine is gone: {client.died}", code="engine_restarting")
    if client.refusal == "asleep":
        return ApiError(503, "the engine sleeps; POST /wake_up wakes it", code="asleep")
    if client.refusal == "paused":
        return ApiError(503, "the engine is paused; POST /resume ends that", code="paused")
    if client.ready is None:
        return ApiError(503, "the engine is loading", code="engine_loading")
    return shutting_down()
