"""The options and command lines that start what was planned."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from millrace.plan.predict.prediction import Deployment

KV = {"fp8": "fp8_e4m3", "bf16": "bfloat16", "fp32": "float32"}
STATES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def serve_options(deployment: Deployment) -> dict[str, Any]:
    """Options of one replica, by their names in EngineArgs; vLLM's have the same."""
    d, settings = deployment.description, deployment.settings
    found: dict[str, Any] = {
        "max_model_len": d.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": deployment.utilization,
        "kv_cache_dtype": KV[d.kv],
    }
    if d.tensor > 1:
        found["tensor_parallel_size"] = d.tensor
    if d.tensor > 1 and d.experts:
        found["enable_expert_parallel"] = True
    if d.drafts:
        found["speculative_config"] = {"method": "mtp", "num_speculative_tokens": d.drafts}
    if d.engine != "vllm" or d.state != "fp32":
        found["mamba_ssm_cache_dtype"] = STATES[d.state]
    if d.engine != "vllm" and settings.mixed:
        found["mixed_prefill_tokens"] = settings.mixed
    return found


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """Options on a command line of Millrace: lists repeated, objects as JSON, switches by name."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [word for one in value for word in (flag, str(one))]
        elif isinstance(value, dict):
            words += [flag, json.dumps(value)]
        elif value is not None:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def serve_command(deployment: Deployment) -> str:
    """Of one replica: `millrace serve`, or `vllm serve` for that engine."""
    program = "vllm" if deployment.description.engine == "vllm" else "millrace"
    options = serve_options(deployment)
    if program == "vllm" and deployment.settings.ranks > 1:
        options["data_parallel_size"] = deployment.settings.ranks
    return shlex.join([program, "serve", deployment.description.model, *as_flags(options)])


def gateway_command(deployment: Deployment) -> str:
    """In front of replicas that are reached by these ports; empty for one replica."""
    if deployment.replicas == 1:
        return ""
    urls = [f"http://127.0.0.1:{8001 + i}" for i in range(min(deployment.replicas, 8))]
    parts = ["millrace", "gateway", "--worker-urls", ",".join(urls)]
    return shlex.join(parts)
