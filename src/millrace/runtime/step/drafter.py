"""Drafts: the tokens that a step proposes behind each row's last one, and the next step verifies.

A drafter is told of every token that the model has computed, and asked for drafts when a step has
sampled. It decides nothing about tokens: a draft is accepted only if the model samples it too.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from millrace.kernels.batch import Batch, Caches
from millrace.model.causal_lm import DraftHead
from millrace.runtime.step.inputs import SampledRows, places, single_batch
from millrace.runtime.step.sampler import Sampler
from millrace.runtime.step.slots import Slots


class Drafter(Protocol):
    """What the runner knows of a drafter. Nothing in it waits for the device."""

    def observe(self, batch: Batch, hidden: Tensor) -> None:
        """The model has computed the batch's tokens; hidden: [T, H], after its final norm."""

    def resume(self, slots: Tensor, hidden: Tensor) -> None:
        """Slots (int64 [R]) continue from snapshots; hidden: [R, H], of the last token of each."""

    def draft(self, hidden: Tensor, rows: SampledRows, count: Tensor, context: int) -> None:
        """Write k drafts of each row to the tape, behind its last token.

        hidden: [T, H], of the step's tokens. count: int64 [R], how many of the row's sampled tokens
        count; a row that had ended (0) may get any drafts. context: no row is longer.
        """


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
        self._write_kv(places(batch.token_slots, batch.positions + 1, self._caches), hidden)

    def resume(self, slots: Tensor, hidden: Tensor) -> None:
        """Write the first row after each snapshot, which does not have it: it depends on the next
        token, which differs from request to request."""
        self._write_kv(places(slots, self._slots.length[slots], self._caches), hidden)

    def draft(self, hidden: Tensor, rows: SampledRows, count: Tensor, context: int) -> None:
        """A row that had ended drafts as if its first sampled token counted."""
        tokens = self._slots.tokens
        last = (count - 1).clamp(min=0)
        position, feed = rows.base + last + 1, hidden[rows.first + last]
        ids = tokens[rows.slots, position]
        for step in range(1, self._drafts + 1):
            row = single_batch(rows.slots, position, context + step, self._caches)
            feed = self._head(ids, feed, row, self._caches)
            position = position + 1
            ids = self._sampler.draft(feed, position, rows)
            tokens[rows.slots, position] = ids

    def _write_kv(self, batch: Batch, hidden: Tensor) -> None:
        """Keys and values of the tape's tokens at batch.positions. hidden: [T, H], of the tokens
        before them."""
        ids = self._slots.tokens[batch.token_slots, batch.positions]
        self._head.write_kv(ids, hidden, batch, self._caches)
