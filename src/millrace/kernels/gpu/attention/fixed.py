"""Attention of rows of any kind in blocks of keys from the first one: batch invariant.

A program owns a tile of a row's tokens and all query heads of a KV head. Its products have one
shape, and every block is masked by the same code, whatever the number of tokens or keys. Keys are
never cut into parts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.batch import KVCache, PrefillRows
from millrace.kernels.gpu.attention.softmax import LOG2_E, _attend_block, _operand

ROW_ARRAYS = ["slots", "starts", "offsets"]
QUERIES, KEYS = 64, 64  # of a tile, and of a block


@triton.jit(do_not_specialize_on_alignment=ROW_ARRAYS, do_not_specialize=["TILES"])
def _fixed_attention_kernel(
    q, keys, values, block_table, slots, starts, offsets, tiles, out, table_stride, TILES, scale,
    HEADS, KV_HEADS, FIRST: tl.constexpr, GROUP: tl.constexpr, EACH: tl.constexpr,
    M: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, DB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """EACH: tokens of a tile."""
    kh = tl.program_id(0)
    number = TILES - 1 - tl.program_id(1)
    row = tl.load(tiles + number)
    if row >= 0:
        tile = tl.load(tiles + TILES + number)
        begin = tl.load(offsets + row)
        count = tl.load(offsets + row + 1) - begin
        start = tl.load(starts + row).to(tl.int32)
        m_index, d = tl.arange(0, M), tl.arange(0, DB)
        t = tile * EACH + m_index // GROUP
        live = (m_index < EACH * GROUP) & (t < count)
        head = kh * GROUP + m_index % GROUP
        at = (((begin + t).to(tl.int64) * HEADS + head) * D)[:, None] + d[None, :]
        mask = live[:, None] & (d < D)[None, :]
        Q = _operand(tl.load(q + at, mask=mask, other=0.0), keys)
        high = start + tl.minimum((tile + 1) * EACH, count)
        table = block_table + tl.load(slots + row) * table_stride
        m = tl.full((M,), -float("inf"), tl.float32)
        mass = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DB), tl.float32)
        for block in tl.range(0, high, BN, num_stages=2):
            m, mass, acc = _attend_block(
                Q, m, mass, acc, keys, values, table, block, high, start + t, kh, scale, KV_HEADS,
                FIRST, PAGE, D, DB, BN, True,
            )  # fmt: skip
        safe = tl.where(mass > 0, mass, 1.0)
        tl.store(out + at, (acc / safe[:, None]).to(out.dtype.element_ty), mask=mask)


def attend_fixed(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: PrefillRows, scale: float, first: int,
    out: Tensor,
) -> None:  # fmt: skip
    """As `attend_prefill`, into out; q is contiguous."""
    page, kv_heads, dim = cache.keys.shape[1:]
    heads = q.shape[1]
    group = heads // kv_heads
    size = max(QUERIES, triton.next_power_of_2(group))
    each = size // group
    tiles = rows.tiles(each, q.shape[0])
    _fixed_attention_kernel[(kv_heads, tiles.shape[1])](
        q, cache.keys, cache.values, block_table, rows.slots, rows.starts, rows.offsets, tiles, out,
        block_table.stride(0), tiles.shape[1], scale * LOG2_E, heads, kv_heads, FIRST=first,
        GROUP=group, EACH=each, M=size, PAGE=page, D=dim, DB=triton.next_power_of_2(dim), BN=KEYS,
        num_warps=4,
    )  # fmt: skip
