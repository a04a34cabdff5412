"""Every flag of vLLM 0.33's `serve`, and what Millrace makes of it: names and words only.

Those of SAME are options of Millrace too. The rest are other names of an option (SYNONYMS), have no
effect here and are accepted (harmless, some at certain values only), or are refused with the reason
and what to use instead. How a command line is rewritten by these tables is the business of
`millrace.server.vllm_arguments`; the tables know no option of Millrace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from millrace.errors import ConfigError

VLLM_VERSION = "0.33"

# Options of Millrace under the same name; `millrace serve --help=all` says what values mean.
_SAME = """
    --allow-credentials --allowed-headers --allowed-methods --allowed-origins --api-key
    --async-scheduling --block-size --chat-template --config --default-chat-template-kwargs
    --disable-access-log-for-endpoints --disable-log-stats --disable-uvicorn-access-log
    --download-dir --dtype
    --enable-force-include-usage --enable-per-request-metrics --enable-prefix-caching
    --enable-request-id-headers --enforce-eager --generation-config
    --gpu-memory-utilization --hf-overrides --host --kv-cache-dtype --kv-cache-memory-bytes
    --load-format --log-level --long-prefill-token-threshold --mamba-ssm-cache-dtype --max-logprobs
    --max-model-len
    --max-num-batched-tokens --max-num-seqs --model --otlp-traces-endpoint
    --override-generation-config --port --quantization --reasoning-parser
    --return-tokens-as-token-ids --revision --root-path
    --scheduling-policy --seed --served-model-name --shutdown-timeout --skip-tokenizer-init
    --speculative-config --ssl-ca-certs --ssl-cert-reqs --ssl-certfile --ssl-keyfile
    --stream-interval --tensor-parallel-size --tokenizer --tool-call-parser
    --uds --uvicorn-log-level
"""
SAME = frozenset(_SAME.split())

# One-dash forms of vLLM, and second names.
SYNONYMS: Mapping[str, str] = {
    "-tp": "--tensor-parallel-size",
    "-dp": "--data-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dpm": "--data-parallel-multi-port-external-lb",
    "-ep": "--enable-expert-parallel",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-q": "--quantization",
    "-sc": "--speculative-config",
    "-dc": "--diffusion-config",
    "-cc": "--compilation-config",
    "-ac": "--attention-config",
    "-asc": "--api-server-count",
    "-O": "--optimization-level",
    "--data-parallel-size": "--replicas",
    "--device-memory-utilization": "--gpu-memory-utilization",
    "--max-num-queued-reqs": "--max-queue",
}

# JSON options that vLLM also takes in parts: flag -> (JSON option, key).
PARTS: Mapping[str, tuple[str, str]] = {
    "--spec-method": ("--speculative-config", "method"),
    "--spec-tokens": ("--speculative-config", "num_speculative_tokens"),
    "--spec-model": ("--speculative-config", "model"),
}

# Why a flag has no effect -> the flags; those with "=" take a value.
_HARMLESS = {
    "no code of a checkpoint is ever run": "--trust-remote-code --code-revision=",
    "on already": """
        --enable-auto-tool-choice --enable-chunked-prefill --enable-prompt-tokens-details
        --enable-server-load-tracking --use-tqdm-on-load
        --scheduler-reserve-full-isl --enable-log-deltas
    """,
    "/tokenizer_info is there": "--enable-tokenizer-info-endpoint",
    "the markers of reasoning are those of the chat template": "--reasoning-config=",
    "/sleep and /wake_up need --admin-key": "--enable-sleep-mode",
    "requests are never logged, only the access log names them": "--enable-log-requests "
    "--max-log-len=",
    "kernels and graphs are chosen at the start for the device": """
        --optimization-level= --performance-mode= --compilation-config= --cudagraph-capture-sizes=
        --max-cudagraph-capture-size= --attention-backend= --attention-config= --kernel-config=
        --ir-op-priority= --enable-flashinfer-autotune --monokernel --linear-backend=
        --moe-backend= --mamba-backend= --mamba-ssu-algorithm= --gdn-prefill-backend=
        --kda-prefill-backend= --kda-decode-backend= --sparse-indexer-topk-backend=
        --jit-monitor-mode= --jit-monitor-verbose --disable-custom-all-reduce
        --disable-cascade-attn --replayssm-buffer-len= --use-replayssm
    """,
    "the memory of the hybrid's states and pages is managed together": """
        --disable-hybrid-kv-cache-manager --mamba-block-size= --mamba-cache-mode=
        --enable-mamba-shared-prefix-checkpoint --enable-cumem-allocator --prefix-match-unit=
    """,
    "a model of this kind has none": """
        --disable-sliding-window --swa-bounded-replay
        --cohere-is-reasoning-model --cohere-format= --kv-cache-dtype-skip-layers=
        --enable-flash-late-interaction --max-lora-cls-labels= --engram-config=
    """,
    "experts are spread over ranks in their order, and every rank has every token": """
        --enable-ep-weight-filter --all2all-backend= --eplb-config= --expert-placement-strategy=
    """,
    "text only, so requests with images, audio or video are refused": """
        --language-model-only --limit-mm-per-prompt= --media-io-kwargs= --mm-processor-kwargs=
        --mm-processor-cache-gb= --mm-processor-cache-type= --mm-hasher-algorithm=
        --mm-shm-cache-max-object-size-mb= --mm-encoder-tp-mode= --mm-encoder-attn-backend=
        --mm-encoder-attn-dtype= --mm-encoder-fp8-scale-path= --mm-encoder-fp8-scale-save-path=
        --mm-encoder-fp8-scale-save-margin= --interleave-mm-strings --skip-mm-profiling
        --video-pruning-rate= --video-pruning-method= --mm-tensor-ipc= --mm-processor-device=
        --mm-ipc-gpu-memory-gb= --mm-device-do-normalize --disable-chunked-mm-input
        --allowed-local-media-path= --allowed-media-domains= --ec-manager-config=
    """,
    "nothing is downloaded": "--hf-token= --ignore-patterns=",
    "safetensors files are mapped and read in order": """
        --safetensors-load-strategy= --safetensors-prefetch-num-threads=
        --safetensors-prefetch-block-size= --max-parallel-loading-workers= --pt-load-map-location=
    """,
    "LoRA is off, and these only size it": """
        --max-loras= --max-lora-rank= --lora-dtype= --max-cpu-loras= --fully-sharded-loras
        --lora-target-modules= --specialize-active-lora --enable-tower-connector-lora
        --default-mm-loras= --enable-mixed-moe-lora-format --enable-moe-shared-loras
    """,
    "replicas are processes of their own, and share nothing": """
        --disable-nccl-for-dp-synchronization --dp-sync-interval= --renderer-num-workers=
        --data-parallel-rpc-port= --data-parallel-supervisor-port=
        --dp-supervisor-probe-interval-s= --dp-supervisor-probe-timeout-s=
        --dp-supervisor-probe-failure-threshold= --aggregate-engine-logging
        --enable-shm-tensor-arena --distributed-timeout-seconds=
        --cpu-distributed-timeout-seconds= --enable-batch-sharded-sampling --master-addr=
        --master-port=
    """,
    "the metrics of Millrace are always there": """
        --show-hidden-metrics-for-version= --kv-cache-metrics --kv-cache-metrics-sample=
        --cudagraph-metrics --enable-mfu-metrics --enable-logging-iteration-details
    """,
    "the OpenAPI page loads nothing from elsewhere": "--enable-offline-docs",
    "no variable of vLLM is read": "--fail-on-environ-validation",
    "prefixes are always kept apart by a keyed hash": "--prefix-caching-hash-algo=",
    "sampling is exact in its own way": "--use-fp64-gumbel",
    "the checkpoint's own scheme is run as it is": "--allow-deprecated-quantization",
    "the header limit is in bytes, --max-header-bytes": "--h11-max-header-count=",
    "no longer a flag of vLLM": """
        --swap-space= --use-v2-block-manager --enable-reasoning --preemption-mode=
        --max-seq-len-to-capture= --guided-decoding-backend= --num-lookahead-slots=
    """,
}

# Flags that are harmless at these values, as vLLM's defaults are, and refused at others:
# the values -> (what is refused and what would work, the flags).
_HARMLESS_AT = (
    ("1", "layers are not split over devices; use --tensor-parallel-size or --replicas",
     "--pipeline-parallel-size"),
    ("1", "a context is not split over devices; use --tensor-parallel-size",
     "--decode-context-parallel-size --prefill-context-parallel-size "
     "--dcp-kv-cache-interleave-size --cp-kv-cache-interleave-size"),
    ("1", "one host serves; start `millrace serve` on each and put `millrace gateway` in front, "
     "or run the ranks of one model under torchrun", "--nnodes"),
    ("0", "one host serves; put `millrace gateway` in front of several", "--node-rank"),
    ("0 1", "one process serves a replica; use --replicas for more", "--api-server-count"),
    ("mp uni", "replicas and ranks are processes; leave it out",
     "--distributed-executor-backend --data-parallel-backend"),
    ("auto generate", "text is generated only; `--engine vllm` serves other kinds of models",
     "--runner --task"),
    ("auto none", "text is generated only; `--engine vllm` serves other kinds of models",
     "--convert"),
    ("auto hf fast", "tokenizer.json is read, in every mode; leave it out", "--tokenizer-mode"),
    ("auto hf", "config.json is read as Hugging Face writes it; leave it out", "--config-format"),
    ("auto vllm", "there is one implementation of the model; `--engine vllm` has others",
     "--model-impl"),
    ("auto", "the convolution keeps the model's type; set that of the state with "
     "--mamba-ssm-cache-dtype", "--mamba-cache-dtype"),
    ("raw_logprobs", "logprobs are of the model's own distribution; leave it out",
     "--logprobs-mode"),
    ("auto openai string", "the template decides how it takes content",
     "--chat-template-content-format"),
    ("assistant", "answers have the role assistant", "--response-role"),
    ("auto", "thinking is turned off by enable_thinking: false; leave it out",
     "--anthropic-disabled-thinking-effort"),
    ("none summary", "drafts are counted in /metrics", "--per-request-spec-decode-metrics"),
    ("0", "weights and caches stay on the device; use fewer with --max-num-seqs and "
     "--max-model-len, or --tensor-parallel-size",
     "--cpu-offload-gb --kv-offloading-size --offload-group-size"),
    ("auto", "weights and caches stay on the device; leave it out", "--offload-backend"),
    ("1", "weights and caches stay on the device; leave it out",
     "--offload-num-in-group --offload-prefetch-step"),
    ("0 0.0", "requests wait until their memory is there; leave it out", "--watermark"),
    ("1", "prompts run in every step; bound them with --mixed-prefill-tokens",
     "--prefill-schedule-interval"),
    ("0", "idle streams are kept alive by the tokens only; raise the proxy's timeout",
     "--sse-keep-alive-interval"),
    ("0", "cached prefixes are kept as long as there is room", "--prefix-cache-retention-interval"),
    ("0", "states are rounded to nearest; leave it out", "--mamba-cache-philox-rounds"),
    ("none", "answers carry no fingerprint; leave it out", "--fingerprint-mode"),
    ("1", "one step is planned at a time", "--num-scheduler-steps"),
)  # fmt: skip

# What is refused, and what to use instead -> the flags.
_REFUSED = {
    "LoRA adapters are not served; merge the adapter into the checkpoint, or use `--engine vllm`":
        "--enable-lora --lora-modules",
    "replicas are placed by --replicas, behind one gateway; for several hosts start "
    "`millrace serve` on each and put `millrace gateway` in front":
        "--data-parallel-rank --data-parallel-start-rank --data-parallel-size-local "
        "--data-parallel-address --data-parallel-hybrid-lb --data-parallel-external-lb "
        "--data-parallel-multi-port-external-lb --enable-elastic-ep --elastic-ep-max-dp-size",
    "every replica has its server; put `millrace gateway` in front of several hosts": "--headless",
    "block /docs and /openapi.json in front of the server": "--disable-fastapi-docs",
    "devices are picked by CUDA_VISIBLE_DEVICES": "--device-ids",
    "use numactl, as in `numactl --cpunodebind=0 --membind=0 millrace serve`":
        "--numa-bind --numa-bind-nodes --numa-bind-cpus",
    "experts are not moved between ranks, nor reported; use `--engine vllm`":
        "--enable-eplb --enable-return-routed-experts",
    "contexts and batches are not split over devices; use --tensor-parallel-size or --replicas":
        "--dcp-comm-backend --dcp-q-replicate --enable-hc-sp --enable-dbo --ubatch-size "
        "--dbo-decode-token-threshold --dbo-prefill-token-threshold",
    "code of others is not loaded; change Millrace itself, or use `--engine vllm`":
        "--worker-cls --worker-extension-cls --scheduler-cls --logits-processors "
        "--io-processor-plugin --middleware --model-class-overrides --tool-parser-plugin "
        "--reasoning-parser-plugin --additional-config",
    "engines that die are started again, see --max-engine-restarts":
        "--enable-fault-tolerance --fault-tolerance-config",
    "a stuck step is ended after --step-timeout seconds": "--watchdog-config",
    "profile with torch's profiler or Nsight around the process; --plan-log records steps":
        "--profiler-config --ray-workers-use-nsight --enable-layerwise-nvtx-tracing "
        "--collect-detailed-traces --enable-trace-replay",
    "prompts and answers apart are set by --role and --kv-transport": "--kv-transfer-config",
    "prefixes go to lower tiers by --host-cache-gb and --disk-cache": "--kv-offloading-backend",
    "only records of prompts go to other engines; use `--engine vllm`":
        "--ec-transfer-config --tokens-only --enable-scale-out --weight-transfer-config "
        "--aux-output-config",
    "routers read /load and /metrics; there are no cache events": "--kv-events-config",
    "weights and caches stay on the device; leave it out":
        "--cpu-offload-params --offload-params --kv-sharing-fast-prefill",
    "an engine that sleeps is a process that has ended, see --admin-key":
        "--sleep-mode-backend --sleep-mode-offload-cudagraph "
        "--sleep-preserve-parameter-names --enable-nccl-comm-suspend",
    "the model writes from left to right": "--diffusion-config",
    "set memory in bytes with --kv-cache-memory-bytes": "--num-gpu-blocks-override",
    "use --max-num-seqs, --max-num-batched-tokens and --max-queue":
        "--max-num-scheduled-tokens --max-num-active-seqs --max-num-queued-tokens "
        "--long-prefill-token-threshold-adaptive",
    "use --max-header-bytes": "--h11-max-incomplete-event-size",
    "listen with --host and --port, or --uds": "--grpc --grpc-port",
    "restart to load new certificates; ciphers are those of the system's OpenSSL":
        "--enable-ssl-refresh --ssl-ciphers",
    "give the model's directory; config.json is read there, and --hf-overrides changes it":
        "--hf-config-path --rope-scaling --rope-theta",
    "give --tokenizer a directory": "--tokenizer-revision",
    "the scheme is read from the checkpoint": "--quantization-config",
    "embeddings are not taken; send token ids": "--enable-prompt-embeds",
    "text is generated only; `--engine vllm` serves other kinds of models":
        "--pooler-config --enable-mm-embeds --mm-encoder-only",
    "texts and prompts are never logged; trace requests with --otlp-traces-endpoint":
        "--enable-log-outputs",
    "use --log-level and --log-format": "--log-config-file --logging-config",
    "errors are logged with their stack whenever they are ours": "--log-error-stack",
    "the buckets are fixed, see docs/operations.md": "--custom-histogram-buckets",
    "send chat_template_kwargs, or use --chat-template":
        "--trust-request-chat-template --reasoning-effort-map",
    "text only": "--trust-request-mm-kwargs",
    "leave tools out of such requests": "--exclude-tools-when-tool-choice-none",
    "set strict in a tool's definition": "--tool-strict-level",
    "the client runs its tools": "--tool-server",
    "structured outputs are matched by llguidance; leave it out": "--structured-outputs-config",
    "texts are not marked": "--watermark-config",
    "answers carry no fingerprint": "--fingerprint-value",
    "states are rounded to nearest; leave it out": "--enable-mamba-cache-stochastic-rounding",
    "no mask is returned; ask for logprobs": "--return-sampling-mask",
    "safetensors are read by one loader; leave it out": "--model-loader-extra-config",
}  # fmt: skip

# Values of options here that vLLM takes and Millrace does not: why, and what works.
_WHOLE = "the model's whole context is the default; if it does not fit, the start says what does"
_HALF = "float16 is not run; use bfloat16"
REFUSED_VALUES: Mapping[tuple[str, str], str] = {
    ("--max-model-len", "auto"): _WHOLE,
    ("--max-model-len", "-1"): _WHOLE,
    ("--dtype", "float16"): _HALF,
    ("--dtype", "half"): _HALF,
    ("--dtype", "float"): "use float32",
}

Fate = Literal["harmless", "refused"]


class Row(NamedTuple):
    """One flag. words: why it has no effect, or why it is refused and what works instead.

    takes_value: whether a value follows. harmless_at: values at which a refused flag is accepted.
    """

    flag: str
    fate: Fate
    words: str
    takes_value: bool = False
    harmless_at: tuple[str, ...] = ()


def _rows() -> Iterator[Row]:
    for words, names in _HARMLESS.items():
        for name in names.split():
            yield Row(name.removesuffix("="), "harmless", words, name.endswith("="))
    for values, words, names in _HARMLESS_AT:
        for name in names.split():
            yield Row(name, "refused", words, True, tuple(values.split()))
    for words, names in _REFUSED.items():
        for name in names.split():
            yield Row(name, "refused", words)


TABLE: Mapping[str, Row] = {row.flag: row for row in _rows()}


def positive_form(flag: str) -> tuple[str, bool] | None:
    """Of a flag that turns another off: that other one, and True where it is written `--no-...`.

    vLLM writes the opposite of `--x` as `--no-x`, and that of `--enable-x` as `--disable-x` too.
    """
    if flag.startswith("--no-"):
        return f"--{flag[5:]}", True
    if flag.startswith("--disable-"):
        return f"--enable-{flag[10:]}", False
    if flag.startswith("--enable-"):
        return f"--disable-{flag[9:]}", False
    return None


def own_keywords(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Of the keywords of vLLM's `LLM`, those that are not in these tables, and a note for each of
    the others that has no effect. Raises ConfigError for what is refused.
    """
    kept: dict[str, Any] = {}
    notes = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        row = TABLE.get(flag)
        if flag in PARTS:
            if value is not None:
                option, key = PARTS[flag]
                whole = option.removeprefix("--").replace("-", "_")
                kept[whole] = {**(options.get(whole) or {}), **(kept.get(whole) or {}), key: value}
        elif flag == "--data-parallel-size":
            if value not in (None, 1):
                raise ConfigError(
                    f"{name} {value!r}: an LLM is one replica; use `millrace serve --replicas`"
                )
        elif flag == "--reasoning-parser":
            notes.append(f"{name} (the text of LLM.chat holds the reasoning)")
        elif row is None:
            if value is not None and name not in kept:  # None: the default
                kept[name] = value
        elif row.fate == "harmless":
            notes.append(f"{name} ({row.words})")
        elif _changes_nothing(flag, value, row):
            notes.append(f"{name} (as it is anyway)")
        else:
            raise ConfigError(f"{name} {value!r}: {row.words}")
    return kept, notes


_OUTPUT_OPTIONS = ("disable_any_whitespace", "disable_additional_properties")


def structured_output_options(config: Mapping[str, Any] | None) -> dict[str, bool]:
    """What `LLM(structured_outputs_config=...)` sets for every request."""
    return {name: True for name in _OUTPUT_OPTIONS if (config or {}).get(name)}


def _changes_nothing(flag: str, value: Any, row: Row) -> bool:
    """Whether a refused keyword holds a value at which it has no effect."""
    if flag == "--structured-outputs-config" and isinstance(value, Mapping):
        return not any(value[key] for key in value.keys() - {"backend", *_OUTPUT_OPTIONS})
    return value in (None, False, {}, []) or str(value) in row.harmless_at


# --- docs/vllm_flags.md ------------------------------------------------------------------------

_OPENING = f"""# Flags of vLLM

Every flag of vLLM {VLLM_VERSION}'s `serve`, and what `millrace serve` makes of it. Underscores may
stand for dashes, sizes may end in k, m, g, t (thousands) or K, M, G, T (powers of 1,024), lists may
follow one flag, and JSON may be given in parts (`--speculative-config.method mtp`). `--no-x` and
`--disable-x` turn off what `--x` and `--enable-x` turn on. `python -m millrace.vllm_flags` prints
this page.
"""


def page() -> str:
    """These tables as a page of the documents."""
    parts = [_OPENING]
    parts += ["## Options here too", ", ".join(f"`{flag}`" for flag in sorted(SAME)) + "."]
    other = [(f"`{flag}`", f"`{name}`") for flag, name in SYNONYMS.items()]
    other += [(f"`{flag}`", f"`{key}` in `{option}`") for flag, (option, key) in PARTS.items()]
    parts += ["## Other names", _table(("flag", "is"), other)]
    parts += [
        "## Without effect",
        "Accepted, with one line at the start that names them.",
        _by_words("harmless", ("why", "flags")),
        "## Refused",
        "The start ends with a line that says why, unless the value is one of those in brackets.",
        _by_words("refused", ("why, and what works", "flags")),
        "Of options that are here too, some values are refused:",
        _table(
            ("why, and what works", "value"),
            [(why, f"`{flag} {value}`") for (flag, value), why in REFUSED_VALUES.items()],
        ),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _by_words(fate: Fate, titles: tuple[str, str]) -> str:
    found: dict[str, list[str]] = {}
    for row in TABLE.values():
        if row.fate == fate:
            but = f" ({', '.join(row.harmless_at)})" if row.harmless_at else ""
            found.setdefault(row.words.replace("|", "\\|"), []).append(f"`{row.flag}`{but}")
    return _table(titles, [(words, ", ".join(flags)) for words, flags in found.items()])


def _table(titles: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in [titles, ("---", "---"), *rows]]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
