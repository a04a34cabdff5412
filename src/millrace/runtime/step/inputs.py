"""From a plan to the tensors of a step: which token of which slot sits where.

Row structure (who runs, how many tokens) comes from the plan; lengths come from the device, so a
plan made before the last result is known still reads the right positions. A plan becomes one vector
of whole numbers, and the device makes the rest of that: so a step of any shape is the same work
for the host, and a CUDA graph runs whatever steps fit into its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, Caches, DecodeRows, PrefillRows, SelectedTokens
from millrace.protocol import StepPlan


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a step or a graph: decode rows, chunks, and rows that are sampled."""

    decode: int
    chunks: int
    sampled: int

    @classmethod
    def of(cls, plan: StepPlan) -> Sizes:
        return cls(len(plan.decode), len(plan.chunks), len(plan.sampled_slots))

    def __len__(self) -> int:
        """Numbers of a step's vector."""
        return 1 + self.decode + 3 * self.chunks + 3 * self.sampled

    def cover(self, other: Sizes) -> bool:
        mine = (self.decode, self.chunks, self.sampled)
        theirs = (other.decode, other.chunks, other.sampled)
        return all(a >= b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True, slots=True)
class Numbers:
    """A step's vector, by what its numbers are; rows that are padding are zeros, and come last.

    decoding: int64 [1], how many decode rows there are. decode: int64 [D], their slots. chunks:
    int64 [3, P], slot, start and count of each. sampled: int64 [3, R], slot, first token and
    whether it verifies drafts, of each row that brings new tokens.
    """

    decoding: Tensor
    decode: Tensor
    chunks: Tensor
    sampled: Tensor

    @classmethod
    def split(cls, vector: Tensor, sizes: Sizes) -> Numbers:
        """vector: int64 [len(sizes)], as `listed` orders it."""
        parts = [1, sizes.decode, 3 * sizes.chunks, 3 * sizes.sampled]
        decoding, decode, chunks, sampled = vector.split(parts)
        return cls(decoding, decode, chunks.view(3, -1), sampled.view(3, -1))

    def cut(self, sizes: Sizes) -> Numbers:
        """The first ones of each kind."""
        chunks, sampled = self.chunks[:, : sizes.chunks], self.sampled[:, : sizes.sampled]
        return Numbers(self.decoding, self.decode[: sizes.decode], chunks, sampled)


def listed(plan: StepPlan, width: int, sizes: Sizes) -> list[int]:
    """A plan's numbers, filled up with zeros to `sizes`, which cover the plan."""
    chunks, decode = plan.chunks, plan.decode
    ends = zip(chunks, chunk_ends(plan, width), strict=True)
    first = [*range(0, len(decode) * width, width), *(end for c, end in ends if c.last)]
    return [
        len(decode),
        *_filled(decode, sizes.decode),
        *_filled([chunk.slot for chunk in chunks], sizes.chunks),
        *_filled([chunk.start for chunk in chunks], sizes.chunks),
        *_filled([chunk.count for chunk in chunks], sizes.chunks),
        *_sampled(plan, first, sizes.sampled),
    ]


def listed_sampled(plan: StepPlan, width: int, sizes: Sizes) -> list[int]:
    """The numbers of a plan's sampled rows alone, whose candidates are `width` tokens each, row
    after row. sizes: cover the sampled rows; there may be more chunks than they have room for."""
    first = range(0, len(plan.sampled_slots) * width, width)
    before = len(sizes) - 3 * sizes.sampled
    return [0] * before + _sampled(plan, list(first), sizes.sampled)


def _sampled(plan: StepPlan, first: list[int], size: int) -> list[int]:
    """Slot, first token and whether it verifies drafts, of each sampled row."""
    verify = [1] * len(plan.decode)
    return [*_filled(plan.sampled_slots, size), *_filled(first, size), *_filled(verify, size)]


def _filled(values: list[int], size: int) -> list[int]:
    assert len(values) <= size
    return values + [0] * (size - len(values))


def chunk_ends(plan: StepPlan, width: int) -> list[int]:
    """The flat token that each of the plan's chunks ends with."""
    counts = [chunk.count for chunk in plan.chunks]
    return [end - 1 for end in accumulate(counts, initial=len(plan.decode) * width)][1:]


def width_of(plan: StepPlan, most: int) -> int:
    """Tokens of the plan's decode rows. most: those of an engine at most."""
    return most if plan.drafts < 0 else plan.drafts + 1


def tokens_of(plan: StepPlan, width: int) -> int:
    return len(plan.decode) * width + sum(chunk.count for chunk in plan.chunks)


# --- batches -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Room:
    """What a batch is made for. width: tokens of a decode row. tokens: T. context: no token's
    position is greater."""

    width: int
    tokens: int
    context: int


def exact_batch(
    plan: StepPlan, numbers: Numbers, length: Tensor, caches: Caches, room: Room
) -> Batch:
    """A plan's tokens, with all that the host knows of them. length: int64 [N], by slot."""
    width = room.width
    batch = padded_batch(numbers, length, caches, room)
    decode, prefill = batch.decode, batch.prefill
    if decode is not None:
        first = _neighbours(plan.decode, decode.slots)
        decode = DecodeRows(decode.slots, decode.starts, width, plan.context, first)
    if prefill is not None:
        counts, starts = zip(*((c.count, c.start) for c in plan.chunks), strict=True)
        prefill = PrefillRows(prefill.slots, prefill.starts, prefill.offsets, counts, starts)
    return Batch(batch.token_slots, batch.positions, batch.kv_rows, decode, prefill)


def padded_batch(numbers: Numbers, length: Tensor, caches: Caches, room: Room) -> Batch:
    """The tokens that the numbers tell of, in room.tokens places. Nothing waits for the device."""
    device, width = length.device, room.width
    token = torch.arange(room.tokens, device=device)
    slots, positions = torch.zeros_like(token), torch.zeros_like(token)
    decode = prefill = None
    if numbers.decode.shape[0]:
        starts = length[numbers.decode]
        row = (token // width).clamp(max=numbers.decode.shape[0] - 1)
        mine = token < numbers.decoding * width
        slots = torch.where(mine, numbers.decode[row], slots)
        positions = torch.where(mine, starts[row] + token % width, positions)
        decode = DecodeRows(numbers.decode, starts, width, room.context)
    if numbers.chunks.shape[1]:
        chunk_slots, starts, counts = numbers.chunks
        offsets = torch.cat([numbers.decoding * width, counts]).cumsum(0)
        row = torch.searchsorted(offsets, token, right=True) - 1
        mine = (row >= 0) & (row < counts.shape[0])
        row = row.clamp(0, counts.shape[0] - 1)
        slots = torch.where(mine, chunk_slots[row], slots)
        positions = torch.where(mine, starts[row] + token - offsets[row], positions)
        ends = offsets.to(torch.int32)
        prefill = PrefillRows(chunk_slots, starts, ends, None, None, room.context)
    return Batch(slots, positions, caches.kv_rows(slots, positions), decode, prefill, padded=True)


def without_ended(numbers: Numbers, ended: Tensor) -> Numbers:
    """The numbers, with the null slot in place of decode rows that have ended: the host may not
    know that yet, and what their slots hold is to be saved. ended: bool [N], by slot."""
    return replace(numbers, decode=torch.where(ended[numbers.decode], 0, numbers.decode))


def _neighbours(slots: list[int], live: Tensor) -> int | None:
    """The first slot if the slots are consecutive, else None; a hint for ops of a CPU. live: the
    same, without those that have ended."""
    if live.is_cuda or slots != list(range(slots[0], slots[0] + len(slots))):
        return None
    return slots[0] if bool(live.all()) else None


def row_ends(plan: StepPlan, batch: Batch, ends: Tensor) -> SelectedTokens:
    """The last token of every row, of decode rows all. A step without prompt log-probabilities and
    drafts reads the hidden of no other. ends: int64, the last tokens of the plan's chunks.
    """
    device = batch.positions.device
    tokens = torch.cat([torch.arange(batch.num_decode_tokens, device=device), ends])
    slots, positions = batch.token_slots[tokens], batch.positions[tokens]
    rows = DecodeRows(slots, positions, 1, batch.max_context)
    return SelectedTokens(tokens, Batch(slots, positions, batch.kv_rows[tokens], rows, None))


def places(slots: Tensor, positions: Tensor, caches: Caches) -> Batch:
    """Tokens of which only keys and values are written. slots, positions: int64 [T]."""
    return Batch(slots, positions, caches.kv_rows(slots, positions), None, None)


def single_batch(slots: Tensor, positions: Tensor, context: int, caches: Caches) -> Batch:
    """One token a row. slots, positions: int64 [R]; context: bound on positions + 1."""
    rows = DecodeRows(slots, positions, 1, context)
    return Batch(slots, positions, caches.kv_rows(slots, positions), rows, None)


# --- rows that are sampled ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The R rows of a step that bring new tokens: its decode rows, then its final chunks.

    Each has `width` candidates, of which a final chunk's first alone is one. slots: int64 [R].
    base: int64 [R], position of the row's first candidate; the token sampled from candidate j takes
    position base + 1 + j. first: int64 [R], the flat token that is candidate 0. verify: bool [R],
    decode rows. noise, filters: whether any row draws with a temperature, and with top_k or top_p.
    """

    slots: Tensor
    base: Tensor
    first: Tensor
    verify: Tensor
    width: int
    noise: bool
    filters: bool

    def candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Slot, position and flat token of each candidate: int64 [R * width]; a final chunk's first
        one stands for all of its."""
        place = torch.arange(self.width, device=self.slots.device) * self.verify[:, None]
        slots = self.slots[:, None].expand(-1, self.width)
        positions, tokens = (x[:, None] + place for x in (self.base, self.first))
        return slots.flatten(), positions.flatten(), tokens.flatten()


def sampled_rows(
    numbers: Numbers, length: Tensor, width: int, noise: bool, filters: bool
) -> SampledRows:
    """length: int64 [N], by slot: of decode rows without their candidates, of chunks with all of
    their tokens."""
    slots, first, verify = numbers.sampled
    verifies = verify != 0
    base = length[slots] - torch.where(verifies | (slots == 0), 0, 1)
    return SampledRows(slots, base, first, verifies, width, noise, filters)
