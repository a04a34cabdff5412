"""From flags to a scenario, checked. Every refusal names the flag and what would work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.load.options import BenchOptions
from millrace.bench.runs.options_from_flags import load_options, read_objectives
from millrace.bench.workload.prompts import AgentSpec, FileSpec, PolicySpec, TraceSpec, lengths
from millrace.errors import UserError
from millrace.gateway.common.limits import GatewayLimits
from millrace.plan.model.memory import cache_spec, fit
from millrace.plan.model.profiles import step_model
from millrace.plan.model.step_model import StepModel
from millrace.protocol import Limits
from millrace.runtime.memory import SNAPSHOTS_PER_SEQUENCE
from millrace.simulate.common.fitted_steps import FittedSteps, fit_plan_logs
from millrace.simulate.common.lifecycle import LifeOptions, ScaleRule
from millrace.simulate.common.options import (
    ApiServerCost,
    GatewayOptions,
    ReplicaKind,
    Scenario,
    Speeds,
)
from millrace.simulate.flags import SimulateFlags
from millrace.target import Target

MOST_REPLICAS = 10_000
HOST_BYTES = 64 << 30  # of the host's memory, for records and cached prefixes
LEAST_SNAPSHOTS = 2  # of a replica that hands records over
_ACCEPTANCE = 0.8
_NOWHERE = Target("simulated", 80)


def scenario_of(flags: SimulateFlags) -> Scenario:
    """The scenario. Raises UserError for the first flag that cannot work."""
    _check_numbers(flags)
    model = _step_model(flags)
    load = load_options(flags, _NOWHERE)
    if load.workload.count is None and load.duration is None:
        raise UserError("a load without end: give --num-prompts or --duration")
    limits = _with_records(flags, _limits(flags, load, model), model)
    start = model.start_up.cold if flags.start_seconds is None else flags.start_seconds
    server = model.server
    return Scenario(
        load=load,
        kind=ReplicaKind(
            limits=limits,
            model=model,
            speeds=Speeds(
                acceptance=_acceptance(flags),
                jitter=model.jitter if flags.jitter is None else flags.jitter,
                link=flags.link * 1e9,
            ),
            api_server=ApiServerCost(server.request_seconds, server.chunk_seconds),
            depth=flags.pipeline_depth,
        ),
        gateway=GatewayOptions(
            policy=flags.policy,
            gap=flags.affinity_gap,
            processes=flags.gateway_processes,
            chunk_seconds=server.gateway_chunk_seconds,
            max_tokens=flags.max_tokens,
            limits=_gateway_limits(flags),
            seed=flags.seed,
        ),
        life=LifeOptions(
            replicas=flags.replicas,
            start_seconds=start,
            crashes=flags.crashes,
            reclaims=flags.spot_reclaims,
            notice=flags.spot_notice,
            reclaim_wait=flags.spot_wait,
            kills=tuple(_kill(text, flags.replicas) for text in flags.kill),
            scale=_scale_rule(flags),
            seed=flags.seed,
            prefill=flags.prefill_replicas,
        ),
        seed=flags.seed,
        check=flags.check,
    )


def objectives_of(flags: SimulateFlags) -> dict[str, float]:
    """Milliseconds by latency. Raises UserError."""
    return read_objectives(flags.goodput)


def _check_numbers(flags: SimulateFlags) -> None:
    least = {"replicas": 1, "gateway_processes": 0, "max_num_seqs": 1, "block_size": 1}
    least |= {"max_num_batched_tokens": 1, "mixed_prefill_tokens": 1, "drafts": 0}
    least |= {"long_prefill_token_threshold": 0, "max_requests_per_replica": 0, "max_tokens": 0}
    least |= {"max_model_len": 1, "num_pages": 2, "num_snapshots": 0, "tensor_parallel_size": 1}
    least |= {"max_concurrent_requests": 1, "queue_size": 0}
    for name, low in least.items():
        value = getattr(flags, name)
        if value is not None and value < low:
            raise UserError(f"{_flag(name)} {value}: use {low} or more")
    for name in ("jitter", "start_seconds", "crashes", "spot_reclaims", "spot_notice", "spot_wait"):
        value = getattr(flags, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"{_flag(name)} {value:g}: use a number from 0 on")
    for name in ("autoscale_interval", "price", "link"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{_flag(name)} {value:g}: use a number above 0")
    if flags.replicas > MOST_REPLICAS:
        raise UserError(f"--replicas {flags.replicas}: use at most {MOST_REPLICAS}")
    if flags.pipeline_depth not in (0, 1):
        raise UserError(f"--pipeline-depth {flags.pipeline_depth}: use 0 or 1")
    if flags.drafts > 5:
        raise UserError(f"--drafts {flags.drafts}: use 0 to 5")
    if not 0 <= flags.warmup < (flags.duration or math.inf):
        raise UserError(f"--warmup {flags.warmup:g}: use seconds from 0, below --duration")
    needed = flags.max_num_seqs * (flags.drafts + 1)
    if flags.max_num_batched_tokens < needed:
        raise UserError(
            f"--max-num-batched-tokens {flags.max_num_batched_tokens} is too small for "
            f"{flags.max_num_seqs} sequences with {flags.drafts} drafts; use {needed} or more"
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _step_model(flags: SimulateFlags) -> StepModel | FittedSteps:
    if flags.plan_log:
        return fit_plan_logs([_readable(path) for path in flags.plan_log])
    if flags.step_model is not None:
        return StepModel.load(Path(flags.step_model))
    return step_model(
        gpu=flags.gpu,
        model=flags.model,
        engine=flags.engine,
        weights=flags.weights,
        kv=flags.kv,
        state=flags.state,
        tensor=flags.tensor_parallel_size,
        drafts=flags.drafts,
    )


def _readable(path: str) -> Path:
    if not Path(path).is_file():
        raise UserError(f"--plan-log {path}: there is no such file")
    return Path(path)


def _acceptance(flags: SimulateFlags) -> tuple[float, ...]:
    if not flags.acceptance:
        return (_ACCEPTANCE,) * flags.drafts
    try:
        values = [float(part) for text in flags.acceptance for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values) or len(values) not in (1, flags.drafts):
        given = " ".join(flags.acceptance)
        raise UserError(
            f"--acceptance {given}: use one number from 0 to 1, or {flags.drafts}, one for each "
            "of --drafts"
        )
    return tuple(values * flags.drafts if len(values) == 1 else values)


def _memory(
    flags: SimulateFlags, model: StepModel | FittedSteps, longest: int, pages_each: int
) -> tuple[int, int, float]:
    """(pages, snapshots, page cost) of a replica. With --num-pages, and where the memory is not
    known, snapshots are as many as are useful. Raises UserError for what does not fit."""
    useful = SNAPSHOTS_PER_SEQUENCE * flags.max_num_seqs
    if flags.num_pages is not None:
        return flags.num_pages, useful, 0.0
    if isinstance(model, FittedSteps):
        return pages_each * flags.max_num_seqs + 1, useful, 0.0
    description = msgspec.structs.replace(
        model.description, max_model_len=longest, drafts=flags.drafts
    )
    found = fit(
        description,
        mean_tokens=1,
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        page_size=flags.block_size,
        prefix_caching=flags.enable_prefix_caching,
    )
    if found.max_num_seqs < flags.max_num_seqs or found.num_pages <= pages_each:
        raise UserError(
            f"--max-num-seqs {flags.max_num_seqs}: the memory of {description.tensor} x "
            f"{description.gpu} has room for at most {found.max_num_seqs} sequences beside the "
            f"weights and one of {longest} tokens"
        )
    return found.num_pages, found.num_snapshots, 1.0 / max(1, found.page_cost)


def _limits(flags: SimulateFlags, load: BenchOptions, model: StepModel | FittedSteps) -> Limits:
    longest = flags.max_model_len or _longest(load)
    pages_each = -(-(longest + 3 * flags.drafts + 1) // flags.block_size)
    pages, held, page_cost = _memory(flags, model, longest, pages_each)
    if pages <= pages_each:
        raise UserError(
            f"--num-pages {pages}: one sequence of {longest} tokens needs {pages_each} pages of "
            f"{flags.block_size} tokens and the null page; use {pages_each + 1} or more"
        )
    snapshots = held if flags.num_snapshots is None else flags.num_snapshots
    return Limits(
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        max_model_len=longest,
        page_size=flags.block_size,
        num_pages=pages,
        num_snapshots=snapshots if flags.enable_prefix_caching else 0,
        drafts=flags.drafts,
        prefix_caching=flags.enable_prefix_caching,
        page_cost=page_cost,
        snapshot_distance=128,
        mixed_prefill_tokens=min(flags.mixed_prefill_tokens, flags.max_num_batched_tokens),
        long_prefill_token_threshold=flags.long_prefill_token_threshold,
        max_long_partial_prefills=1,
        eos_ids=frozenset({0}),
        seed=flags.seed,
    )


def _with_records(flags: SimulateFlags, limits: Limits, model: StepModel | FittedSteps) -> Limits:
    """With what replicas need that hand records of prompts over. Raises UserError."""
    prefill = flags.prefill_replicas
    if not prefill:
        return limits
    if not 0 < prefill < flags.replicas:
        raise UserError(
            f"--prefill-replicas {prefill}: use fewer than --replicas {flags.replicas}, or 0"
        )
    if isinstance(model, FittedSteps):
        raise UserError(
            "--prefill-replicas with --plan-log: the model's bytes are not known; use "
            "--model and --gpu, or --step-model"
        )
    if not limits.prefix_caching or limits.num_snapshots < LEAST_SNAPSHOTS:
        raise UserError("--prefill-replicas: leave prefix caching on, with 2 snapshots or more")
    spec = cache_spec(model.config, model.description, flags.block_size)
    ranks = model.description.tensor
    return msgspec.structs.replace(
        limits,
        transfers=True,
        host_cache=HOST_BYTES,
        page_bytes=ranks * spec.page_bytes(ranks),
        snapshot_bytes=ranks * spec.snapshot_bytes(ranks),
    )


def _longest(load: BenchOptions) -> int:
    """The longest sequence that a workload may have."""
    spec = load.workload
    if isinstance(spec, TraceSpec):
        return max(row.input_tokens + row.output_tokens for row in spec.rows)
    if isinstance(spec, FileSpec):
        seen = lengths(spec.prompts)
        return 8 * seen.max_input + seen.max_output
    if isinstance(spec, AgentSpec | PolicySpec):
        return 131_072
    # Twice what the lengths' range allows, for each turn.
    names = ("input_len", "prefix_len", "context_len", "suffix_len", "output_len")
    total = sum(getattr(spec, name, 0) for name in names)
    return 2 * total * int(getattr(spec, "turns", 1)) + 1


def _gateway_limits(flags: SimulateFlags) -> GatewayLimits:
    given: dict[str, Any] = {
        "max_concurrent_requests": flags.max_concurrent_requests,
        "queue_size": flags.queue_size,
        "max_requests_per_replica": flags.max_requests_per_replica,
        "hand_over_prompt": flags.hand_over_prompt,
        "hand_over_ratio": flags.hand_over_ratio,
    }
    # The gateway's own limits are for one gateway of up to 256 replicas.
    most = GatewayLimits().max_concurrent_requests * -(-flags.replicas // 64)
    limits = GatewayLimits(max_concurrent_requests=most)
    return msgspec.structs.replace(limits, **{k: v for k, v in given.items() if v is not None})


def _kill(text: str, replicas: int) -> tuple[float, int]:
    replica, _, moment = text.partition("@")
    try:
        number, at = int(replica), float(moment)
    except ValueError:
        number, at = -1, -1.0
    if not 0 <= number < replicas or not 0 <= at < math.inf:
        raise UserError(
            f"--kill {text!r}: use REPLICA@SECONDS, with a replica from 0 to {replicas - 1}"
        )
    return at, number


def _scale_rule(flags: SimulateFlags) -> ScaleRule | None:
    if flags.autoscale is None:
        return None
    parts = flags.autoscale.split(":")
    try:
        least, most, target = int(parts[0]), int(parts[1]), float(parts[2])
    except (ValueError, IndexError):
        least, most, target = -1, -1, -1.0
    if len(parts) != 3 or not 0 <= least <= most <= MOST_REPLICAS or most < 1 or not target > 0:
        raise UserError(
            f"--autoscale {flags.autoscale!r}: use LEAST:MOST:TARGET, such as 1:8:200 for 200 "
            "requests a replica"
        )
    return ScaleRule(
        least=least,
        most=most,
        target=target,
        interval=flags.autoscale_interval,
        stabilisation=flags.autoscale_stabilisation,
    )
