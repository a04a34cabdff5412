"""Attention of prompts over keys and values that lie in rows of their own, in float16.

What `prefill` has widened out of pages is contiguous, so whole blocks of it are fetched by the
hardware that copies boxes of a matrix (TMA). That leaves a thread the registers that addresses
would take; without them products on tensor cores wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from millrace.kernels.batch import KVCache, PrefillRows
from millrace.kernels.gpu.attention.softmax import LOG2_E

ROW_ARRAYS = ["starts", "offsets"]
FEW = 32  # keys of a block at the end of a row, where a thread masks them
# Query tile, block of keys, warps, stages. Blocks of 64 keys leave products too few registers: 278
# TFLOP/s behind a long context for 310, on an H200.
CONFIG = (128, 32, 8, 3)


@triton.jit
def _join(Q, m, mass, acc, keys, values, at, column, block, high, q_pos, scale,
          FIRST: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Keys block .. block + BN - 1 join the running softmax; what is past `high`, before FIRST or
    past a query does not, if MASKED. m: in powers of two, scaled."""
    K = keys.load([at + block, column])
    S = tl.dot(Q, tl.trans(K))
    pos = block + tl.arange(0, BN)
    if MASKED:
        live = (pos < high) & (pos >= FIRST)
        S = tl.where(live[None, :] & (pos[None, :] <= q_pos[:, None]), S, -float("inf"))
    m_new = tl.maximum(m, tl.max(S, axis=1) * scale)
    m_safe = m_new
    if MASKED:
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
    P = tl.exp2(S * scale - m_safe[:, None])
    alpha = tl.exp2(m - m_safe)
    V = values.load([at + block, column])
    if MASKED:  # rows of others, or of nobody, may hold anything
        V = tl.where(live[:, None], V, 0.0)
    acc = tl.dot(P.to(Q.dtype), V, acc=acc * alpha[:, None])
    return m_new, mass * alpha + tl.sum(P, axis=1), acc


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS, do_not_specialize=["TILES"])
def _prefill_wide_kernel(
    q, keys, values, few_keys, few_values, starts, offsets, wide_at, tiles, out, q_stride, TILES,
    scale, HEADS, FIRST: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BN: tl.constexpr, FEW: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of M tokens of a row and one query head. Rows that are not widened are for others."""
    head = tl.program_id(0)
    # The last tiles have the longest rows to read: they go first.
    number = TILES - 1 - tl.program_id(1)
    row = tl.load(tiles + number)
    own = tl.load(wide_at + tl.maximum(row, 0))
    if (row >= 0) & (own >= 0):
        begin = tl.load(offsets + row)
        count = tl.load(offsets + row + 1) - begin
        start = tl.load(starts + row).to(tl.int32)
        tile = tl.load(tiles + TILES + number)
        t = tile * M + tl.arange(0, M)
        d = tl.arange(0, D)
        token = (begin + t).to(tl.int64)[:, None]
        mask = (t < count)[:, None]
        Q = tl.load(q + token * q_stride + head * D + d[None, :], mask=mask, other=0.0)
        Q = Q.to(tl.float16)
        high = start + tl.minimum((tile + 1) * M, count)
        column = head // GROUP * D
        q_pos = start + t
        m = tl.full((M,), -float("inf"), tl.float32)
        mass = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, D), tl.float32)
        middle = 0
        if FIRST == 0:
            middle = tl.minimum(high, start + tile * M + 1) // BN * BN
            for block in tl.range(0, middle, BN, num_stages=STAGES):
                m, mass, acc = _join(
                    Q, m, mass, acc, keys, values, own, column, block, high, q_pos, scale, FIRST,
                    BN, False,
                )  # fmt: skip
        for block in tl.range(middle, high, FEW, num_stages=1):
            m, mass, acc = _join(
                Q, m, mass, acc, few_keys, few_values, own, column, block, high, q_pos, scale,
                FIRST, FEW, True,
            )  # fmt: skip
        safe = tl.where(mass > 0, mass, 1.0)
        result = (acc / safe[:, None]).to(out.dtype.element_ty)
        tl.store(out + (token * HEADS + head) * D + d[None, :], result, mask=mask)


def takes(q: Tensor, wide: KVCache) -> bool:
    """Whether the kernel is for these: heads of a power of two of 16-bit channels."""
    dim = q.shape[2]
    return q.itemsize == 2 and wide.keys.itemsize == 2 and dim == triton.next_power_of_2(dim)


def attend(
    q: Tensor, wide: KVCache, rows: PrefillRows, wide_at: Tensor, scale: float, first: int,
    out: Tensor, config: tuple[int, int, int, int] | None = None,
) -> None:  # fmt: skip
    """Write to out what `attend_prefill` wants of the rows that are widened.

    wide: each [keys, kv_heads, head_dim], float16; wide_at: where each row's begin, -1: nowhere.
    """
    height, block, warps, stages = config or CONFIG
    heads, dim = q.shape[1:]
    tiles = rows.tiles(height, q.shape[0])
    few = min(FEW, block)
    boxes = [
        TensorDescriptor.from_tensor(x.flatten(1), [size, dim])
        for size in (block, few)
        for x in (wide.keys, wide.values)
    ]
    _prefill_wide_kernel[(heads, tiles.shape[1])](
        q, *boxes, rows.starts, rows.offsets, wide_at, tiles, out, q.stride(0),
        tiles.shape[1], scale * LOG2_E, heads, FIRST=first, GROUP=heads // wide.keys.shape[1],
        M=height, D=dim, BN=block, FEW=few, STAGES=stages, num_warps=warps,
    )  # fmt: skip
