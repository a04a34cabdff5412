"""One benchmark run against one server: look at it, warm it up, load it, sum up.

`run` ties the parts together and returns the fields of the result file; it prints nothing. What
goes wrong before the run is a UserError; what goes wrong in it is counted.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
import numpy as np

from millrace.bench.load import Job, Load
from millrace.bench.metrics import Record, successes, summarize
from millrace.bench.report import detail_fields, summary_fields
from millrace.bench.schedule import arrivals
from millrace.bench.workload import Prompt, RandomSpec, random_prompts
from millrace.errors import UserError
from millrace.http1 import Target, encode_request, error_text, fetch

Backend = Literal["openai", "openai-chat"]
ENDPOINTS: Mapping[Backend, str] = {
    "openai": "/v1/completions",
    "openai-chat": "/v1/chat/completions",
}
_DEFAULT_VOCAB = 1000


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What one run does; names as the flags of the command.

    model: None takes the first model the server names. vocab_size: None asks the server.
    timeout and ready_timeout are seconds.
    """

    target: Target
    backend: Backend = "openai"
    endpoint: str | None = None
    model: str | None = None
    workload: RandomSpec
    vocab_size: int | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: dict[str, Any] = {}
    headers: tuple[tuple[str, str], ...] = ()
    percentiles: tuple[float, ...] = (99.0,)
    objectives: dict[str, float] = {}
    timeout: float = 600.0
    ready_timeout: float = 0.0


class Run(msgspec.Struct, frozen=True):
    """The outcome: the fields of the result file, the records they were made of, and whether it
    was ended early."""

    fields: dict[str, Any]
    records: list[Record]
    interrupted: bool


class _Served(msgspec.Struct, frozen=True):
    model: str
    vocab_size: int


async def run(
    options: BenchOptions,
    *,
    stop: asyncio.Event | None = None,
    on_start: Callable[[Sequence[Prompt]], None] | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> Run:
    """One run. `stop` ends it early with what was measured so far; on_start is called with the
    workload, before anything is sent.

    Raises UserError when the server cannot be reached, does not know the model, or fails the
    first request.
    """
    served = await _look(options)
    spec = msgspec.structs.replace(options.workload, vocab_size=served.vocab_size)
    prompts = random_prompts(spec, as_text=options.backend == "openai-chat")
    due = arrivals(len(prompts), options.request_rate, options.burstiness, spec.seed)
    if on_start is not None:
        on_start(prompts)
    await _warm_up(options, served.model, spec)
    load = Load(
        options.target,
        [_job(options, served.model, prompt) for prompt in prompts],
        due,
        limit=options.max_concurrency,
        timeout=options.timeout,
        on_record=on_record,
    )
    cpu, began = time.process_time(), time.perf_counter()
    interrupted = await _until(load, stop)
    client = _client_fields(load.records, time.process_time() - cpu, time.perf_counter() - began)
    return Run(
        _fields(options, served.model, prompts, load.records, client), load.records, interrupted
    )


async def _until(load: Load, stop: asyncio.Event | None) -> bool:
    """Run the load; True when `stop` ended it early."""
    running = asyncio.create_task(load.run())
    if stop is not None:
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([running, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if stop.is_set() and not running.done():
            load.stop()
            await running
            return True
    await running
    return False


# --- before the run ----------------------------------------------------------------------------


async def _look(options: BenchOptions) -> _Served:
    """Which model to ask for, and how many token ids to draw from."""
    await _ready(options)
    listed = await _listed_models(options)
    names = [str(card["id"]) for card in listed if "id" in card]
    if options.model is not None and names and options.model not in names:
        raise UserError(
            f"--model {options.model!r} is not served at {options.target}; "
            f"it serves: {', '.join(names)}"
        )
    model = options.model or (names[0] if names else None)
    if model is None:
        raise UserError(f"{options.target} names no model at /v1/models; give one with --model")
    told = next((card.get("vocab_size") for card in listed if card.get("id") == model), None)
    vocab = options.vocab_size or (told if isinstance(told, int) else _DEFAULT_VOCAB)
    return _Served(model, vocab)


async def _ready(options: BenchOptions) -> None:
    """Return once the server answers and its /health, if it has one, does not refuse."""
    deadline = time.monotonic() + options.ready_timeout
    while True:
        try:
            health = await fetch(options.target, "/health", headers=options.headers)
            if health.status != 503:
                return
            problem = f"{options.target} is not ready ({error_text(health.body)}); wait for it"
        except OSError as error:
            problem = (
                f"no answer from {options.target} ({error or type(error).__name__}); "
                "start the server first, or give its address with --base-url"
            )
        if time.monotonic() >= deadline:
            raise UserError(f"{problem}, or have us wait with --ready-check-timeout-sec")
        await asyncio.sleep(0.2)


async def _listed_models(options: BenchOptions) -> list[dict[str, Any]]:
    """The cards of /v1/models, none where the server has no such list."""
    response = await fetch(options.target, "/v1/models", headers=options.headers)
    if response.status in (401, 403):
        raise UserError(
            f"{options.target} refuses us with status {response.status} "
            f"({error_text(response.body)}); give its key in OPENAI_API_KEY"
        )
    try:
        cards = msgspec.json.decode(response.body)["data"] if response.status == 200 else []
    except (msgspec.DecodeError, KeyError, TypeError):
        return []
    return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []


async def _warm_up(options: BenchOptions, model: str, spec: RandomSpec) -> None:
    """Requests that are not counted: one by itself to see that the server answers at all, then
    `num_warmups` at the run's concurrency."""
    count = 1 + options.num_warmups
    # Prompts of another seed, so that no prefix cache knows the run's own.
    prompts = random_prompts(
        msgspec.structs.replace(spec, count=count, seed=spec.seed + 1_000_003),
        as_text=options.backend == "openai-chat",
    )
    jobs = [_job(options, model, prompt) for prompt in prompts]
    for part in (jobs[:1], jobs[1:]):
        load = Load(
            options.target,
            part,
            [0.0] * len(part),
            limit=options.max_concurrency,
            timeout=options.timeout,
        )
        failed = next((r.error for r in await load.run() if r.error is not None), None)
        if failed is not None:
            raise UserError(f"{options.target} failed a request before the run: {failed}")


def _job(options: BenchOptions, model: str, prompt: Prompt) -> Job:
    body: dict[str, Any] = {"model": model}
    if options.backend == "openai-chat":
        body["messages"] = [{"role": "user", "content": prompt.content}]
    else:
        body["prompt"] = prompt.content
    body |= {
        "max_tokens": prompt.output_tokens,
        "temperature": options.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if options.ignore_eos:
        body["ignore_eos"] = True
    body |= options.extra_body
    path = options.endpoint or ENDPOINTS[options.backend]
    request = encode_request(
        options.target, "POST", path, msgspec.json.encode(body), options.headers
    )
    return Job(request, prompt.input_tokens)


# --- after the run -----------------------------------------------------------------------------


def _client_fields(records: list[Record], cpu: float, wall: float) -> dict[str, float]:
    """What the client itself cost: its share of a core, and how late it sent, in ms."""
    delays = [(r.start_ns - r.scheduled_ns) / 1e6 for r in records] or [0.0]
    return {
        "cpu_share": cpu / wall if wall else 0.0,
        "median_send_delay_ms": float(np.median(delays)),
        "p99_send_delay_ms": float(np.percentile(delays, 99)),
    }


def _fields(
    options: BenchOptions,
    model: str,
    prompts: Sequence[Prompt],
    records: list[Record],
    client: dict[str, float],
) -> dict[str, Any]:
    open_loop = math.isfinite(options.request_rate)
    level = None if open_loop else min(options.max_concurrency or len(prompts), len(prompts))
    summary = summarize(
        records,
        percentiles=options.percentiles,
        objectives=options.objectives or None,
        steady_level=level,
    )
    done = successes(records)
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": options.backend,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(prompts),
        "request_rate": options.request_rate if open_loop else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "random_range_convention": options.workload.convention,
        "mean_input_len": sum(p.input_tokens for p in prompts) / len(prompts),
        "mean_output_len": sum(p.output_tokens for p in prompts) / len(prompts),
        "cancelled": len(prompts) - len(records),
        "usage_missing": sum(not r.counted for r in done),
        **summary_fields(summary),
        "client": client,
        **detail_fields(records),
    }
