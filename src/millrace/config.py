"""The options of an engine, and the configuration that they are resolved to.

`EngineArgs` has the options, with vLLM's names. `resolve` is a pure function from them and a few
facts of the model to a frozen `EngineConfig`. Sizes that depend on free memory (pages, snapshots)
are not here: `millrace.runtime.memory` plans them on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from millrace.errors import ConfigError
from millrace.speculation import (
    Speculation,
    SpeculativeConfig,
    named_speculation,
    resolve_speculation,
)

DType = Literal["auto", "float32", "bfloat16"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "fp8", "fp8_e4m3"]
StateDType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "safetensors", "dummy"]
Device = Literal["auto", "cpu", "cuda"]
Quantization = Literal["fp8", "gptq", "awq", "auto-round", "compressed-tensors", "modelopt", "none"]

# A step of 256 decode rows of the 27B takes 50 ms on an H200, and 75 ms more with 1,536 prompt
# tokens. In a steady state of 768 tokens in and 384 out, fewer than 1,000 come per step: with 2,048
# the throughput is the same, and ITL p99 is 147 ms instead of 125.
GPU_MIXED_TOKENS = 1536
GPU_MOST_TOKENS = 65535  # of a step: the largest grid of kernels with one block per token
# Tokens of one long prompt per step: 60 ms on such an H200, tens of ms of a small model on a CPU.
# A prompt that arrives meanwhile waits until the step has ended. With twice as many a token would
# cost 4% less.
LONG_TOKENS = 1024
# A prompt stops for each of its snapshots. The additional step costs about as much as so many
# tokens.
GPU_SNAPSHOT_DISTANCE, CPU_SNAPSHOT_DISTANCE = 128, 64
# Steps with prompts are cut to these numbers of tokens if possible: a GEMM computes full tiles of
# TILE tokens.
TILE = 128
SMALL_BUCKETS = (16, 32, 64)
ROLE_HOST_CACHE_GB = 4.0
# Rows of the recurrent window where it begins at fixed positions. Drafts end with it: with fewer
# rows more drafts are lost, with more rows each token reads more, and snapshots are larger.
INVARIANT_WINDOW = 16
# A sum over more ranks depends on the algorithm, which is chosen by size.
INVARIANT_RANKS = {"cpu": 2, "cuda": 1}


class EngineArgs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one engine, with vLLM's names. Help texts are in `HELP`."""

    model: str
    served_model_name: list[str] = []
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    download_dir: str | None = None
    hf_overrides: dict[str, Any] = {}
    quantization: Quantization | None = None
    dtype: DType = "auto"
    device: Device = "auto"
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    mixed_prefill_tokens: int | None = None
    long_prefill_token_threshold: int | None = None
    max_num_partial_prefills: int | None = None
    max_long_partial_prefills: int | None = None
    block_size: int = 16
    kv_cache_dtype: KVCacheDType = "auto"
    mamba_ssm_cache_dtype: StateDType = "auto"
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    snapshot_interval: int | None = None
    snapshot_distance: int | None = None
    num_snapshots: int | None = None
    host_cache_gb: float = 0.0
    disk_cache: str | None = None
    disk_cache_gb: float = 16.0
    role: Literal["prefill", "decode", "both"] | None = None
    kv_transfer_host: str = "127.0.0.1"
    kv_transfer_port: int = 0
    kv_transport: Literal["auto", "shm", "tcp", "nixl", "cuda_ipc"] = "auto"
    kv_lease: float = 30.0
    kv_load_failure_policy: Literal["fail", "recompute"] = "fail"
    speculative_config: SpeculativeConfig | None = None
    tensor_parallel_size: int = 1
    enable_expert_parallel: bool = False
    report_expert_load: bool = False
    async_scheduling: bool | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enforce_eager: bool = False
    prefill_graphs: bool = True
    batch_invariant: bool = False
    seed: int = 0
    max_queue: int = 4096
    max_logprobs: int = 20
    step_timeout: float = 300.0
    plan_log: str | None = None
    debug: bool = False


HELP: Mapping[str, str] = {
    "model": "Directory of a Hugging Face checkpoint, the id of one in its cache, or the name of a "
    "shipped model.",
    "served_model_name": "Name(s) of the model in the API (default: the model).",
    "tokenizer": "Directory with tokenizer.json (default: the model's).",
    "skip_tokenizer_init": "Load no tokenizer: prompts and answers are token ids.",
    "revision": "Revision of a model in the Hugging Face cache: branch, tag or commit "
    "(default: main).",
    "download_dir": "Hugging Face cache to look for models in (default: HF_HUB_CACHE, or hub in "
    "HF_HOME).",
    "hf_overrides": "JSON that replaces entries of config.json, such as "
    '{"max_position_embeddings": 65536}.',
    "quantization": "What the checkpoint must be: fp8, gptq, awq, auto-round, compressed-tensors "
    "or modelopt, none for weights that are not quantized (default: any).",
    "dtype": "Data type of weights and activations (auto: the checkpoint's).",
    "device": "Where to run (auto: cuda if there is one).",
    "load_format": "dummy: seeded random weights instead of those of the checkpoint.",
    "max_model_len": "Longest sequence, prompt and output, in tokens.",
    "max_num_seqs": "Requests that run at the same time; each has a recurrent state.",
    "max_num_batched_tokens": "Tokens that one step may compute.",
    "mixed_prefill_tokens": "Prompt tokens of a step that also has decode rows, so that streams do "
    "not stall (default: 2048 on a GPU, else max_num_batched_tokens).",
    "long_prefill_token_threshold": "A prompt with more tokens left to compute is long; a step "
    "computes at most so many of it. 0: no prompt is long (default: 2048 on a GPU, else 1024).",
    "max_num_partial_prefills": "Prompts that may be computed chunk by chunk at the same time "
    "(default: any number).",
    "max_long_partial_prefills": "How many of these may be long; short ones then overtake "
    "(default: 1).",
    "block_size": "Tokens in a page of the KV cache.",
    "kv_cache_dtype": "Data type of keys and values (auto: the model's; fp8 has scale 1.0).",
    "mamba_ssm_cache_dtype": "Data type of the recurrent state (auto: float32).",
    "gpu_memory_utilization": "Share of a GPU's memory that the engine may use; on a CPU see "
    "kv_cache_memory_bytes.",
    "kv_cache_memory_bytes": "Bytes for states, pages and snapshots together (default on a CPU: "
    "what max_num_seqs sequences of max_model_len tokens need, at most 4 GiB).",
    "enable_prefix_caching": "Reuse pages and states of prompts that begin with the same tokens.",
    "snapshot_interval": "Also take snapshots at multiples of so many tokens (default: none).",
    "snapshot_distance": "Least distance of snapshots of one prompt, in tokens; each snapshot "
    "costs the prompt a step (default: 128 on a GPU, else 64; at most the interval).",
    "num_snapshots": "Snapshots of the prefix cache (default: by memory).",
    "host_cache_gb": "GiB of the host's memory for cached prefixes that do not stay on the device, "
    "for all ranks together (0: none).",
    "disk_cache": "Directory for cached prefixes; they survive a restart. It holds users' prompts "
    "(default: none).",
    "disk_cache_gb": "GiB that --disk-cache may take.",
    "role": "Part in serving prompts and answers apart: prefill computes prompts for others, "
    "decode answers prompts that others computed, both does either (default: none of it). It "
    "needs host_cache_gb (then 4 by default).",
    "kv_transfer_host": "Address where other engines take the records of prompts; they are not "
    "asked for a key, only for a record's name.",
    "kv_transfer_port": "Port for that; other ranks take those behind it; 0 takes free ones.",
    "kv_transport": "How records come here. shm: out of the other engine's memory, on one host; "
    "tcp; nixl: both sides need it then (pip install 'millrace[pd]'); cuda_ipc: "
    "records lie in host_cache_gb of the GPU's memory, for engines of one host that all use it; "
    "auto: shm where that is possible, else tcp.",
    "kv_lease": "Seconds for which the record of a prompt is kept for whoever may take it.",
    "kv_load_failure_policy": "What becomes of a request whose record does not come: fail, or "
    "recompute its prompt.",
    "speculative_config": 'JSON, such as {"method": "mtp", "num_speculative_tokens": 1}; methods: '
    'mtp, ngram, suffix, eagle3 and draft_model (these with "model"); with "lookup": "suffix" rows '
    'look up drafts before the head makes them; "quantization": "fp8" or "none" for the output '
    "head that drafts of mtp use (default: fp8 if the weights are fp8).",
    "tensor_parallel_size": "Ranks that share the model.",
    "enable_expert_parallel": "Of a mixture of experts, each rank has some experts in full, not a "
    "part of every expert.",
    "report_expert_load": "Count the tokens that each expert of a mixture gets, for /metrics and "
    "LLM.expert_load().",
    "async_scheduling": "Plan a step while the step before runs (default: on a GPU).",
    "scheduling_policy": "fcfs: in order of arrival; priority: by priority, then arrival.",
    "enforce_eager": "Use no CUDA graphs.",
    "prefill_graphs": "Run steps with prompts as CUDA graphs, too (not yet where ranks share "
    "a model).",
    "batch_invariant": "Tokens of a request depend on the request alone, whatever runs beside it, "
    "is cached, drafted or preempted, or was generated elsewhere (slower).",
    "seed": "Seed for requests that have none.",
    "max_logprobs": "Most log-probabilities that a request may ask for at each position; -1: the "
    "whole vocabulary.",
    "max_queue": "Requests that may wait; more are refused with status 429.",
    "step_timeout": "Seconds after which a step counts as stuck; the engine is then ended, with "
    "its stacks in the log. 0: no limit.",
    "plan_log": "File for the plan and result of every step, for replay.",
    "debug": "Check every invariant after each step, and fill freed memory with NaN (slow).",
}


class ModelFacts(msgspec.Struct, frozen=True):
    """The facts of a model that `resolve` needs."""

    max_position_embeddings: int
    checkpoint_dtype: str  # "bfloat16" or "float32"
    mtp_layers: int


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an engine knows before it sees the free memory of its device.

    drafts: k, drafts verified per step at most; a step brings 1 .. k + 1 tokens per row.
    speculation: how they are made. draft_fp8: the head's drafts use an FP8 copy of the output head;
    None: if the weights stay FP8 on the device. window: W, rows of the recurrent window.
    snapshot_interval: 0: no snapshots at fixed distances. long_prefill_token_threshold: 0: no
    prompt is long. max_num_partial_prefills: 0: no limit.
    """

    args: EngineArgs
    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    kv_dtype: Literal["float32", "bfloat16", "float8_e4m3fn"]
    state_dtype: Literal["float32", "bfloat16", "float16"]
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    mixed_prefill_tokens: int
    long_prefill_token_threshold: int
    max_num_partial_prefills: int
    max_long_partial_prefills: int
    page_size: int
    drafts: int
    speculation: Speculation
    draft_fp8: bool | None
    window: int
    snapshot_interval: int
    snapshot_distance: int
    host_cache: int
    disk_cache: int
    async_scheduling: bool

    @property
    def max_pages_per_request(self) -> int:
        """Pages that the longest sequence needs, its last unverified drafts included."""
        return -(-(self.max_model_len + self.drafts + 1) // self.page_size)

    @property
    def most_mixed_tokens(self) -> int:
        """Tokens of the largest step that has decode rows and prompts."""
        rows = self.max_num_seqs * (self.drafts + 1)
        return min(self.max_num_batched_tokens, self.mixed_prefill_tokens + rows)


def token_buckets(most: int) -> list[int]:
    """The numbers of tokens that steps are cut to, ascending; the last is the first >= `most`."""
    last = bucket_above(most)
    small = [bucket for bucket in SMALL_BUCKETS if bucket <= last]
    return [*small, *range(TILE, last + 1, TILE)]


def bucket_above(tokens: int) -> int:
    """The least bucket that `tokens` fit into."""
    found = next((bucket for bucket in SMALL_BUCKETS if bucket >= tokens), None)
    return found or -(-tokens // TILE) * TILE


def bucket_below(tokens: int) -> int:
    """The largest bucket of at most `tokens`; 0 if there is none."""
    if tokens >= TILE:
        return tokens // TILE * TILE
    return max((bucket for bucket in SMALL_BUCKETS if bucket <= tokens), default=0)


def resolve(args: EngineArgs, facts: ModelFacts, cuda: bool) -> EngineConfig:
    """Resolve every option. cuda: whether there is a CUDA device.

    Raises ConfigError with the option, its value and a value that works.
    """
    _check_choices(args)
    if args.device == "cuda" and not cuda:
        raise ConfigError("device cuda: no CUDA device is visible; use --device cpu")
    device: Literal["cpu", "cuda"] = "cuda" if cuda and args.device != "cpu" else "cpu"
    _check_cuda_ipc(args, device)
    _check_invariant(args, device)
    dtype = _dtype(args, facts)
    speculation = resolve_speculation(args.speculative_config, facts.mtp_layers)
    drafts = speculation.drafts
    if speculation.model and args.tensor_parallel_size > 1:
        raise ConfigError(
            f"speculative_config.method {speculation.head}: not yet with tensor_parallel_size "
            "above 1; mtp, ngram and suffix are"
        )
    max_len = _max_model_len(args, facts)
    max_seqs = _or(args.max_num_seqs, 256 if device == "cuda" else 64)
    batched = _or(args.max_num_batched_tokens, 8192 if device == "cuda" else 2048)
    mixed = min(batched, GPU_MIXED_TOKENS) if device == "cuda" else batched
    distance = GPU_SNAPSHOT_DISTANCE if device == "cuda" else CPU_SNAPSHOT_DISTANCE
    distance = min(distance, args.snapshot_interval or distance)
    _positive("max_num_seqs", max_seqs)
    if batched < max_seqs * (drafts + 1):
        raise ConfigError(
            f"max_num_batched_tokens {batched} is too small for max_num_seqs {max_seqs} with "
            f"{drafts} draft tokens; at least {max_seqs * (drafts + 1)} works"
        )
    if device == "cuda" and batched > GPU_MOST_TOKENS:
        raise ConfigError(
            f"max_num_batched_tokens {batched}: a GPU takes at most {GPU_MOST_TOKENS}"
        )
    return EngineConfig(
        args=args,
        device=device,
        dtype=dtype,
        kv_dtype=_kv_dtype(args, dtype),
        state_dtype=_state_dtype(args),
        max_model_len=max_len,
        max_num_seqs=max_seqs,
        max_num_batched_tokens=batched,
        mixed_prefill_tokens=min(batched, _or(args.mixed_prefill_tokens, mixed)),
        long_prefill_token_threshold=_or(args.long_prefill_token_threshold, LONG_TOKENS),
        max_num_partial_prefills=_or(args.max_num_partial_prefills, 0),
        max_long_partial_prefills=_or(args.max_long_partial_prefills, 1),
        page_size=args.block_size,
        drafts=drafts,
        speculation=speculation,
        draft_fp8=_draft_fp8(args),
        window=INVARIANT_WINDOW if args.batch_invariant else max(16, 3 * (drafts + 1)),
        snapshot_interval=args.snapshot_interval or 0,
        snapshot_distance=_or(args.snapshot_distance, distance),
        host_cache=int(_host_cache_gb(args) * 2**30),
        disk_cache=int(args.disk_cache_gb * 2**30) if args.disk_cache else 0,
        async_scheduling=device == "cuda"
        if args.async_scheduling is None
        else args.async_scheduling,
    )


def _check_choices(args: EngineArgs) -> None:
    if args.block_size not in (1, 2, 4, 8, 16, 32, 64, 128):
        raise ConfigError(f"block_size {args.block_size}: use a power of two from 1 to 128")
    if not 0.0 < args.gpu_memory_utilization <= 1.0:
        raise ConfigError(f"gpu_memory_utilization {args.gpu_memory_utilization}: use (0, 1]")
    if args.tensor_parallel_size < 1:
        raise ConfigError(f"tensor_parallel_size {args.tensor_parallel_size}: use 1 or more")
    for name in ("mixed_prefill_tokens", "max_num_partial_prefills", "max_long_partial_prefills"):
        if (value := getattr(args, name)) is not None:
            _positive(name, value)
    partial, long = args.max_num_partial_prefills, args.max_long_partial_prefills
    if partial is not None and long is not None and long > partial:
        raise ConfigError(
            f"max_long_partial_prefills {long}: use at most max_num_partial_prefills {partial}"
        )
    for name in (
        "long_prefill_token_threshold", "snapshot_interval", "snapshot_distance",
        "num_snapshots", "kv_cache_memory_bytes",
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 0:
            raise ConfigError(f"{name} {value}: use 0 or more")
    if args.snapshot_interval and args.snapshot_interval % args.block_size:
        raise ConfigError(
            f"snapshot_interval {args.snapshot_interval}: use a multiple of block_size "
            f"{args.block_size}"
        )
    _check_tiers(args)
    _check_role(args)
    _positive("max_queue", args.max_queue)
    if args.max_logprobs < -1:
        raise ConfigError(f"max_logprobs {args.max_logprobs}: use 0 or more, or -1 for all")
    if args.step_timeout != 0.0 and not 1.0 <= args.step_timeout < float("inf"):
        raise ConfigError(f"step_timeout {args.step_timeout}: use 1 or more, or 0 for no limit")


def _check_tiers(args: EngineArgs) -> None:
    for name in ("host_cache_gb", "disk_cache_gb"):
        if not 0 <= (value := getattr(args, name)) < float("inf"):
            raise ConfigError(f"{name} {value:g}: use GiB from 0 on")
    if (args.host_cache_gb or args.disk_cache) and not args.enable_prefix_caching:
        raise ConfigError(
            "host_cache_gb and disk_cache keep cached prefixes: leave prefix caching on"
        )
    if args.disk_cache and not args.disk_cache_gb:
        raise ConfigError("disk_cache_gb 0: give the GiB that disk_cache may take, as 16")


def _check_role(args: EngineArgs) -> None:
    if args.role is None:
        return
    if not args.enable_prefix_caching:
        raise ConfigError(f"role {args.role}: records are cached prefixes; leave prefix caching on")
    if args.num_snapshots == 0:
        raise ConfigError(f"role {args.role}, num_snapshots 0: use 2 or more, or leave it out")
    if not 0 < args.kv_lease < float("inf"):
        raise ConfigError(f"kv_lease {args.kv_lease:g}: use seconds above 0")
    if not 0 <= args.kv_transfer_port <= 65536 - args.tensor_parallel_size:
        raise ConfigError(
            f"kv_transfer_port {args.kv_transfer_port}: use 0, or one with a port behind it for "
            "each rank"
        )


def _check_cuda_ipc(args: EngineArgs, device: str) -> None:
    if args.kv_transport != "cuda_ipc":
        return
    if device == "cpu":
        raise ConfigError("kv_transport cuda_ipc: the device is a CPU; use shm, or auto")
    if args.disk_cache:
        raise ConfigError(
            "kv_transport cuda_ipc: files are written out of the host's memory; leave disk_cache "
            "out, or use shm"
        )


def _check_invariant(args: EngineArgs, device: Literal["cpu", "cuda"]) -> None:
    if not args.batch_invariant:
        return
    most = INVARIANT_RANKS[device]
    if args.tensor_parallel_size > most:
        raise ConfigError(
            f"batch_invariant, tensor_parallel_size {args.tensor_parallel_size}: not yet with more "
            f"than {most} on this device; use {most}, and --replicas for more"
        )


def _host_cache_gb(args: EngineArgs) -> float:
    """Records go through the host's memory."""
    return args.host_cache_gb or (ROLE_HOST_CACHE_GB if args.role is not None else 0.0)


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} {value}: use 1 or more")


def _dtype(args: EngineArgs, facts: ModelFacts) -> Literal["float32", "bfloat16"]:
    wanted = facts.checkpoint_dtype if args.dtype == "auto" else args.dtype
    return "float32" if wanted == "float32" else "bfloat16"


def _state_dtype(args: EngineArgs) -> Literal["float32", "bfloat16", "float16"]:
    return "float32" if args.mamba_ssm_cache_dtype == "auto" else args.mamba_ssm_cache_dtype


def _kv_dtype(
    args: EngineArgs, dtype: Literal["float32", "bfloat16"]
) -> Literal["float32", "bfloat16", "float8_e4m3fn"]:
    if args.kv_cache_dtype in ("fp8", "fp8_e4m3"):
        return "float8_e4m3fn"
    if args.kv_cache_dtype == "auto":
        return dtype
    return "float32" if args.kv_cache_dtype == "float32" else "bfloat16"


def _draft_fp8(args: EngineArgs) -> bool | None:
    spec = args.speculative_config
    wanted = msgspec.UNSET if spec is None else spec.quantization
    if wanted not in (msgspec.UNSET, None, "none", "fp8"):
        raise ConfigError(f'speculative_config.quantization "{wanted}": use "fp8" or "none"')
    return None if wanted is msgspec.UNSET else wanted == "fp8"


def _max_model_len(args: EngineArgs, facts: ModelFacts) -> int:
    limit = facts.max_position_embeddings
    if args.max_model_len is None:
        return limit
    if args.max_model_len < 2:
        raise ConfigError(
            f"max_model_len {args.max_model_len}: use 2 or more, for a prompt and its answer"
        )
    if args.max_model_len > limit:
        raise ConfigError(
            f"max_model_len {args.max_model_len} is beyond the model's {limit} positions; "
            f"at most {limit} works"
        )
    return args.max_model_len


def engine_args(**options: Any) -> EngineArgs:
    """EngineArgs from keyword options. Raises ConfigError for unknown names and wrong types.

    "model": "Directory of a Hugging Face checkpoint, the id of one in its cache, or the name of a "
    "shipped model.",
    "served_model_name": "Name(s) of the model in the API (default: the model).",
    """
    known = {field.name: field for field in msgspec.structs.fields(EngineArgs)}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    if isinstance(options.get("served_model_name"), str):
        options["served_model_name"] = [options["served_model_name"]]
    if isinstance(spec := options.get("speculative_config"), Mapping):
        options["speculative_config"] = named_speculation(spec)
    for name, value in options.items():
        choices = get_args(known[name].type)
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise ConfigError(f"{name} {value!r}: use one of {', '.join(choices)}")
    try:
        return msgspec.convert(options, EngineArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"engine options: {error}") from None
