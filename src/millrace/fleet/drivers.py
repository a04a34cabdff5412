"""Other servers as replicas: their command lines, made from the options of `millrace serve`.

Millrace's engine options have vLLM's names, so most pass to vLLM unchanged; SGLang's names differ.
An option without a counterpart is refused, not dropped. Options that are not translated here can be
given in the server's own syntax.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from millrace.errors import ConfigError

Engine = Literal["millrace", "vllm", "sglang"]

_FP8 = {"fp8": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3"}


def _flag(name: str) -> Callable[[Any], list[str]]:
    return lambda value: [name, str(value)]


def _switch(on: str | None, off: str | None) -> Callable[[Any], list[str]]:
    return lambda value: [flag for flag in [on if value else off] if flag]


def _each(name: str) -> Callable[[Any], list[str]]:
    return lambda values: [name, *map(str, values)] if values else []


def _speculation(value: Any) -> list[str]:
    """MTP and EAGLE3 in SGLang's terms: a chain of k drafts is a tree with one branch."""
    k, method = value.get("num_speculative_tokens", 1), value.get("method", "mtp")
    if not isinstance(k, int) or method not in ("mtp", "eagle3"):
        raise ConfigError(
            f"speculative_config for sglang: method {method!r} with {k!r} drafts has no equal "
            "there; use mtp or eagle3 with a number, or give SGLang's own options"
        )
    if not k:
        return []
    chain = {"num-steps": k, "eagle-topk": 1, "num-draft-tokens": k + 1}
    rest = [word for name, n in chain.items() for word in (f"--speculative-{name}", str(n))]
    if method == "mtp":
        return ["--speculative-algorithm", "NEXTN", *rest]
    drafter = ["--speculative-draft-model-path", str(value.get("model"))]
    return ["--speculative-algorithm", "EAGLE3", *drafter, *rest]


def _object(name: str) -> Callable[[Any], list[str]]:
    return lambda value: [name, msgspec.json.encode(value).decode()]


_VLLM: Mapping[str, Callable[[Any], list[str]]] = {
    "served_model_name": _each("--served-model-name"),
    "tokenizer": _flag("--tokenizer"),
    "skip_tokenizer_init": _switch("--skip-tokenizer-init", None),
    "revision": _flag("--revision"),
    "download_dir": _flag("--download-dir"),
    "hf_overrides": _object("--hf-overrides"),
    "quantization": lambda value: ["--quantization", value] if value != "none" else [],
    "dtype": _flag("--dtype"),
    "load_format": _flag("--load-format"),
    "max_model_len": _flag("--max-model-len"),
    "max_num_seqs": _flag("--max-num-seqs"),
    "max_num_batched_tokens": _flag("--max-num-batched-tokens"),
    "long_prefill_token_threshold": _flag("--long-prefill-token-threshold"),
    "block_size": _flag("--block-size"),
    "kv_cache_dtype": lambda value: ["--kv-cache-dtype", _FP8.get(value, value)],
    "mamba_ssm_cache_dtype": _flag("--mamba-ssm-cache-dtype"),
    "gpu_memory_utilization": _flag("--gpu-memory-utilization"),
    "kv_cache_memory_bytes": _flag("--kv-cache-memory-bytes"),
    "enable_prefix_caching": _switch("--enable-prefix-caching", "--no-enable-prefix-caching"),
    "speculative_config": _object("--speculative-config"),
    "tensor_parallel_size": _flag("--tensor-parallel-size"),
    "async_scheduling": _switch("--async-scheduling", "--no-async-scheduling"),
    "enforce_eager": _switch("--enforce-eager", None),
    "seed": _flag("--seed"),
    "generation_config": _flag("--generation-config"),
    "override_generation_config": _object("--override-generation-config"),
    "chat_template": _flag("--chat-template"),
    "default_chat_template_kwargs": _object("--default-chat-template-kwargs"),
    "api_key": _each("--api-key"),
    "otlp_traces_endpoint": _flag("--otlp-traces-endpoint"),
}
# So that it sends traces as the gateway does; by itself it speaks gRPC.
ENVIRONMENT = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}

_SGLANG: Mapping[str, Callable[[Any], list[str]]] = {
    "served_model_name": lambda names: ["--served-model-name", str(names[0])] if names else [],
    "tokenizer": _flag("--tokenizer-path"),
    "dtype": _flag("--dtype"),
    "load_format": _flag("--load-format"),
    "max_model_len": _flag("--context-length"),
    "max_num_seqs": _flag("--max-running-requests"),
    "max_num_batched_tokens": _flag("--chunked-prefill-size"),
    "block_size": _flag("--page-size"),
    "kv_cache_dtype": lambda value: ["--kv-cache-dtype", _FP8.get(value, value)],
    "gpu_memory_utilization": _flag("--mem-fraction-static"),
    "enable_prefix_caching": _switch(None, "--disable-radix-cache"),
    "speculative_config": _speculation,
    "tensor_parallel_size": _flag("--tp-size"),
    "async_scheduling": _switch(None, "--disable-overlap-schedule"),
    "enforce_eager": _switch("--disable-cuda-graph", None),
    "seed": _flag("--random-seed"),
    "api_key": lambda keys: ["--api-key", str(keys[0])] if keys else [],
}

# Options of the supervisor and the gateway; a replica needs none of them.
_OURS = frozenset(
    (
        *("model", "host", "port", "replicas", "device", "engine", "engine_args"),
        *("engine_command", "policy", "gateway_processes", "ssl_keyfile", "ssl_certfile"),
    )
)


def engine_command(
    engine: Engine, model: str, options: Mapping[str, Any], *, own: str = "", program: str = ""
) -> list[str]:
    """The command of one replica; the caller adds --host and --port.

    options: those that the user gave, by their names in EngineArgs and ServerOptions. own: more
    arguments in the server's own syntax. program: what to run instead of the program on PATH.
    Raises ConfigError for an option without a counterpart, or a server that is not installed.
    """
    table, start = (_VLLM, _vllm) if engine == "vllm" else (_SGLANG, _sglang)
    words = []
    for name, value in options.items():
        if name in _OURS:
            continue
        if name not in table:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} has no counterpart in {engine}; leave it out, or give it in {engine}'s "
                "own syntax with --engine-args"
            )
        words += table[name](value)
    return [*start(model, program), *words, *shlex.split(own)]


def _vllm(model: str, program: str) -> list[str]:
    found = shlex.split(program) or [shutil.which("vllm") or ""]
    if not found[0]:
        raise ConfigError(
            "--engine vllm: no `vllm` on PATH; install it (its own environment is best) and name "
            "it with --engine-command /path/to/vllm"
        )
    return [*found, "serve", model]


def _sglang(model: str, program: str) -> list[str]:
    if program:
        return [*shlex.split(program), "--model-path", model]
    from importlib.util import find_spec

    if find_spec("sglang") is None:
        raise ConfigError(
            "--engine sglang: the package is not installed here; name its interpreter with "
            "--engine-command '/path/to/python -m sglang.launch_server'"
        )
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
