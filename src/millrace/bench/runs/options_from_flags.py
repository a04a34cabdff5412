"""From flags to BenchOptions: what a command line asks for, checked.

Every refusal names the flag and what would work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any
from urllib.request import proxy_bypass

import msgspec

from millrace.bench.flags.structs import LoadFlags, ServeFlags
from millrace.bench.load.arrivals import Schedule, check_schedule
from millrace.bench.load.options import ENDPOINTS, BenchOptions
from millrace.bench.measure.metrics import LATENCIES
from millrace.bench.workload.bursts import Bursts, burst_workload
from millrace.bench.workload.files import estimate_tokens, read_custom, read_sharegpt
from millrace.bench.workload.files import tokenizer_counts as read_tokenizer
from millrace.bench.workload.prompts import (
    AgentSpec,
    PolicySpec,
    PrefixSpec,
    RandomSpec,
    Workload,
    check_spec,
)
from millrace.bench.workload.traces import read_trace
from millrace.common.http_client import Target, parse_base_url, parse_url
from millrace.errors import UserError

_API_PATHS = tuple(dict.fromkeys(ENDPOINTS.values()))
_FILES = ("custom", "sharegpt", "trace")


def serve_options(flags: ServeFlags) -> BenchOptions:
    """BenchOptions from the flags of a running server and its load.

    Raises UserError for the first bad one.
    """
    return msgspec.structs.replace(
        load_options(flags, target_of(flags)),
        backend=flags.backend,
        endpoint=None if flags.endpoint is None else f"/{flags.endpoint.lstrip('/')}",
        model=flags.served_model_name or flags.model,
        model_id=flags.model if flags.served_model_name else None,
        label=flags.label,
        headers=_headers(flags.header),
        percentiles=_percentiles(flags.metric_percentiles),
        objectives=read_objectives(flags.goodput),
        ready_timeout=flags.ready_check_timeout_sec,
        reset_prefix_cache=flags.reset_prefix_cache,
        metrics_urls=tuple(flags.metrics_url),
        dcgm_url=flags.dcgm_url,
        observe=flags.observe,
    )


def load_options(flags: LoadFlags, target: Target) -> BenchOptions:
    """BenchOptions from the flags of a load. Raises UserError for the first bad one."""
    for name in ("max_concurrency", "processes", "gpus"):
        _at_least_one(name, getattr(flags, name))
    if flags.num_warmups < 0:
        raise UserError(f"--num-warmups {flags.num_warmups}: use 0 or more")
    if flags.duration is not None and not flags.duration > 0:
        raise UserError(f"--duration {flags.duration:g}: use seconds above 0")
    workload, times = _workload(flags)
    check_spec(workload)
    schedule = _schedule(flags, workload.count, times)
    check_schedule(schedule)
    return BenchOptions(
        target=target,
        workload=workload,
        vocab_size=flags.random_vocab_size,
        schedule=schedule,
        duration=flags.duration,
        max_concurrency=flags.max_concurrency,
        processes=flags.processes,
        num_warmups=flags.num_warmups,
        temperature=flags.temperature,
        ignore_eos=flags.ignore_eos,
        extra_body=_sampling(flags) | _json_object("--extra-body", flags.extra_body),
        timeout=flags.request_timeout,
        gpus=flags.gpus,
    )


def _workload(flags: LoadFlags) -> tuple[Workload, tuple[float, ...] | None]:
    """The workload, and a trace's arrival times."""
    kind, path = flags.dataset_name, flags.dataset_path
    if kind in _FILES:
        if not path:
            raise UserError(f"--dataset-name {kind} reads a file: give --dataset-path")
        return _from_file(kind, path, flags)
    if path:
        raise UserError(f"--dataset-path goes with --dataset-name {', '.join(_FILES)}")
    count = _count(flags, otherwise=1000)
    if kind == "policy":
        return PolicySpec(count=count, output_len=flags.policy_output_len, seed=flags.seed), None
    if kind == "agent":
        return _agent(flags), None
    if kind == "bursts":
        names = Bursts.__struct_fields__
        values = {name: getattr(flags, f"burst_{name}") for name in names}
        return burst_workload(Bursts(**values), flags.seed)
    if kind == "prefix_repetition":
        return PrefixSpec(
            count=count,
            prefix_len=flags.prefix_repetition_prefix_len,
            suffix_len=flags.prefix_repetition_suffix_len,
            num_prefixes=flags.prefix_repetition_num_prefixes,
            output_len=flags.prefix_repetition_output_len,
            seed=flags.seed,
        ), None
    return RandomSpec(
        count=count,
        input_len=flags.random_input_len,
        output_len=flags.random_output_len,
        range_ratio=flags.random_range_ratio,
        convention=flags.random_range_convention,
        prefix_len=flags.random_prefix_len,
        context_len=flags.random_context_len,
        turns=flags.multi_turn_turns,
        seed=flags.seed,
    ), None


def _agent(flags: LoadFlags) -> AgentSpec:
    """Sessions; --num-prompts counts these, not their requests."""
    names = [name for name in AgentSpec.__struct_fields__ if hasattr(flags, f"agent_{name}")]
    values = {name: getattr(flags, f"agent_{name}") for name in names}
    return AgentSpec(count=_count(flags, otherwise=50), seed=flags.seed, **values)


def _from_file(kind: str, path: str, flags: LoadFlags) -> tuple[Workload, tuple[float, ...] | None]:
    wanted = _count(flags, otherwise=None)
    if kind == "trace":
        return read_trace(path, count=wanted, seed=flags.seed)
    tokens = read_tokenizer(flags.tokenizer) if flags.tokenizer else estimate_tokens
    if kind == "custom":
        spec = read_custom(path, count=wanted, output_len=flags.custom_output_len, tokens=tokens)
    else:
        spec = read_sharegpt(
            path,
            count=wanted,
            output_len=flags.sharegpt_output_len,
            turns=flags.multi_turn_turns,
            tokens=tokens,
        )
    # For a number of requests the whole file, for a time as often as it takes.
    once = wanted is None and flags.duration is None
    return msgspec.structs.replace(spec, count=len(spec.prompts) if once else wanted), None


def _count(flags: LoadFlags, otherwise: int | None) -> int | None:
    """How many requests; None for as many as the time allows."""
    if flags.num_prompts is None:
        return None if flags.duration is not None else otherwise
    _at_least_one("num_prompts", flags.num_prompts)
    return int(flags.num_prompts)


def _schedule(flags: LoadFlags, count: int | None, times: tuple[float, ...] | None) -> Schedule:
    return Schedule(
        rate=flags.request_rate,
        burstiness=flags.burstiness,
        ramp=flags.ramp_up_strategy,
        ramp_start=flags.ramp_up_start_rps,
        ramp_end=flags.ramp_up_end_rps,
        count=count,
        times=times,
        speed=flags.trace_speed,
        seed=flags.seed,
    )


def _sampling(flags: LoadFlags) -> dict[str, Any]:
    names = ("top_p", "top_k", "min_p")
    return {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"--{name.replace('_', '-')} {value}: use 1 or more")


def target_of(flags: ServeFlags) -> Target:
    """The server. A base URL may end in /v1, as other clients want it, or in a whole endpoint.

    Raises UserError.
    """
    target = Target(flags.host, flags.port)
    if flags.base_url and flags.endpoint:
        target = parse_url(flags.base_url)
    elif flags.base_url:
        target = parse_base_url(flags.base_url)
        prefix = target.prefix
        prefix = next((prefix.removesuffix(e) for e in _API_PATHS if prefix.endswith(e)), prefix)
        target = msgspec.structs.replace(target, prefix=prefix)
    return msgspec.structs.replace(target, verify=not flags.insecure)


def ignored_proxy(target: Target) -> str | None:
    """A remark where the environment names a proxy for the server: it is not used."""
    names = ("HTTPS_PROXY" if target.tls else "HTTP_PROXY", "ALL_PROXY")
    found = next((n for name in names for n in (name, name.lower()) if os.environ.get(n)), None)
    if found is None or proxy_bypass(target.host):
        return None
    return (
        f"{found}={os.environ[found]} is ignored: requests go to {target} directly; "
        "give the proxy's own address with --base-url to measure through it"
    )


def metadata_fields(listed: Sequence[str]) -> dict[str, str]:
    """Further fields of the result file. Raises UserError for what is not NAME=VALUE."""
    fields = {}
    for text in listed:
        name, found, value = text.partition("=")
        if not found or not name.strip():
            raise UserError(f"--metadata {text!r}: use the form NAME=VALUE")
        fields[name.strip()] = value.strip()
    return fields


def _headers(listed: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Headers of every request: those of --header, then the key of OPENAI_API_KEY."""
    pairs = [_header(text) for text in listed]
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not _VALUE.fullmatch(key):
        raise UserError("OPENAI_API_KEY: there is a line end or control character in it")
    if key:
        pairs.append(("Authorization", f"Bearer {key}"))
    found: dict[str, tuple[str, str]] = {}
    for name, value in pairs:
        found.setdefault(name.lower(), (name, value))
    return tuple(found.values())


_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")
_NOT_OURS = ("content-length", "transfer-encoding", "connection", "expect", "accept-encoding")


def _header(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not found or not _NAME.fullmatch(name):
        raise UserError(f"--header {text!r}: use the form Name=Value")
    if not _VALUE.fullmatch(value):
        raise UserError(f"--header {name}: its value has a line end or control character")
    if name.lower() in _NOT_OURS:
        raise UserError(f"--header {name}: the load generator sets this header by itself")
    return name, value


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise UserError(f'{flag}: use a JSON object such as {{"top_k": 5}} ({error})') from None


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (-1.0,)
    if not all(0 <= value <= 100 for value in values):
        raise UserError(f"--metric-percentiles {text!r}: use numbers from 0 to 100, as 50,90,99")
    return values


def metric_names(text: str) -> list[str]:
    """Latencies by name, comma-separated. Raises UserError for an unknown one."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in LATENCIES:
            raise UserError(f"--percentile-metrics {name!r}: use any of {','.join(LATENCIES)}")
    return names


def read_objectives(given: Sequence[str]) -> dict[str, float]:
    """Milliseconds by latency, of --goodput. Raises UserError."""
    objectives = {}
    for text in " ".join(given).split():
        name, _, limit = text.partition(":")
        try:
            objectives[name] = float(limit)
        except ValueError:
            name = ""
        if name not in ("ttft", "tpot", "e2el"):
            raise UserError(f"--goodput {text!r}: use ttft:MS, tpot:MS or e2el:MS")
    return objectives


def with_run_seed(options: BenchOptions, run: int, point: int = 0) -> BenchOptions:
    """The options of one of several runs: its prompts and arrival times are its own.

    Equal prompts in two runs would measure the server's prefix cache. The first run of the first
    point keeps the seed of the flags; so do equal runs of two servers.
    """
    if run == point == 0:
        return options
    key = f"{options.workload.seed}/{point}/{run}".encode()
    seed = int.from_bytes(blake2b(key, digest_size=6).digest())
    return msgspec.structs.replace(
        options,
        workload=msgspec.structs.replace(options.workload, seed=seed),
        schedule=msgspec.structs.replace(options.schedule, seed=seed),
    )


def positive_counts(text: str, flag: str) -> list[int]:
    """Counts from 1 on, comma-separated. Raises UserError, which names the flag."""
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"{flag} {text!r}: use counts from 1 on, as 1,2,3")
    return counts
