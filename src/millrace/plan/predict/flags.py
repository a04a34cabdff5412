"""The command lines that start what was planned."""

from __future__ import annotations

import json
import shlex

from millrace.plan.predict.prediction import Deployment

KV = {"fp8": "fp8_e4m3", "bf16": "bfloat16", "fp32": "float32"}
STATES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def serve_command(deployment: Deployment) -> str:
    """Of one replica: `millrace serve`, or `vllm serve` for that engine."""
    d, settings = deployment.description, deployment.settings
    program = {"vllm": "vllm"}.get(d.engine, "millrace")
    parts = [program, "serve", d.model, *_common(deployment)]
    if program == "vllm":
        if settings.ranks > 1:
            parts += ["--data-parallel-size", str(settings.ranks)]
        if d.state != "fp32":
            parts += ["--mamba-ssm-cache-dtype", STATES[d.state]]
    else:
        parts += ["--mamba-ssm-cache-dtype", STATES[d.state]]
        if settings.mixed:
            parts += ["--mixed-prefill-tokens", str(settings.mixed)]
    return shlex.join(parts)


def _common(deployment: Deployment) -> list[str]:
    """What both take under the same name."""
    d, settings = deployment.description, deployment.settings
    parts = [
        "--max-model-len", str(d.max_model_len),
        "--max-num-seqs", str(settings.max_num_seqs),
        "--max-num-batched-tokens", str(settings.max_num_batched_tokens),
        "--gpu-memory-utilization", f"{deployment.utilization:g}",
        "--kv-cache-dtype", KV[d.kv],
    ]  # fmt: skip
    if d.tensor > 1:
        parts += ["--tensor-parallel-size", str(d.tensor)]
    if d.tensor > 1 and d.experts:
        parts.append("--enable-expert-parallel")
    if d.drafts:
        config = {"method": "mtp", "num_speculative_tokens": d.drafts}
        parts += ["--speculative-config", json.dumps(config)]
    return parts


def gateway_command(deployment: Deployment) -> str:
    """In front of replicas that are reached by these ports; empty for one replica."""
    if deployment.replicas == 1:
        return ""
    urls = [f"http://127.0.0.1:{8001 + i}" for i in range(min(deployment.replicas, 8))]
    parts = ["millrace", "gateway", "--worker-urls", ",".join(urls)]
    return shlex.join(parts)
