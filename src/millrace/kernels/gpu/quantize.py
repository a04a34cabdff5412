"""E4M3 activations with one scale per token and group of 128 channels, and the ops that end in one.

Each of these ops also has a plain form that leaves its result in the model dtype; both come from
one kernel. Scales lie group by group (a column per group, tokens padded to a multiple of 4), the
order in which FP8 products on Hopper read them. With EARLY_LAUNCHES what quantises lets the product
behind it be launched at once: that one's blocks set themselves up meanwhile, and wait before they
read. With CHAINED_LAUNCHES, too, norms and silu are launched so behind the product before them, and
products of few tokens fetch their weight while they wait.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from millrace.kernels.quantize import GROUP, Quantized

E4M3_MAX = tl.constexpr(448.0)
COPY, SILU_MUL, SIGMOID_GATE, GATED_NORM = range(4)
EARLY_LAUNCHES = True  # `benchmarks/early_launch_h200.py` compares
CHAINED_LAUNCHES = True  # the same; only where EARLY_LAUNCHES is set
NORM_STRIP = 1024  # channels that a norm holds as one piece: [8, GROUP]


@triton.jit
def quantize_groups(y):
    """[G, 128] float32 to e4m3 values and [G] scales; a group of zeros has a tiny scale."""
    scale = tl.maximum(tl.max(tl.abs(y), axis=1), 1e-10) / E4M3_MAX
    return (y / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit
def _order_launches(EARLY: tl.constexpr, CHAINED: tl.constexpr):
    """EARLY: the next kernel may be launched now. CHAINED: this one may have been, so wait until
    the one in front has ended."""
    if EARLY:
        gdc_launch_dependents()
    if CHAINED:
        gdc_wait()


@triton.jit(do_not_specialize=["scale_stride"])
def _pointwise_kernel(
    x, y, weight, out, scales, x_stride, y_stride, width, scale_stride, eps,
    OP: tl.constexpr, WIDE: tl.constexpr, DIM: tl.constexpr, G: tl.constexpr,
    QUANTIZE: tl.constexpr, EARLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One token's groups program_id(1) * G and after; a group has DIM channels in WIDE lanes."""
    _order_launches(EARLY, CHAINED)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * G + tl.arange(0, G)
    lane = tl.arange(0, WIDE)
    channel = group[:, None] * DIM + lane[None, :]
    mask = (channel < width) & (lane < DIM)[None, :]
    value = tl.load(x + token * x_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if OP != 0:
        other = tl.load(y + token * y_stride + channel, mask=mask, other=0.0).to(tl.float32)
    if OP == 1:
        value = value / (1.0 + tl.exp(-value)) * other
    elif OP == 2:
        value = value / (1.0 + tl.exp(-other))
    elif OP == 3:
        inverse = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / DIM + eps)
        w = tl.load(weight + lane, mask=lane < DIM, other=0.0).to(tl.float32)
        value = value * inverse[:, None] * w[None, :] * (other / (1.0 + tl.exp(-other)))
    at = out + token * width + channel
    if QUANTIZE:
        quantized, scale = quantize_groups(value)
        tl.store(at, quantized, mask=mask)
        live = group * DIM < width
        tl.store(scales + group.to(tl.int64) * scale_stride + token, scale, mask=live)
    else:
        tl.store(at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["scale_stride"])
def _norm_kernel(
    x, residual, weight, sums, normed, values, scales, x_stride, residual_stride, width,
    scale_stride, eps, ADD: tl.constexpr, KEEP: tl.constexpr, QUANTIZE: tl.constexpr,
    STRIPS: tl.constexpr, RAGGED: tl.constexpr, EARLY: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """rms_norm of one token after adding the residual where ADD, in STRIPS pieces of [8, 128]
    channels that are held between two passes. RAGGED: the last one is not full."""
    _order_launches(EARLY, CHAINED)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, 8)
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    held = ()
    square = tl.zeros((8, 128), tl.float32)
    for i in tl.static_range(STRIPS):
        at = i * 1024 + channel
        mask = at < width if RAGGED else at >= 0
        value = tl.load(x + token * x_stride + at, mask=mask, other=0.0).to(tl.float32)
        if ADD:
            old = tl.load(residual + token * residual_stride + at, mask=mask, other=0.0)
            total = (value + old.to(tl.float32)).to(sums.dtype.element_ty)
            tl.store(sums + token * width + at, total, mask=mask)
            value = total.to(tl.float32)
        square += value * value
        held = held + (value,)  # type: ignore[assignment]  # noqa: RUF005
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(square, axis=1), axis=0) / width + eps)
    for i in tl.static_range(STRIPS):
        at = i * 1024 + channel
        mask = at < width if RAGGED else at >= 0
        w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        value = held[i] * inverse * w
        if KEEP:
            to = normed + token * width + at
            tl.store(to, value.to(normed.dtype.element_ty), mask=mask)
        if QUANTIZE:
            quantized, scale = quantize_groups(value)
            tl.store(values + token * width + at, quantized, mask=mask)
            block = i * 8 + group
            to = scales + block.to(tl.int64) * scale_stride + token
            tl.store(to, scale, mask=block * 128 < width)


def quantize(x: Tensor) -> Quantized:
    """x: [T, K], rows of any stride."""
    return _quantized(COPY, x, x, x.shape[1])


def silu_mul_quantize(gate_up: Tensor) -> Quantized:
    """silu(gate) * up, quantised. gate_up: [T, 2 I], gate first."""
    width = gate_up.shape[1] // 2
    return _quantized(SILU_MUL, gate_up, gate_up[:, width:], width)


def sigmoid_gate_quantize(x: Tensor, gate: Tensor) -> Quantized:
    """x * sigmoid(gate), quantised. x, gate: [T, K]."""
    return _quantized(SIGMOID_GATE, x, gate, x.shape[1])


def gated_rms_norm_quantize(o: Tensor, z: Tensor, weight: Tensor, eps: float) -> Quantized:
    """`gated_rms_norm` quantised. o, z: [T, value_heads, 128]: a head is a group."""
    if o.shape[-1] != GROUP:
        raise ValueError(f"value_dim must be {GROUP} to quantise by head, got {o.shape[-1]}")
    return _quantized(GATED_NORM, o.flatten(1), _rows(z), o[0].numel(), weight, eps)


def rms_norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, keep: bool
) -> tuple[Tensor | None, Quantized, Tensor]:
    """As the reference, in one pass."""
    normed, quantized, total = norm(x, residual, weight, eps, keep=keep, quantized=True)
    assert quantized is not None
    return normed, quantized, x if total is None else total


def pointwise(
    op: int, x: Tensor, y: Tensor, width: int, dim: int = GROUP,
    weight: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """The plain form of an op: [T, width] of x's dtype. dim: channels that a norm runs over."""
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    _launch_pointwise(op, x, y, width, out, None, dim, weight, eps)
    return out


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float,
    *, keep: bool = True, quantized: bool = False,
) -> tuple[Tensor | None, Quantized | None, Tensor | None]:  # fmt: skip
    """(rms_norm(s), its quantised form, s) for s = x + residual, or s = x without a residual.

    x, residual: [T, H], any row stride. Only what keep and quantized ask for is computed; the
    third is None without a residual.
    """
    tokens, width = x.shape
    sums = None if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = torch.empty(tokens, width, dtype=x.dtype, device=x.device) if keep else None
    q = empty_quantized(tokens, width, x.device) if quantized else None
    early = quantized and launches_early()
    chained = quantized and chains_launches()
    if tokens:
        _norm_kernel[(tokens,)](
            x, _or(residual, x), weight, _or(sums, x), _or(normed, x),
            *(q or (x, x)), x.stride(0), _or(residual, x).stride(0), width,
            q.scales.stride(1) if q else 0, eps, ADD=residual is not None, KEEP=keep,
            QUANTIZE=quantized, STRIPS=-(-width // NORM_STRIP), RAGGED=width % NORM_STRIP > 0,
            EARLY=early, CHAINED=chained, launch_pdl=chained, num_warps=4,
        )  # fmt: skip
    return normed, q, sums


def _quantized(
    op: int, x: Tensor, y: Tensor, width: int, weight: Tensor | None = None, eps: float = 0.0
) -> Quantized:
    q = empty_quantized(x.shape[0], width, x.device)
    _launch_pointwise(op, x, y, width, q.values, q.scales, GROUP, weight, eps)
    return q


def _launch_pointwise(
    op: int, x: Tensor, y: Tensor, width: int, out: Tensor, scales: Tensor | None,
    dim: int, weight: Tensor | None, eps: float,
) -> None:  # fmt: skip
    if x.stride(-1) != 1 or y.stride(-1) != 1:
        raise ValueError("channels must be neighbours in memory")
    groups = -(-width // dim)
    per_program = min(16, triton.next_power_of_2(groups))
    if x.shape[0] == 0:
        return
    early = scales is not None and launches_early()
    # Behind products alone: what gates and norms of heads wait for may run on two streams.
    chained = scales is not None and chains_launches() and op == SILU_MUL
    _pointwise_kernel[(x.shape[0], -(-groups // per_program))](
        x, y, _or(weight, x), out, _or(scales, x), x.stride(0), y.stride(0), width,
        0 if scales is None else scales.stride(1), eps, OP=op, DIM=dim, G=per_program,
        WIDE=triton.next_power_of_2(dim), QUANTIZE=scales is not None,
        EARLY=early, CHAINED=chained, launch_pdl=chained, num_warps=4,
    )  # fmt: skip


@functools.cache
def launches_early() -> bool:
    """Whether a product is launched before what quantises its input has ended."""
    if not (EARLY_LAUNCHES and torch.cuda.is_available()):
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def chains_launches() -> bool:
    """Whether what stands behind a product, and products of few tokens, are launched before the
    kernel in front of them has ended."""
    return CHAINED_LAUNCHES and launches_early()


def empty_quantized(tokens: int, width: int, device: torch.device) -> Quantized:
    """Of these sizes and in the order of scales that products want, with memory as it is found."""
    groups, padded = -(-width // GROUP), -(-tokens // 4) * 4
    scales = torch.empty(groups, padded, dtype=torch.float32, device=device).t()[:tokens]
    return Quantized(torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=device), scales)


def _rows(x: Tensor) -> Tensor:
    """[T, heads, dim] as [T, heads * dim] without a copy where the heads are neighbours."""
    return x.view(x.shape[0], -1) if x.stride(1) == x.shape[2] else x.flatten(1)


def _or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if x is None else x
