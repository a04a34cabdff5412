"""Weights rounded to int4 by groups, or to e4m3 by blocks. It knows tensors, no checkpoint."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.gemm import quantize_blocks

LOWEST, HIGHEST = -8, 7
# Scales that are tried, as parts of the one that leaves the largest value of a group its size.
SHARES = tuple(1.0 - 0.02 * step for step in range(16))
DAMPING = 0.01  # of a Hessian, as a part of its mean diagonal
COLUMNS = 128  # of a weight that are corrected one by one before the others are


class Int4(NamedTuple):
    """values: int8 [N, K], from -8 to 7; scales: bfloat16 [N, K / group]."""

    values: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """float32 [N, K]."""
        group = self.values.shape[1] // self.scales.shape[1]
        return self.values.float() * self.scales.float().repeat_interleave(group, 1)


def round_int4(weight: Tensor, group: int) -> Int4:
    """Each value to the nearest, with the scale of its group that brings the least square error.

    weight: float32 [N, K], K a multiple of group.
    """
    groups = weight.unflatten(1, (-1, group))
    scales = best_scales(groups)
    return Int4(_rounded(groups, scales.float()).flatten(1).to(torch.int8), scales.squeeze(2))


def best_scales(groups: Tensor) -> Tensor:
    """bfloat16 [.., 1] of values [.., group]."""
    widest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-8) / -(LOWEST + 0.5)
    best, least = widest.bfloat16(), torch.full_like(widest, math.inf)
    for share in SHARES:
        scales = (widest * share).bfloat16()
        wide = scales.float()
        error = (_rounded(groups, wide) * wide - groups).square().sum(-1, keepdim=True)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def gptq_int4(weight: Tensor, hessian: Tensor, group: int) -> Int4:
    """Column by column, each error made good in the columns that are still to come.

    weight: float32 [N, K]; hessian: float32 [K, K], the sum of x x^T over inputs x. Frantar et al.,
    "GPTQ", arXiv 2210.17323.
    """
    weight, factor = weight.clone(), _inverse_factor(hessian)
    weight[:, hessian.diagonal() == 0] = 0.0
    values, scales = torch.empty_like(weight), []
    for first in range(0, weight.shape[1], COLUMNS):
        last = min(first + COLUMNS, weight.shape[1])
        errors = torch.empty_like(weight[:, first:last])
        for k in range(first, last):
            if k % group == 0:
                scales.append(best_scales(weight[:, k : k + group]))
            scale, column = scales[-1].float()[:, 0], weight[:, k]
            values[:, k] = _rounded(column, scale)
            error = (column - values[:, k] * scale) / factor[k, k]
            weight[:, k:last] -= torch.outer(error, factor[k, k:last])
            errors[:, k - first] = error
        weight[:, last:] -= errors @ factor[first:last, last:]
    return Int4(values.to(torch.int8), torch.cat(scales, 1))


def _rounded(values: Tensor, scales: Tensor) -> Tensor:
    return (values / scales).round_().clamp_(LOWEST, HIGHEST)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse."""
    diagonal = hessian.diagonal()
    damped = hessian + torch.diag((diagonal == 0).float())
    damped.diagonal().add_(DAMPING * float(diagonal.mean()) + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def round_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K], and bfloat16 scales [N / 128, K / 128] of its blocks, rounded up: the values are
    made for the rounded scales. weight: float32 [N, K], of any sizes."""
    _, exact = quantize_blocks(weight)
    scales = exact.bfloat16()
    wide = scales.float().repeat_interleave(FP8_BLOCK, 0)[: len(weight)]
    wide = wide.repeat_interleave(FP8_BLOCK, 1)[:, : weight.shape[1]]
    return (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn), scales
