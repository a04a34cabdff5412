"""One benchmark run against one server: inspect it, warm it up, load it, summarise.

`run` returns the fields of the result file and prints nothing. A failure before the run raises
UserError; failures during the run are counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any
from urllib.parse import urlsplit

import msgspec

from millrace.bench.load.arrivals import check_schedule
from millrace.bench.load.interrupts import unless_stopped
from millrace.bench.load.load_driver import Load
from millrace.bench.load.messages import Progress
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.process_pool import Outcome, open_pool
from millrace.bench.load.records import RequestTiming
from millrace.bench.load.request_builder import make_job
from millrace.bench.measure.attached import AttachedObserver
from millrace.bench.measure.client_overhead import ClientOverhead, measure_client
from millrace.bench.measure.metrics import Summary, summarize
from millrace.bench.measure.telemetry import Observation, Telemetry, find_replicas
from millrace.bench.report.run_report import run_fields
from millrace.bench.workload.prompts import (
    FileSpec,
    Lengths,
    Prompt,
    RandomSpec,
    Workload,
    prompt_maker,
)
from millrace.bench.workload.text_files import whole_number
from millrace.common.http_client import Response, Target, error_text, fetch
from millrace.errors import UserError
from millrace.fleet.device_assignment import usable_cores

_DEFAULT_VOCAB = 1000
_LIST_LIMIT_S = 30.0  # for the list of models
_WARMUP_SEED = 1_000_003  # added to the seed for prompts that must differ from the run's


class Run(msgspec.Struct, frozen=True):
    """The outcome of a run: the fields of the result file and what they were made from."""

    fields: dict[str, Any]
    records: list[RequestTiming]
    interrupted: bool
    observation: Observation
    client: ClientOverhead
    summary: Summary
    server_version: str | None = None


class ServerFacts(msgspec.Struct, frozen=True):
    """What the server says of itself."""

    model: str
    vocab_size: int
    version: str | None = None


async def run(
    options: BenchOptions,
    *,
    stop: asyncio.Event | None = None,
    on_start: Callable[[Workload, Lengths], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """One run. `stop` ends it early and keeps what was measured; on_start is called with the
    workload before anything is sent, on_progress twice a second.

    Raises UserError when the server cannot be reached, does not know the model, or fails the
    first request, and InterruptedRunError when `stop` comes before the run.
    """
    check_schedule(options.schedule)
    served = await unless_stopped(inspect_server(options), stop)
    options = with_server_facts(options, served)
    async with open_pool(options, served.model) as pool:
        await unless_stopped(pool.prepare(), stop)
        if on_start is not None:
            on_start(options.workload, pool.lengths)
        async with AttachedObserver(options) as observer:
            observer.mark("warm-up")
            await unless_stopped(warm_up(options, served.model), stop)
            observer.mark("measured")
            async with Telemetry(options) as telemetry:
                outcome = await pool.run(stop, on_progress)
        return _run(options, served, pool.lengths, outcome, telemetry.observation)


async def background_load(options: BenchOptions, stop: asyncio.Event) -> None:
    """The same kind of load, not measured, until `stop`."""
    served = await inspect_server(options)
    other = msgspec.structs.replace(
        with_server_facts(options, served).workload,
        count=None,
        seed=options.workload.seed + 2 * _WARMUP_SEED,
    )
    options = msgspec.structs.replace(options, workload=other, duration=None)
    async with open_pool(options, served.model) as pool:
        await pool.prepare()
        await pool.run(stop)


def with_server_facts(options: BenchOptions, served: ServerFacts) -> BenchOptions:
    """The options, with what the server says of itself filled in."""
    workload = msgspec.structs.replace(options.workload, vocab_size=served.vocab_size)
    return msgspec.structs.replace(options, workload=workload)


def _run(
    options: BenchOptions,
    served: ServerFacts,
    seen: Lengths,
    outcome: Outcome,
    observation: Observation,
) -> Run:
    summary = summarize(
        outcome.records,
        percentiles=options.percentiles,
        objectives=options.objectives or None,
        steady_level=_steady_level(options, outcome),
    )
    client = measure_client(outcome, summary, cores=usable_cores())
    fields = run_fields(options, served.model, seen, outcome, summary, client, observation)
    return Run(
        fields=fields,
        records=outcome.records,
        interrupted=outcome.interrupted,
        observation=observation,
        client=client,
        summary=summary,
        server_version=served.version,
    )


def _steady_level(options: BenchOptions, outcome: Outcome) -> int | None:
    """The concurrency that counts as full; None where arrival times set the load."""
    if options.schedule.open_loop:
        return None
    return min(options.max_concurrency or outcome.started, outcome.started)


# --- before the run ----------------------------------------------------------------------------


async def inspect_server(options: BenchOptions) -> ServerFacts:
    """The model to name in requests, its vocabulary size, and the server's version."""
    await _wait_ready(options)
    cards = await _listed_models(options)
    names = [str(card["id"]) for card in cards if "id" in card]
    if options.model is not None and names and options.model not in names:
        raise UserError(
            f"--model {options.model!r} is not served at {options.target}; "
            f"it serves: {', '.join(names)}"
        )
    model = options.model or (names[0] if names else None)
    if model is None:
        raise UserError(f"{options.target} lists no model at /v1/models; name one with --model")
    listed_size = next((card.get("vocab_size") for card in cards if card.get("id") == model), None)
    vocab = options.vocab_size or whole_number(listed_size, least=1) or _DEFAULT_VOCAB
    return ServerFacts(model, vocab, await _version(options))


async def _version(options: BenchOptions) -> str | None:
    """The version at /version, which vLLM and Millrace have; None elsewhere."""
    try:
        response = await fetch(options.target, "/version", headers=options.headers)
        return str(msgspec.json.decode(response.body, type=dict[str, Any])["version"])
    except (OSError, msgspec.DecodeError, KeyError):
        return None


async def _wait_ready(options: BenchOptions) -> None:
    """Return when the server answers and its /health, if it has one, is not 503."""
    deadline = time.monotonic() + options.ready_timeout
    while True:
        try:
            health = await fetch(options.target, "/health", headers=options.headers)
            _check_redirect(options.target, health)
            if health.status != 503:
                return
            problem = f"{options.target} is not ready ({error_text(health.body)}); wait for it"
        except OSError as error:
            problem = (
                f"no answer from {options.target} ({error or type(error).__name__}); "
                "start the server first, or give its address with --base-url"
            )
        if time.monotonic() >= deadline:
            raise UserError(f"{problem}, or let the benchmark wait with --ready-check-timeout-sec")
        await asyncio.sleep(0.2)


def _check_redirect(target: Target, response: Response) -> None:
    """Raise UserError where a server sends its clients to another one."""
    where = response.headers.get("location", "")
    if not 300 <= response.status < 400 or "//" not in where:
        return
    other = urlsplit(where if "://" in where else f"http{'s' if target.tls else ''}:{where}")
    port = other.port or (443 if other.scheme == "https" else 80)
    if (other.scheme == "https", other.hostname, port) != (target.tls, target.host, target.port):
        raise UserError(f"{target} redirects to {where}; give that server as --base-url")


async def _listed_models(options: BenchOptions) -> list[dict[str, Any]]:
    """The cards of /v1/models, none where the server has no such list.

    A server that is slow to list its models is waited for; with --model the list is not needed.
    """
    try:
        response = await fetch(
            options.target, "/v1/models", headers=options.headers, timeout=_LIST_LIMIT_S
        )
    except OSError as error:
        if options.model is not None:
            return []
        raise UserError(
            f"{options.target} does not list its models at /v1/models "
            f"({error or f'no answer within {_LIST_LIMIT_S:g} s'}); name one with --model"
        ) from None
    if response.status in (401, 403):
        raise UserError(
            f"{options.target} refuses access with status {response.status} "
            f"({error_text(response.body)}); give its key in OPENAI_API_KEY"
        )
    try:
        cards = msgspec.json.decode(response.body)["data"] if response.status == 200 else []
    except (msgspec.DecodeError, KeyError, TypeError):
        return []
    return [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []


def _warmup_prompts(options: BenchOptions) -> Callable[[int], Prompt]:
    """Prompts like those of the run which no prefix cache can hold yet."""
    workload = options.workload
    if not isinstance(workload, FileSpec):
        other = msgspec.structs.replace(workload, count=None, seed=workload.seed + _WARMUP_SEED)
        return prompt_maker(other, as_text=options.as_text)
    like = workload.prompts[0]
    as_text = isinstance(like.content, str) or options.chat
    spec = RandomSpec(
        count=None,
        input_len=like.input_tokens,
        output_len=like.output_tokens,
        vocab_size=workload.vocab_size,
        seed=_WARMUP_SEED,
    )
    return prompt_maker(spec, as_text=as_text)


_RESETS = ("/reset_prefix_cache", "/flush_cache")  # of vLLM and Millrace, of SGLang


async def reset_prefix_caches(options: BenchOptions) -> None:
    """Empty the prefix cache of every replica. Raises UserError when one cannot do that."""
    for target in await find_replicas(options):
        statuses = []
        for path in _RESETS:
            try:
                response = await fetch(target, path, method="POST", headers=options.headers)
            except OSError as error:
                raise UserError(
                    f"--reset-prefix-cache: no answer from {target} ({error})"
                ) from None
            statuses.append(response.status)
            if response.status == 200:
                break
        else:
            raise UserError(
                f"--reset-prefix-cache: {target} has neither {' nor '.join(_RESETS)} (status "
                f"{statuses[0]}); serve with --admin-key, and send that key (Millrace), or with "
                "VLLM_SERVER_DEV_MODE=1 (vLLM), or give each run another --seed"
            )


async def warm_up(options: BenchOptions, model: str) -> None:
    """Send requests that are not counted: one alone, to check that the server answers, then
    `num_warmups` at the run's concurrency; then empty the prefix caches where that is asked for.
    Raises UserError when one fails."""
    make = _warmup_prompts(options)
    jobs = [make_job(options, model, make(index)) for index in range(1 + options.num_warmups)]
    for part in (jobs[:1], jobs[1:]):
        load = Load(
            options.targets,
            part,
            repeat(None),
            limit=options.max_concurrency,
            timeout=options.timeout,
        )
        failed = next((r.error for r in await load.run() if r.error is not None), None)
        if failed is not None:
            raise UserError(f"{options.target} failed a request before the run: {failed}")
    if options.reset_prefix_cache:
        await reset_prefix_caches(options)
