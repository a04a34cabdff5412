"""GEMMs with weights: plain ones, and FP8 ones with scales for blocks of 128 x 128."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.dispatch import op
from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.quantize import E4M3_MAX, MIN_ABSMAX, Quantized


@op
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T. x: [T, in], weight: [out, in] of the same dtype; returns [T, out]."""
    return F.linear(x, weight)


@op
def fp8_linear(
    x: Tensor | Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """x @ dequantized weight^T, in dtype.

    weight: e4m3 [out, in]; weight_scale_inv: [ceil(out / 128), ceil(in / 128)], multiplied with
    the blocks. A fast path may quantize x to e4m3 too, in groups of 128 per row; the reference does
    not.
    """
    plain = x.dequantize().to(dtype) if isinstance(x, Quantized) else x
    return F.linear(plain, dequantize(weight, weight_scale_inv).to(dtype))


def dequantize(weight: Tensor, weight_scale_inv: Tensor) -> Tensor:
    """The float32 weight [out, in] of an e4m3 weight and its block scales."""
    rows, columns = weight.shape
    scale = weight_scale_inv.float().repeat_interleave(FP8_BLOCK, 0)[:rows]
    return weight.float() * scale.repeat_interleave(FP8_BLOCK, 1)[:, :columns]


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight of any float dtype: e4m3 [out, in], float32 block scales.

    The inverse of `dequantize`. Needs about three times the weight's size in float32 meanwhile.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    scale = blocks.abs().amax((1, 3)).clamp(min=MIN_ABSMAX) / E4M3_MAX
    values = (blocks / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return values[:rows, :columns].to(torch.float8_e4m3fn), scale
