"""One load on a running server, as a trial needs it: its figures, or why they cannot be had.

A server from which no token comes for a while hangs; that ends the load, as the end of its process
does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from millrace.bench.load.arrivals import Schedule
from millrace.bench.load.interrupts import unless_stopped
from millrace.bench.load.messages import Progress
from millrace.bench.load.options import BenchOptions
from millrace.bench.measure.client_overhead import ClientOverhead, bound_reasons
from millrace.bench.runs.accuracy import EVALUATION, Accuracy, measure_accuracy
from millrace.bench.runs.serve import Run as BenchRun
from millrace.bench.runs.serve import inspect_server, run, warm_up, with_server_facts
from millrace.bench.workload.prompts import RandomSpec
from millrace.common.http_client import Target
from millrace.errors import UserError
from millrace.tune.servers.bottleneck import read_bottleneck
from millrace.tune.trials.outcome import Run

_EVAL_LIMIT = 1800.0  # seconds
_CONNECTING = 0.05  # share of the requests' time
_FEWEST = 2  # requests for each one in flight, in a short load
_SHORT_PROMPT = 8  # tokens
_SILENCE = "no complete answer within"  # how the load generator puts it
_FEWEST_ALONE = 8  # requests, in a load with few in flight


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The loads of all trials. full: options of a full load, without a target. short_share: of its
    requests or its duration, for a short load. hang_seconds: without a token, until a server counts
    as hung. max_itl_p99: ms, beyond which a run has no goodput; 0: no limit. task, items: of the
    evaluation; no items: none. timed: the latencies that decide, and so the client's error of
    them: ttft, itl."""

    full: BenchOptions
    short_share: float = 0.25
    hang_seconds: float = 120.0
    max_itl_p99: float = 0.0
    task: str = "math"
    items: int = 0
    timed: tuple[str, ...] = ()

    def options(self, target: Target, seed: int, *, short: bool, streams: int = 0) -> BenchOptions:
        """The options of one load; its prompts and arrival times follow from the seed. streams: so
        many requests are in flight all the time; 0: as many as the load itself has."""
        full = self.full
        workload = msgspec.structs.replace(full.workload, seed=seed)
        schedule = msgspec.structs.replace(full.schedule, seed=seed)
        duration = full.duration
        if streams:
            workload = msgspec.structs.replace(workload, count=_count(streams))
            schedule, duration = Schedule(seed=seed), None
        elif short and duration is not None:
            duration *= self.short_share
        elif short and workload.count is not None:
            least = _FEWEST * (full.max_concurrency or 1)
            count = min(workload.count, max(least, round(workload.count * self.short_share)))
            workload = msgspec.structs.replace(workload, count=count)
        return msgspec.structs.replace(
            full,
            target=target,
            workload=workload,
            schedule=schedule,
            duration=duration,
            max_concurrency=streams or full.max_concurrency,
        )


def _count(streams: int) -> int:
    """Requests of a load with so many in flight: enough for a figure, few where each is alone."""
    return max(_FEWEST_ALONE, _FEWEST * streams)


class HungError(Exception):
    """No token came for too long."""


async def run_load(
    plan: LoadPlan,
    options: BenchOptions,
    *,
    stop: asyncio.Event | None = None,
    ended: asyncio.Event | None = None,
) -> Run:
    """The figures of one load. options: of `plan`. stop: ends the study; ended: the server's
    process has ended.

    Raises UserError if the server refuses or fails the first request, HungError, and
    InterruptedRunError at `stop`.
    """
    await unless_stopped(_answers(options, plan.hang_seconds), stop)
    over = asyncio.Event()
    watch = _Watch(plan.hang_seconds, over)
    ending = asyncio.create_task(_either(ended, over))
    try:
        measured = await unless_stopped(run(options, stop=over, on_progress=watch.seen), stop)
    except UserError as error:
        raise HungError(str(error)) if _SILENCE in str(error) else error from None
    finally:
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
    if watch.hung:
        raise HungError(f"no token came for {plan.hang_seconds:g} s")
    return figures_of(plan, measured, options.workload.seed)


async def _answers(options: BenchOptions, limit: float) -> None:
    """Ask for one token, within a limit: nothing is seen of the requests before a run, and so a
    server that answers none would hold the study for as long as a request may take."""
    served = await inspect_server(options)
    one = RandomSpec(count=1, input_len=_SHORT_PROMPT, output_len=1, seed=options.workload.seed)
    asked = msgspec.structs.replace(
        options, workload=one, num_warmups=0, timeout=limit, reset_prefix_cache=False
    )
    try:
        await warm_up(with_server_facts(asked, served), served.model)
    except UserError as error:
        raise HungError(str(error)) if _SILENCE in str(error) else error from None


async def _either(ended: asyncio.Event | None, over: asyncio.Event) -> None:
    if ended is not None:
        await ended.wait()
        over.set()


class _Watch:
    """Sets an event when tokens stop while requests are in flight."""

    def __init__(
        self, limit: float, over: asyncio.Event, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._over = over
        self._clock = clock
        self._last = (-1.0, clock())
        self.hung = False

    def seen(self, progress: Progress) -> None:
        now = self._clock()
        moved = progress.tokens + progress.done + progress.failed
        if moved != self._last[0] or not progress.in_flight:
            self._last = (moved, now)
        elif now - self._last[1] > self._limit:
            self.hung = True
            self._over.set()


def figures_of(plan: LoadPlan, measured: BenchRun, seed: int) -> Run:
    """What a trial keeps of a run."""
    fields = measured.fields
    bound = client_bound(measured.client, plan.timed)
    reading = read_bottleneck(measured.observation.samples, fields, bound)
    itl = float(fields["p99_itl_ms"])
    goodput = float(fields.get("request_goodput") or 0.0)
    if plan.max_itl_p99 and itl > plan.max_itl_p99:
        goodput = 0.0
    return Run(
        seed=seed,
        total=float(fields["total_token_throughput"]),
        output=float(fields["output_throughput"]),
        goodput=goodput,
        ttft_p50=float(fields["median_ttft_ms"]),
        ttft_p99=float(fields["p99_ttft_ms"]),
        tpot_p50=float(fields["median_tpot_ms"]),
        itl_p99=itl,
        completed=int(fields["completed"]),
        failed=int(fields["failed"]),
        client_error=_client_error(measured.client, float(fields["mean_e2el_ms"])),
        client_bound=bound,
        bottleneck=reading.bottleneck if reading else None,
        why=reading.why if reading else "",
        figures=_more(fields),
    )


def client_bound(client: ClientOverhead, timed: Sequence[str]) -> str:
    """Why the load generator limited a run; empty if it did not. timed: the latencies that count,
    ttft or itl; throughput, and the mean gap of a request, do not suffer from a clock that is read
    late now and then."""
    errors = {name: client.error_ms[name] for name in timed if name in client.error_ms}
    relative = {name: client.relative_error[name] for name in errors}
    reasons = bound_reasons([client.cpu_share], errors, relative)
    if not reasons and client.connect_share > _CONNECTING:
        reasons = client.reasons or ["the load generator had no time left"]
    return "; ".join(reasons)


def _client_error(client: ClientOverhead, e2el: float) -> float:
    """The share of a request's time by which the client was late to send the next one."""
    return min(1.0, client.lag_ms["p50"] / e2el) if e2el > 0 else 0.0


def _more(fields: dict[str, Any]) -> dict[str, float]:
    """Hit rate and acceptance, where the server says them."""
    spec = (fields.get("server") or {}).get("speculation") or {}
    found = {
        "prefix_hits": fields.get("prefix_cache_hit_rate"),
        "acceptance_length": spec.get("acceptance_length"),
        "duration": fields.get("duration"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


async def check_accuracy(
    plan: LoadPlan, target: Target, stop: asyncio.Event | None
) -> Accuracy | None:
    """The accuracy of a running server; None where none is asked for."""
    if not plan.items:
        return None
    measuring = measure_accuracy(
        str(target), command=EVALUATION, task=plan.task, items=plan.items, limit=_EVAL_LIMIT
    )
    return await unless_stopped(measuring, stop)
