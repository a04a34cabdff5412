"""The memory that a GPU's largest steps need beyond weights and caches, measured by running them.

The steps run on scratch caches of one page: a block table of zeros sends every key and value to the
null page, and all decode rows use the null slot. So only the workspace is allocated, which is
measured. What kernels need to have run before the first request runs with them: the kernels declare
it (`kernels/warmup.py`). All ranks do the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import torch

from millrace.config import EngineConfig, token_buckets
from millrace.kernels import warmup
from millrace.kernels.warmup import StepLimits, StepShape, Warmup
from millrace.protocol import Admission, Chunk, StepPlan
from millrace.runtime.step.cuda_graphs import GraphSizes, bucket_sizes
from millrace.runtime.step.inputs import tokens_of
from millrace.runtime.step.runner import Runner

FEW_TOKENS = 16  # steps of no more use none of the GEMM kernels that other processes compile
GRAPH_BYTES = 8 << 20  # of the driver's, for each graph: an allowance, for models of 64 layers


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
    profile = ProfileRun.of(config)
    runner = build(profile.scratch_config)
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    profile.run(runner)
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


@dataclass(frozen=True, slots=True)
class ProfileRun:
    """The steps that run before any request, in their order.

    First those of few tokens, since other processes compile the GEMMs of the others; then the
    largest step with prompts only, and the largest with decode rows and prompts; then all others
    that kernels ask for, and the latter with fewer drafts, if steps may have fewer.
    """

    config: EngineConfig
    steps: tuple[StepPlan, ...]

    @classmethod
    def of(cls, config: EngineConfig) -> ProfileRun:
        declared = [_step(shape) for shape in declared_warmup(config).steps]
        width = config.drafts + 1
        few = [plan for plan in declared if tokens_of(plan, width) <= FEW_TOKENS]
        others = [plan for plan in declared if tokens_of(plan, width) > FEW_TOKENS]
        shallow = [
            msgspec.structs.replace(_step(shape), drafts=depth)
            for depth in config.speculation.all_depths[:-1]
            for shape in _largest(config)
            if shape.decode
        ]
        largest = [_step(shape) for shape in _largest(config)]
        return cls(config, (*few, *largest, *others, *shallow))

    @property
    def scratch_config(self) -> EngineConfig:
        """With as many slots as prompts of a step."""
        slots = max(len(plan.chunks) for plan in self.steps)
        return msgspec.structs.replace(self.config, max_num_seqs=slots)

    def run(self, runner: Runner) -> None:
        for plan in self.steps:
            runner.run(plan)


# --- sizes -------------------------------------------------------------------------------------


def token_counts(config: EngineConfig) -> list[int]:
    """Token counts of a step's GEMMs: those of the profile run, and where kernels change.

    Steps with prompts that run in no graph may have any number; each number here stands for those
    between it and the next smaller one.
    """
    width = config.drafts + 1
    counts = {tokens_of(plan, width) for plan in ProfileRun.of(config).steps}
    if not config.args.enforce_eager:
        widths = {1, width, *(1 + depth for depth in config.speculation.all_depths)}
        counts |= {rows * each for rows in bucket_sizes(config.max_num_seqs) for each in widths}
        counts |= declared_warmup(config).tokens
        counts |= set(token_buckets(config.most_mixed_tokens))
    return sorted(counts)


def row_counts(config: EngineConfig) -> list[int]:
    """Numbers of rows that a step may draft for, as in `token_counts`."""
    counts = {len(plan.sampled_slots) for plan in ProfileRun.of(config).steps}
    if not config.args.enforce_eager:
        counts |= set(bucket_sizes(config.max_num_seqs))
    return sorted(counts)


def declared_warmup(config: EngineConfig) -> Warmup:
    """What the kernels of the device need to have run."""
    limits = StepLimits(
        config.max_num_seqs, config.drafts + 1, config.max_num_batched_tokens, config.max_model_len
    )
    return warmup.declared(config.device, limits)


# --- steps -------------------------------------------------------------------------------------


def _largest(config: EngineConfig) -> Iterator[StepShape]:
    yield StepShape(0, _prompts(config, config.max_num_batched_tokens))
    yield StepShape(config.max_num_seqs, _prompts(config, config.mixed_prefill_tokens))


def _prompts(config: EngineConfig, tokens: int) -> tuple[tuple[int, int], ...]:
    """Prompts of the greatest length that fill a step."""
    longest = config.max_model_len - 1
    counts = [min(longest, tokens - start) for start in range(0, tokens, longest)]
    return tuple((0, count) for count in counts[: config.max_num_seqs])


def _step(shape: StepShape) -> StepPlan:
    """Prompts have slots from 1 on; decode rows use slot 0, the null slot."""
    chunks = [
        Chunk(n, start, count, last=True) for n, (start, count) in enumerate(shape.prompts, 1)
    ]
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
        step=0, admissions=admissions, grants=[], decode=[0] * shape.decode, chunks=chunks,
        saves=[], context=shape.context or longest + 1,
    )  # fmt: skip


def _collect(wait_for_device: Callable[[], None]) -> None:
    wait_for_device()  # first: to free memory waits for the device without a limit
    gc.collect()
    torch.cuda.empty_cache()
