"""Products with weights of 4 bits and activations of 16: the weight is widened in registers.

Three ways. At most 8 tokens: our CUDA kernel (`w4_few`), which is bound by memory. More: a Triton
kernel, which takes every layout of groups, and E2M1 codes; where there are few tiles, K is split.
Many: the weight is dequantized to memory, and cuBLAS multiplies; that costs the same at any number
of tokens. Weights are rounded to the dtype of x in the last two ways; in the first they are exact.
Between these two a table chooses, where the device was measured, or else `TORCH_FROM`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.dispatch import BackendChoice, is_invariant, remembered
from millrace.kernels.gemm import W4
from millrace.kernels.gpu import tables
from millrace.kernels.gpu.device import device_name, gpu
from millrace.kernels.gpu.gemm import w4_few as few
from millrace.kernels.gpu.gemm.bands import tile_in_bands

SECTION = "w4_products"  # of the tables: TORCH, or tiles of the Triton kernel
TORCH = "torch"
TORCH_FROM = 256  # tokens from which cuBLAS with a dequantized weight is taken for faster
LEAST_INPUTS = 512  # of a part of K


class Tiles(NamedTuple):
    """tokens, outputs: of a tile; inputs: of a step, at least 32; swap: the weight is the operand
    of many rows; splits: parts of K."""

    tokens: int
    outputs: int
    inputs: int
    swap: bool
    splits: int
    warps: int
    stages: int


@triton.jit
def _values(codes, zero, scale, FLOATS: tl.constexpr):
    """float32 of codes from 0 to 15, less zero, times scale."""
    if FLOATS:
        size = codes & 7
        exponent = size >> 1
        mantissa = size & 1
        twice = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))
        value = tl.where(codes >= 8, -twice, twice).to(tl.float32) * 0.5
    else:
        # 2^23 + code, by its bits: no conversion of integers, which is slow.
        value = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
    return value * scale


@triton.jit
def _scales_of(
    scales, zeros, o, step, groups, GROUP: tl.constexpr, BK: tl.constexpr, ZEROS: tl.constexpr
):
    """The scales and zeros of a step's inputs: [outputs], if they are one group, else [outputs,
    BK / 2]. One that is not there is read as the last."""
    row = o.to(tl.int64) * groups
    if GROUP % BK == 0:
        at = row + tl.minimum(step // (GROUP // BK), groups - 1)
    else:
        column = step * BK + 2 * tl.arange(0, BK // 2)
        at = row[:, None] + tl.minimum(column // GROUP, groups - 1)[None, :]
    scale = tl.load(scales + at)
    zero = tl.load(zeros + at) if ZEROS else tl.full(at.shape, 8, tl.uint8)
    return scale, zero


@triton.jit
def _weight_tile(
    codes, scale, zero, o, step, KB, GROUP: tl.constexpr, BK: tl.constexpr,
    EVEN: tl.constexpr, FLOATS: tl.constexpr,
):  # fmt: skip
    """float32 [outputs, BK], of inputs from step * BK on, without the factor of an output. o:
    outputs, all of them there. codes: bytes [OUT, KB]; EVEN: BK divides K. Bytes are counted as
    such, so that the compiler sees that they are neighbours: else each is loaded by itself."""
    HALF: tl.constexpr = BK // 2
    at_byte = step * HALF + tl.arange(0, HALF)
    at = codes + o.to(tl.int64)[:, None] * KB + at_byte[None, :]
    if EVEN:
        pairs = tl.load(at).to(tl.int32)
    else:
        pairs = tl.load(at, mask=(at_byte < KB)[None, :], other=0).to(tl.int32)
    if GROUP % BK == 0:
        wide, nought = scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
    else:
        wide, nought = scale.to(tl.float32), zero.to(tl.float32)
    low = _values(pairs & 15, nought, wide, FLOATS)
    high = _values(pairs >> 4, nought, wide, FLOATS)
    return tl.join(low, high).reshape(low.shape[0], BK)


@triton.jit(do_not_specialize=["T"])  # else odd numbers of tokens are compiled when they come
def _matmul_kernel(
    x, codes, scales, zeros, factor, out, T, OUT, K, KB, groups, GROUP: tl.constexpr,
    BT: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr, SWAP: tl.constexpr,
    STEPS: tl.constexpr, EVEN: tl.constexpr, SUPER: tl.constexpr, STAGES: tl.constexpr,
    FLOATS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """A tile [BT tokens, BO outputs] of part program_id(1) of K: STEPS steps of BK inputs. The
    parts' results lie one behind the other in `out`.

    A step's product takes the outputs' factors, and is added afterwards. That is what makes the
    compiler wait for it. Were it added by the product itself, as Triton 3.6 compiles it, the next
    step's weights would be computed in registers from which the tensor cores still read this one's
    (tests/kernels/gpu/test_compile.py looks for that in every kernel)."""
    tile_t, tile_o = tile_in_bands(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(OUT, BO), SUPER)
    part = tl.program_id(1)
    t = tile_t * BT + tl.arange(0, BT)
    o = tile_o * BO + tl.arange(0, BO)
    x_at = x + (t % T).to(tl.int64)[:, None] * K + tl.arange(0, BK)[None, :]
    acc = tl.zeros((BO, BT) if SWAP else (BT, BO), tl.float32)
    row = o % OUT
    of_row = tl.load(factor + row)
    # Scales are asked for a step ahead: they are too small for copies that run ahead by themselves.
    scale, zero = _scales_of(scales, zeros, row, part * STEPS, groups, GROUP, BK, ZEROS)
    for i in tl.range(0, STEPS, num_stages=STAGES):
        step = part * STEPS + i
        if EVEN:
            a = tl.load(x_at + step * BK)
        else:
            there = (step * BK + tl.arange(0, BK) < K)[None, :]
            a = tl.load(x_at + step * BK, mask=there, other=0.0)
        w = _weight_tile(codes, scale, zero, row, step, KB, GROUP, BK, EVEN, FLOATS)
        scale, zero = _scales_of(scales, zeros, row, step + 1, groups, GROUP, BK, ZEROS)
        if SWAP:
            product = tl.dot(w.to(a.dtype), tl.trans(a), input_precision="ieee")
            acc += product * of_row[:, None]
        else:
            product = tl.dot(a, tl.trans(w.to(a.dtype)), input_precision="ieee")
            acc += product * of_row[None, :]
    if SWAP:
        acc = tl.trans(acc)
    at = (part.to(tl.int64) * T + t)[:, None] * OUT + o[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(t < T)[:, None] & (o < OUT)[None, :])


@triton.jit(do_not_specialize=["size"])
def _sum_kernel(parts, out, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = the sum of PARTS float32 tensors of `size` numbers, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size.to(tl.int64) + at, mask=at < size, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _dequantize_kernel(
    codes, scales, zeros, factor, out, OUT, K, KB, groups, GROUP: tl.constexpr, BO: tl.constexpr,
    BK: tl.constexpr, EVEN: tl.constexpr, FLOATS: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    step = tl.program_id(0)
    row = o % OUT
    scale, zero = _scales_of(scales, zeros, row, step, groups, GROUP, BK, ZEROS)
    of_row = tl.load(factor + row)
    w = _weight_tile(codes, scale, zero, row, step, KB, GROUP, BK, EVEN, FLOATS)
    w = (w * of_row[:, None]).to(out.dtype.element_ty)
    column = step * BK + tl.arange(0, BK)
    at = out + o.to(tl.int64)[:, None] * K + column[None, :]
    if EVEN:
        tl.store(at, w, mask=(o < OUT)[:, None])
    else:
        tl.store(at, w, mask=(o < OUT)[:, None] & (column < K)[None, :])


def triton_matmul(x: Tensor, weight: W4, tiles: Tiles | None = None) -> Tensor:
    """x @ weight^T by the Triton kernel. tiles: None: those of the rule."""
    tokens, (outputs, width) = len(x), weight.shape
    tiles = tiles or tile_rule(tokens, outputs, width, weight.group)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if not tokens:
        return out
    steps = triton.cdiv(width, tiles.inputs)
    each = triton.cdiv(steps, tiles.splits)
    parts = triton.cdiv(steps, each)
    to = out if parts == 1 else x.new_empty(parts, tokens, outputs, dtype=torch.float32)
    grid = (triton.cdiv(tokens, tiles.tokens) * triton.cdiv(outputs, tiles.outputs), parts)
    _matmul_kernel[grid](
        x, *_operands(weight), to, tokens, outputs, width, width // 2, weight.scales.shape[1],
        GROUP=weight.group, BT=tiles.tokens, BO=tiles.outputs, BK=tiles.inputs, SWAP=tiles.swap,
        STEPS=each, EVEN=width == parts * each * tiles.inputs, SUPER=8, STAGES=tiles.stages,
        FLOATS=weight.floats, ZEROS=weight.zeros is not None, num_warps=tiles.warps,
    )  # fmt: skip
    if parts > 1:
        size = tokens * outputs
        _sum_kernel[(triton.cdiv(size, 1024),)](to, out, size, PARTS=parts, BLOCK=1024)
    return out


def dequantized(weight: W4, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in dtype."""
    (outputs, width), inputs = weight.shape, inputs_of(weight.group)
    out = torch.empty(outputs, width, dtype=dtype, device=weight.codes.device)
    _dequantize_kernel[triton.cdiv(width, inputs), triton.cdiv(outputs, 4096 // inputs)](
        *_operands(weight), out, outputs, width, width // 2, weight.scales.shape[1],
        GROUP=weight.group, BO=4096 // inputs, BK=inputs, EVEN=width % inputs == 0,
        FLOATS=weight.floats,
        ZEROS=weight.zeros is not None, num_warps=4,
    )  # fmt: skip
    return out


def _operands(weight: W4) -> tuple[Tensor, ...]:
    """Pointers of the kernels; zeros that are not there are not read."""
    zeros = weight.scales if weight.zeros is None else weight.zeros
    return weight.codes.view(torch.uint8), weight.scales, zeros, weight.factor


@remembered
def way_for(tokens: int, outputs: int, width: int, group: int) -> Tiles | None:
    """Tiles of the Triton kernel; None: cuBLAS with a dequantized weight. As it measured fastest
    on this GPU, or else by a rule."""
    way = tables.find(SECTION, (outputs, width, group), tokens, device_name())
    if way is None:
        return None if tokens >= TORCH_FROM else tile_rule(tokens, outputs, width, group)
    return None if way == TORCH else Tiles._make(tables.numbers_of(way, Tiles._fields))


def tile_rule(tokens: int, outputs: int, width: int, group: int = 128) -> Tiles:
    """Tiles where nothing was measured, with as many parts of K as fill the multiprocessors twice.
    A step has inputs of one group, if that is possible: a scale for each row, and not for each
    byte."""
    most = inputs_of(group)
    if tokens > 64:
        return Tiles(128, 128, min(most, 64), True, 1, 8, 3)
    size = max(16, triton.next_power_of_2(tokens))
    programs = triton.cdiv(outputs, 64)
    wanted = triton.next_power_of_2(triton.cdiv(264, programs))
    return Tiles(size, 64, most, True, max(1, min(wanted, width // LEAST_INPUTS, 8)), 4, 4)


def inputs_of(group: int) -> int:
    """The most inputs of a step that lie in one group."""
    return next((inputs for inputs in (128, 64, 32) if group % inputs == 0), 64)


def w4_linear(x: Tensor, weight: W4) -> Tensor:
    """As the reference, by the way that should be the fastest for this number of tokens."""
    reference: Tensor = NotImplemented  # it dequantizes the weight for `fixed_linear`
    if is_invariant():
        return reference
    out = few.w4_few(x, weight)
    if out is not None:
        return out
    tiles = way_for(len(x), *weight.shape, weight.group)
    if tiles is None:
        return torch_matmul(x, weight)
    return triton_matmul(x, weight, tiles)


def torch_matmul(x: Tensor, weight: W4) -> Tensor:
    """x @ weight^T by cuBLAS, with the weight dequantized to memory."""
    return torch.nn.functional.linear(x, dequantized(weight, x.dtype))


def w4_backends() -> list[BackendChoice]:
    """The backends of GEMMs with weights of 4 bits on this GPU."""
    compiled = few.is_compiled()
    reason = "" if compiled else "the CUDA kernel cannot be compiled here"
    name = f"W4 GEMM, {few.MAX_TOKENS} tokens or less"
    found = BackendChoice(name, "CUDA kernel" if compiled else "Triton kernel", reason)
    many = f"Triton kernel, and from {TORCH_FROM} tokens on cuBLAS with a dequantized weight"
    if tables.is_measured(SECTION, device_name()):
        many = f"Triton kernel or cuBLAS, by what was measured on {device_name()}"
    why = "" if gpu().capability[0] < 10 else "there are no kernels for FP4 tensor cores yet"
    return [found, BackendChoice("W4 GEMM", many, why)]
