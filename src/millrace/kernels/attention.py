"""Attention over paged keys and values: storing them, and reading them for decode and prefill rows.

The reference gathers the KV rows that each query may see, and attends to those. KV rows that no
query may see are never gathered (a position past the row's end reads the row's last token instead).
So stale pages, even with NaN in them, cannot change a result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.batch import Batch, DecodeRows, KVCache, PrefillRows
from millrace.kernels.dispatch import is_invariant, op
from millrace.kernels.norm import rms_norm
from millrace.kernels.rope import apply_rope

# Prefill rows of different lengths run as one padded batch, up to this share of padding.
MAX_PADDING = 0.25
# Spans grow in steps of this, so that copies of equal size reuse the same memory.
SPAN_STEP = 16


@op
def store_kv(k: Tensor, v: Tensor, cache: KVCache, kv_rows: Tensor) -> None:
    """Write keys and values [T, kv_heads, head_dim] into the cache's flat rows kv_rows int64 [T].

    They are rounded to the cache's dtype; for float8_e4m3fn with scale 1.0, saturating.
    """
    for new, pages in ((k, cache.keys), (v, cache.values)):
        if pages.dtype == torch.float8_e4m3fn:
            limit = torch.finfo(pages.dtype).max  # not every version of torch saturates
            bits = new.clamp(-limit, limit).to(pages.dtype).view(torch.uint8)
            pages.view(torch.uint8).flatten(0, 1)[kv_rows] = bits
        else:
            pages.flatten(0, 1)[kv_rows] = new.to(pages.dtype)


@op
def norm_rope_store(
    qkv: Tensor,
    widths: list[int],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: KVCache,
    kv_rows: Tensor,
) -> Tensor:
    """The step from the attention projection to attention: norm, rotation, KV store.

    qkv: [T, sum(widths)], the (query, gate, key, value) parts of the projection; queries and gates
    may be absent, with widths of 0. Norms (where there is a weight) and rotates queries and keys by
    head, stores keys and values at kv_rows, and returns the queries [T, query_heads, head_dim].
    """
    kv_heads, dim = cache.keys.shape[2:]
    q, _, k, v = qkv.split(widths, dim=-1)

    def rotated(x: Tensor, weight: Tensor | None, heads: int) -> Tensor:
        x = x.unflatten(-1, (heads, dim))
        return apply_rope(x if weight is None else rms_norm(x, weight, eps), positions, cos_sin)

    q, k = rotated(q, q_weight, widths[0] // dim), rotated(k, k_weight, kv_heads)
    store_kv(k, v.unflatten(-1, (kv_heads, dim)), cache, kv_rows)
    return q


@op
def attend(
    q: Tensor, cache: KVCache, block_table: Tensor, batch: Batch, scale: float, first: int = 0
) -> Tensor:
    """Attention of a batch's tokens, both kinds of rows, over their own pages.

    q: [T, query_heads, head_dim]; the rest as attend_decode and attend_prefill take it. Returns q's
    shape and dtype.
    """
    known = batch.trimmed()
    n, parts = known.num_decode_tokens, []
    if known.decode is not None:
        parts.append(attend_decode(q[:n], cache, block_table, known.decode, scale, first))
    if known.prefill is not None:
        rows, tokens = known.prefill.alone(), q[n : known.positions.shape[0]]
        parts.append(attend_prefill(tokens, cache, block_table, rows, scale, first))
    return fill_up(parts, q.shape[0])


def fill_up(parts: list[Tensor], tokens: int) -> Tensor:
    """The parts [n, ...] of a batch one after another, and zeros for the padding of its tokens."""
    padding = tokens - sum(len(part) for part in parts)
    if padding:
        parts = [*parts, parts[0].new_zeros(padding, *parts[0].shape[1:])]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@op
def attend_decode(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: DecodeRows, scale: float, first: int = 0
) -> Tensor:
    """Attention of `width` tokens a row over the row's own pages.

    q: [D * width, query_heads, head_dim]; block_table: int32 [N, max_pages], by slot. The token at
    position p sees the KV rows first .. p, its own included, which must be stored already. Returns
    q's shape and dtype.
    """
    if is_invariant():
        starts = rows.starts[:, None] + torch.arange(rows.width, device=q.device)
        slots = rows.slots[:, None].expand_as(starts)
        return _attend_alone(q, cache, block_table, slots.flatten(), starts.flatten(), scale, first)
    batched = q.unflatten(0, (-1, rows.width))
    ends = rows.starts + rows.width
    span = _span(cache, block_table, rows.slots, rows.starts, ends, rows.width, first)
    return _attend_head_by_head(batched, *span, scale).flatten(0, 1)


@op
def attend_prefill(
    q: Tensor, cache: KVCache, block_table: Tensor, rows: PrefillRows, scale: float, first: int = 0
) -> Tensor:
    """Attention of prompt tokens: as attend_decode, for rows of `rows.counts` tokens each."""
    if is_invariant():
        known = zip(rows.starts.tolist(), rows.host_counts, strict=True)
        positions = torch.cat([torch.arange(s, s + n, device=q.device) for s, n in known])
        slots = rows.slots.repeat_interleave(torch.tensor(rows.host_counts, device=q.device))
        return _attend_alone(q, cache, block_table, slots, positions, scale, first)
    counts, ends = list(rows.host_counts), rows.starts + rows.offsets.diff()
    if len(counts) * max(counts) * (1 - MAX_PADDING) <= sum(counts):
        padded = torch.nn.utils.rnn.pad_sequence(q.split(counts), batch_first=True)
        span = _span(cache, block_table, rows.slots, rows.starts, ends, max(counts), first)
        out = _attend_fused(padded, *span, scale)
        return torch.cat([out[row, :count] for row, count in enumerate(counts)])
    pieces = []
    for row, piece in enumerate(q.split(counts)):
        slots, starts, end = (x[row : row + 1] for x in (rows.slots, rows.starts, ends))
        span = _span(cache, block_table, slots, starts, end, counts[row], first)
        pieces.append(_attend_fused(piece.unsqueeze(0), *span, scale).squeeze(0))
    return torch.cat(pieces)


def _attend_alone(
    q: Tensor,
    cache: KVCache,
    block_table: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    first: int,
) -> Tensor:
    """Each token of q [T, query_heads, D] by itself, so that no shape depends on another. slots,
    positions: int64 [T]."""
    out = []
    for token in range(q.shape[0]):
        slot, start = (x[token : token + 1] for x in (slots, positions))
        span = _span(cache, block_table, slot, start, start + 1, 1, first)
        out.append(_attend_head_by_head(q[token : token + 1, None].clone(), *span, scale)[:, 0])
    return torch.cat(out)


def _attend_fused(q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Torch's attention, which is fast for many queries per row.

    q: [R, n, query_heads, D]; keys, values: [R, L, kv_heads, D]; visible: bool [R, n, L]. Returns
    q's shape. The query heads of a group are further queries of their KV head, so keys and values
    are never repeated.
    """
    queries, group = _by_kv_head(q, keys.shape[2])
    mask = visible.repeat_interleave(group, 1).unsqueeze(1)
    k, v = (x.to(q.dtype).transpose(1, 2) for x in (keys, values))
    out: Tensor = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)
    return _by_query_head(out, group)


def _attend_head_by_head(
    q: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """As _attend_fused, and several times faster for the few queries of a decode row.

    Scores and softmax are float32; the weights are rounded to the values' dtype.
    """
    queries, group = _by_kv_head(q, keys.shape[2])
    hidden = ~visible.repeat_interleave(group, 1)
    queries = queries.float() * scale
    out = []
    for head in range(keys.shape[2]):
        scores = queries[:, head] @ keys[:, :, head].float().transpose(1, 2)
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        out.append(weights.to(q.dtype) @ values[:, :, head].to(q.dtype))
    return _by_query_head(torch.stack(out, 1), group)


def _by_kv_head(q: Tensor, kv_heads: int) -> tuple[Tensor, int]:
    """[R, n, query_heads, D] as [R, kv_heads, n * group, D], and the group's size."""
    group = q.shape[2] // kv_heads
    return q.unflatten(2, (kv_heads, group)).transpose(1, 2).flatten(2, 3), group


def _by_query_head(out: Tensor, group: int) -> Tensor:
    """The inverse of _by_kv_head."""
    tokens: Tensor = out.unflatten(2, (-1, group)).transpose(1, 2)
    return tokens.flatten(2, 3)


def _span(
    cache: KVCache,
    block_table: Tensor,
    slots: Tensor,
    starts: Tensor,
    ends: Tensor,
    count: int,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [R, L, kv_heads, D] that `count` tokens from `starts` on may see, and a mask.

    ends: the rows' lengths, which may fall short of starts + count where rows are padded. visible:
    bool [R, count, L]. Column j is position first + j; one at or past a row's end, or past its
    table, holds the row's last token again: live, and not visible to a token that counts.
    """
    page_size = cache.keys.shape[1]
    capacity = block_table.shape[1] * page_size
    limit = -(-(int(starts.max()) + count) // SPAN_STEP) * SPAN_STEP
    limit = min(limit, capacity)
    columns = torch.arange(first, max(limit, first + 1), device=starts.device)
    positions = torch.minimum(columns, (ends - 1)[:, None])
    pages = block_table[slots[:, None], positions // page_size].to(torch.int64)
    flat = (pages * page_size + positions % page_size).flatten()
    tokens = starts[:, None] + torch.arange(count, device=starts.device)
    shape = (*positions.shape, *cache.keys.shape[2:])
    keys, values = (_take(x, flat).view(shape) for x in (cache.keys, cache.values))
    return keys, values, columns <= tokens[:, :, None]


def _take(pages: Tensor, flat: Tensor) -> Tensor:
    """KV rows [len(flat), kv_heads * head_dim], copied."""
    rows = pages.flatten(0, 1).flatten(1)
    if pages.dtype == torch.float8_e4m3fn:  # the CPU has no index_select for e4m3
        return rows.view(torch.uint8).index_select(0, flat).view(pages.dtype)
    return rows.index_select(0, flat)
