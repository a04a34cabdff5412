"""Drafts: the tokens that a step proposes behind each row's last one, and the next step verifies.

A drafter is told of every token that the model has computed, and asked for drafts when a step has
sampled. It decides nothing about tokens: a draft is accepted only if the model samples it too. How
many drafts a row has, and which method made them, is known on the device (`Slots.drafted`), so
rows with drafts of any method, and rows without, share a step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from millrace.kernels.batch import Batch, Caches
from millrace.kernels.lookup import continuation, longest_match, split_match
from millrace.model.causal_lm import CausalLM, DraftHead
from millrace.runtime.step.inputs import SampledRows, places, single_batch
from millrace.runtime.step.sampler import Sampler
from millrace.runtime.step.slots import METHOD, Slots
from millrace.speculation import Lookup, Speculation


class Drafter(Protocol):
    """What the runner knows of a drafter. Nothing in it waits for the device."""

    def observe(self, batch: Batch, hidden: Tensor) -> None:
        """The model has computed the batch's tokens; hidden: [T, H], after its final norm."""

    def resume(self, slots: Tensor, hidden: Tensor) -> None:
        """Slots (int64 [R]) continue from snapshots; hidden: [R, H], of the last token of each."""

    def draft(self, hidden: Tensor, rows: SampledRows, count: Tensor, context: int) -> None:
        """Write up to rows.width - 1 drafts of each row to the tape, behind its last token, and
        how many there are, and of which method, to the slots.

        hidden: [T, H], of the step's tokens. count: int64 [R], how many of the row's sampled tokens
        count; a row that had ended (0) may get any drafts. context: no row is longer.
        """


def drafter_of(
    speculation: Speculation, model: CausalLM, caches: Caches, slots: Slots, sampler: Sampler
) -> Drafter | None:
    """The drafter of an engine; None if it makes no drafts."""
    if not speculation.drafts:
        return None
    head: HeadDrafter | ModelDrafter | None = None
    if model.draft_model is not None:
        head = ModelDrafter(model.draft_model, caches, slots, sampler, speculation.head_drafts)
    elif speculation.head:
        assert model.mtp is not None
        head = HeadDrafter(model.mtp, caches, slots, sampler, speculation.head_drafts)
    lookup = None if speculation.lookup is None else LookupDrafter(speculation.lookup, slots)
    return MixedDrafter(slots, head, lookup)


class MixedDrafter:
    """Each row's drafts by the methods that its request has: those that it looks up, if it finds
    any, else those of the head, else none. Methods are numbered as in `Speculation.methods`."""

    def __init__(
        self,
        slots: Slots,
        head: HeadDrafter | ModelDrafter | None,
        lookup: LookupDrafter | None,
    ) -> None:
        self._slots, self._head, self._lookup = slots, head, lookup

    def observe(self, batch: Batch, hidden: Tensor) -> None:
        if self._head is not None:
            self._head.observe(batch, hidden)

    def resume(self, slots: Tensor, hidden: Tensor) -> None:
        if self._head is not None:
            self._head.resume(slots, hidden)

    def draft(self, hidden: Tensor, rows: SampledRows, count: Tensor, context: int) -> None:
        s, depth = self._slots, rows.width - 1
        if not depth:
            s.drafted.index_fill_(0, rows.slots, 0)
            return
        methods, number = s.methods[rows.slots], 0
        drafted = torch.zeros_like(methods) if self._head is None else methods & 1
        if self._head is not None:
            drafted = drafted * self._head.draft(hidden, rows, count, context, depth)
            number = 1
        if self._lookup is not None:
            found = self._lookup.draft(rows, count, context, depth, methods >> number & 1 != 0)
            drafted = torch.where(found > 0, found + METHOD * number, drafted)
        s.drafted[rows.slots] = drafted


class HeadDrafter:
    """Drafts by the model's own head, which keeps keys and values of every token.

    Its row of a token needs the hidden vector of the token before, and the token itself. So what
    follows the last computed token is written from the tape as it stands, and written again with
    the drafts if that token was not sampled yet.
    """

    def __init__(
        self, head: DraftHead, caches: Caches, slots: Slots, sampler: Sampler, drafts: int
    ) -> None:
        self._head, self._caches, self._slots = head, caches, slots
        self._sampler, self._drafts = sampler, drafts

    def observe(self, batch: Batch, hidden: Tensor) -> None:
        features = self._head.features(hidden)
        self._write_kv(places(batch.token_slots, batch.positions + 1, self._caches), features)

    def resume(self, slots: Tensor, hidden: Tensor) -> None:
        """Write the first row after each snapshot, which does not have it: it depends on the next
        token, which differs from request to request."""
        self._write_kv(places(slots, self._slots.length[slots], self._caches), hidden)

    def draft(
        self, hidden: Tensor, rows: SampledRows, count: Tensor, context: int, depth: int
    ) -> int:
        """Write drafts of each row to the tape, at most `depth`; returns how many. A row that had
        ended drafts as if its first sampled token counted."""
        tokens, drafts = self._slots.tokens, min(depth, self._drafts)
        last = (count - 1).clamp(min=0)
        position, feed = rows.base + last + 1, self._head.features(hidden[rows.first + last])
        ids = tokens[rows.slots, position]
        for step in range(1, drafts + 1):
            row = single_batch(rows.slots, position, context + step, self._caches)
            feed = self._head(ids, feed, row, self._caches)
            position = position + 1
            ids = self._sampler.draft(self._head.normed(feed), position, rows)
            tokens[rows.slots, position] = ids
        return drafts

    def _write_kv(self, batch: Batch, hidden: Tensor) -> None:
        """Keys and values of the tape's tokens at batch.positions. hidden: [T, H], of the tokens
        before them."""
        ids = self._slots.tokens[batch.token_slots, batch.positions]
        self._head.write_kv(ids, hidden, batch, self._caches)


class ModelDrafter:
    """Drafts by a smaller model with the same tokens, which keeps keys and values of its own.

    It computes every token that the target computes, drafts among them: those that are rejected
    are written again by the next step. So what it has of a page depends only on the tokens there,
    and a cached page serves it too.
    """

    def __init__(
        self, model: CausalLM, caches: Caches, slots: Slots, sampler: Sampler, drafts: int
    ) -> None:
        self._model, self._slots = model, slots
        self._caches = replace(caches, layers=list(caches.draft_layers))
        self._sampler, self._drafts = sampler, drafts

    def observe(self, batch: Batch, hidden: Tensor) -> None:
        ids = self._slots.tokens[batch.token_slots, batch.positions]
        self._model(ids, batch, self._caches)

    def resume(self, slots: Tensor, hidden: Tensor) -> None:
        """Pages have all that it needs."""

    def draft(
        self, hidden: Tensor, rows: SampledRows, count: Tensor, context: int, depth: int
    ) -> int:
        """As of `HeadDrafter`."""
        tokens, drafts = self._slots.tokens, min(depth, self._drafts)
        position = rows.base + (count - 1).clamp(min=0) + 1
        ids = tokens[rows.slots, position]
        for step in range(1, drafts + 1):
            row = single_batch(rows.slots, position, context + step, self._caches)
            found = self._model(ids, row, self._caches)
            position = position + 1
            ids = self._sampler.draft(found, position, rows)
            tokens[rows.slots, position] = ids
        return drafts


class LookupDrafter:
    """Drafts what followed a row's last tokens where they stood before, in its prompt or output.

    It needs nothing but the tape, so it has nothing to keep, and nothing to undo.
    """

    def __init__(self, options: Lookup, slots: Slots) -> None:
        self._options, self._slots = options, slots

    def draft(
        self, rows: SampledRows, count: Tensor, context: int, depth: int, wanted: Tensor
    ) -> Tensor:
        """Write drafts of the rows that are `wanted` (bool [R]) to the tape where they are found;
        returns how many, int64 [R]."""
        options, tokens = self._options, self._slots.tokens
        most = min(depth, options.drafts)
        ends = rows.base + (count - 1).clamp(min=0) + 2
        match = split_match(longest_match(tokens, rows.slots, ends, options.longest, context + 1))
        made = torch.full_like(ends, most)
        if options.factor:
            made = (match.length * options.factor).to(torch.int64).clamp(max=most)
        made = torch.where(wanted & (match.length >= options.shortest), made, 0)
        drafts = continuation(tokens, rows.slots, ends, match, most)
        positions = ends[:, None] + torch.arange(most, device=ends.device)
        taken = torch.arange(most, device=ends.device) < made[:, None]
        here = tokens[rows.slots[:, None], positions]
        tokens[rows.slots[:, None], positions] = torch.where(taken, drafts, here)
        return made
