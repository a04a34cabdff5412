"""Gated DeltaNet: its gates, its short convolution, and its recurrence in the window form.

With alpha = exp(g), the recurrence of one value head is S_t = alpha_t S_{t-1} + k_t u_t^T with
u_t = beta_t (v_t - alpha_t S_{t-1}^T k_t) and o_t = S_t^T q_t. The window form keeps the state S_0
of the last commit and, for every token since, (k_i, u_i, log A_i), A being the product of alphas:

    u_t = beta_t (v_t - A_t S_0^T k_t - sum_{i<t} A_t/A_i (k_i . k_t) u_i)
    o_t = A_t S_0^T q_t + sum_{i<=t} A_t/A_i (k_i . q_t) u_i
    S_t = A_t S_0 + sum_{i<=t} A_t/A_i k_i u_i^T

`advance` is the first two lines, `fold` the third. Decode advances from the slot's window and folds
when it would overflow; prefill advances a chunk at a time from an empty one and folds after each.
Window rows past the fill are undefined. They are excluded by selection, never multiplied by 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from millrace.kernels.attention import fill_up
from millrace.kernels.batch import Batch, DecodeRows, FixedRows, GDNState, PrefillRows
from millrace.kernels.dispatch import by_token, is_invariant, op

CHUNK = 64
L2_EPS = 1e-6
HALF_MAX = 65504.0  # of float16
FOLD_BATCH = 4
MAX_SPAN_RATIO = (
    1.5  # a range may span so many slots per row; beyond that, copying the states is cheaper
)


# --- gates -------------------------------------------------------------------------------------


@op
@by_token("a", "b")
def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The decay g = -exp(A_log) softplus(a + dt_bias), in log space, and beta = sigmoid(b).

    a, b: [T, value_heads]; A_log, dt_bias: float32 [value_heads]. Both results are float32: a
    rounded beta or A_log drifts over a long context.
    """
    g = -A_log.exp() * F.softplus(a.float() + dt_bias)
    return g, torch.sigmoid(b.float())


# --- convolution -------------------------------------------------------------------------------


@op
def conv_decode(
    x: Tensor, cache: GDNState, weight: Tensor, rows: DecodeRows, conv_offset: Tensor
) -> Tensor:
    """silu of the causal convolution over decode rows; keeps the inputs for any accepted count.

    x: [D * width, C]; weight: [C, 4]; conv_offset: int32 [N]. The three inputs before a row are its
    buffer's rows offset .. offset + 2. The buffer then holds the last 2 + width inputs from row 0
    on, so that after accepting a tokens the right offset is a - 1. Returns x's shape and dtype.
    """
    new, slots = x.unflatten(0, (-1, rows.width)), _slot_index(rows)
    inputs = torch.cat([_previous_inputs(cache, slots, conv_offset), new], dim=1)
    cache.conv[slots, : rows.width + 2] = inputs[:, 1:]
    return _convolve(inputs, weight).flatten(0, 1)


@op
def conv_prefill(
    x: Tensor, cache: GDNState, weight: Tensor, rows: PrefillRows, conv_offset: Tensor
) -> Tensor:
    """silu of the causal convolution over prompt tokens.

    x: [T, C], rows one after another. Reads the inputs before each row as conv_decode does and
    leaves the row's last three in its buffer rows 0 .. 2 (offset 0). Returns x's shape and dtype.
    """
    pieces: list[Tensor] = []
    before = _previous_inputs(cache, rows.slots, conv_offset)
    for row, piece in enumerate(x.split(list(rows.host_counts))):
        pieces += [before[row], piece]
    inputs = torch.cat(pieces)
    ends = rows.offsets[1:].to(torch.int64) + 3 * torch.arange(1, len(rows.host_counts) + 1).to(
        x.device
    )
    cache.conv[rows.slots, :3] = inputs[ends[:, None] + torch.arange(-3, 0, device=x.device)]
    out = _convolve(inputs.unsqueeze(0), weight).squeeze(0)
    if len(rows.host_counts) == 1:
        return out
    starts = [sum(rows.host_counts[:row]) + 3 * row for row in range(len(rows.host_counts))]
    return torch.cat([out[s : s + n] for s, n in zip(starts, rows.host_counts, strict=True)])


def _previous_inputs(cache: GDNState, slots: slice | Tensor, conv_offset: Tensor) -> Tensor:
    """The three inputs before each row: [R, 3, C]."""
    inputs = cache.conv[slots]
    if inputs.shape[1] == 3:  # no drafts: the offset is always 0
        return inputs
    place = conv_offset[slots].to(torch.int64)[:, None] + torch.arange(3, device=inputs.device)
    return inputs.gather(1, place[:, :, None].expand(-1, -1, inputs.shape[2]))


def _convolve(inputs: Tensor, weight: Tensor) -> Tensor:
    """silu of sum_j weight[:, j] * inputs[:, t + j]. inputs: [R, 3 + n, C]; returns [R, n, C].

    The sum is float32 inside and rounded to the inputs' dtype. The inputs are seen as images of
    one row in channels-last order, which is how they lie in memory.
    """
    if is_invariant():
        return _convolve_fixed(inputs, weight)
    image = inputs.unsqueeze(1).permute(0, 3, 1, 2)
    kernel = weight.to(inputs.dtype)[:, None, None]
    out = F.conv2d(image, kernel, groups=weight.shape[0]).permute(0, 2, 3, 1).squeeze(1)
    return F.silu(out, inplace=True)


def _convolve_fixed(inputs: Tensor, weight: Tensor) -> Tensor:
    """As _convolve, each sum in the order of its taps."""
    n = inputs.shape[1] - weight.shape[1] + 1
    taps = (inputs[:, j : j + n].float() * weight[:, j].float() for j in range(weight.shape[1]))
    total = next(taps)
    for tap in taps:
        total = total + tap
    return _silu(total.to(inputs.dtype).flatten(0, 1)).view(len(inputs), n, -1)


@by_token("x")
def _silu(x: Tensor) -> Tensor:
    return F.silu(x)


# --- the window form ---------------------------------------------------------------------------


class Window(NamedTuple):
    """Tokens since the last commit, for R rows, as far as the fullest of them reaches (w tokens).

    k: [R, key_heads, w, key_dim]; u: [R, value_heads, w, value_dim]; log_a: [R, value_heads, w].
    fill: int64 [R], of which only tokens i < fill count; None: all of them do.
    """

    k: Tensor
    u: Tensor
    log_a: Tensor
    fill: Tensor | None

    def live(self) -> Tensor | None:
        """bool [R, 1, w], true for the tokens that count."""
        if self.fill is None:
            return None
        return (torch.arange(self.k.shape[2], device=self.k.device) < self.fill[:, None])[:, None]

    def decay(self) -> Tensor:
        """log A after the window's last token: [R, value_heads, 1], 0 for an empty window."""
        if self.k.shape[2] == 0:
            return self.log_a.new_zeros(*self.log_a.shape[:2], 1)
        if self.fill is None:
            return self.log_a[..., -1:]
        last = (self.fill - 1).clamp(min=0)[:, None, None].expand(*self.log_a.shape[:2], 1)
        return torch.where(self.fill[:, None, None] > 0, self.log_a.gather(2, last), 0.0)


def advance(
    state: Tensor, window: Window, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and window rows (o, u, log A) of n tokens after the window; the state is only read.

    state: [R, value_heads, key_dim, value_dim]; q, k: [R, key_heads, n, key_dim], normalised;
    v: [R, value_heads, n, value_dim]; g, beta: [R, value_heads, n]. o and u have v's shape, log A
    has g's. A key head serves value_heads / key_heads value heads in a row.
    """
    n, ratio = k.shape[2], v.shape[1] // k.shape[1]
    log_a = window.decay() + g.cumsum(-1)
    # Keys and queries are multiplied with the state, the window and each other in one GEMM each.
    probes = torch.cat([k, q], dim=2)
    per_value_head = probes if ratio == 1 else probes.repeat_interleave(ratio, 1)
    old = torch.matmul(per_value_head, state).unflatten(2, (2, n))
    old = old * log_a.exp()[:, :, None, :, None]
    if window.k.shape[2]:
        old += _from_window(window, probes, log_a)
    among = _pairs(probes, k, log_a, log_a)
    u = beta.unsqueeze(-1) * (v - old[:, :, 0])
    if n > 1:  # the solver reads what is below the diagonal and takes ones on it
        system = beta.unsqueeze(-1) * among[:, :, 0]
        u = torch.linalg.solve_triangular(system, u, upper=False, unitriangular=True)
    return old[:, :, 1] + among[:, :, 1].tril() @ u, u, log_a


def _from_window(window: Window, probes: Tensor, log_a: Tensor) -> Tensor:
    """sum_i A_t/A_i (k_i . probe_t) u_i over the window: [R, value_heads, 2, n, value_dim]."""
    weights, u, live = _pairs(probes, window.k, log_a, window.log_a), window.u, window.live()
    if live is not None:
        weights = torch.where(live[:, :, None, None], weights, 0.0)
        u = torch.where(live.unsqueeze(-1), u, 0.0)
    return (weights.flatten(2, 3) @ u).view(*weights.shape[:-1], -1)


def _pairs(probes: Tensor, k: Tensor, log_a: Tensor, before: Tensor) -> Tensor:
    """A_t/A_i (k_i . probe_t) for m tokens i: [R, value_heads, 2, n, m].

    probes: the keys, then the queries, of n tokens t: [R, key_heads, 2 * n, key_dim]; log_a:
    [R, value_heads, n]; k: [R, key_heads, m, key_dim]; before: log A of tokens i. Values at
    i > t mean nothing, and may be infinite.
    """
    rows, key_heads, m, _ = k.shape
    n, value_heads = log_a.shape[2], log_a.shape[1]
    dots = (probes @ k.transpose(2, 3)).view(rows, key_heads, 1, 2, n, m)
    decay = (log_a.unsqueeze(3) - before.unsqueeze(2)).exp_()
    decay = decay.view(rows, key_heads, value_heads // key_heads, 1, n, m)
    return (dots * decay).flatten(1, 2)


def as_stored(state: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 state in the dtype of the cache; what is beyond the range of float16 becomes its
    largest number."""
    if dtype == torch.float16:
        state = state.clamp(-HALF_MAX, HALF_MAX)
    return state.to(dtype)


def fold(state: Tensor, window: Window) -> Tensor:
    """Bring `state` up to the window's last live token, in place; returns it."""
    rows, key_heads, w, key_dim = window.k.shape
    value_heads = window.u.shape[1]
    decay = window.decay()
    share = (decay - window.log_a).exp().view(rows, key_heads, -1, w, 1)
    k = (window.k.unsqueeze(2) * share).view(rows, value_heads, w, key_dim)
    u, live = window.u, window.live()
    if live is not None:
        k, u = (torch.where(live.unsqueeze(-1), x, 0.0) for x in (k, u))
    state.mul_(decay.exp().unsqueeze(-1)).view(-1, key_dim, u.shape[3]).baddbmm_(
        k.flatten(0, 1).transpose(1, 2), u.flatten(0, 1)
    )
    return state


# --- ops over slots ----------------------------------------------------------------------------


@op
def gdn_decode(
    qkv: Tensor, g: Tensor, beta: Tensor, cache: GDNState, fill: Tensor, rows: DecodeRows
) -> Tensor:
    """Advance decode rows by `width` tokens each, from their slots' windows.

    qkv: [D * width, C] after the convolution; g, beta: float32 [D * width, value_heads]; fill:
    int32 [N], read only. A row whose window cannot take `width` more is folded into its state
    first and starts at window row 0; otherwise the new rows are written from fill on. Returns
    [D * width, value_heads, value_dim] of qkv's dtype.
    """
    filled = fill[rows.slots].to(torch.int64)
    full = filled + rows.width > cache.window_u.shape[2]
    if bool(full.any()):
        _commit(cache, rows.slots[full], filled[full])
        filled = filled.masked_fill(full, 0)
    q, k, v = _split_heads(qkv.unflatten(0, (-1, rows.width)), cache)
    g, beta = (x.unflatten(0, (-1, rows.width)).transpose(1, 2) for x in (g, beta))
    o, u, log_a = _advance_slots(cache, rows, filled, (q, k, v, g, beta))
    _write_window(cache, rows.slots, filled, (k, u, log_a))
    return o.transpose(1, 2).flatten(0, 1).to(qkv.dtype)


@op
def gdn_decode_raw(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    rows: DecodeRows,
) -> Tensor:
    """`gates` and `gdn_decode` in one. a, b: [D * width, value_heads], of the projection."""
    g, beta = gates(a, b, A_log, dt_bias)
    return gdn_decode(qkv, g, beta, cache, fill, rows)


@op
def gdn_decode_conv(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    conv_offset: Tensor,
    rows: DecodeRows,
) -> Tensor:
    """`conv_decode` and `gdn_decode_raw` in one: all of a decode step between two GEMMs.

    x: [D * width, C], of the projection; weight: [C, 4], of the convolution.
    """
    qkv = conv_decode(x, cache, weight, rows, conv_offset)
    return gdn_decode_raw(qkv, a, b, A_log, dt_bias, cache, fill, rows)


@op
def gdn(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    conv_offset: Tensor,
    batch: Batch,
) -> Tensor:
    """Convolution and recurrence of a batch's tokens, both kinds of rows.

    x: [T, C], a and b: [T, value_heads], of the projections; the rest as the ops above and below
    take it. Returns [T, value_heads, value_dim] of x's dtype.
    """
    known = batch.trimmed()
    n, end, parts = known.num_decode_tokens, known.positions.shape[0], []
    gating = (A_log, dt_bias)
    if is_invariant():
        parts = _fixed_parts((x, weight, a, b, *gating), cache, fill, conv_offset, known)
        return fill_up(parts, x.shape[0])
    if known.decode is not None:
        given = (x[:n], weight, a[:n], b[:n], *gating, cache, fill, conv_offset)
        parts.append(gdn_decode_conv(*given, known.decode))
    if known.prefill is not None:
        rows = known.prefill.alone()
        qkv = conv_prefill(x[n:end], cache, weight, rows, conv_offset)
        parts.append(gdn_prefill(qkv, *gates(a[n:end], b[n:end], *gating), cache, rows))
    return fill_up(parts, x.shape[0])


def _fixed_parts(
    inputs: tuple[Tensor, ...], cache: GDNState, fill: Tensor, conv_offset: Tensor, batch: Batch
) -> list[Tensor]:
    """The outputs of both kinds of rows, by ops that are batch invariant. inputs: as gdn's."""
    x, weight, a, b, A_log, dt_bias = inputs
    n, end, parts = batch.num_decode_tokens, batch.positions.shape[0], []
    if batch.decode is not None:
        qkv = conv_decode(x[:n], cache, weight, batch.decode, conv_offset)
        rows = batch.decode.fixed()
        parts.append(gdn_fixed(qkv, a[:n], b[:n], A_log, dt_bias, cache, fill, rows))
    if batch.prefill is not None:
        alone = batch.prefill.alone()
        qkv = conv_prefill(x[n:end], cache, weight, alone, conv_offset)
        rows = alone.fixed()
        parts.append(gdn_fixed(qkv, a[n:end], b[n:end], A_log, dt_bias, cache, fill, rows))
    return parts


@op
def gdn_fixed(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    cache: GDNState,
    fill: Tensor,
    rows: FixedRows,
) -> Tensor:
    """`gates` and the recurrence of rows of any kind, so that a token's result depends on what
    comes before it in its sequence alone.

    Windows begin at multiples of their W rows, and their keys are float32. A token is computed from
    the state at its window's begin and the window's rows before it. A full window is folded before
    the next token. In rows of drafts, the tokens behind the end of a window get zeros: they must
    not count. qkv: [T, C] after the convolution; a, b: [T, value_heads], of the projection; fill:
    int32 [N], read only, the rows of each window, W for a full one. Returns [T, value_heads,
    value_dim] of qkv's dtype.
    """
    out = qkv.new_zeros(qkv.shape[0], cache.state.shape[1], cache.state.shape[3])
    g, beta = gates(a, b, A_log, dt_bias)
    ends = rows.offsets.tolist()
    for slot, first, last in zip(rows.slots.tolist(), ends, ends[1:], strict=False):
        filled = int(fill[slot])
        for token in range(first, last):
            if filled == cache.window_u.shape[2]:
                if token > first and not rows.prompts:
                    break
                _fold_slot(cache, slot)
                filled = 0
            here = slice(token, token + 1)
            out[here] = _advance_token(cache, slot, filled, qkv[here], g[here], beta[here])
            filled += 1
    return out


def _advance_token(
    cache: GDNState, slot: int, filled: int, qkv: Tensor, g: Tensor, beta: Tensor
) -> Tensor:
    """A slot's next token, behind `filled` rows of its window, and its row. Arguments as in
    gdn_fixed, of one token; returns [1, value_heads, value_dim]."""
    q, k, v = _split_heads(qkv.unsqueeze(0), cache)
    k_old, u_old, log_old = _window_of(cache, slot, filled)
    state = cache.state[slot : slot + 1].to(torch.float32, copy=True)
    window = Window(k_old, u_old, log_old, None)
    gating = g.t().unsqueeze(0), beta.t().unsqueeze(0)
    o, u, log_a = advance(state, window, q, k, v, *gating)
    cache.window_k[slot, :, filled] = k[0, :, 0].to(cache.window_k.dtype)
    cache.window_u[slot, :, filled] = u[0, :, 0]
    cache.window_g[slot, :, filled] = log_a[0, :, 0]
    return o[:, :, 0].to(qkv.dtype)


def _window_of(cache: GDNState, slot: int, filled: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, u and log A of a slot's first rows, copied: [1, heads, filled, ...]."""
    buffers = (cache.window_k, cache.window_u, cache.window_g)
    k, u, log_a = (x[slot : slot + 1, :, :filled].float().contiguous().clone() for x in buffers)
    return k, u, log_a


def _fold_slot(cache: GDNState, slot: int) -> None:
    """Fold a slot's full window into its state."""
    window = Window(*_window_of(cache, slot, cache.window_u.shape[2]), None)
    state = cache.state[slot : slot + 1].to(torch.float32, copy=True)
    cache.state[slot : slot + 1] = as_stored(fold(state, window), cache.state.dtype)


def _slot_index(rows: DecodeRows) -> slice | Tensor:
    """The rows' slots; a slice where they are neighbours, which reads states without a copy."""
    if rows.contiguous_from is None:
        return rows.slots
    return slice(rows.contiguous_from, rows.contiguous_from + rows.slots.shape[0])


def _advance_slots(
    cache: GDNState, rows: DecodeRows, fill: Tensor, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """`advance` from the rows' slots, without copying states if the slots are close together.

    Rows in any order over a range of slots that they mostly fill run as that whole range: slots
    between them get inputs of zeros, and what comes out for those is dropped. inputs: as advance
    takes them; fill: int64 [R].
    """
    slots = _slot_index(rows)
    low, high = int(rows.slots.min()), int(rows.slots.max()) + 1
    scattered = isinstance(slots, Tensor) and high - low <= MAX_SPAN_RATIO * slots.shape[0]
    if scattered:
        place, slots = rows.slots - low, slice(low, high)
        fill, *inputs_ = (
            x.new_zeros(high - low, *x.shape[1:]).index_copy_(0, place, x) for x in (fill, *inputs)
        )
        inputs = tuple(inputs_)
    window = _read_window(cache, slots, fill, int(fill.max()))
    out = advance(cache.state[slots].float(), window, *inputs)
    if not scattered:
        return out
    o, u, log_a = (x.index_select(0, place) for x in out)
    return o, u, log_a


def _read_window(cache: GDNState, slots: slice | Tensor, fill: Tensor, w: int) -> Window:
    k, u, log_a = (x[slots, :, :w] for x in (cache.window_k, cache.window_u, cache.window_g))
    return Window(k.float(), u, log_a, fill)


def _write_window(
    cache: GDNState, slots: Tensor, fill: Tensor, new: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Put n tokens (k, u, log A), each [R, heads, n, ...], at window rows fill .. fill + n - 1."""
    place = fill[:, None] + torch.arange(new[0].shape[2], device=fill.device)
    for buffer, rows in zip((cache.window_k, cache.window_u, cache.window_g), new, strict=True):
        buffer[slots[:, None], :, place] = rows.transpose(1, 2).to(buffer.dtype)


def _commit(cache: GDNState, slots: Tensor, fill: Tensor) -> None:
    """Fold the windows of these slots into their states, a few at a time.

    So that the copies stay in the processor's cache.
    """
    for some, filled in zip(slots.split(FOLD_BATCH), fill.split(FOLD_BATCH), strict=True):
        window = _read_window(cache, some, filled, int(filled.max()))
        state = cache.state[some].float()  # a copy: indexed by slots
        cache.state[some] = as_stored(fold(state, window), cache.state.dtype)


@op
def gdn_prefill(qkv: Tensor, g: Tensor, beta: Tensor, cache: GDNState, rows: PrefillRows) -> Tensor:
    """Run prompt tokens through the recurrence; the slots' windows are empty and stay so.

    qkv: [T, C] after the convolution; g, beta: float32 [T, value_heads]. Starts from each slot's
    state and writes the state after the row's last token. Returns [T, value_heads, value_dim] of
    qkv's dtype.
    """
    out: list[Tensor] = [qkv.new_empty(0)] * len(rows.host_counts)
    qkvs, gs, betas = (x.split(list(rows.host_counts)) for x in (qkv, g, beta))
    for group in _groups(rows.host_counts):
        padded = [_pad([x[row] for row in group]) for x in (qkvs, gs, betas)]
        q, k, v = _split_heads(padded[0], cache)
        slots = rows.slots[group] if len(group) < len(out) else rows.slots
        state = cache.state[slots].float()
        o, state = _scan(state, q, k, v, *(x.transpose(1, 2) for x in padded[1:]))
        cache.state[slots] = as_stored(state, cache.state.dtype)
        for row, o_row in zip(group, o.transpose(1, 2), strict=True):
            out[row] = o_row[: rows.host_counts[row]]
    return torch.cat(out).to(qkv.dtype)


def _groups(counts: tuple[int, ...]) -> list[list[int]]:
    """Rows that run together: those with the same number of chunks, so padding stays under one."""
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        groups.setdefault(-(-count // CHUNK), []).append(row)
    return list(groups.values())


def _pad(pieces: list[Tensor]) -> Tensor:
    """Stack rows of different lengths: [R, longest, ...], padded with zeros.

    A token of zeros is inert: its key and its beta are 0, so u is 0, and its g is 0, so A stays.
    """
    if len(pieces) == 1:
        return pieces[0].unsqueeze(0)
    return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)


def _scan(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance and fold chunk by chunk. Returns (o as v's shape, the state after the last token)."""
    out = []
    for start in range(0, q.shape[2], CHUNK):
        chunk = [x[:, :, start : start + CHUNK] for x in (q, k, v, g, beta)]
        empty = Window(chunk[1][:, :, :0], chunk[2][:, :, :0], chunk[3][:, :, :0], None)
        o, u, log_a = advance(state, empty, *chunk)
        state = fold(state, Window(chunk[1], u, log_a, None))
        out.append(o)
    return torch.cat(out, dim=2), state


def _split_heads(qkv: Tensor, cache: GDNState) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, in float32: [R, heads, n, dim], from qkv [R, n, C].

    Queries and keys are L2-normalised, queries then scaled by key_dim ** -0.5.
    """
    key_heads, key_dim = cache.window_k.shape[1], cache.window_k.shape[3]
    value_heads, value_dim = cache.state.shape[1], cache.state.shape[3]
    split = [2 * key_heads * key_dim, value_heads * value_dim]
    qk, v = qkv.float().split(split, dim=-1)
    qk = qk.unflatten(-1, (2 * key_heads, key_dim)).transpose(1, 2)
    norm = torch.rsqrt(qk.square().sum(-1, keepdim=True) + L2_EPS)
    norm[:, :key_heads] *= key_dim**-0.5
    q, k = (qk * norm).split(key_heads, dim=1)
    return q, k, v.unflatten(-1, (value_heads, value_dim)).transpose(1, 2)
