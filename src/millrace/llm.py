"""The Python API: an engine in this process, called as vLLM's `LLM` is.

    from millrace import LLM, SamplingParams

    with LLM("models/millrace-mini", max_model_len=2048) as llm:
        for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

One thread at a time may use it. Serving many clients is the server's business.
"""

from __future__ import annotations

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
from millrace.engine.replica import build_engine
from millrace.errors import ConfigError, RequestError
from millrace.models import find_model
from millrace.protocol import AddRequest, Delta, EngineStats, FinishReason, SamplingParams
from millrace.text.codec import Codec
from millrace.text.output import OutputText
from millrace.text.template import Message
from millrace.text.tokenizer import Tokenizer

Prompt = str | list[int] | Mapping[str, Any]


@dataclass
class CompletionOutput:
    """One output. stop_reason: the stop text or stop token id that ended it, if one did."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None


@dataclass
class RequestMetrics:
    """When things happened, in seconds of `time.monotonic()`; 0.0 where they have not yet."""

    arrival_time: float = 0.0
    first_token_time: float = 0.0
    finished_time: float = 0.0


@dataclass
class RequestOutput:
    """One prompt and what came of it. prompt: its text, None if it was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    num_cached_tokens: int = 0


class LLM:
    """A model, loaded, in this process. Options are those of `millrace serve`, in snake_case.

    generation_config: "auto" takes the checkpoint's sampling defaults, "vllm" takes none.
    Raises UserError for a model or an option that cannot work.
    """

    def __init__(self, model: str, *, generation_config: str = "auto", **options: Any) -> None:
        if generation_config not in ("auto", "vllm"):
            raise ConfigError(f"generation_config {generation_config!r}: use auto or vllm")
        args = _resolved(engine_args(model=str(model), **options))
        directory = Path(args.model)
        tokenizer = find_model(args.tokenizer) if args.tokenizer else directory
        self._codec = Codec.load(directory, tokenizer, generation_config)
        self._engine = build_engine(args)
        self._close = weakref.finalize(self, self._engine.close)  # at the latest when Python ends
        config = self._engine.config
        assert config is not None
        self._max_model_len = config.max_model_len
        self._count = 0

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs come in the prompts' order.

        prompts: a text, {"prompt": text}, {"prompt_token_ids": ids} or token ids, or a list of
        such. sampling_params: for all, or one each. use_tqdm: show progress at a terminal.
        Raises RequestError if one of them cannot run; then none does.
        """
        given = _as_list(prompts)
        params = self._params_for(len(given), sampling_params)
        runs = [
            self._run(*self._read(prompt), one) for prompt, one in zip(given, params, strict=True)
        ]
        return self._finish(runs, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. Otherwise as `generate`.

        The text is all that the model wrote, its reasoning and `</think>` included.
        """
        conversations = cast(
            Sequence[Sequence[Message]],
            [messages] if messages and isinstance(messages[0], Mapping) else messages,
        )
        params = self._params_for(len(conversations), sampling_params)
        runs = []
        for conversation, one in zip(conversations, params, strict=True):
            text = self._codec.chat_prompt(
                conversation,
                add_generation_prompt=add_generation_prompt,
                variables=chat_template_kwargs,
            )
            runs.append(self._run(text, self._codec.encode(text, add_special_tokens=False), one))
        return self._finish(runs, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer: encode and decode."""
        return self._codec.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a prompt without sampling_params gets."""
        defaults = self._codec.defaults
        given = {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
        }
        if defaults.max_tokens is not None:
            given["max_tokens"] = defaults.max_tokens
        return msgspec.convert(given, SamplingParams)

    def stats(self) -> EngineStats:
        """The engine's gauges, and its totals since it was built."""
        return self._engine.stats()

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

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """(text or None, token ids) of a prompt in any of its shapes."""
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise RequestError('a prompt is {"prompt": text} or {"prompt_token_ids": ids}')
            prompt = cast(str, prompt["prompt"])
        if isinstance(prompt, str):
            return prompt, self._codec.encode(prompt)
        return None, list(prompt)

    def _run(self, text: str | None, token_ids: list[int], params: SamplingParams) -> _Run:
        self._count += 1
        request = self._codec.request(str(self._count), token_ids, params, self._max_model_len)
        return _Run(request, text, self._codec.output(params))

    def _finish(self, runs: Sequence[_Run], show: bool) -> list[RequestOutput]:
        """Run them all to their ends; none stays in the engine, whatever happens."""
        engine, open_runs = self._engine, {run.request.id: run for run in runs}
        console = Console(stderr=True)
        try:
            for run in runs:
                engine.add(run.request)
            with Progress(console=console, disable=not (show and console.is_terminal)) as progress:
                task = progress.add_task("prompts", total=len(runs))
                while open_runs:
                    ended = _take(open_runs, engine.step(), engine.abort)
                    progress.advance(task, ended)
        finally:
            engine.abort(list(open_runs))
        return [run.output for run in runs]


class _Run:
    """One prompt on its way through the engine."""

    def __init__(self, request: AddRequest, text: str | None, words: OutputText) -> None:
        self.request = request
        self._words = words
        self._texts: list[str] = []
        self.output = RequestOutput(
            request_id=request.id,
            prompt=text,
            prompt_token_ids=request.prompt,
            outputs=[CompletionOutput(index=0, text="", token_ids=[])],
            metrics=RequestMetrics(arrival_time=request.arrival),
        )

    def take(self, delta: Delta, now: float) -> bool:
        """Add what a step brought. True if its text has ended it, and the engine must drop it."""
        if delta.error is not None:
            raise RequestError(delta.error)
        piece = self._words.push(delta.token_ids, delta.finish_reason, delta.stop_token_id)
        output, words = self.output, self.output.outputs[0]
        self._texts.append(piece.text)
        words.token_ids += piece.token_ids
        words.finish_reason, words.stop_reason = piece.finish_reason, piece.stop_reason
        output.num_cached_tokens = max(output.num_cached_tokens, delta.cached_tokens)
        output.metrics.first_token_time = output.metrics.first_token_time or now
        if piece.finish_reason is not None:
            words.text = "".join(self._texts)
            output.finished = True
            output.metrics.finished_time = now
        return self._words.ended_by_text and delta.finish_reason is None


def _take(
    runs: dict[str, _Run], deltas: Iterable[Delta], abort: Callable[[Iterable[str]], None]
) -> int:
    """Hand deltas to their runs; drop the runs that have ended, and return how many did."""
    now = monotonic()
    before = len(runs)
    for delta in deltas:
        run = runs.get(delta.id)
        if run is None:
            continue
        if run.take(delta, now):
            abort([delta.id])
        if run.output.finished:
            del runs[delta.id]
    return before - len(runs)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A single prompt, of whatever shape, as a list of one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast(list[int], list(prompts))]
    return list(cast(Sequence[Prompt], prompts))


def _resolved(args: EngineArgs) -> EngineArgs:
    return msgspec.structs.replace(args, model=str(find_model(args.model)))
