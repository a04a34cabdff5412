"""Experts on the CPU: tokens are grouped by expert, and experts without tokens are not read.

With many tokens of an expert torch's GEMMs are faster than the compiled function. That widens e4m3
weights where it uses them; where it cannot run, they are dequantized expert by expert.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.activation import silu_mul
from millrace.kernels.cpu.call import all_contiguous, function, is_bf16, pointer, threads
from millrace.kernels.dispatch import is_invariant
from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.moe import ExpertWeights, Routes, Shared, plain_rows, with_shared
from millrace.kernels.quantize import Quantized

TORCH_IS_FASTER = 512  # from so many tokens of an expert on, on average


class _Groups(NamedTuple):
    """The pairs of a token and one of its experts, expert by expert.

    experts: those that have tokens, ascending; starts: where their pairs begin, and the end of the
    last. tokens: int64 [P]; weights: float32 [P].
    """

    experts: Tensor
    starts: Tensor
    tokens: Tensor
    weights: Tensor


def run_experts(
    x: Tensor | Quantized,
    routes: Routes,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    shared: Shared | None = None,
) -> Tensor:
    """As the reference, reading only the experts that have tokens."""
    x, groups = plain_rows(x, routes), _grouped(routes)
    total = torch.zeros_like(x, dtype=torch.float32)
    if not _native(x, groups, gate_up, down, total):
        _one_by_one(x, groups, gate_up, down, total)
    return with_shared(total.to(x.dtype), shared)


def _grouped(routes: Routes) -> _Groups:
    chosen, order = routes.experts.flatten().sort(stable=True)
    elsewhere = int((chosen < 0).sum())
    chosen, order = chosen[elsewhere:], order[elsewhere:]
    experts, counts = chosen.unique_consecutive(return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    tokens = order // max(1, routes.experts.shape[1])
    return _Groups(experts, starts, tokens, routes.weights.flatten()[order].float())


def _native(
    x: Tensor, groups: _Groups, gate_up: ExpertWeights, down: ExpertWeights, total: Tensor
) -> bool:
    """Add to `total` [T, H] by the compiled function; False if it does not support this."""
    run, pairs, hits = function("run_experts"), len(groups.tokens), len(groups.experts)
    hidden, width = down.values.shape[1:]
    multiple = 32 if x.dtype == torch.bfloat16 else 16
    if run is None or hidden % multiple or width % multiple:
        return False
    if pairs >= TORCH_IS_FASTER * hits and not is_invariant():
        return False
    if not all(_fits(weights, x.dtype) for weights in (gate_up, down)):
        return False
    rows, inner = x[groups.tokens], x.new_empty(pairs, width)
    weights = gate_up.values, gate_up.scales, down.values, down.scales
    given = (rows, *groups, *weights, inner, total)
    sizes = (hits, hidden, width, is_bf16(x), threads())
    return bool(run(*map(pointer, given), *sizes))


def _fits(weights: ExpertWeights, dtype: torch.dtype) -> bool:
    """Whether the compiled function reads these weights, with inputs of the dtype."""
    values, scales = weights.values, weights.scales
    if weights.factor is not None:
        return False
    if scales is None:
        return values.dtype == dtype and all_contiguous(values)
    blocks = values.shape[1] % FP8_BLOCK == 0 and values.shape[2] % FP8_BLOCK == 0
    plain = values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    contiguous = values.is_contiguous() and scales.is_contiguous()
    return dtype == torch.bfloat16 and blocks and plain and contiguous


def _one_by_one(
    x: Tensor, groups: _Groups, gate_up: ExpertWeights, down: ExpertWeights, total: Tensor
) -> None:
    """Add to `total` [T, H] by GEMMs of one expert each."""
    starts = groups.starts.tolist()
    for expert, (start, stop) in zip(groups.experts.tolist(), pairwise(starts), strict=True):
        tokens = groups.tokens[start:stop]
        inner = silu_mul(gate_up.multiply(expert, x[tokens]))
        out = down.multiply(expert, inner).float()
        total.index_add_(0, tokens, out * groups.weights[start:stop, None])
