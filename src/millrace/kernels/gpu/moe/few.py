"""The experts of few tokens, by a CUDA kernel that is compiled at run time.

They cost what reading the weights of their experts costs. few.cu says how. Of more than 8 tokens
the pairs are grouped before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.cuda_source import CudaKernel
from millrace.kernels.gpu.device import gpu
from millrace.kernels.gpu.moe.routing import Groups, group
from millrace.kernels.moe import ExpertWeights
from millrace.kernels.quantize import GROUP, Quantized

TILE = 8  # tokens of a block
MAX_TOKENS = 64
ROWS = 16  # of a weight, that a block has at once
WARPS = 8  # of a block, or as many as a row has groups, if these are fewer
FEW_PAIRS = 32  # below, blocks do less each, so that there are enough


class Form(NamedTuple):
    """What the kernel is compiled for. groups: of a row of the weight. gated: the first GEMM.
    grouped: tokens come in tiles. parts: of ROWS rows, that a block has one after the other."""

    groups: int
    gated: bool
    grouped: bool
    parts: int


def few_experts(
    x: Quantized, experts: Tensor, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor | None:
    """The outputs of each token's experts, bfloat16 [T * K, H], for which `takes` holds; None where
    the kernel cannot be compiled. experts: int32 [T, K]."""
    hidden, width = down.values.shape[1:]
    if not is_compiled(hidden, width):
        return None
    count = len(gate_up.values)
    groups = group(experts, count, TILE) if len(experts) > TILE else None
    return few_down(few_gate_up(x, experts, gate_up, groups), experts, down, groups)


def few_gate_up(
    x: Quantized, experts: Tensor, weights: ExpertWeights, groups: Groups | None = None
) -> Tensor:
    """silu(gate) * up of each token's experts, bfloat16 [T * K, I]. groups: of more tokens than
    TILE."""
    both, hidden = weights.values.shape[1:]
    out = torch.empty(experts.numel(), both // 2, dtype=torch.bfloat16, device=experts.device)
    form = form_of(hidden // GROUP, True, experts.numel(), groups is not None)
    _launch(form, (x.values, x.scales), weights, experts, groups, out, x.scales.stride(1))
    return out


def few_down(
    x: Tensor, experts: Tensor, weights: ExpertWeights, groups: Groups | None = None
) -> Tensor:
    """x, of `few_gate_up`, times the second weight: bfloat16 [T * K, H]."""
    hidden, width = weights.values.shape[1:]
    out = torch.empty(len(x), hidden, dtype=torch.bfloat16, device=experts.device)
    form = form_of(width // GROUP, False, experts.numel(), groups is not None)
    _launch(form, (x, x), weights, experts, groups, out, 0)
    return out


def _launch(
    form: Form, x: tuple[Tensor, Tensor], weights: ExpertWeights, experts: Tensor,
    groups: Groups | None, out: Tensor, scale_stride: int,
) -> None:  # fmt: skip
    kernel, (tokens, top_k), (pairs, outputs) = compiled(form), experts.shape, out.shape
    assert kernel is not None
    assert weights.scales is not None
    if not pairs:
        return
    owners, members, tiles = experts, experts, pairs
    if groups is not None:
        owners, members, tiles = groups.experts, groups.pairs, groups.tiles
    step = ROWS // 2 if form.gated else ROWS
    kernel(
        (outputs // (step * form.parts), tiles, 1), (32 * warps_of(form.groups), 1, 1),
        [*x, weights.values, weights.scales, owners, members, out, tokens, top_k, outputs,
         form.groups * GROUP, scale_stride],
    )  # fmt: skip


def form_of(groups: int, gated: bool, pairs: int, grouped: bool) -> Form:
    few = pairs < FEW_PAIRS
    return Form(groups, gated, grouped, (1 if few else 2) if gated else (2 if few else 4))


def takes(x: Quantized, gate_up: ExpertWeights, down: ExpertWeights) -> bool:
    """Whether the kernel multiplies these."""
    tokens, hidden = x.values.shape
    scales = gate_up.scales, down.scales
    return (
        tokens <= MAX_TOKENS
        and all(s is not None and s.dtype == torch.float32 and s.is_contiguous() for s in scales)
        and hidden % GROUP == 0
        and down.values.shape[2] % GROUP == 0
        and all(t.is_contiguous() for t in (x.values, gate_up.values, down.values))
        and all(t.data_ptr() % 16 == 0 for t in (x.values, gate_up.values, down.values))
        and (tokens == 1 or x.scales.stride(0) == 1)
    )


def warps_of(groups: int) -> int:
    return min(WARPS, groups)


def source(form: Form) -> str:
    """The kernel `experts_few`."""
    constants = {"warps": warps_of(form.groups), **form._asdict()}
    del constants["groups"]
    return cuda_source.read(constants, "gemm/stream.cuh", "gemm/few.cu", "moe/few.cu")


def is_compiled(hidden: int, width: int) -> bool:
    """Whether this machine has both kernels; they are compiled now."""
    forms = form_of(hidden // GROUP, True, 0, False), form_of(width // GROUP, False, 0, False)
    return None not in map(compiled, forms)


@remembered
def compiled(form: Form) -> CudaKernel | None:
    """None where there is no compiler, or no conversion of e4m3 in hardware."""
    if gpu().capability < (8, 9):
        return None
    return cuda_source.compiled(source(form), "experts_few")
