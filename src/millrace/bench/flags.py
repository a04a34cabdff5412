"""The flags of every `millrace bench` command: names, types, defaults and help texts.

Each command's flags are a struct, from which `millrace.common.flags` makes the options. Names
follow `vllm bench serve` where it has them. This module says what may be chosen and imports nothing
heavy, so that `--help` is quick. What a choice means is for `runs.options_from_flags`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import msgspec

from millrace.common.flags import given, struct_options

Backend = Literal["openai", "openai-chat", "vllm"]
Dataset = Literal["random", "prefix_repetition", "policy", "custom", "sharegpt", "trace"]
PresetName = Literal["write-up", "inferencex"]
RampStrategy = Literal["linear", "exponential"]
RangeConvention = Literal["vllm", "inferencex"]
RawFormat = Literal["auto", "parquet", "jsonl", "none"]


class LoadFlags(msgspec.Struct, frozen=True, kw_only=True):
    """The workload, and how fast it is sent."""

    preset: PresetName | None = None
    dataset_name: Dataset = "random"
    dataset_path: str | None = None
    tokenizer: str | None = None
    num_prompts: int | None = None
    duration: float | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    random_prefix_len: int = 0
    random_context_len: int = 0
    random_range_ratio: float = 0.0
    random_range_convention: RangeConvention = "vllm"
    random_vocab_size: int | None = None
    multi_turn_turns: int = 1
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    custom_output_len: int = 256
    sharegpt_output_len: int | None = None
    policy_output_len: int = 160
    max_concurrency: int | None = None
    request_rate: float = math.inf
    burstiness: float = 1.0
    ramp_up_strategy: RampStrategy | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    trace_speed: float = 1.0
    processes: int = 1
    gpus: int | None = None
    seed: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    num_warmups: int = 0
    extra_body: str = "{}"
    request_timeout: float = 600.0


class ServeFlags(LoadFlags, frozen=True, kw_only=True):
    """A running server, the load on it, and what is done with the figures."""

    backend: Backend = "openai"
    base_url: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    endpoint: str | None = None
    model: str | None = None
    header: list[str] = []
    ready_check_timeout_sec: float = 0.0
    metrics_url: list[str] = []
    dcgm_url: str | None = None
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    goodput: list[str] = []
    save_result: bool = False
    save_detailed: bool = False
    result_dir: str = "."
    result_filename: str | None = None
    raw: RawFormat = "auto"
    num_runs: int = 1
    disable_tqdm: bool = False
    accuracy: str | None = None
    accuracy_items: int = 50
    min_accuracy: float | None = None
    max_failed: float = 0.05
    refuse_client_bound: bool = False
    llama_benchy: bool = False

    @property
    def saves(self) -> bool:
        """Whether a result file is written."""
        return self.save_result or self.save_detailed or self.result_filename is not None


class SweepFlags(ServeFlags, frozen=True, kw_only=True):
    """A running server, measured at every point of a grid."""

    over: list[str] = []


class OwnServersFlags(LoadFlags, frozen=True, kw_only=True):
    """Servers that the command starts by itself; the load is of a size for a laptop."""

    num_prompts: int | None = 64
    random_input_len: int = 128
    random_output_len: int = 64
    random_range_ratio: float = 0.5
    max_concurrency: int | None = 16
    ignore_eos: bool = True
    num_warmups: int = 16
    repeats: int = 1
    accuracy_task: str = "math"
    accuracy_items: int = 50
    start_timeout: float = 900.0
    result_dir: str = "bench-results"
    result_filename: str | None = None


class ScalingFlags(OwnServersFlags, frozen=True, kw_only=True):
    """Counts of replicas, compared."""

    replicas: str = "1,2,3"


class ParallelismFlags(OwnServersFlags, frozen=True, kw_only=True):
    """Arrangements of tensor parallelism and replicas, compared."""

    arrangements: str | None = None


class SelftestFlags(msgspec.Struct, frozen=True, kw_only=True):
    """The load generator against the built-in mock server."""

    streams: str = "16,64,256,1024"
    processes: int = 1
    seconds: float = 5.0
    chat: bool = False
    json: str | None = None


class CompareFlags(msgspec.Struct, frozen=True, kw_only=True):
    """Two sets of results."""

    json: str | None = None


class ReportFlags(msgspec.Struct, frozen=True, kw_only=True):
    """An HTML report."""

    output: str | None = None


HELP: Mapping[str, str] = {
    "preset": "A known set of flags; flags on the command line win over it.",
    "dataset_name": "What is sent.",
    "dataset_path": "The file of the datasets custom, sharegpt and trace.",
    "tokenizer": "A tokenizer.json or model directory that counts the tokens of a file's texts.",
    "num_prompts": "Number of requests.",
    "duration": "Send no more requests after this many seconds.",
    "random_input_len": "Tokens of a random prompt.",
    "random_output_len": "Output tokens of a random prompt.",
    "random_prefix_len": "Tokens at the beginning that all random prompts share.",
    "random_context_len": "Tokens added before each random prompt, different for each.",
    "random_range_ratio": "How far random lengths vary; see --random-range-convention.",
    "random_range_convention": "vllm: lengths in [L(1-r), L(1+r)]; inferencex: in [L*r, L].",
    "random_vocab_size": "Draw token ids below this number (default: the server's, else 1000).",
    "multi_turn_turns": "User turns of a conversation.",
    "prefix_repetition_prefix_len": "Tokens of a shared prefix.",
    "prefix_repetition_suffix_len": "Tokens after the prefix, different for each prompt.",
    "prefix_repetition_num_prefixes": "Number of shared prefixes.",
    "prefix_repetition_output_len": "Output tokens of each prompt.",
    "custom_output_len": "Output tokens of a line that names none.",
    "sharegpt_output_len": "Output tokens (default: as many as the file's answer has).",
    "policy_output_len": "Output tokens of a policy question.",
    "max_concurrency": "Most requests in flight.",
    "request_rate": "Requests a second.",
    "burstiness": "1: Poisson arrivals; below 1: bursts; inf: equal gaps.",
    "ramp_up_strategy": "Raise the request rate during the run.",
    "ramp_up_start_rps": "Requests a second at the start of the ramp.",
    "ramp_up_end_rps": "Requests a second at the end of the ramp.",
    "trace_speed": "Replay a trace this many times faster than it was recorded.",
    "processes": "Number of load processes.",
    "gpus": "GPUs of the server; adds figures per GPU.",
    "seed": "Seed of prompts and arrival times.",
    "ignore_eos": "Generate to the requested length, past the end-of-sequence token.",
    "temperature": "Sampling temperature.",
    "top_p": "Sampling parameter top_p.",
    "top_k": "Sampling parameter top_k.",
    "min_p": "Sampling parameter min_p.",
    "num_warmups": "Requests sent before the run; they are not counted.",
    "extra_body": "JSON object merged into the body of every request.",
    "request_timeout": "Seconds that one request may take.",
    "backend": "Which API is called.",
    "base_url": "URL of the server; otherwise --host and --port.",
    "host": "Host of the server.",
    "port": "Port of the server.",
    "endpoint": "Path of the API (default: that of the backend).",
    "model": "Model name (default: the first that the server lists).",
    "header": "Extra header, as Name=Value.",
    "ready_check_timeout_sec": "Seconds to wait until the server is ready.",
    "metrics_url": "Address of a replica whose /metrics is read.",
    "dcgm_url": "Address of a DCGM exporter, as http://host:9400.",
    "percentile_metrics": "Latencies in the table: any of ttft,tpot,itl,e2el.",
    "metric_percentiles": "Percentiles, comma-separated.",
    "goodput": "Objective in ms, as ttft:500.",
    "save_result": "Write the figures as JSON.",
    "save_detailed": "Write the figures and the times of each request as JSON.",
    "result_dir": "Directory of the result files.",
    "result_filename": "Name of the JSON file (default: made from the run).",
    "raw": "Format of the raw data beside the JSON file.",
    "num_runs": "Number of repeated runs.",
    "disable_tqdm": "Show no progress.",
    "accuracy": "Also evaluate these tasks under the same load, as math,policy.",
    "accuracy_items": "Evaluation items of each task; scaling and parallelism take 0 for none.",
    "min_accuracy": "Exit with 1 when the accuracy of a task is lower.",
    "max_failed": "Exit with 1 when a larger share of the requests failed.",
    "refuse_client_bound": "Exit with 1 when the load generator limited the run.",
    "llama_benchy": "Also print the table of llama-benchy.",
    "over": "FLAG=V1,V2: measure at each of these values.",
    "repeats": "Measure everything this many times, interleaved; figures are medians.",
    "accuracy_task": "The task that measures accuracy.",
    "start_timeout": "Seconds that a server may take to start.",
    "replicas": "Counts of replicas to compare.",
    "arrangements": "TPxDP to compare, as 1x1,1x2,2x1 (default: all that fit).",
    "streams": "Concurrent streams, one level for each number.",
    "seconds": "Seconds for each level.",
    "chat": "Use chat completions instead of completions.",
    "json": "Also write the result to this JSON file.",
    "output": "The HTML file (default: report.html in the directory).",
}

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Flags = TypeVar("_Flags", bound=msgspec.Struct)


def flags_of(kind: type[msgspec.Struct]) -> Callable[[_Command], _Command]:
    """Decorator: the options of a command whose flags are `kind`."""
    return struct_options(kind, HELP)


def read_flags(kind: type[_Flags], values: Mapping[str, Any]) -> _Flags:
    """The flags of a command line: as given, else the preset's, else the defaults.

    values: what click hands to the command. Raises UserError for a preset that lacks a flag.
    """
    from millrace.bench.runs.presets import preset_values

    chosen = given(values, kind)
    flags = kind(**chosen)
    if isinstance(flags, LoadFlags) and flags.preset is not None:
        return msgspec.structs.replace(flags, **preset_values(flags, chosen.keys()))
    return flags
