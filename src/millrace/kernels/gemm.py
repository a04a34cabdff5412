"""GEMMs with weights: plain ones, FP8 ones with scales for blocks of 128 x 128, and W4 ones.

W4 is one form for every format of 4 bits: a weight is factor * scale * (value of its code - zero),
with a factor for each row, and scales and zeros for each group of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.dispatch import by_token, is_invariant, op
from millrace.kernels.formats import FP8_BLOCK
from millrace.kernels.quantize import E4M3_MAX, MIN_ABSMAX, Quantized

CODES_PER_WORD = 8
ROWS_AT_ONCE = 4096  # of a weight, which are multiplied by one row of inputs
SYMMETRIC = 8  # the code of zero where there are no zeros
# The values of E2M1 by their codes: a sign, two bits of exponent, one of mantissa.
E2M1 = tuple(sign * x for sign in (1.0, -1.0) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


@op
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T. x: [T, in], weight: [out, in] of the same dtype; returns [T, out]."""
    return multiply(x, weight)


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
    return multiply(plain, dequantize(weight, weight_scale_inv).to(dtype))


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """As `linear`, by torch unless ops are to be invariant."""
    return fixed_linear(x, weight) if is_invariant() else F.linear(x, weight)


@op
@by_token("x")
def fixed_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `linear`; every number of the result is a sum of its own, so that it depends on its row
    and its column alone."""
    parts = [(x.float() * some.float()).sum(-1) for some in weight.split(ROWS_AT_ONCE)]
    return torch.cat(parts)[None, :].to(x.dtype) if len(x) else x.new_empty(0, len(weight))


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


# --- weights of 4 bits --------------------------------------------------------------------------


class W4(NamedTuple):
    """A weight [N, K] of 4 bits.

    codes: int32 [N, K / 8]; bits 4 i .. 4 i + 3 of word c are column 8 c + i. scales: float16
    [N, groups]; column k is in group k // group. factor: float32 [N, 1]. zeros: uint8 [N, groups],
    of codes that are whole numbers; None: 8 for all. group: columns of a group, a multiple of 8;
    the last group may have fewer. floats: codes are E2M1 numbers, without zeros.
    """

    codes: Tensor
    scales: Tensor
    factor: Tensor
    zeros: Tensor | None
    group: int
    floats: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * CODES_PER_WORD

    def rows_from(self, first: int) -> W4:
        """The rows from `first` on."""
        zeros = None if self.zeros is None else self.zeros[first:]
        return self._replace(
            codes=self.codes[first:], scales=self.scales[first:], factor=self.factor[first:],
            zeros=zeros,
        )  # fmt: skip


def unpack(codes: Tensor) -> Tensor:
    """uint8 [N, K] of int32 [N, K / 8]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)
    return ((codes.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(1)


def pack(codes: Tensor) -> Tensor:
    """int32 [N, K / 8] of codes [N, K] from 0 to 15, in any dtype of whole numbers."""
    pairs = codes.to(torch.uint8).unflatten(1, (-1, 2))
    joined: Tensor = pairs[..., 0] | pairs[..., 1] << 4
    return joined.contiguous().view(torch.int32)


def dequantize_w4(weight: W4) -> Tensor:
    """The float32 weight [N, K]."""
    codes, columns = unpack(weight.codes), weight.shape[1]

    def by_column(of_groups: Tensor) -> Tensor:
        return of_groups.repeat_interleave(weight.group, 1)[:, :columns]

    if weight.floats:
        table = torch.tensor(E2M1, dtype=torch.float32, device=codes.device)
        values = table[codes.int()]
    elif weight.zeros is None:
        values = codes.float() - SYMMETRIC
    else:
        values = codes.float() - by_column(weight.zeros).float()
    return values.mul_(by_column(weight.scales.float() * weight.factor))


@op
def w4_linear(x: Tensor, weight: W4) -> Tensor:
    """x @ dequantized weight^T. x: [T, K]; returns [T, N] in x's dtype.

    The weight is rounded to x's dtype first, so that a checkpoint that was dequantized before it
    was loaded gives the same results.
    """
    return multiply(x, dequantize_w4(weight).to(x.dtype))
