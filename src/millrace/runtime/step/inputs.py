"""From a plan to the tensors of a step: which token of which slot sits where.

Row structure (who runs, how many tokens) comes from the plan; lengths come from the device, so a
plan made before the last result is known still reads the right positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, Caches, DecodeRows, PrefillRows, SelectedTokens
from millrace.protocol import Chunk, StepPlan
from millrace.runtime.step.upload import upload


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The R rows of a step that bring new tokens: its decode rows, then its final chunks.

    slots: int64 [R]. base: int64 [R], position of the row's first candidate input; the token
    sampled from candidate j takes position base + 1 + j. first: int64 [R], the flat token that is
    candidate 0. candidates: int64 [D * width + R - D], the flat tokens whose logits are wanted, or
    None for all. num_decode: D. noise, filters: whether any row draws with a temperature, and with
    top_k or top_p.
    """

    slots: Tensor
    base: Tensor
    first: Tensor
    candidates: Tensor | None
    num_decode: int
    noise: bool
    filters: bool


def decode_batch(slots: Tensor, length: Tensor, caches: Caches, width: int, context: int) -> Batch:
    """Decode rows only. slots: int64 [D]; length: int64 [N], by slot."""
    starts = length[slots]
    positions = (starts[:, None] + torch.arange(width, device=slots.device)).flatten()
    token_slots = slots.repeat_interleave(width, output_size=slots.shape[0] * width)
    rows = DecodeRows(slots, starts, width, context)
    return Batch(token_slots, positions, caches.kv_rows(token_slots, positions), rows, None)


def decode_sampled(batch: Batch, width: int, noise: bool, filters: bool) -> SampledRows:
    """The sampled rows of a batch of decode rows only: all of them."""
    assert batch.decode is not None
    slots = batch.decode.slots
    first = torch.arange(0, batch.positions.shape[0], width, device=slots.device)
    starts = batch.decode.starts
    return SampledRows(slots, starts, first, None, slots.shape[0], noise, filters)


def mixed_batch(plan: StepPlan, length: Tensor, caches: Caches, width: int) -> Batch:
    """Decode rows of `width` tokens, then the plan's chunks. length: int64 [N], by slot."""
    device = length.device
    slots, positions = [], []
    decode = prefill = None
    if plan.decode:
        batch = decode_batch(upload(plan.decode, device), length, caches, width, plan.context)
        assert batch.decode is not None
        decode = replace(batch.decode, contiguous_from=_neighbours(plan.decode))
        slots.append(batch.token_slots)
        positions.append(batch.positions)
    if plan.chunks:
        prefill = _prefill_rows(plan.chunks, device)
        table = upload(_prefill_tokens(plan.chunks), device)
        slots.append(table[0])
        positions.append(table[1])
    token_slots, token_positions = torch.cat(slots), torch.cat(positions)
    kv_rows = caches.kv_rows(token_slots, token_positions)
    return Batch(token_slots, token_positions, kv_rows, decode, prefill)


def _prefill_tokens(chunks: list[Chunk]) -> list[list[int]]:
    """Slot and position of every prompt token, in two rows."""
    return [
        list(chain.from_iterable([c.slot] * c.count for c in chunks)),
        list(chain.from_iterable(range(c.start, c.start + c.count) for c in chunks)),
    ]


def _prefill_rows(chunks: list[Chunk], device: torch.device) -> PrefillRows:
    counts = tuple(chunk.count for chunk in chunks)
    starts = tuple(chunk.start for chunk in chunks)
    table = upload([[chunk.slot for chunk in chunks], list(starts)], device)
    offsets = upload(list(accumulate(counts, initial=0)), device, torch.int32)
    return PrefillRows(table[0], table[1], offsets, counts, starts)


def _neighbours(slots: list[int]) -> int | None:
    """The first slot if the slots are consecutive, else None."""
    return slots[0] if slots == list(range(slots[0], slots[0] + len(slots))) else None


def mixed_sampled(
    plan: StepPlan, batch: Batch, width: int, noise: bool, filters: bool
) -> SampledRows | None:
    """The rows of a mixed batch that bring new tokens; None if there are none."""
    ends = [
        end for chunk, end in zip(plan.chunks, chunk_ends(plan, batch), strict=True) if chunk.last
    ]
    if not ends and not plan.decode:
        return None
    device = batch.positions.device
    verify = torch.arange(batch.num_decode_tokens, device=device)
    last = upload(ends, device)
    first = torch.cat([verify[::width], last])
    return SampledRows(
        slots=batch.token_slots[first],
        base=batch.positions[first],
        first=first,
        candidates=torch.cat([verify, last]),
        num_decode=len(plan.decode),
        noise=noise,
        filters=filters,
    )


def chunk_ends(plan: StepPlan, batch: Batch) -> list[int]:
    """The flat token that each of the plan's chunks ends with."""
    counts = [chunk.count for chunk in plan.chunks]
    return [end - 1 for end in accumulate(counts, initial=batch.num_decode_tokens)][1:]


def row_ends(plan: StepPlan, batch: Batch) -> SelectedTokens:
    """The last token of every row, of decode rows all. A step without prompt log-probabilities and
    drafts reads the hidden of no other.
    """
    ends = [*range(batch.num_decode_tokens), *chunk_ends(plan, batch)]
    tokens = upload(ends, batch.positions.device)
    return SelectedTokens(tokens, singles(batch, tokens, batch.max_context))


def singles(batch: Batch, tokens: Tensor, context: int) -> Batch:
    """Some of a batch's tokens, int64 [R], each a row; context: bound on their positions + 1."""
    slots, positions = batch.token_slots[tokens], batch.positions[tokens]
    rows = DecodeRows(slots, positions, 1, context)
    return Batch(slots, positions, batch.kv_rows[tokens], rows, None)


def shifted(batch: Batch, caches: Caches) -> Batch:
    """The tokens one position on, where the draft head remembers them with this batch's hidden."""
    return places(batch.token_slots, batch.positions + 1, caches)


def places(slots: Tensor, positions: Tensor, caches: Caches) -> Batch:
    """Tokens that are remembered and attend to nothing. slots, positions: int64 [T]."""
    return Batch(slots, positions, caches.kv_rows(slots, positions), None, None)


def single_batch(slots: Tensor, positions: Tensor, context: int, caches: Caches) -> Batch:
    """One token a row. slots, positions: int64 [R]; context: bound on positions + 1."""
    rows = DecodeRows(slots, positions, 1, context)
    return Batch(slots, positions, caches.kv_rows(slots, positions), rows, None)
