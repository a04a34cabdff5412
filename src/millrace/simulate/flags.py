"""The flags of `millrace simulate`: names, types, defaults and help. What they mean is for
`scenario`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from millrace.bench.flags.help_texts import HELP as BENCH_HELP
from millrace.bench.flags.structs import LoadFlags
from millrace.gateway.common.replica_spec import DEFAULT_POLICY, PolicyName

Mode = Literal["auto", "event", "aggregated"]

# Flags of a load that have no meaning without a server.
SKIPPED = frozenset(
    {
        *("tokenizer", "processes", "gpus", "ignore_eos", "temperature", "top_p", "top_k", "min_p"),
        *("num_warmups", "extra_body", "request_timeout", "random_vocab_size"),
    }
)


class SimulateFlags(LoadFlags, frozen=True, kw_only=True):
    """A fleet, what happens to it, and the load on it."""

    replicas: int = 1
    prefill_replicas: int = 0
    hand_over_prompt: int = 2048
    hand_over_ratio: float = 4.0
    link: float = 25.0
    mode: Mode = "auto"
    policy: PolicyName = DEFAULT_POLICY
    affinity_gap: int = 4096
    gateway_processes: int = 0
    max_concurrent_requests: int | None = None
    queue_size: int | None = None
    max_requests_per_replica: int = 0
    step_model: str | None = None
    plan_log: list[str] = msgspec.field(default_factory=list)
    gpu: str = "h200"
    model: str = "qwen3.5-27b"
    engine: str = "millrace"
    weights: str = "fp8"
    kv: str = "fp8"
    state: str = "fp32"
    tensor_parallel_size: int = 1
    drafts: int = 0
    acceptance: list[str] = msgspec.field(default_factory=list)
    jitter: float | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    mixed_prefill_tokens: int = 1536
    long_prefill_token_threshold: int = 1024
    max_model_len: int | None = None
    block_size: int = 16
    num_pages: int | None = None
    num_snapshots: int | None = None
    enable_prefix_caching: bool = True
    pipeline_depth: int = 1
    max_tokens: int = 0
    start_seconds: float | None = None
    kill: list[str] = msgspec.field(default_factory=list)
    crashes: float = 0.0
    spot_reclaims: float = 0.0
    spot_notice: float = 30.0
    spot_wait: float = 60.0
    autoscale: str | None = None
    autoscale_interval: float = 15.0
    autoscale_stabilisation: float = 300.0
    warmup: float = 0.0
    goodput: list[str] = msgspec.field(default_factory=list)
    price: float | None = None
    json: str | None = None
    html: str | None = None
    check: bool = False


HELP: Mapping[str, str] = {
    **BENCH_HELP,
    "replicas": "Replicas at the start.",
    "prefill_replicas": "Of --replicas, those that compute prompts for the others (millrace serve "
    "--role prefill); 0: each does everything.",
    "hand_over_prompt": "Least prompt tokens of a request that goes to two replicas then.",
    "hand_over_ratio": "Least prompt tokens of such a request for each token of its answer.",
    "link": "GB/s of each replica's link to the others, for records of prompts.",
    "mode": "event: every step of every engine, for up to 16 replicas or so; aggregated: all "
    "replicas advance together, for thousands; auto: event up to 16 replicas.",
    "policy": "How the gateway chooses a replica.",
    "affinity_gap": "Tokens of load by which prefix_aware may prefer a replica with the prefix.",
    "gateway_processes": "Processes of the gateway, which share the chunks; 0: enough.",
    "max_concurrent_requests": "Requests that the gateway admits at a time (default: its own).",
    "queue_size": "Requests that may wait for admission (default: the gateway's own).",
    "max_requests_per_replica": "Requests that a replica gets at a time; 0: any number.",
    "step_model": "A step model that `millrace plan calibrate` wrote, instead of --gpu, --model, "
    "--engine, --weights, --kv, --state, --tensor-parallel-size.",
    "plan_log": "A plan log of an engine (`millrace serve --plan-log`): steps take the time that "
    "is fitted to it, whatever --gpu says.",
    "gpu": "GPU of a replica, as `millrace plan` names it.",
    "model": "Model, as `millrace plan` names it.",
    "engine": "Engine whose speed is taken: millrace, vllm or sglang. The scheduler is millrace's.",
    "weights": "Format of the weights.",
    "kv": "Format of keys and values.",
    "state": "Format of the recurrent state.",
    "tensor_parallel_size": "GPUs of a replica.",
    "drafts": "Draft tokens of a step.",
    "acceptance": "How often each draft is accepted, given that all before it were: 0.9, or 0.85 "
    "and 0.7 in turn (default: 0.8 for each).",
    "jitter": "Relative spread of the time of single steps (default: the step model's).",
    "max_num_seqs": "Requests that a replica runs at the same time.",
    "max_num_batched_tokens": "Tokens that one step may compute.",
    "mixed_prefill_tokens": "Prompt tokens of a step that also has decode rows.",
    "long_prefill_token_threshold": "Tokens of a long prompt that one step computes.",
    "max_model_len": "Longest sequence (default: the longest of the workload).",
    "block_size": "Tokens in a page of the KV cache.",
    "num_pages": "Pages of the KV cache (default: what the GPU's memory holds).",
    "num_snapshots": "Snapshots of the prefix cache (default: what the GPU's memory holds).",
    "enable_prefix_caching": "Reuse what prompts have in common.",
    "pipeline_depth": "Steps planned ahead of the last known result: 1 on a GPU, 0 on a CPU.",
    "max_tokens": "What requests ask for, where their texts end before; 0: they ask for what they "
    "get.",
    "start_seconds": "Seconds from the order of a replica to its first answer (default: the step "
    "model's).",
    "kill": "REPLICA@SECONDS: this replica's process dies then, and is started again.",
    "crashes": "Crashes of each replica and hour, drawn from the seed.",
    "spot_reclaims": "Machines taken away, for each replica and hour, drawn from the seed.",
    "spot_notice": "Seconds between the notice of a reclaim and the end of the machine; 0: none.",
    "spot_wait": "Seconds until another machine is there.",
    "autoscale": "LEAST:MOST:TARGET: replicas, and requests for each (running and waiting).",
    "autoscale_interval": "Seconds between two looks of the autoscaler.",
    "autoscale_stabilisation": "Seconds for which it keeps the largest number wanted.",
    "warmup": "Seconds at the start that the figures leave out.",
    "goodput": "Objectives as ttft:MS, tpot:MS or e2el:MS.",
    "price": "Dollars for a replica and hour.",
    "json": "File for the result as JSON.",
    "html": "File for the result as one HTML page, with time lines.",
    "check": "Test the invariants of every engine after every step.",
}
