"""Which experts a token goes to, and the tokens' rows in the order of their experts.

Nothing is read on the host, and every size is what the number of tokens allows at most: so both run
in graphs. A row is a pair of a token and one of its experts, `token * top_k + choice`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from millrace.kernels.dispatch import remembered
from millrace.kernels.gpu import cuda_source
from millrace.kernels.gpu.cuda_source import CudaKernel
from millrace.kernels.moe import Routes

PART = 128  # pairs that are ranked against each other at once
COUNTED_ALONE = 4096  # pairs, up to which every program counts all of them itself
ALONE = 8192  # pairs, up to which one block of the CUDA kernel takes all
BLOCK = 2048  # pairs of a block, where there are more
MOST_EXPERTS = 1024  # of the CUDA kernels


@triton.jit
def _route_kernel(
    logits, gate, experts, weights, stride, gate_stride, count,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BE: tl.constexpr, NORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """One token's TOP_K largest logits, in SLOTS lanes, of `count` in BE lanes. SHARED: and behind
    them expert `count`, by its gate.

    Keys are integers in the order of the logits, and below them the order of the experts from the
    last to the first: so no two are equal. A NaN counts as infinite.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BE)
    live = expert < count
    x = tl.load(logits + token * stride + expert, mask=live, other=-float("inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x) + 0.0  # -0 is 0
    bits = x.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = tl.where(live, ordered * 65536 + (65535 - expert), -(1 << 62))
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.max(key, axis=0)
        index = (65535 - (best & 65535)).to(tl.int32)
        chosen = tl.where(slot == i, index, chosen)
        key = tl.where(expert == index, -(1 << 62), key)
    most = tl.max(x, axis=0)
    share = tl.where(live, tl.exp(x - most), 0.0)
    picked = tl.load(logits + token * stride + chosen, mask=slot < TOP_K, other=-float("inf"))
    value = tl.exp(picked.to(tl.float32) - most) / tl.sum(share, axis=0)
    value = tl.where(slot < TOP_K, value, 0.0)
    if NORMALIZE:
        value = value / tl.sum(value, axis=0)
    at = token * (TOP_K + SHARED) + slot
    tl.store(experts + at, chosen, mask=slot < TOP_K)
    tl.store(weights + at, value.to(weights.dtype.element_ty), mask=slot < TOP_K)
    if SHARED:
        share = 1.0 / (1.0 + tl.exp(-tl.load(gate + token * gate_stride).to(tl.float32)))
        last = token * (TOP_K + 1) + TOP_K
        tl.store(experts + last, count)
        tl.store(weights + last, share.to(weights.dtype.element_ty))


def route(logits: Tensor, top_k: int, normalize: bool, shared_gate: Tensor | None = None) -> Routes:
    """As the reference, with experts in int32. logits: [T, E], any row stride."""
    tokens, count = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    gate = logits if shared_gate is None else shared_gate
    wide = tokens, top_k + (shared_gate is not None)
    experts = torch.empty(wide, dtype=torch.int32, device=logits.device)
    weights = torch.empty(wide, dtype=logits.dtype, device=logits.device)
    if tokens:
        _route_kernel[(tokens,)](
            logits, gate, experts, weights, logits.stride(0), gate.stride(0), count, TOP_K=top_k,
            SLOTS=triton.next_power_of_2(top_k), BE=triton.next_power_of_2(count),
            NORMALIZE=normalize, SHARED=shared_gate is not None, num_warps=1,
        )  # fmt: skip
    return Routes(experts, weights)


class Groups(NamedTuple):
    """The pairs in the order of their experts, in tiles of `tile` rows that have one expert each.

    experts: int32 [P], of each row; -1 where a tile is not full, and behind the last tile.
    pairs: int32 [P], of each row that has an expert; others hold anything.
    rows: int32 [T * K], of each pair; -1: its expert is on another rank.
    """

    experts: Tensor
    pairs: Tensor
    rows: Tensor
    tile: int

    @property
    def tiles(self) -> int:
        return len(self.experts) // self.tile


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(experts, counts, pairs, PARTS: tl.constexpr, BE: tl.constexpr):
    """How many of a program's PARTS * PART pairs each expert has."""
    first = tl.program_id(0) * PARTS * 128
    expert = tl.arange(0, BE)
    found = tl.zeros((BE,), tl.int32)
    for part in range(PARTS):
        at = first + part * 128 + tl.arange(0, 128)
        ids = tl.load(experts + at, mask=at < pairs, other=-1)
        found += tl.histogram(tl.maximum(ids, 0), BE, ids >= 0)
    tl.store(counts + tl.program_id(0) * BE + expert, found)


@triton.jit(do_not_specialize=["pairs", "room", "programs"])
def _group_kernel(
    experts, counts, row_experts, row_pairs, rows, pairs, room, programs,
    TILE: tl.constexpr, PARTS: tl.constexpr, BE: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Rows of a program's PARTS * PART pairs, and the experts of every programs-th PART of all
    `room` rows. COUNTED: by `_count_kernel`, of all programs; else each counts all pairs."""
    own = tl.program_id(0)
    first = own * PARTS * 128
    expert = tl.arange(0, BE)
    total = tl.zeros((BE,), tl.int32)
    before = tl.zeros((BE,), tl.int32)  # pairs of programs in front
    if COUNTED:
        for start in range(0, programs, 16):
            program = start + tl.arange(0, 16)
            at = counts + program[:, None] * BE + expert[None, :]
            some = tl.load(at, mask=(program < programs)[:, None], other=0)
            total += tl.sum(some, axis=0)
            before += tl.sum(tl.where((program < own)[:, None], some, 0), axis=0)
    else:
        for start in range(0, pairs, 512):
            at = start + tl.arange(0, 512)
            ids = tl.load(experts + at, mask=at < pairs, other=-1)
            own_ids = tl.maximum(ids, 0)
            total += tl.histogram(own_ids, BE, ids >= 0)
            before += tl.histogram(own_ids, BE, (ids >= 0) & (at < first))
    padded = (total + (TILE - 1)) // TILE * TILE
    end = tl.cumsum(padded, axis=0)
    begin = end - padded
    filled = begin + total
    place = begin + before
    lane = tl.arange(0, 128)
    for part in range(PARTS):
        at = first + part * 128 + lane
        inside = at < pairs
        ids = tl.load(experts + at, mask=inside, other=-1)
        others = tl.load(experts + first + part * 128 + lane[None, :],
                         mask=(first + part * 128 + lane < pairs)[None, :], other=-1)  # fmt: skip
        earlier = (ids[:, None] == others) & (lane[None, :] < lane[:, None])
        is_of = ids[:, None] == expert[None, :]
        row = tl.sum(tl.where(is_of, place[None, :], 0), axis=1) + tl.sum(
            earlier.to(tl.int32), axis=1
        )
        tl.store(rows + at, tl.where(ids >= 0, row, -1), mask=inside)
        tl.store(row_pairs + row, at, mask=ids >= 0)
        place += tl.sum(is_of.to(tl.int32), axis=0)
    for start in range(own * 128, room, programs * 128):
        row = start + lane
        inside_of = (row[:, None] >= begin[None, :]) & (row[:, None] < filled[None, :])
        found = tl.sum(tl.where(inside_of, expert[None, :] + 1, 0), axis=1) - 1
        tl.store(row_experts + row, found, mask=row < room)


def group(experts: Tensor, count: int, tile: int) -> Groups:
    """The pairs of `experts`, int32 [T, K] of `count` experts or -1, grouped; those of an expert in
    any order. tile: a power of two."""
    pairs, device = experts.numel(), experts.device
    room = most_rows(pairs, count, tile)
    row_experts, row_pairs = torch.empty(2, room, dtype=torch.int32, device=device)
    found = Groups(row_experts, row_pairs, experts.new_empty(pairs), tile)
    if count > MOST_EXPERTS or device.type != "cuda" or not group_by_cuda(experts, count, found):
        group_in_triton(experts, count, found)
    return found


def group_by_cuda(experts: Tensor, count: int, to: Groups) -> bool:
    """Whether the CUDA kernels have done it."""
    pairs, alone = experts.numel(), experts.numel() <= ALONE
    part = ALONE if alone else BLOCK
    place = compiled("group_place", to.tile, part, alone)
    first = place if alone else compiled("group_count", to.tile, part, alone)
    if place is None or first is None:
        return False
    blocks = max(1, triton.cdiv(pairs, part))
    counts, shape = to.rows, ((blocks, 1, 1), (1024, 1, 1))
    if not alone:
        counts = experts.new_empty(blocks * count)
        first(*shape, [experts, counts, to.rows, pairs, count])
    room = len(to.experts)
    place(*shape, [experts, counts, to.rows, to.experts, to.pairs, pairs, count, room, blocks])
    return True


def source(tile: int, part: int, alone: bool) -> str:
    """The kernels `group_count` and `group_place`. part: pairs of a block; alone: it is the only
    one."""
    return cuda_source.read({"tile": tile, "part": part, "alone": alone}, "moe/group.cu")


@remembered
def compiled(name: str, tile: int, part: int, alone: bool) -> CudaKernel | None:
    """None where there is no compiler."""
    return cuda_source.compiled(source(tile, part, alone), name)


def group_in_triton(experts: Tensor, count: int, to: Groups) -> None:
    """`group` into `to` by Triton, those of an expert in their order. Slower: for machines that
    compile no CUDA."""
    pairs, tile, device = experts.numel(), to.tile, experts.device
    row_experts, row_pairs, rows = to.experts, to.pairs, to.rows
    room = len(row_experts)
    counted = pairs > COUNTED_ALONE
    parts, wide = (8 if counted else 2), triton.next_power_of_2(max(2, count))
    programs = max(1, triton.cdiv(pairs, parts * PART))
    counts = rows
    if counted:
        counts = torch.empty(programs, wide, dtype=torch.int32, device=device)
        _count_kernel[(programs,)](experts, counts, pairs, PARTS=parts, BE=wide, num_warps=4)
    _group_kernel[(programs,)](
        experts, counts, row_experts, row_pairs, rows, pairs, room, programs, TILE=tile,
        PARTS=parts, BE=wide, COUNTED=counted, num_warps=8,
    )  # fmt: skip


def most_rows(pairs: int, count: int, tile: int) -> int:
    """Rows that so many pairs of `count` experts take at most, in tiles."""
    begun = min(pairs, count)  # every expert that has pairs may have a tile that is not full
    return max(tile, (pairs + begun * (tile - 1)) // tile * tile)
