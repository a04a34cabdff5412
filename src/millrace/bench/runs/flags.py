"""The flags of a load and what they mean: from a command line to BenchOptions.

Names follow `vllm bench serve` where it has them. Every refusal names the flag and what would work.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import click
import msgspec

from millrace.bench.load.arrivals import RampStrategy, Schedule, check_schedule
from millrace.bench.load.options import Backend, BenchOptions
from millrace.bench.measure.metrics import LATENCIES
from millrace.bench.runs.presets import PRESETS, with_preset
from millrace.bench.workload.files import estimate_tokens, read_custom, read_sharegpt, read_trace
from millrace.bench.workload.files import tokenizer_counts as read_tokenizer
from millrace.bench.workload.prompts import (
    PolicySpec,
    PrefixSpec,
    RandomSpec,
    RangeConvention,
    Workload,
    check_spec,
)
from millrace.common.http_client import Target, parse_url
from millrace.errors import UserError

DATASETS = ("random", "prefix_repetition", "policy", "custom", "sharegpt", "trace")
_FILES = ("custom", "sharegpt", "trace")
_VOCABULARY = 1000  # of a trace's prompts, which are made before the server is asked


def load_flags(**defaults: Any) -> Callable[[Any], Any]:
    """Decorator: the flags of a workload and its load, with these defaults."""

    def default(name: str) -> Any:
        return {"default": defaults[name], "show_default": defaults[name] is not None}

    flags = [
        click.option("--preset", type=click.Choice(list(PRESETS)), help="A known set of flags."),
        click.option("--dataset-name", type=click.Choice(DATASETS), default="random"),
        click.option("--dataset-path", help="The file of custom, sharegpt or trace."),
        click.option("--tokenizer", help="tokenizer.json or model directory, to count a file's."),
        click.option("--num-prompts", type=int, help="Requests.", **default("num_prompts")),
        click.option("--duration", type=float, help="Seconds after which no more are sent."),
        click.option("--random-input-len", type=int, **default("input_len")),
        click.option("--random-output-len", type=int, **default("output_len")),
        click.option("--random-prefix-len", type=int, default=0, help="Tokens all prompts share."),
        click.option(
            "--random-context-len", type=int, default=0, help="Tokens before each, its own."
        ),
        click.option("--random-range-ratio", type=float, **default("range_ratio")),
        click.option(
            "--random-range-convention",
            type=click.Choice(get_args(RangeConvention)),
            default="vllm",
            show_default=True,
            help="vllm: lengths in [L(1-r), L(1+r)]; inferencex: in [L*r, L].",
        ),
        click.option("--random-vocab-size", type=int, help="Token ids to draw from."),
        click.option("--multi-turn-turns", type=int, default=1, help="User turns a conversation."),
        click.option("--prefix-repetition-prefix-len", type=int, default=256),
        click.option("--prefix-repetition-suffix-len", type=int, default=256),
        click.option("--prefix-repetition-num-prefixes", type=int, default=10),
        click.option("--prefix-repetition-output-len", type=int, default=128),
        click.option("--custom-output-len", type=int, default=256, show_default=True),
        click.option("--sharegpt-output-len", type=int, help="[default: as long as the answers]"),
        click.option("--policy-output-len", type=int, default=160, show_default=True),
        click.option(
            "--max-concurrency", type=int, help="Requests in flight.", **default("concurrency")
        ),
        click.option("--request-rate", type=float, default=math.inf, help="Requests a second."),
        click.option(
            "--burstiness", type=float, default=1.0, help="1 Poisson, below in bursts, inf steady."
        ),
        click.option("--ramp-up-strategy", type=click.Choice(get_args(RampStrategy))),
        click.option("--ramp-up-start-rps", type=float),
        click.option("--ramp-up-end-rps", type=float),
        click.option("--trace-speed", type=float, default=1.0, help="2 replays twice as fast."),
        click.option("--processes", type=int, default=1, show_default=True, help="That send."),
        click.option("--gpus", type=int, help="Of the server, for figures per GPU."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option(
            "--ignore-eos/--no-ignore-eos",
            help="Go on to the length asked.",
            **default("ignore_eos"),
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True),
        click.option("--top-p", type=float),
        click.option("--top-k", type=int),
        click.option("--min-p", type=float),
        click.option("--num-warmups", type=int, help="Requests before.", **default("warmups")),
        click.option("--extra-body", default="{}", help="JSON merged into every request."),
        click.option("--request-timeout", type=float, default=600.0, help="Seconds a request."),
    ]
    return _decorator(flags)


def server_flags() -> Callable[[Any], Any]:
    """Decorator: the flags that say which server, and how it is asked."""
    return _decorator(
        [
            click.option("--backend", type=click.Choice(get_args(Backend)), default="openai"),
            click.option("--base-url", help="Server's URL; otherwise --host and --port."),
            click.option("--host", default="127.0.0.1", show_default=True),
            click.option("--port", type=int, default=8000, show_default=True),
            click.option("--endpoint", help="Path of the API (default: by backend)."),
            click.option("--model", help="Model name (default: the first that the server names)."),
            click.option("--header", multiple=True, help="Extra header, as Name=Value."),
            click.option(
                "--ready-check-timeout-sec", type=float, default=0.0, help="Wait for the server."
            ),
            click.option("--metrics-url", multiple=True, help="A replica, for its /metrics."),
            click.option("--dcgm-url", help="A DCGM exporter, as http://host:9400."),
            click.option("--percentile-metrics", default="ttft,tpot,itl", show_default=True),
            click.option("--metric-percentiles", default="99", show_default=True),
            click.option("--goodput", multiple=True, help="Objective in ms, as ttft:500."),
        ]
    )


def _decorator(flags: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


# --- from flags to options ---------------------------------------------------------------------


def serve_options(flags: Mapping[str, Any]) -> BenchOptions:
    """BenchOptions from the flags of `bench serve`. Raises UserError for the first bad one."""
    return msgspec.structs.replace(
        load_options(flags, _target(flags)),
        backend=flags["backend"],
        endpoint=flags["endpoint"],
        model=flags["model"],
        headers=_headers(flags["header"]),
        percentiles=_percentiles(flags["metric_percentiles"]),
        objectives=_objectives(flags["goodput"]),
        ready_timeout=flags["ready_check_timeout_sec"],
        metrics_urls=tuple(flags["metrics_url"]),
        dcgm_url=flags["dcgm_url"],
    )


def load_options(flags: Mapping[str, Any], target: Target) -> BenchOptions:
    """BenchOptions from `load_flags`. Raises UserError for the first bad one."""
    flags = with_preset(flags)
    for name in ("max_concurrency", "processes", "gpus"):
        _at_least_one(name, flags[name])
    if flags["num_warmups"] < 0:
        raise UserError(f"--num-warmups {flags['num_warmups']}: use 0 or more")
    if flags["duration"] is not None and not flags["duration"] > 0:
        raise UserError(f"--duration {flags['duration']:g}: use seconds above 0")
    workload, times = _workload(flags)
    check_spec(workload)
    schedule = _schedule(flags, workload.count, times)
    check_schedule(schedule)
    return BenchOptions(
        target=target,
        workload=workload,
        vocab_size=flags["random_vocab_size"],
        schedule=schedule,
        duration=flags["duration"],
        max_concurrency=flags["max_concurrency"],
        processes=flags["processes"],
        num_warmups=flags["num_warmups"],
        temperature=flags["temperature"],
        ignore_eos=flags["ignore_eos"],
        extra_body=_sampling(flags) | _json_object("--extra-body", flags["extra_body"]),
        timeout=flags["request_timeout"],
        gpus=flags["gpus"],
    )


def _workload(flags: Mapping[str, Any]) -> tuple[Workload, tuple[float, ...] | None]:
    """The workload, and a trace's arrival times."""
    kind, path = flags["dataset_name"], flags["dataset_path"]
    if kind in _FILES:
        if not path:
            raise UserError(f"--dataset-name {kind} reads a file: give --dataset-path")
        return _from_file(kind, path, flags)
    if path:
        raise UserError(f"--dataset-path goes with --dataset-name {', '.join(_FILES)}")
    count = _count(flags, otherwise=1000)
    if kind == "policy":
        return PolicySpec(
            count=count, output_len=flags["policy_output_len"], seed=flags["seed"]
        ), None
    if kind == "prefix_repetition":
        return PrefixSpec(
            count=count,
            prefix_len=flags["prefix_repetition_prefix_len"],
            suffix_len=flags["prefix_repetition_suffix_len"],
            num_prefixes=flags["prefix_repetition_num_prefixes"],
            output_len=flags["prefix_repetition_output_len"],
            seed=flags["seed"],
        ), None
    return RandomSpec(
        count=count,
        input_len=flags["random_input_len"],
        output_len=flags["random_output_len"],
        range_ratio=flags["random_range_ratio"],
        convention=flags["random_range_convention"],
        prefix_len=flags["random_prefix_len"],
        context_len=flags["random_context_len"],
        turns=flags["multi_turn_turns"],
        seed=flags["seed"],
    ), None


def _from_file(
    kind: str, path: str, flags: Mapping[str, Any]
) -> tuple[Workload, tuple[float, ...] | None]:
    wanted = _count(flags, otherwise=None)
    if kind == "trace":
        vocabulary = flags["random_vocab_size"] or _VOCABULARY
        return read_trace(path, count=wanted, vocab_size=vocabulary, seed=flags["seed"])
    tokens = read_tokenizer(flags["tokenizer"]) if flags["tokenizer"] else estimate_tokens
    if kind == "custom":
        spec = read_custom(path, count=wanted, output_len=flags["custom_output_len"], tokens=tokens)
    else:
        spec = read_sharegpt(
            path,
            count=wanted,
            output_len=flags["sharegpt_output_len"],
            turns=flags["multi_turn_turns"],
            tokens=tokens,
        )
    # For a number of requests the whole file, for a time as often as it takes.
    once = wanted is None and flags["duration"] is None
    return msgspec.structs.replace(spec, count=len(spec.prompts) if once else wanted), None


def _count(flags: Mapping[str, Any], otherwise: int | None) -> int | None:
    """How many requests; None for as many as the time allows."""
    if flags["num_prompts"] is None:
        return None if flags["duration"] is not None else otherwise
    _at_least_one("num_prompts", flags["num_prompts"])
    return int(flags["num_prompts"])


def _schedule(
    flags: Mapping[str, Any], count: int | None, times: tuple[float, ...] | None
) -> Schedule:
    return Schedule(
        rate=flags["request_rate"],
        burstiness=flags["burstiness"],
        ramp=flags["ramp_up_strategy"],
        ramp_start=flags["ramp_up_start_rps"],
        ramp_end=flags["ramp_up_end_rps"],
        count=count,
        times=times,
        speed=flags["trace_speed"],
        seed=flags["seed"],
    )


def _sampling(flags: Mapping[str, Any]) -> dict[str, Any]:
    names = ("top_p", "top_k", "min_p")
    return {name: flags[name] for name in names if flags[name] is not None}


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise UserError(f"--{name.replace('_', '-')} {value}: use 1 or more")


def _target(flags: Mapping[str, Any]) -> Target:
    if flags["base_url"]:
        return parse_url(flags["base_url"])
    return Target(flags["host"], flags["port"])


def _headers(given: Sequence[str]) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in given:
        name, found, value = text.partition("=")
        if not found or not name:
            raise UserError(f"--header {text!r}: use the form Name=Value")
        pairs.append((name, value))
    if key := os.environ.get("OPENAI_API_KEY"):
        pairs.append(("Authorization", f"Bearer {key}"))
    return tuple(pairs)


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


def _objectives(given: Sequence[str]) -> dict[str, float]:
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
