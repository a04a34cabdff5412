"""The memory that a GPU's largest steps need beyond weights and caches, measured by running them.

The steps run on scratch caches of one page: a block table of zeros sends every key and value to the
null page, and all decode rows use the null slot. So only the workspace is allocated, which is
measured, and what the steps compile is compiled before the first request. All ranks do the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import msgspec
import torch

from millrace.config import EngineConfig, token_buckets
from millrace.protocol import Admission, Chunk, StepPlan
from millrace.runtime.step.cuda_graphs import GraphSizes, bucket_sizes
from millrace.runtime.step.runner import Runner

SHORT = 16  # tokens of a short prompt
SEVERAL = 3  # prompts that make several
GRAPH_BYTES = 8 << 20  # of the driver's, for each graph: an allowance, for models of 64 layers
BETWEEN = (16, 24, 32, 48, 96)  # tokens, beside multiples of 64


def workspace_bytes(
    config: EngineConfig,
    build: Callable[[EngineConfig], Runner],
    wait_for_device: Callable[[], None],
) -> int:
    """Bytes that the largest steps and the graphs need together, on the current GPU.

    build: a runner with caches of one page for the slots that a config asks for. wait_for_device:
    has a limit, so it ends if ranks have failed.
    """
    _collect(wait_for_device)
    runner = build(_few_slots(config))
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run_largest_steps(config, runner)
    wait_for_device()
    steps = torch.cuda.max_memory_reserved() - before
    graphs = 0
    if not config.args.enforce_eager:
        _collect(wait_for_device)
        before = torch.cuda.memory_reserved()
        runner.capture(config, largest_only=True)
        _collect(wait_for_device)
        graphs = torch.cuda.memory_reserved() - before
        graphs += len(list(GraphSizes.of(config).all())) * GRAPH_BYTES
    del runner
    _collect(wait_for_device)
    return steps + graphs


def run_largest_steps(config: EngineConfig, runner: Runner) -> None:
    """Run a decode row with one prompt token at growing contexts, which need different kernels.

    Then run the largest step with prompts only, the largest with decode rows and prompts, and
    several short prompts. The first steps have too few tokens for DeepGEMM, whose kernels other
    processes compile meanwhile.
    """
    for context in _contexts(config):
        runner.run(_step([Chunk(1, 0, 1, last=True)], [0], context))
    runner.run(_step(_chunks(config, config.max_num_batched_tokens), []))
    runner.run(_step(_chunks(config, config.mixed_prefill_tokens), [0] * config.max_num_seqs))
    runner.run(_step(_short(config), []))


def token_counts(config: EngineConfig) -> list[int]:
    """Token counts of a step's GEMMs: those of the profile run, and of later steps.

    Steps with prompts that run in no graph may have any number. Kernels are tiled by 16 and 32
    tokens and by multiples of 64, and GEMM backends (kernels/gpu/gemm/choice.py) change there and
    at a few numbers between. So each of these covers the smaller ones; large ones differ little.
    """
    width, batched = config.drafts + 1, config.max_num_batched_tokens
    alone, beside, short = (
        sum(chunk.count for chunk in chunks)
        for chunks in (
            _chunks(config, batched),
            _chunks(config, config.mixed_prefill_tokens),
            _short(config),
        )
    )
    counts = {alone, beside + config.max_num_seqs * width, short, 1 + width}
    if not config.args.enforce_eager:
        counts |= {rows * each for rows in bucket_sizes(config.max_num_seqs) for each in (1, width)}
        counts |= {*BETWEEN, *range(64, min(batched, 4096) + 1, 64), *range(1024, batched, 1024)}
        counts |= set(token_buckets(config.most_mixed_tokens))
    return sorted(counts)


def row_counts(config: EngineConfig) -> list[int]:
    """Numbers of rows that a step may draft for, as in `token_counts`."""
    alone, beside = (
        len(_chunks(config, tokens))
        for tokens in (config.max_num_batched_tokens, config.mixed_prefill_tokens)
    )
    counts = {alone, beside + config.max_num_seqs, len(_short(config)), 2}
    if not config.args.enforce_eager:
        counts |= set(bucket_sizes(config.max_num_seqs))
    return sorted(counts)


def _few_slots(config: EngineConfig) -> EngineConfig:
    """As many slots as prompts of a step."""
    largest = _chunks(config, config.max_num_batched_tokens)
    return msgspec.structs.replace(config, max_num_seqs=max(len(largest), len(_short(config))))


def _chunks(config: EngineConfig, tokens: int) -> list[Chunk]:
    """Prompts of the greatest length that fill a step; slot 0 is the null slot."""
    longest = config.max_model_len - 1
    counts = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    counts = counts[: config.max_num_seqs]
    return [Chunk(slot, 0, count, last=True) for slot, count in enumerate(counts, 1)]


def _short(config: EngineConfig) -> list[Chunk]:
    count = min(SHORT, config.max_model_len - 1)
    prompts = min(SEVERAL, config.max_num_seqs, config.max_num_batched_tokens // count)
    start = config.max_model_len - 1 - count  # as late as possible, since kernels differ there too
    return [Chunk(slot, start, count, last=True) for slot in range(1, max(prompts, 1) + 1)]


def _contexts(config: EngineConfig) -> list[int]:
    """One for each number of parts that attention cuts a decode row's keys into, by its length.

    Graphs are captured at the greatest context alone.
    """
    return [100 << i for i in range(7) if 100 << i <= config.max_model_len]


def _step(chunks: list[Chunk], decode: list[int], context: int = 0) -> StepPlan:
    """context: of the decode rows; 0: the longest chunk's."""
    longest = max(chunk.start + chunk.count for chunk in chunks)
    admissions = [
        Admission(
            slot=chunk.slot, tokens=[0] * chunk.count, start=0, snapshot=-1,
            max_total=longest + 1, temperature=1.0, top_p=0.9, top_k=0, seed=0,
            stop_token_ids=[],
        )
        for chunk in chunks
    ]  # fmt: skip
    return StepPlan(
        step=0, admissions=admissions, grants=[], decode=decode, chunks=chunks, saves=[],
        context=context or longest + 1,
    )  # fmt: skip


def _collect(wait_for_device: Callable[[], None]) -> None:
    wait_for_device()  # first: to free memory waits for the device without a limit
    gc.collect()
    torch.cuda.empty_cache()
