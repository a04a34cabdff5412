"""The experts of at most 8 tokens, by a CUDA kernel that is compiled at run time.

So few tokens cost what reading the weights of their experts costs. few.cu says how.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.cuda_source import CudaKernel
from millrace.kernels.gpu.device import gpu
from millrace.kernels.moe import ExpertWeights
from millrace.kernels.quantize import GROUP, Quantized

MAX_TOKENS = 8
ROWS = 16  # of a weight, a block
WARPS = 8  # of a block, or as many as a row has groups, if these are fewer


def few_experts(
    x: Quantized, experts: Tensor, gate_up: ExpertWeights, down: ExpertWeights
) -> Tensor | None:
    """The outputs of each token's experts, bfloat16 [T * K, H], for which `takes` holds; None where
    the kernel cannot be compiled. experts: int32 [T, K]."""
    hidden, width = down.values.shape[1:]
    if not is_compiled(hidden, width):
        return None
    return few_down(few_gate_up(x, experts, gate_up), experts, down)


def few_gate_up(x: Quantized, experts: Tensor, weights: ExpertWeights) -> Tensor:
    """silu(gate) * up of each token's experts, bfloat16 [T * K, I]."""
    (tokens, top_k), (_, both, hidden) = experts.shape, weights.values.shape
    out = torch.empty(tokens * top_k, both // 2, dtype=torch.bfloat16, device=experts.device)
    kernel, scales = compiled(hidden // GROUP, True), weights.scales
    assert kernel is not None
    assert scales is not None
    if tokens:
        kernel(
            (both // ROWS, len(out), 1), (32 * warps_of(hidden // GROUP), 1, 1),
            [*x, weights.values, scales, experts, out, tokens, top_k, both // 2, hidden,
             x.scales.stride(1)],
        )  # fmt: skip
    return out


def few_down(x: Tensor, experts: Tensor, weights: ExpertWeights) -> Tensor:
    """x, of `few_gate_up`, times the second weight: bfloat16 [T * K, H]."""
    (tokens, top_k), (_, hidden, width) = experts.shape, weights.values.shape
    out = torch.empty(len(x), hidden, dtype=torch.bfloat16, device=experts.device)
    kernel, scales = compiled(width // GROUP, False), weights.scales
    assert kernel is not None
    assert scales is not None
    if tokens:
        kernel(
            (hidden // ROWS, len(x), 1), (32 * warps_of(width // GROUP), 1, 1),
            [x, x, weights.values, scales, experts, out, tokens, top_k, hidden, width, 0],
        )  # fmt: skip
    return out


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


def source(groups: int, gated: bool) -> str:
    """The kernel `experts_few` for rows of so many groups."""
    constants = {"warps": warps_of(groups), "gated": gated}
    return cuda_source.read("gemm/few.cu", constants) + cuda_source.read("moe/few.cu", {})


def is_compiled(hidden: int, width: int) -> bool:
    """Whether this machine has both kernels; they are compiled now."""
    return None not in (compiled(hidden // GROUP, True), compiled(width // GROUP, False))


@remembered
def compiled(groups: int, gated: bool) -> CudaKernel | None:
    """None where there is no compiler, or no conversion of e4m3 in hardware."""
    if gpu().capability < (8, 9):
        return None
    return cuda_source.compiled(source(groups, gated), "experts_few")
