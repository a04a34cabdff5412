"""One step on the device: forward, sample, accept, draft, keep.

The device decides: which drafts stand, where a sequence ends, how long it is. Nothing here waits
for the device or reads a value back; the result is tensors that the worker copies out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from millrace.config import EngineConfig
from millrace.kernels.batch import Batch, Caches
from millrace.model.qwen3_5 import Qwen3_5
from millrace.protocol import Admission, Masks, StepPlan
from millrace.runtime.ranks.ranks import Ranks
from millrace.runtime.step import snapshots as records
from millrace.runtime.step.cuda_graphs import DecodeGraphs
from millrace.runtime.step.inputs import (
    SampledRows,
    chunk_ends,
    decode_batch,
    decode_sampled,
    mixed_batch,
    mixed_sampled,
    places,
    row_ends,
    shifted,
    single_batch,
    singles,
)
from millrace.runtime.step.logits_processors import LogitsProcessors, StepProcessors
from millrace.runtime.step.results import StepOutput
from millrace.runtime.step.sampler import Sampler
from millrace.runtime.step.slots import Slots, grant_pages
from millrace.runtime.step.snapshots import Snapshots
from millrace.runtime.step.upload import upload

MasksOfStep = Callable[[], Masks] | None


class Runner:
    """Carries out plans on one rank's tensors."""

    def __init__(
        self,
        config: EngineConfig,
        model: Qwen3_5,
        caches: Caches,
        slots: Slots,
        snapshots: Snapshots,
        ranks: Ranks,
    ) -> None:
        self._config = config
        self._model = model
        self._caches = caches
        self._slots = slots
        self._snapshots = snapshots
        self._width = config.drafts + 1
        self._device = slots.length.device
        heads = model.head, model.draft_output
        self._sampler = Sampler(config, slots, *heads, ranks.broadcast)
        self._settle = ranks.wait_for_device
        self._processors = LogitsProcessors(slots, self._width, model.config.vocab_size)
        self._graphs: DecodeGraphs | None = None  # of whole decode steps
        self._forwards: DecodeGraphs | None = None  # of their forwards alone

    @torch.inference_mode()
    def run(self, plan: StepPlan, masks: MasksOfStep = None) -> StepOutput:
        """Launch a step. masks: the step's grammars' masks, asked for behind the forward."""
        self._admit(plan)
        processors = self._processors.of_step(plan)
        if self._graphs is not None and processors is None and not plan.chunks:
            _, filters = self._sampler.flags(plan)
            return StepOutput(self._graphs.run(plan.decode, filters))
        batch = mixed_batch(plan, self._slots.length, self._caches, self._width)
        rows = mixed_sampled(plan, batch, self._width, *self._sampler.flags(plan))
        hidden = self._forward(plan, batch)
        out = self._after(hidden, batch, rows, processors, masks)
        self._save(plan, batch, hidden)
        prompt = self._processors.prompt_logprobs(
            plan, hidden, batch.num_decode_tokens, self._model.logits
        )
        return replace(out, prompt=prompt)

    @torch.inference_mode()
    def capture(self, most: int, largest_only: bool = False) -> None:
        """Capture the graphs of decode steps of up to `most` rows (on a GPU).

        largest_only: one of each kind, to see what they take.
        """
        device, settle = self._device, self._settle
        self._graphs = DecodeGraphs(self._decode_step, most, device, settle)
        self._forwards = DecodeGraphs(self._decode_forward, most, device, settle)
        if largest_only:
            self._graphs.capture_largest(filters=True)
            self._forwards.capture_largest(filters=False)
        else:
            self._graphs.capture_all()

    def release(self) -> None:
        """Drop the graphs; no step may follow."""
        self._graphs = self._forwards = None

    def _decode_step(self, slots: Tensor, filters: bool) -> Tensor:
        """A step of decode rows only, from their slots alone."""
        batch = self._decode_batch(slots)
        rows = decode_sampled(batch, self._width, noise=True, filters=filters)
        hidden = self._model(self._ids(batch), batch, self._caches)
        out = self._after(hidden, batch, rows, None, None).tokens
        assert out is not None
        return out

    def _decode_forward(self, slots: Tensor, filters: bool) -> Tensor:
        """The hidden vectors of such a step: [rows, width, H]."""
        batch = self._decode_batch(slots)
        hidden: Tensor = self._model(self._ids(batch), batch, self._caches)
        return hidden.view(slots.shape[0], self._width, -1)

    def _decode_batch(self, slots: Tensor) -> Batch:
        context = self._config.max_model_len + self._width
        return decode_batch(slots, self._slots.length, self._caches, self._width, context)

    def _forward(self, plan: StepPlan, batch: Batch) -> Tensor:
        """The hidden vectors of the step's tokens: [T, H], of those at least that are read."""
        if self._forwards is not None and not plan.chunks:
            hidden: Tensor = self._forwards.run(plan.decode, filters=False).flatten(0, 1)
        else:
            every = self._config.drafts or not plan.chunks or self._processors.reads_prompts(plan)
            asked = None if every else row_ends(plan, batch)
            hidden = self._model(self._ids(batch), batch, self._caches, asked)
        return hidden

    def _after(
        self,
        hidden: Tensor,
        batch: Batch,
        rows: SampledRows | None,
        processors: StepProcessors | None,
        masks: MasksOfStep,
    ) -> StepOutput:
        """Behind the forward: draw, accept, keep, draft."""
        out, count = StepOutput(), None
        if rows is not None:
            drawn, logprobs = self._sampler.targets(hidden, batch, rows, processors, masks)
            count = self._sampler.accept(drawn, rows)
            self._write_tape(drawn, rows, count)
            out = StepOutput(torch.cat([count[:, None], drawn], dim=1), logprobs)
        self._move_on(batch, rows, count)
        if self._config.drafts:
            self._draft(hidden, batch, rows, count)
        if rows is not None and count is not None and processors is not None and processors.masked:
            out = replace(out, drafts=self._drafts(rows, count))
        return out

    # --- before the forward -----------------------------------------------------------------

    def _admit(self, plan: StepPlan) -> None:
        if plan.admissions:
            self._slots.admit(plan.admissions)
            for admission in plan.admissions:
                self._sampler.note(admission)
                self._processors.note(admission)
        grant_pages(self._caches.block_table, plan.admissions, plan.grants)
        if self._config.args.debug:
            self._poison(plan)
        fresh = [a.slot for a in plan.admissions if a.snapshot < 0]
        if fresh:
            records.reset(self._caches, upload(fresh, self._device))
        resumed = [a for a in plan.admissions if a.snapshot >= 0]
        if resumed:
            self._resume(resumed)

    def _resume(self, admissions: list[Admission]) -> None:
        """Restore snapshots, and the draft head's first row after them, which they do not hold:
        it depends on the token that follows, and that may differ from request to request.
        """
        table = [[a.slot for a in admissions], [a.snapshot for a in admissions]]
        slots, index = upload(table, self._device)
        hidden = self._snapshots.restore(self._caches, slots, index)
        if self._config.drafts:
            self._write_draft_kv(places(slots, self._slots.length[slots], self._caches), hidden)

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
        drawn = torch.where(counts, drawn, 0).clamp_(min=0)  # NOT_FINITE is no token
        self._slots.tokens[slots, positions] = drawn

    def _draft(
        self, hidden: Tensor, batch: Batch, rows: SampledRows | None, count: Tensor | None
    ) -> None:
        """The draft head remembers the step's tokens, then guesses on from each row's last, which
        stands one position on: k drafts. A row that had ended guesses as if its first had stood.
        """
        mtp, caches, drafts = self._model.mtp, self._caches, self._config.drafts
        assert mtp is not None
        ahead = shifted(batch, caches)
        x = self._write_draft_kv(ahead, hidden)
        if rows is None or count is None:
            return
        last = rows.first + (count - 1).clamp(min=0)
        reach = batch.max_context + 1
        row = singles(ahead, last, reach)
        feed, position = mtp.draft_hidden(x[last], row, caches), row.positions
        for step in range(1, drafts + 1):
            position = position + 1
            drawn = self._sampler.draft(feed, position, rows)
            self._slots.tokens[rows.slots, position] = drawn
            if step < drafts:
                row = single_batch(rows.slots, position, reach + step, caches)
                feed = mtp(drawn, feed, row, caches)

    def _drafts(self, rows: SampledRows, count: Tensor) -> Tensor:
        """The drafts that wait behind each row's last token: int64 [R, k]."""
        ahead = 1 + torch.arange(self._config.drafts, device=self._device)
        return self._slots.tokens[rows.slots[:, None], (rows.base + count)[:, None] + ahead]

    def _write_draft_kv(self, batch: Batch, hidden: Tensor) -> Tensor:
        """The draft head remembers the tape's tokens at batch.positions; returns its input there.

        hidden: [T, H], of the tokens before them.
        """
        assert self._model.mtp is not None
        return self._model.mtp.write_kv(self._ids(batch), hidden, batch, self._caches)

    def _save(self, plan: StepPlan, batch: Batch, hidden: Tensor) -> None:
        if not plan.saves:
            return
        ends = dict(zip((c.slot for c in plan.chunks), chunk_ends(plan, batch), strict=True))
        table = [[save.slot, save.snapshot, ends[save.slot]] for save in plan.saves]
        slots, index, last = upload(table, self._device).unbind(1)
        self._snapshots.save(self._caches, slots, index, hidden[last])
