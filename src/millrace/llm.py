"""The Python API: an engine in this process, with the interface of vLLM's `LLM`.

    from millrace import LLM, SamplingParams

    with LLM("models/millrace-mini", max_model_len=2048) as llm:
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

One thread at a time may use it. For many clients use `millrace serve`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, cast

import msgspec
from rich.console import Console
from rich.progress import Progress

from millrace.config import EngineArgs, engine_args
from millrace.errors import ConfigError, ModelError, RequestError
from millrace.model_lookup import find_model
from millrace.protocol import (
    AddRequest,
    Delta,
    EngineStats,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from millrace.replica.build import build_engine
from millrace.text.detokenizer import Detokenizer
from millrace.text.messages import Message
from millrace.text.processor import TextProcessor, split_outputs
from millrace.text.reasoning import opens_reasoning
from millrace.text.tokenizer import Tokenizer
from millrace.text.tools.schema import read_tools
from millrace.vllm_flags import own_keywords, structured_output_options

logger = logging.getLogger(__name__)

Prompt = str | list[int] | Mapping[str, Any]


@dataclass
class Logprob:
    """One token at one position: its natural log-probability, its rank from 1, its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]  # of one position; the token of the output comes first


@dataclass
class CompletionOutput:
    """One output. stop_reason: the stop text or stop token id that ended it, if one did.

    logprobs: one entry per token, if sampling_params.logprobs is set. cumulative_logprob: the sum
    over the tokens of the output.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None


@dataclass
class RequestMetrics:
    """Times in seconds of `time.monotonic()`; 0.0: not yet."""

    arrival_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0


@dataclass
class RequestOutput:
    """One prompt and its outputs. prompt: its text; None if it was given as token ids.

    prompt_logprobs: one entry per token, None for the first, if they are asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0
    prompt_logprobs: list[Logprobs | None] | None = None


class LLM:
    """A loaded model in this process. Options are those of `millrace serve`, in snake_case.

    Those of vLLM's `LLM` that have no effect here are accepted with a note in the log.

    generation_config: "auto": the checkpoint's sampling defaults; "vllm": none.
    override_generation_config: defaults that come before these. chat_template: a template, or its
    file, instead of the checkpoint's. engine: the engine behind it. Raises UserError for a model or
    an option that cannot work.
    """

    def __init__(
        self,
        model: str,
        *,
        generation_config: str = "auto",
        override_generation_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        if generation_config not in ("auto", "vllm"):
            raise ConfigError(f"generation_config {generation_config!r}: use auto or vllm")
        own, notes = own_keywords(options)
        if notes:
            logger.warning("without effect: %s", "; ".join(notes))
        args = _with_found_model(engine_args(model=str(model), **own))
        directory = Path(args.model)
        tokenizer = find_model(args.tokenizer) if args.tokenizer else directory
        self._processor = TextProcessor.load(
            directory,
            tokenizer,
            generation_config,
            sampling=override_generation_config or {},
            skip_tokenizer=args.skip_tokenizer_init,
            template=chat_template,
            max_logprobs=args.max_logprobs,
        )
        self._output_options = structured_output_options(options.get("structured_outputs_config"))
        self.engine = build_engine(args)
        self._close = weakref.finalize(self, self.engine.close)  # at interpreter exit at the latest
        config = self.engine.config
        assert config is not None
        self._max_model_len = config.max_model_len
        self._count = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs come in the prompts' order.

        prompts: a text, {"prompt": text}, {"prompt_token_ids": ids} or token ids, or a list of
        such. sampling_params: for all, or one each; an output ends where the model's context does,
        whatever its max_tokens. use_tqdm: show progress at a terminal. priority: for all, or one
        each; lower goes first, with scheduling_policy="priority". tokenization_kwargs:
        add_special_tokens. Raises RequestError if one of them cannot run; then none does.
        """
        _refuse_lora(lora_request)
        special = _special_tokens(tokenization_kwargs, default=True)
        given = _prompt_list(prompts)
        params = self._params_for(len(given), sampling_params)
        ranks = self._priorities_for(len(given), priority)
        groups = [
            self._outputs_of(*self._read_prompt(prompt, special), one, priority=rank)
            for prompt, one, rank in zip(given, params, ranks, strict=True)
        ]
        return self._run_to_end(groups, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. Otherwise as `generate`.

        The text is all that the model wrote: its reasoning and `</think>`, its calls of tools.
        Structured outputs bind what comes behind the reasoning. chat_template: give it to `LLM`.
        chat_template_content_format, mm_processor_kwargs: without effect on texts.
        """
        _refuse_lora(lora_request)
        if chat_template is not None:
            raise RequestError(
                "chat_template: one LLM has one template; give it to LLM(chat_template=...)",
                param="chat_template",
            )
        special = _special_tokens(tokenization_kwargs, default=False)
        offered = read_tools(tools)
        conversations = cast(
            Sequence[Sequence[Message]],
            [messages] if messages and isinstance(messages[0], Mapping) else messages,
        )
        params = self._params_for(len(conversations), sampling_params)
        ranks = self._priorities_for(len(conversations), priority)
        groups = []
        for conversation, one, rank in zip(conversations, params, ranks, strict=True):
            text = self._processor.chat_prompt(
                conversation,
                tools=offered,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            token_ids = self._processor.encode(text, add_special_tokens=special)
            reasons = opens_reasoning("auto", text)
            groups.append(self._outputs_of(text, token_ids, one, reasons, priority=rank))
        return self._run_to_end(groups, use_tqdm)

    @property
    def vocab_size(self) -> int:
        """Token ids are below it; the tokenizer may have fewer."""
        return self._processor.vocab_size

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with the most used names of transformers' tokenizers."""
        return self._processor.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a prompt without sampling_params gets."""
        defaults = self._processor.defaults
        given = {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
        }
        if defaults.max_tokens is not None:
            given["max_tokens"] = defaults.max_tokens
        return msgspec.convert(given, SamplingParams)

    def reset_prefix_cache(self) -> bool:
        """Forget every cached prefix."""
        self.engine.reset_prefix_cache()
        return True

    def stats(self) -> EngineStats:
        """The gauges of the engine, and its totals since it was built."""
        return self.engine.stats()

    def expert_load(self) -> dict[str, list[int]]:
        """How many tokens each expert has got, by layer, with report_expert_load; else empty."""
        return self.engine.expert_load()

    def close(self) -> None:
        """Free the device. The model cannot be used afterwards; closing again does nothing."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- one call ------------------------------------------------------------------------------

    def _params_for(
        self, count: int, given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise RequestError(f"{len(given)} sampling_params for {count} prompts; give one each")
        return list(given)

    def _priorities_for(self, count: int, given: int | Sequence[int] | None) -> list[int]:
        """One for each prompt; 0 where they have no effect."""
        one = given if isinstance(given, int) else 0
        ranks = [one] * count if given is None or isinstance(given, int) else list(given)
        if len(ranks) != count:
            raise RequestError(f"{len(ranks)} priorities for {count} prompts; give one each")
        if any(ranks) and not self.engine.scheduler.limits.priorities:
            logger.warning('priority has no effect without scheduling_policy="priority"')
            return [0] * count
        return ranks

    def _read_prompt(self, prompt: Prompt, special: bool) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of a prompt in any of its shapes."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise RequestError('a prompt is {"prompt": text} or {"prompt_token_ids": ids}')
            prompt = cast(str, prompt["prompt"])
        if isinstance(prompt, str):
            return prompt, self._processor.encode(prompt, add_special_tokens=special)
        return None, list(prompt)

    def _outputs_of(
        self,
        text: str | None,
        token_ids: list[int],
        params: SamplingParams,
        reasons: bool = False,
        priority: int = 0,
    ) -> list[_RunningOutput]:
        """A prompt's outputs. reasons: they begin with reasoning."""
        self._count += 1
        room = self._max_model_len - len(token_ids)
        if params.max_tokens is not None and params.max_tokens > room >= 1:
            least = min(params.min_tokens, room)
            params = msgspec.structs.replace(params, max_tokens=room, min_tokens=least)
        wanted = params.structured_outputs
        if wanted is not None and self._output_options:
            wanted = msgspec.structs.replace(wanted, **self._output_options)
        grammar = None
        if wanted is not None:
            job = self._processor.output_grammar(wanted, "structured_outputs", reasons)
            grammar = self._processor.grammar(job.build(), reasons)
        request = self._processor.request(
            str(self._count),
            token_ids,
            params,
            self._max_model_len,
            priority=priority,
            grammar=grammar,
            reasoning=self._processor.reasoning_bound(params.thinking_token_budget, reasons),
        )
        output = RequestOutput(
            request_id=request.id,
            prompt=text,
            prompt_token_ids=request.prompt,
            outputs=[],
            metrics=RequestMetrics(arrival_time=request.arrival),
        )
        tokenizer = self._processor.tokenizer
        return [
            _RunningOutput(one, output, self._processor.detokenizer(params), tokenizer)
            for one in split_outputs(request)
        ]

    def _run_to_end(
        self, groups: Sequence[Sequence[_RunningOutput]], show: bool
    ) -> list[RequestOutput]:
        """Run all requests to their ends. None stays in the engine, even after an exception."""
        runs = [run for group in groups for run in group]
        engine, open_runs = self.engine, {run.request.id: run for run in runs}
        console = Console(stderr=True)
        try:
            for run in runs:
                engine.add(run.request)
            with Progress(console=console, disable=not (show and console.is_terminal)) as progress:
                task = progress.add_task("outputs", total=len(runs))
                while open_runs:
                    ended = _dispatch_deltas(open_runs, engine.step(), engine.abort)
                    progress.advance(task, ended)
                while engine.has_work():  # a last step keeps the ends of answers for next turns
                    engine.step()
        finally:
            engine.abort(list(open_runs))
        return [group[0].output for group in groups]


class _RunningOutput:
    """One output while it runs. The outputs of one prompt share a RequestOutput."""

    def __init__(
        self,
        request: AddRequest,
        output: RequestOutput,
        detokenizer: Detokenizer,
        tokenizer: Tokenizer,
    ) -> None:
        self.request = request
        self.output = output
        self.done = False
        self._detokenizer = detokenizer
        self._tokenizer = tokenizer
        self._texts: list[str] = []
        self._own = CompletionOutput(index=len(output.outputs), text="", token_ids=[])
        if request.params.logprobs is not None:
            self._own.logprobs, self._own.cumulative_logprob = [], 0.0
        output.outputs.append(self._own)

    def add_delta(self, delta: Delta, now: float) -> bool:
        """Add the new tokens of a step. True if a stop text was found, and the engine must abort
        it."""
        if delta.error is not None:
            raise (ModelError if delta.model_failed else RequestError)(delta.error)
        piece = self._detokenizer.push(
            delta.token_ids, delta.finish_reason, delta.stop_token_id, delta.logprobs
        )
        output, own = self.output, self._own
        self._texts.append(piece.text)
        own.token_ids += piece.token_ids
        own.finish_reason, own.stop_reason = piece.finish_reason, piece.stop_reason
        self._add_logprobs(piece.logprobs or (), delta.prompt_logprobs)
        output.num_cached_tokens = max(output.num_cached_tokens, delta.cached_tokens)
        output.metrics.first_token_time = output.metrics.first_token_time or now
        if piece.finish_reason is not None:
            own.text = "".join(self._texts)
            self.done = True
            output.finished = all(one.finish_reason is not None for one in output.outputs)
            output.metrics.finished_time = now
        return self._detokenizer.ended_by_text and delta.finish_reason is None

    def _add_logprobs(
        self, given: Sequence[TokenLogprobs], prompt: list[TokenLogprobs] | None
    ) -> None:
        own = self._own
        if own.logprobs is not None and own.cumulative_logprob is not None:
            own.logprobs += [_logprobs(one, self._tokenizer) for one in given]
            own.cumulative_logprob += sum(one.logprobs[0] for one in given)
        if prompt is not None and self.output.prompt_logprobs is None:
            entries = [_logprobs(one, self._tokenizer) for one in prompt]
            self.output.prompt_logprobs = [None, *entries]


def _logprobs(position: TokenLogprobs, tokenizer: Tokenizer) -> Logprobs:
    """vLLM's shape: the token itself with its rank, then the likeliest ones with theirs."""
    found: Logprobs = {}
    for at, (token, value) in enumerate(zip(position.token_ids, position.logprobs, strict=True)):
        found.setdefault(token, Logprob(value, at or position.rank, tokenizer.token_text(token)))
    return found


def _dispatch_deltas(
    runs: dict[str, _RunningOutput], deltas: Iterable[Delta], abort: Callable[[Iterable[str]], None]
) -> int:
    """Hand deltas to their runs; drop the runs that have ended, and return how many did."""
    now = monotonic()
    before = len(runs)
    for delta in deltas:
        run = runs.get(delta.id)
        if run is None:
            continue
        if run.add_delta(delta, now):
            abort([delta.id])
        if run.done:
            del runs[delta.id]
    return before - len(runs)


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, of whatever shape, as a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast(list[int], list(prompts))]
    return list(cast(Sequence[Prompt], prompts))


def _refuse_lora(lora_request: object) -> None:
    if lora_request is not None:
        raise RequestError(
            "lora_request: adapters are not served; merge the adapter into the checkpoint",
            param="lora_request",
        )


def _special_tokens(given: Mapping[str, Any] | None, default: bool) -> bool:
    """Whether a text gets the tokenizer's special tokens. Raises RequestError for other options."""
    options = dict(given or {})
    special = bool(options.pop("add_special_tokens", default))
    if options:
        raise RequestError(
            f"tokenization_kwargs: {next(iter(options))} is not known; add_special_tokens is",
            param="tokenization_kwargs",
        )
    return special


def _with_found_model(args: EngineArgs) -> EngineArgs:
    return msgspec.structs.replace(
        args, model=str(find_model(args.model, args.revision, args.download_dir))
    )
