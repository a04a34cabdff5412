"""The command of a pod: Millrace's own, or that of vLLM or SGLang."""

from __future__ import annotations

import json
import shlex
from typing import Any

from millrace.deploy.layout.layout import ADMIN_PORT, PORT, RANK_PORT, Layout
from millrace.fleet.drivers import engine_command
from millrace.plan.predict.flags import as_flags

SGLANG = "python3 -m sglang.launch_server"


def replica_command(layout: Layout, port: int = PORT, role: str = "") -> list[str]:
    """What a replica's container runs. role: prefill or decode, in a split."""
    file, options = layout.file, _options(layout)
    if file.engine == "millrace":
        words = ["millrace", "serve", layout.directory, *as_flags(options)]
        words += ["--shutdown-timeout", str(file.drain), *_traces(layout)]
        if layout.engines > 1:
            words += ["--replicas", str(layout.engines)]
        if not file.has_gpus:
            words += ["--device", "cpu"]
    else:
        program = "vllm" if file.engine == "vllm" else SGLANG
        words = engine_command(file.engine, layout.directory, options, program=program)
        words += _others(layout, role)
    return [*words, "--host", "0.0.0.0", "--port", str(port), *file.arguments]


def _options(layout: Layout) -> dict[str, Any]:
    return {"served_model_name": [layout.served_name], **layout.settings.options}


def engine_words(layout: Layout) -> list[str]:
    """One replica for `millrace fleet`, which adds host and port: arguments of `millrace serve`, or
    the whole command of another engine."""
    file, options = layout.file, _options(layout)
    if file.engine == "millrace":
        words = as_flags(options)
    else:
        program = "vllm" if file.engine == "vllm" else SGLANG
        words = engine_command(file.engine, layout.directory, options, program=program)
    return [*words, *file.arguments]


def _others(layout: Layout, role: str) -> list[str]:
    """Options of vLLM and SGLang that Millrace's have no name for."""
    words = []
    vllm = layout.file.engine == "vllm"
    if vllm:
        words += ["--shutdown-timeout", str(layout.file.drain), *_traces(layout)]
    if layout.engines > 1:
        words += ["--data-parallel-size" if vllm else "--dp-size", str(layout.engines)]
    if role:
        transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_both",
                    "kv_load_failure_policy": "fail"}  # fmt: skip
        # Hybrid models hand over states beside pages, which takes this manager and layout.
        words += ["--kv-transfer-config", json.dumps(transfer)]
        words.append("--no-disable-hybrid-kv-cache-manager")
    return words


def _traces(layout: Layout) -> list[str]:
    return ["--otlp-traces-endpoint", layout.file.traces] if layout.file.traces else []


def rank_script(layout: Layout) -> str:
    """What each pod of a group runs: the same line, with its own number from the variables that
    LeaderWorkerSet sets."""
    words = replica_command(layout)
    hosts = str(layout.file.hosts)
    leader, number = '"$LWS_LEADER_ADDRESS"', '"$LWS_WORKER_INDEX"'
    if layout.file.engine == "millrace":
        start = ["torchrun", "--nnodes", hosts, "--nproc-per-node", str(layout.gpus)]
        return (
            f"exec {shlex.join(start)} --node-rank {number} --master-addr {leader} "
            f"--master-port {RANK_PORT} -m millrace.cli {shlex.join(words[1:])}"
        )
    if layout.file.engine == "sglang":
        return (
            f"exec {shlex.join(words)} --nnodes {hosts} --node-rank {number} "
            f'--dist-init-addr "$LWS_LEADER_ADDRESS:{RANK_PORT}"'
        )
    return (
        f'if [ {number} = 0 ]; then head=""; else head=--headless; fi\n'
        f"exec {shlex.join(words)} --nnodes {hosts} --node-rank {number} --master-addr {leader} "
        f"--master-port {RANK_PORT} $head"
    )


def gateway_command(layout: Layout) -> list[str]:
    """The gateway's: it finds replicas by the addresses of their service's name."""
    part = layout.file.gateway
    options = {
        "worker_dns": [f"{layout.replica_service}:{PORT}"],
        "host": "0.0.0.0",
        "port": PORT,
        "processes": part.processes,
        "admin_port": ADMIN_PORT,
        "hold_timeout": part.hold_timeout,
        "drain_timeout": layout.file.drain,
        **_scale(layout),
        **part.options,
    }
    return ["millrace", "gateway", *as_flags(options), *_traces(layout)]


def _scale(layout: Layout) -> dict[str, object]:
    """What /gateway/scale answers by: pods are what it counts."""
    wanted = layout.file.autoscale
    if wanted is None:
        return {}
    return {
        "scale_requests": layout.requests_per_pod,
        "scale_min": wanted.min,
        "scale_max": wanted.max,
        "scale_down_after": wanted.down_after,
        "scale_zero_after": wanted.zero_after,
    }


def download_command(layout: Layout) -> list[str]:
    return ["millrace", "download", layout.file.model, "--local-dir", layout.directory,
            "--max-workers", "16"]  # fmt: skip


def bench_command(layout: Layout) -> list[str]:
    """`bench scaling` on the GPUs of the pod, with the settings of the replicas."""
    part = layout.file.bench
    assert part is not None
    options = _options(layout)
    counts = ",".join(map(str, part.replicas))
    return ["millrace", "bench", "scaling", layout.directory, "--replicas", counts,
            "--result-dir", "/tmp/results", *part.flags, "--", *as_flags(options),
            *layout.file.arguments]  # fmt: skip
