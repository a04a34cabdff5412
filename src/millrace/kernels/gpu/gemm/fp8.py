"""FP8 products with block-scaled weights: activations in e4m3 by groups of 128, sums in float32.

Four ways, all with the same rounding: our Triton kernel (always there), our CUDA kernel for few
tokens, cuBLAS's block-scaled product through torch, and DeepGEMM where it is installed.
`fp8_linear` takes the one that measured fastest (choice.py) and quantises its input first;
`fp8_matmul` starts from activations that a fused op has quantised already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.common.optional import probe
from millrace.kernels.dispatch import BackendChoice, is_invariant, remembered
from millrace.kernels.gpu import tables
from millrace.kernels.gpu.device import device_name, gpu
from millrace.kernels.gpu.gemm import choice
from millrace.kernels.gpu.gemm import few as gemm_few
from millrace.kernels.gpu.gemm.bands import tile_in_bands
from millrace.kernels.gpu.gemm.choice import CUBLAS, DEEP_GEMM, GemmBackend, choose
from millrace.kernels.gpu.gemm.clusters import Tiling, cluster_matmul
from millrace.kernels.gpu.gemm.few import MAX_TOKENS, few_matmul
from millrace.kernels.gpu.quantize import launches_early, quantize
from millrace.kernels.quantize import GROUP, Quantized

NOT_MEASURED = "by a rule, until `millrace tune kernels MODEL` has measured this GPU"
SECTION = "fp8_tiles"  # of the tables: tiles of the Triton kernel


class Tiles(NamedTuple):
    """tokens, outputs: of a tile. swap: whether it is computed transposed."""

    tokens: int
    outputs: int
    swap: bool
    warps: int
    stages: int


FIXED = Tiles(64, 128, False, 4, 4)  # of batch invariant products, at any number of tokens


@triton.jit
def _matmul_kernel(
    x, sx, w, sw, out, T, OUT, K, sx_stride, sw_stride,
    BT: tl.constexpr, BO: tl.constexpr, SWAP: tl.constexpr, SUPER: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile [BT tokens, BO outputs], BO dividing 128. SWAP computes it transposed, for few tokens:
    the weight then is the operand with many rows."""
    tile_t, tile_o = tile_in_bands(tl.program_id(0), tl.cdiv(T, BT), tl.cdiv(OUT, BO), SUPER)
    t = tile_t * BT + tl.arange(0, BT)
    o = tile_o * BO + tl.arange(0, BO)
    k = tl.arange(0, 128)
    x_at = x + (t % T).to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + (o % OUT).to(tl.int64)[:, None] * K + k[None, :]
    sx_at = sx + t % T
    sw_at = sw + (tile_o * BO // 128) * sw_stride
    acc = tl.zeros((BO, BT) if SWAP else (BT, BO), tl.float32)
    for step in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        inside = (step * 128 + k < K)[None, :]
        a = tl.load(x_at + step * 128, mask=inside, other=0.0)
        b = tl.load(w_at + step * 128, mask=inside, other=0.0)
        scale = tl.load(sx_at + tl.cast(step, tl.int64) * sx_stride) * tl.load(sw_at + step).to(
            tl.float32
        )
        if SWAP:
            acc += tl.dot(b, tl.trans(a)) * scale[None, :]
        else:
            acc += tl.dot(a, tl.trans(b)) * scale[:, None]
    if SWAP:
        acc = tl.trans(acc)
    at = out + t.to(tl.int64)[:, None] * OUT + o[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(t < T)[:, None] & (o < OUT)[None, :])


def triton_matmul(
    x: Quantized, weight: Tensor, scale: Tensor, dtype: torch.dtype,
    config: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """x @ weight^T by our kernel."""
    tokens, width = x.values.shape
    outputs = weight.shape[0]
    out = torch.empty(tokens, outputs, dtype=dtype, device=weight.device)
    bt, bo, swap, warps, stages = config or tiles_for(tokens, outputs, width)
    grid = (triton.cdiv(tokens, bt) * triton.cdiv(outputs, bo),)
    _matmul_kernel[grid](
        x.values, x.scales, weight, scale, out, tokens, outputs, width, x.scales.stride(1),
        scale.stride(0), BT=bt, BO=bo, SWAP=swap, SUPER=8, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


@remembered
def tiles_for(tokens: int, outputs: int, width: int) -> Tiles:
    """The tiles that measured fastest on this GPU, or else those of a rule."""
    way = tables.find(SECTION, (outputs, width), tokens, device_name())
    return tile_rule(tokens) if way is None else Tiles._make(tables.numbers_of(way, Tiles._fields))


def tile_rule(tokens: int) -> Tiles:
    """Tiles where nothing was measured."""
    if tokens <= 64:
        return Tiles(max(16, triton.next_power_of_2(tokens)), 64, True, 4, 6)
    return Tiles(64, 128, False, 4, 4)


def fp8_backends(dtype: torch.dtype, shapes: Iterable[tuple[int, int]] = ()) -> list[BackendChoice]:
    """The backends of GEMMs with FP8 weights on this GPU: for few tokens, for more, and for odd
    shapes. dtype: of the outputs; shapes: (outputs, inputs) of the weights."""
    many = _fp8_backend(dtype)
    if not gpu().is_hopper or dtype != torch.bfloat16:
        return [many]
    few, name = gemm_few.is_compiled(), f"FP8 GEMM, {MAX_TOKENS} tokens or less"
    reason = "" if few else "the CUDA kernel cannot be compiled here"
    found = [BackendChoice(name, "CUDA kernel" if few else many.backend, reason), many]
    odd = [f"{a}x{b}" for a, b in sorted(set(shapes)) if a % GROUP or b % GROUP]
    if odd:
        reason = f"other backends need multiples of {GROUP}"
        found.append(BackendChoice(f"FP8 GEMM, {', '.join(odd)}", "Triton kernel", reason))
    return found


def _fp8_backend(dtype: torch.dtype) -> BackendChoice:
    name, device = "FP8 GEMM", gpu().name
    if not gpu().is_hopper or dtype != torch.bfloat16:
        why = f"DeepGEMM and cuBLAS do it on Hopper in bfloat16, not on {device} in {dtype}"
        tiles = "measured" if tables.is_measured(SECTION, device) else NOT_MEASURED
        return BackendChoice(name, "Triton kernel", f"{why}; its tiles: {tiles}")
    found = probe("deep_gemm")
    if found.module is None:
        return BackendChoice(name, "cuBLAS", found.problem, found.remedy)
    both = f"DeepGEMM {found.version} or cuBLAS"
    if tables.is_measured(choice.SECTION, device):
        return BackendChoice(name, f"{both}, by what was measured on {device}")
    return BackendChoice(name, both, NOT_MEASURED)


@remembered
def allow_early_launches() -> None:
    """Have DeepGEMM's kernels launched while the kernel before them runs, or not, as
    `launches_early` says; once a process. They wait for its end before they read or write."""
    allow = getattr(getattr(probe("deep_gemm").module, "_C", None), "set_pdl", None)
    if allow is not None:
        allow(launches_early())


def deep_gemm_matmul(
    x: Quantized, weight: Tensor, scale: Tensor, multiprocessors: int = 0
) -> Tensor:
    """x @ weight^T by DeepGEMM, in bfloat16; scale: float32. multiprocessors: 0 for all."""
    library = probe("deep_gemm").module
    assert library is not None
    out = torch.empty(len(x.values), len(weight), dtype=torch.bfloat16, device=weight.device)
    allow_early_launches()
    library.set_num_sms(multiprocessors_of(multiprocessors))
    library.fp8_gemm_nt(tuple(x), (weight, scale), out)
    return out


def cublas_matmul(x: Quantized, weight: Tensor, scale: Tensor) -> Tensor:
    """x @ weight^T by cuBLAS, in bfloat16; scale: float32 [out / 128, in / 128].

    weight: [out, in], both multiples of 128; x's scales lie as `quantize` on a GPU leaves them.
    """
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    tokens = x.values.shape[0]
    values, scales = x
    padded = -tokens % 4
    if padded:  # the scales' columns are 4 apart already
        values = torch.nn.functional.pad(values.view(torch.uint8), (0, 0, 0, padded))
        values = values.view(torch.float8_e4m3fn)
        scales = scales.as_strided((tokens + padded, scales.shape[1]), scales.stride())
    out: Tensor = scaled_mm(
        values, weight.t(), scales, ScalingType.BlockWise1x128, _for_cublas(scale),
        ScalingType.BlockWise128x128, SwizzleType.NO_SWIZZLE, SwizzleType.NO_SWIZZLE,
        output_dtype=torch.bfloat16,
    )  # fmt: skip
    return out[:tokens]


def _for_cublas(scale: Tensor) -> Tensor:
    """Block scales [out / 128, in / 128] as cuBLAS reads them: [in / 128, out / 128], the blocks of
    one output row side by side in memory, their number rounded up to a multiple of 4.

    Widths that are no multiple of 512 need zeros in the places that are added.
    """
    added = -scale.shape[1] % 4
    if added:
        return torch.nn.functional.pad(scale, (0, added)).t()
    return scale.flatten().view(scale.shape).t()  # a single row has its own stride even then


def fp8_matmul(x: Quantized, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ dequantised weight^T in dtype, by the way that measured fastest for this shape."""
    if is_invariant():
        return triton_matmul(x, weight, scale, dtype, FIXED)
    outputs, width = weight.shape
    if outputs % GROUP or width % GROUP or dtype != torch.bfloat16 or not gpu().is_hopper:
        return triton_matmul(x, weight, scale, dtype)
    if len(x.values) <= MAX_TOKENS:  # where `few_matmul` is the fastest on an H200
        out = few_matmul(x, weight, scale.float())
        if out is not None:
            return out
    way = _way(len(x.values), outputs, width)
    if way.library == "cublas":
        return cublas_matmul(x, weight, scale.float())
    if way.tiling:
        out = cluster_matmul(x, weight, scale.float(), Tiling.parse(way.tiling))
        if out is not None:
            return out
    return deep_gemm_matmul(x, weight, scale.float(), way.multiprocessors)


def deep_gemm_way(tokens: int, outputs: int, width: int) -> GemmBackend | None:
    """How `fp8_matmul` takes DeepGEMM on this GPU, in bfloat16 and float32 scales; None: not."""
    if outputs % GROUP or width % GROUP or tokens <= MAX_TOKENS or not gpu().is_hopper:
        return None
    way = _way(tokens, outputs, width)
    return way if way.library == "deep_gemm" else None


def _way(tokens: int, outputs: int, width: int) -> GemmBackend:
    if probe("deep_gemm").module is None:
        return CUBLAS
    way = choose(tokens, outputs, width, gpu().name)
    if way.multiprocessors > gpu().multiprocessors:
        return DEEP_GEMM  # this process has a part of the GPU that was measured; more is refused
    return way


def multiprocessors_of(wanted: int) -> int:
    """How many DeepGEMM takes where `wanted` is asked of it, 0 for all."""
    return wanted or gpu().multiprocessors


def fp8_linear(
    x: Tensor | Quantized, weight: Tensor, weight_scale_inv: Tensor, dtype: torch.dtype
) -> Tensor:
    """As the reference, with x rounded to e4m3 by groups of 128."""
    quantized = x if isinstance(x, Quantized) else quantize(x)
    return fp8_matmul(quantized, weight, weight_scale_inv, dtype)
