"""Checks of the model: whether its directory is complete, and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from millrace.config import EngineArgs, EngineConfig, ModelFacts, resolve
from millrace.doctor.finding import Finding
from millrace.errors import UserError
from millrace.model_lookup import find_model, shipped_models

if TYPE_CHECKING:
    from millrace.model.cache_spec import CacheSpec
    from millrace.model.config import ModelConfig

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
LARGE = 8 * GiB  # of weights, from which on it is said how many GPUs they need
H200_BYTES = 143_771 * MiB
_WANTED = ("tokenizer.json", "tokenizer_config.json")


def shipped() -> Iterator[Finding]:
    """The models that can be served by name."""
    found = shipped_models()
    yield Finding("model", "by name", ", ".join(sorted(found)) or "none ships with this install")


def model(args: EngineArgs) -> Iterator[Finding]:
    """The directory, its files, its size against the memory, and the resolved options."""
    from millrace.model.config import read_config

    try:
        directory = find_model(args.model, args.revision, args.download_dir)
        config = read_config(directory, args.hf_overrides)
    except UserError as error:
        yield Finding("model", args.model, str(error), "fail")
        return
    yield Finding("model", "directory", str(directory))
    yield Finding(
        "model", "shape", f"{config.family}, {config.num_layers} layers of {config.hidden_size}, "
        f"{config.dtype}{_quantized(config)}, {config.max_positions} positions, "
        f"{config.mtp_layers} MTP layers",
    )  # fmt: skip
    yield from _files(Path(args.tokenizer) if args.tokenizer else directory)
    yield _weights(directory, args, _fp8_draft_head(config, args))
    yield from _settled(args, config)


def _quantized(config: ModelConfig) -> str:
    found = config.quantization
    return "" if found.method == "none" else f" and {found.format.name}"


def _facts(config: ModelConfig) -> ModelFacts:
    return ModelFacts(config.max_positions, config.dtype, config.mtp_layers)


def _fp8_draft_head(config: ModelConfig, args: EngineArgs) -> int:
    """Bytes of the FP8 output head for drafts, of all ranks; 0 if there is none.

    0 also for options that cannot be resolved, which are a finding of their own.
    """
    import torch

    try:
        settled = resolve(args, _facts(config), cuda=torch.cuda.is_available())
    except UserError:
        return 0
    default = config.quantization.method == "fp8" and settled.device == "cuda"
    wanted = default if settled.draft_fp8 is None else settled.draft_fp8
    return (
        config.vocab_size * config.hidden_size
        if settled.speculation.head == "mtp" and wanted
        else 0
    )


def _files(directory: Path) -> Iterator[Finding]:
    for name in _WANTED:
        found = (directory / name).is_file()
        yield Finding("model", name, "found" if found else "missing", "ok" if found else "fail")


def _weights(directory: Path, args: EngineArgs, more: int) -> Finding:
    """more: bytes in addition to those of the files."""
    import torch

    files = sorted(directory.glob("*.safetensors"))
    if not files:
        fine = args.load_format == "dummy"
        advice = "" if fine else "download them, or try --load-format dummy"
        return Finding("model", "weights", "no *.safetensors", "ok" if fine else "fail", advice)
    size = (sum(file.stat().st_size for file in files) + more) / args.tensor_parallel_size
    drafts = " and an FP8 head for drafts" if more else ""
    if torch.cuda.is_available() and args.device != "cpu":
        room = torch.cuda.mem_get_info()[1] * args.gpu_memory_utilization
    else:
        from millrace.doctor.machine import free_memory

        room = free_memory()
    value = (
        f"{size / GiB:.2f} GiB a rank in {len(files)} files{drafts}, {room / GiB:.1f} GiB available"
    )
    if size < room:
        return Finding("model", "weights", value)
    return Finding("model", "weights", value, "fail", "raise --tensor-parallel-size")


def _settled(args: EngineArgs, config: ModelConfig) -> Iterator[Finding]:
    import torch

    try:
        settled = resolve(args, _facts(config), cuda=torch.cuda.is_available())
        spec = _cache_spec(settled, config)
    except UserError as error:
        yield Finding("model", "options", str(error), "fail")
        return
    yield Finding(
        "model", "options", f"{settled.dtype} on {settled.device}, max_model_len "
        f"{settled.max_model_len}, max_num_seqs {settled.max_num_seqs}, "
        f"{settled.drafts} draft tokens",
    )  # fmt: skip
    yield _size(settled, config)
    yield _cache(settled, spec)
    yield from _ranks(settled, config, spec)


def _size(settled: EngineConfig, config: ModelConfig) -> Finding:
    """How many weights there are, and what they take of a rank's memory."""

    from millrace.model.build import count_weights, rank_bytes

    device, ranks = settled.device, settled.args.tensor_parallel_size
    whole = settled.args.enable_expert_parallel and config.experts is not None
    try:
        size = rank_bytes(
            config,
            settled.dtype,
            ranks,
            mtp=settled.speculation.head == "mtp",
            kept=device == "cuda",
            whole_experts=whole and ranks > 1,
        )
    except UserError as error:
        return Finding("model", "parameters", str(error), "fail")
    total = count_weights(config)
    active = f", {_count(total - config.idle_weights)} active" if config.experts else ""
    value = f"{_count(total)}{active}, {size / GiB:.2f} GiB a rank on {device}"
    return Finding("model", "parameters", value)


def _count(weights: int) -> str:
    return f"{weights / 1e9:.2f} B" if weights >= 1e9 else f"{weights / 1e6:.2f} M"


def _cache(settled: EngineConfig, spec: CacheSpec) -> Finding:
    """What requests and cached prompts take of a rank's memory."""
    ranks = settled.args.tensor_parallel_size
    token, slot = spec.page_bytes(ranks) / settled.page_size, spec.slot_bytes(ranks)
    resume = "prompts resume at any page"
    if spec.needs_snapshots:
        resume = f"{spec.snapshot_bytes(ranks) / MiB:.2f} MiB a snapshot"
    value = f"{token / KiB:.2f} KiB a token, {slot / MiB:.2f} MiB a sequence, {resume}"
    return Finding("model", "cache", value if ranks == 1 else f"{value}, on each rank")


def _cache_spec(settled: EngineConfig, config: ModelConfig) -> CacheSpec:
    """The memory of the layers, those of a drafter of its own among them. Raises UserError if there
    is no such drafter."""
    from millrace.model.cache_spec import CacheOptions
    from millrace.model.drafters.source import DraftSource

    spec, args = config.cache_spec(CacheOptions.of(settled)), settled.args
    if not settled.speculation.model:
        return spec
    directory = find_model(args.model, args.revision, args.download_dir)
    drafter = DraftSource.of(settled, config, directory)
    return spec if drafter is None else drafter.extended(spec)


def _ranks(settled: EngineConfig, config: ModelConfig, spec: CacheSpec) -> Iterator[Finding]:
    """What a model that may not fit needs on 1, 2, 4 and 8 GPUs: this machine's, or else H200s."""
    import torch

    from millrace.model.work.fit import formats_in_memory, rank_needs, summary

    try:
        formats = formats_in_memory(config, settled.dtype, kept=True)
    except UserError:
        return
    drafts = settled.speculation.head == "mtp"
    needs = rank_needs(config, formats, spec, settled.max_model_len, drafts=drafts)
    if not needs or needs[0].weights < LARGE:
        return
    memory, gpu = H200_BYTES, "an H200"
    if torch.cuda.is_available():
        memory, gpu = torch.cuda.mem_get_info()[1], torch.cuda.get_device_name()
    room = memory * settled.args.gpu_memory_utilization
    yield Finding("model", "ranks", summary(needs, room, gpu))
