"""The flags of every `millrace bench` command: names, types and defaults.

Each command's flags are a struct, from which `millrace.common.flags` makes the options. Names
follow `vllm bench serve` where it has them. What a choice means is for `runs.options_from_flags`.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

Backend = Literal["openai", "openai-chat", "vllm"]
Dataset = Literal[
    "random", "prefix_repetition", "policy", "custom", "sharegpt", "trace", "agent", "bursts"
]
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
    agent_turns: int = 12
    agent_system_len: int = 1500
    agent_user_len: int = 100
    agent_output_len: int = 120
    agent_tool_min: int = 200
    agent_tool_max: int = 8000
    agent_tools: float = 0.7
    agent_aux: float = 0.25
    agent_branch: float = 0.08
    agent_compaction: float = 0.2
    agent_pause: float = 5.0
    burst_streams: int = 32
    burst_stream_input: int = 128
    burst_stream_output: int = 400
    burst_count: int = 8
    burst_size: int = 2
    burst_every: float = 2.0
    burst_input: int = 4096
    burst_output: int = 4
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
    served_model_name: str | None = None
    insecure: bool = False
    header: list[str] = []
    ready_check_timeout_sec: float = 0.0
    reset_prefix_cache: bool = False
    metrics_url: list[str] = []
    dcgm_url: str | None = None
    observe: str | None = None
    percentile_metrics: str = "ttft,tpot,itl"
    metric_percentiles: str = "99"
    goodput: list[str] = []
    save_result: bool = False
    save_detailed: bool = False
    result_dir: str = "."
    result_filename: str | None = None
    append_result: bool = False
    metadata: list[str] = []
    label: str | None = None
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


class GatewayFlags(OwnServersFlags, frozen=True, kw_only=True):
    """Replicas with and without a gateway in front."""

    replicas: str = "1,2"
    url: str | None = None


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
    goodput: list[str] = []
