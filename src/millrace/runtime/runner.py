"""One step on the device: forward, sample, accept, draft, keep.

The device decides: which drafts stand, where a sequence ends, how long it is. Nothing here waits
for the device or reads a value back; the result is a tensor that the worker copies out.

Verification is sampling. Every position is drawn with noise that depends only on the request's seed
and the position, and a draft stands if it equals what the target draws there. So a request's
tokens are the same with any number of drafts, and drafting changes speed alone. The draft head
draws with the same noise, which makes the two agree as often as their distributions allow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from millrace.config import EngineConfig
from millrace.kernels.sampling import gumbel, sample
from millrace.model.batch import Batch, Caches
from millrace.model.qwen3_5 import Qwen3_5
from millrace.protocol import Admission, StepPlan
from millrace.runtime import state as records
from millrace.runtime.graphs import DecodeGraphs
from millrace.runtime.inputs import (
    SampledRows,
    chunk_ends,
    decode_batch,
    decode_sampled,
    mixed_batch,
    mixed_sampled,
    shifted,
    single_batch,
)
from millrace.runtime.slots import Slots, grant_pages
from millrace.runtime.state import Snapshots
from millrace.runtime.upload import upload

# Positions of synthetic acceptance draws lie beyond every real position.
_SYNTHETIC = 1 << 40


class Runner:
    """Carries out plans on one rank's tensors."""

    def __init__(
        self,
        config: EngineConfig,
        model: Qwen3_5,
        caches: Caches,
        slots: Slots,
        snapshots: Snapshots,
        broadcast: Callable[[Tensor], Tensor],
    ) -> None:
        self._config = config
        self._model = model
        self._caches = caches
        self._slots = slots
        self._snapshots = snapshots
        self._broadcast = broadcast  # rank 0's tensor for every rank; the same one alone
        self._width = config.drafts + 1
        self._device = slots.length.device
        self._noisy: set[int] = set()  # slots with a temperature
        self._filtered: set[int] = set()  # slots with top_k or top_p
        self._graphs: DecodeGraphs | None = None
        self._rates = torch.tensor(config.acceptance or (), device=self._device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor | None:
        """Launch a step. Returns int64 [R, 1 + width]: the count of new tokens, then the tokens.

        Rows are as in StepResult; None if no row samples.
        """
        self._admit(plan)
        if self._graphs is not None and not plan.chunks:
            return self._graphs.run(plan.decode, not self._filtered.isdisjoint(plan.decode))
        batch = mixed_batch(plan, self._slots.length, self._caches, self._width)
        rows = mixed_sampled(plan, batch, self._width, *self._sampling(plan))
        hidden, out = self._advance(batch, rows)
        self._save(plan, batch, hidden)
        return out

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the decode step's graphs (on a GPU)."""
        self._graphs = DecodeGraphs(self._decode_step, self._config.max_num_seqs, self._device)
        self._graphs.capture_all()

    def _decode_step(self, slots: Tensor, filters: bool) -> Tensor:
        """A step of decode rows only, from their slots alone."""
        context = self._config.max_model_len + self._width
        batch = decode_batch(slots, self._slots.length, self._caches, self._width, context)
        rows = decode_sampled(batch, self._width, noise=True, filters=filters)
        _, out = self._advance(batch, rows)
        assert out is not None
        return out

    def _sampling(self, plan: StepPlan) -> tuple[bool, bool]:
        """Whether any row that samples draws with a temperature, and with top_k or top_p."""
        slots = plan.sampled_slots
        return not self._noisy.isdisjoint(slots), not self._filtered.isdisjoint(slots)

    def _advance(self, batch: Batch, rows: SampledRows | None) -> tuple[Tensor, Tensor | None]:
        """Forward, draw, accept, keep, draft. Returns the hidden [T, H] and the step's result."""
        hidden = self._model(self._ids(batch), batch, self._caches)
        out = count = None
        if rows is not None:
            drawn = self._draw_targets(hidden, batch, rows)
            count = self._accept(drawn, rows)
            self._write_tape(drawn, rows, count)
            out = torch.cat([count[:, None], drawn], dim=1)
        self._move_on(batch, rows, count)
        if self._config.drafts:
            self._draft(hidden, batch, rows, count)
        return hidden, out

    # --- before the forward -----------------------------------------------------------------

    def _admit(self, plan: StepPlan) -> None:
        if plan.admissions:
            self._slots.admit(plan.admissions)
            for admission in plan.admissions:
                self._note_sampling(admission)
        grant_pages(self._caches.block_table, plan.admissions, plan.grants)
        if self._config.args.debug:
            self._poison(plan)
        fresh = [a.slot for a in plan.admissions if a.snapshot < 0]
        if fresh:
            records.reset(self._caches, upload(fresh, self._device))
        resumed = [a for a in plan.admissions if a.snapshot >= 0]
        if resumed:
            self._resume(resumed)

    def _note_sampling(self, a: Admission) -> None:
        (self._noisy.add if a.temperature > 0 else self._noisy.discard)(a.slot)
        filtered = a.temperature > 0 and (a.top_k > 0 or a.top_p < 1)
        (self._filtered.add if filtered else self._filtered.discard)(a.slot)

    def _resume(self, admissions: list[Admission]) -> None:
        """Restore snapshots, and the draft head's first row after them, which they do not hold:
        it depends on the token that follows, and that may differ from request to request.
        """
        places = [[a.slot for a in admissions], [a.snapshot for a in admissions]]
        slots, index = upload(places, self._device)
        hidden = self._snapshots.restore(self._caches, slots, index)
        if self._config.drafts:
            starts = self._slots.length[slots]
            context = max(a.start for a in admissions) + 1
            batch = single_batch(slots, starts, context, self._caches)
            self._draft_head(self._ids(batch), hidden, batch)

    def _poison(self, plan: StepPlan) -> None:
        if plan.admissions:
            slots = [a.slot for a in plan.admissions]
            records.poison(self._caches, upload(slots, self._device))
        shared = {(a.slot, 0) for a in plan.admissions if a.snapshot >= 0}
        pages = [p for g in plan.grants if (g.slot, g.first) not in shared for p in g.pages]
        if pages:
            records.poison_pages(self._caches, upload(pages, self._device))

    def _ids(self, batch: Batch) -> Tensor:
        return self._slots.tokens[batch.token_slots, batch.positions]

    # --- sampling and acceptance ------------------------------------------------------------

    def _draw_targets(self, hidden: Tensor, batch: Batch, rows: SampledRows) -> Tensor:
        """What the target draws at each candidate: int64 [R, width], -1 where there is none."""
        slots, positions = batch.token_slots, batch.positions
        if rows.candidates is not None:
            hidden, slots, positions = (x[rows.candidates] for x in (hidden, slots, positions))
        drawn = self._sample(self._model.logits(hidden), slots, positions + 1, rows)
        verified = rows.num_decode * self._width
        ends = drawn[verified:, None]
        padded = torch.nn.functional.pad(ends, (0, self._width - 1), value=-1)
        return torch.cat([drawn[:verified].view(-1, self._width), padded])

    def _sample(
        self, logits: Tensor, slots: Tensor, positions: Tensor, rows: SampledRows
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
        return self._broadcast(drawn)

    def _accept(self, drawn: Tensor, rows: SampledRows) -> Tensor:
        """How many of each row's drawn tokens count: int64 [R]; 0 for a row that had ended.

        A draft stands if it and all before it equal what was drawn; the first drawn token after
        them counts too. A stop token ends the row, and so does its greatest length.
        """
        s, width = self._slots, self._width
        count = torch.ones_like(rows.base)
        if width > 1 and rows.num_decode:
            count[: rows.num_decode] += self._standing_drafts(drawn, rows)
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

    def _standing_drafts(self, drawn: Tensor, rows: SampledRows) -> Tensor:
        """Leading drafts of the decode rows that stand: int64 [D]."""
        d, k = rows.num_decode, self._width - 1
        slots, positions = rows.slots[:d, None], rows.base[:d, None] + 1
        positions = positions + torch.arange(k, device=self._device)
        drafts = self._slots.tokens[slots, positions]
        if self._config.acceptance is None:
            stands = drafts == drawn[:d, :k]
        else:
            stands = self._synthetic(rows.slots[:d], rows.base[:d])
            drawn[:d, :k] = torch.where(stands, drafts, drawn[:d, :k])
        return stands.long().cumprod(1).sum(1)

    def _synthetic(self, slots: Tensor, base: Tensor) -> Tensor:
        """Draws with the configured rates, whatever the drafts are worth: bool [D, k]."""
        k = self._rates.shape[0]
        positions = (base[:, None] + torch.arange(k, device=self._device)).flatten()
        seeds = self._slots.seed[slots].repeat_interleave(k)
        noise = gumbel(seeds, positions + _SYNTHETIC, 1)[:, 0]
        return torch.exp(-torch.exp(-noise)).view(-1, k) < self._rates

    # --- after it ---------------------------------------------------------------------------

    def _move_on(self, batch: Batch, rows: SampledRows | None, count: Tensor | None) -> None:
        """Lengths, windows and offsets as they stand after the step."""
        s, caches = self._slots, self._caches
        if batch.prefill is not None:
            slots = batch.prefill.slots
            s.length[slots] = batch.prefill.starts + batch.prefill.offsets.diff()
            records.empty_windows(caches, slots)
        if rows is None or count is None:
            return
        if batch.decode is not None:
            slots, taken = batch.decode.slots, count[: rows.num_decode]
            s.length[slots] = batch.decode.starts + taken
            caches.conv_offset[slots] = (taken - 1).clamp(min=0).to(torch.int32)
            fill = caches.fill[slots]
            folded = fill + self._width > self._config.window
            caches.fill[slots] = (torch.where(folded, 0, fill) + taken).to(torch.int32)

    def _write_tape(self, drawn: Tensor, rows: SampledRows, count: Tensor) -> None:
        """Tokens that count go to their positions; the others to the null slot's tape."""
        place = torch.arange(self._width, device=self._device)
        counts = place < count[:, None]
        slots = torch.where(counts, rows.slots[:, None], 0)
        positions = torch.where(counts, rows.base[:, None] + 1 + place, 0)
        self._slots.tokens[slots, positions] = torch.where(counts, drawn, 0)

    def _draft(
        self, hidden: Tensor, batch: Batch, rows: SampledRows | None, count: Tensor | None
    ) -> None:
        """Run the draft head over the step's tokens, then on from each row's last for k drafts."""
        ahead = shifted(batch, self._caches)
        out = self._draft_head(self._ids(ahead), hidden, ahead)
        if rows is None or count is None:
            return
        feed = out[rows.first + (count - 1).clamp(min=0)]
        position = rows.base + count
        context = max(part.max_context for part in (batch.decode, batch.prefill) if part)
        for step in range(self._config.drafts):
            position = position + 1
            drawn = self._sample(self._model.logits(feed), rows.slots, position, rows)
            self._slots.tokens[rows.slots, position] = drawn
            if step + 1 < self._config.drafts:
                reach = context + self._width + step + 1
                row = single_batch(rows.slots, position, reach, self._caches)
                feed = self._draft_head(drawn, feed, row)

    def _draft_head(self, ids: Tensor, hidden: Tensor, batch: Batch) -> Tensor:
        """The draft head over tokens at batch.positions: the hidden [T, H] that guess the next."""
        assert self._model.mtp is not None
        out: Tensor = self._model.mtp(ids, hidden, batch, self._caches)
        return out

    def _save(self, plan: StepPlan, batch: Batch, hidden: Tensor) -> None:
        if not plan.saves:
            return
        ends = dict(zip((c.slot for c in plan.chunks), chunk_ends(plan, batch), strict=True))
        table = [[save.slot, save.snapshot, ends[save.slot]] for save in plan.saves]
        slots, index, last = upload(table, self._device).unbind(1)
        self._snapshots.save(self._caches, slots, index, hidden[last])
