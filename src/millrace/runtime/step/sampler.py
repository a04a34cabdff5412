"""Samples a token at every candidate position, and decides how many drafts are accepted.

Verification is sampling. The token at a position is sampled with noise that depends only on the
request's seed and the position. A draft is accepted if it equals that token. So the tokens of a
request are the same with any number of drafts; drafts change the speed only. The draft head samples
with the same noise, so both agree as often as their distributions allow.

Each rank has a part of the vocabulary. If no row needs all of it (for top_k, top_p or logits
processors), each rank finds the best token of its part, and only these are compared between ranks.

The candidates of a row are its last known token and its drafts. The token sampled at a candidate
gets the position behind it. A final chunk has only its last token as candidate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from millrace.config import EngineConfig
from millrace.kernels.sampling import (
    best,
    checked,
    checked_token_of,
    gumbel,
    sample,
    token_of,
)
from millrace.model.vocabulary import OutputHead
from millrace.protocol import Admission, Masks, StepPlan
from millrace.runtime.step.inputs import SampledRows
from millrace.runtime.step.logits_processors import Logprobs, StepProcessors
from millrace.runtime.step.slots import METHOD, Slots

# Positions for synthetic acceptance are beyond every real position.
_SYNTHETIC = 1 << 40


class Sampler:
    """Samples for the rows of one rank. head: from hidden [T, H] to logits [T, V], or its part.

    draft_head: the head for drafts; may be less exact. broadcast: rank 0's tensor on every rank.
    hidden_size: channels that the head reads; what stands behind them is a drafter's.
    """

    def __init__(
        self,
        config: EngineConfig,
        slots: Slots,
        head: OutputHead,
        draft_head: OutputHead,
        broadcast: Callable[[Tensor], Tensor],
        hidden_size: int,
    ) -> None:
        self._config = config
        self._slots = slots
        self._head = head
        self._draft_head = draft_head
        self._broadcast = broadcast
        self._hidden_size = hidden_size
        self._device = slots.length.device
        self._noisy: set[int] = set()  # slots with a temperature
        self._filtered: set[int] = set()  # slots with top_k or top_p
        self._rates = torch.tensor(config.speculation.acceptance or (), device=self._device)

    def admit(self, a: Admission) -> None:
        """A request gets a slot."""
        (self._noisy.add if a.temperature > 0 else self._noisy.discard)(a.slot)
        filtered = a.temperature > 0 and (a.top_k > 0 or a.top_p < 1)
        (self._filtered.add if filtered else self._filtered.discard)(a.slot)

    def flags(self, plan: StepPlan) -> tuple[bool, bool]:
        """Whether any sampled row uses a temperature, and whether any uses top_k or top_p."""
        slots = plan.sampled_slots
        return not self._noisy.isdisjoint(slots), not self._filtered.isdisjoint(slots)

    def targets(
        self,
        hidden: Tensor,
        context: int,
        rows: SampledRows,
        processors: StepProcessors | None,
        masks: Callable[[], Masks] | None,
    ) -> tuple[Tensor, Logprobs | None]:
        """The sampled token at each candidate: int64 [R, width]. Those of a final chunk behind its
        first have no meaning.

        hidden: [T, H] of the step's tokens. context: no sampled position is greater. masks: called
        only after the forward is launched. Log-probabilities: if a request asks for them.
        """
        slots, positions, tokens = rows.candidates()
        ends, logprobs = positions + 1, None
        hidden = hidden[tokens, : self._hidden_size]
        if processors is None:
            drawn = self._draw(self._head, hidden, slots, ends, rows, check=True)
        else:
            logits = self._head.logits(hidden)
            given = masks() if masks is not None and processors.masked else None
            logits = processors.adjust(logits, slots, ends, context, given)
            drawn = self._sample(logits, slots, ends, rows, check=True)
            logprobs = processors.logprobs(drawn)
        return drawn.view(-1, rows.width), logprobs

    def draft(self, hidden: Tensor, positions: Tensor, rows: SampledRows) -> Tensor:
        """The draft for each row's position: int64 [R], by temperature, top_k and top_p only."""
        return self._draw(self._draft_head, hidden, rows.slots, positions, rows)

    def _draw(
        self,
        head: OutputHead,
        hidden: Tensor,
        slots: Tensor,
        positions: Tensor,
        rows: SampledRows,
        *,
        check: bool = False,
    ) -> Tensor:
        """A token for each row, int64 [R], by temperature, top_k and top_p alone. check: NOT_FINITE
        for rows whose logits are not usable."""
        s = self._slots
        if head.tp.size == 1 or rows.filters:
            return self._sample(head.logits(hidden), slots, positions, rows, check=check)
        logits = head.local_logits(hidden)
        heat, seed = s.temperature[slots], s.seed[slots]
        mine = best(logits, heat, seed, positions, head.start, noise=rows.noise)
        found = head.tp.all_reduce_max(mine)
        return checked_token_of(found) if check else token_of(found)

    def _sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, rows: SampledRows, *, check: bool
    ) -> Tensor:
        s = self._slots
        drawn = sample(
            logits,
            s.temperature[slots],
            s.top_p[slots],
            s.top_k[slots],
            s.seed[slots],
            positions,
            noise=rows.noise,
            filters=rows.filters,
        )
        return self._broadcast(checked(logits, drawn) if check else drawn)

    # --- acceptance ---------------------------------------------------------------------------

    def accept(self, drawn: Tensor, rows: SampledRows, drafted: Tensor) -> Tensor:
        """How many of each row's sampled tokens count: int64 [R]; 0 for a row that had ended.

        A draft is accepted if it and all drafts before it equal the sampled tokens; what no method
        proposed is no draft, whatever the tape has there. The first sampled token after them counts
        too. A stop token, NOT_FINITE and max_total end the row. drafted: int64 [R], as of `Slots`.
        """
        s, width = self._slots, rows.width
        count = torch.ones_like(rows.base)
        if width > 1:
            count += self._accepted_drafts(drawn, rows, drafted)
        place = torch.arange(width, device=self._device)
        stops = (drawn[:, :, None] == s.stop_ids[rows.slots][:, None, :]).any(-1)
        stops &= place < count[:, None]
        first_stop = torch.where(stops, place, width).amin(1)
        count = torch.minimum(count, first_stop + 1)
        room = s.max_total[rows.slots] - rows.base - 1
        ended = s.ended[rows.slots]
        count = torch.where(ended, 0, torch.minimum(count, room))
        s.ended[rows.slots] = ended | (first_stop < count) | (count >= room)
        return count

    def _accepted_drafts(self, drawn: Tensor, rows: SampledRows, drafted: Tensor) -> Tensor:
        """How many leading drafts of each row are accepted: int64 [R]; 0 for final chunks."""
        k = rows.width - 1
        place = torch.arange(k, device=self._device)
        positions = rows.base[:, None] + 1 + place
        drafts = self._slots.tokens[rows.slots[:, None], positions]
        proposed = rows.verify[:, None] & (place < (drafted % METHOD)[:, None])
        if self._config.speculation.acceptance is None:
            accepted = proposed & (drafts == drawn[:, :k])
        else:
            accepted = proposed & self._synthetic(rows.slots, rows.base, k)
            drawn[:, :k] = torch.where(accepted, drafts, drawn[:, :k])
        return accepted.long().cumprod(1).sum(1)

    def _synthetic(self, slots: Tensor, base: Tensor, k: int) -> Tensor:
        """Random acceptance at the configured rates, independent of the drafts: bool [R, k]."""
        positions = (base[:, None] + torch.arange(k, device=self._device)).flatten()
        seeds = self._slots.seed[slots][:, None].expand(-1, k).flatten()
        noise = gumbel(seeds, positions + _SYNTHETIC, 1)[:, 0]
        return torch.exp(-torch.exp(-noise)).view(-1, k) < self._rates[:k]
