"""Runs one step on the device: forward, sample, accept, draft, save.

The device decides which drafts are accepted, where a sequence ends and how long it is. Nothing here
waits for the device or reads a value back; the result is tensors that the worker copies out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from millrace.config import EngineConfig
from millrace.kernels.batch import Batch, Caches
from millrace.kernels.dispatch import invariant
from millrace.model.causal_lm import CausalLM
from millrace.protocol import Admission, Masks, StepPlan
from millrace.runtime.ranks.ranks import Ranks
from millrace.runtime.step import snapshots as records
from millrace.runtime.step.caches import DTYPES
from millrace.runtime.step.cuda_graphs import GraphSizes, Parts, StepGraphs
from millrace.runtime.step.drafter import Drafter, drafter_of
from millrace.runtime.step.inputs import (
    Numbers,
    Room,
    SampledRows,
    Sizes,
    chunk_ends,
    exact_batch,
    listed,
    padded_batch,
    row_ends,
    sampled_rows,
    tokens_of,
    width_of,
    without_ended,
)
from millrace.runtime.step.logits_processors import LogitsProcessors, StepProcessors
from millrace.runtime.step.results import StepOutput
from millrace.runtime.step.sampler import Sampler
from millrace.runtime.step.slots import METHOD, Slots, grant_pages
from millrace.runtime.step.snapshots import Snapshots
from millrace.runtime.step.upload import upload

MasksOfStep = Callable[[], Masks] | None


class Transfers(Protocol):
    """What starts transfers between tiers, beside the steps."""

    def start(self, plan: StepPlan, wait: bool) -> None:
        """Start a plan's transfers. wait: the plan's step waits for earlier loads."""

    def close(self) -> None:
        """Wait for what has begun."""


class Runner:
    """Runs plans on the tensors of one rank. slots: the running requests' rows, with the tape.
    drafter: what proposes drafts; None without drafts."""

    def __init__(
        self,
        config: EngineConfig,
        model: CausalLM,
        caches: Caches,
        slots: Slots,
        snapshots: Snapshots,
        ranks: Ranks,
    ) -> None:
        self._config = config
        self._model = model
        self._caches = caches
        self.slots = slots
        self._snapshots = snapshots
        self._width = config.drafts + 1
        recurrent = config.args.batch_invariant and "window_u" in caches.stacks
        self._fixed_window = config.window if recurrent else 0
        self._longest = config.max_model_len + self._width  # tokens of a row
        self._device = slots.length.device
        heads = model.head, model.draft_output
        size = model.config.hidden_size
        self._sampler = Sampler(config, slots, *heads, ranks.broadcast, size)
        self._wait_for_device = ranks.wait_for_device
        self._processors = LogitsProcessors(slots, model.config.vocab_size)
        self.drafter: Drafter | None = drafter_of(
            config.speculation, model, caches, slots, self._sampler
        )
        drafting = model.draft_model
        self._groups = {one.query_group for one in (model, drafting) if one is not None}
        self._graphs: StepGraphs | None = None
        self.tiers: Transfers | None = None
        self._shared = ranks.size > 1
        # By slot, of the last token that is computed: a record needs it. Slot 0 is padding's.
        self._last = None if snapshots.hidden is None else _vectors(slots, snapshots.hidden)

    def run(self, plan: StepPlan, masks: MasksOfStep = None) -> StepOutput:
        """Launch a step. masks: builds the grammar masks; called after the forward."""
        with torch.inference_mode(), invariant(self._config.args.batch_invariant):
            return self._run(plan, masks)

    def _run(self, plan: StepPlan, masks: MasksOfStep) -> StepOutput:
        self._save_ends(plan)
        if self.tiers is not None:
            self.tiers.start(plan, wait=self._shared and bool(plan.admissions))
        self._admit(plan)
        if not plan.decode and not plan.chunks:
            return StepOutput()
        width = self._width_of(plan)
        processors = self._processors.of_step(plan, width)
        graphs, numbers = self._graphs, None
        if graphs is not None and graphs.forward(plan):
            hidden = graphs.hidden
        else:
            numbers = self._numbers(plan)
            hidden = self._eager(plan, numbers)
            if graphs is not None and plan.sampled_slots and processors is None:
                graphs.take(plan, hidden[self._rows(plan, numbers).candidates()[2]])
        out = self._tail_of(plan, hidden, numbers, processors, masks)
        self._keep_parts(plan, hidden)
        self._save(plan, hidden)
        offset = len(plan.decode) * width
        prompt = self._processors.prompt_logprobs(plan, hidden, offset, self._model.logits)
        return replace(out, prompt=prompt)

    def capture(self, config: EngineConfig, largest_only: bool = False) -> int:
        """Capture the graphs of steps; returns how many. A CPU has none; there, steps have the
        sizes of graphs from then on.

        config: decides which graphs; it may allow more rows than there are slots, to measure
        memory. largest_only: one of each kind.
        """
        with torch.inference_mode(), invariant(self._config.args.batch_invariant):
            return self._capture(config, largest_only)

    def _capture(self, config: EngineConfig, largest_only: bool) -> int:
        sizes = GraphSizes.of(config)
        parts = Parts(self._forward, self._tail, self._fits, self._model.multiply)
        hidden = torch.zeros(
            sizes.most_tokens, self._model.hidden_width,
            dtype=DTYPES[config.dtype], device=self._device,
        )  # fmt: skip
        self._graphs = StepGraphs(parts, sizes, hidden, self._longest, self._wait_for_device)
        return self._graphs.capture(largest_only)

    @property
    def has_prefill_graphs(self) -> bool:
        """Whether steps with prompts run in graphs."""
        return self._graphs is not None and self._graphs.covers_prompts

    @torch.inference_mode()
    def try_snapshots(self) -> None:
        """Save and restore the null slot, so that the copy kernels are compiled."""
        if self._snapshots.count:
            self._snapshots.save_open(self._caches, 0, 0, None)
            null, size = upload([0], self._device), self._model.hidden_width
            hidden = torch.zeros(1, size, dtype=DTYPES[self._config.dtype], device=self._device)
            self._snapshots.save(self._caches, null, null, self._features(hidden))
            self._snapshots.restore(self._caches, null, null)

    def release(self) -> None:
        """Free the graphs and end transfers; no step may follow."""
        if self.tiers is not None:
            self.tiers.close()
        if self._graphs is not None:
            self._graphs.release()
        self._graphs = None

    # --- a step's parts -----------------------------------------------------------------------

    def _forward(self, numbers: Numbers, room: Room, hidden: Tensor) -> None:
        """The forward for tokens that only the device knows, with its writes to caches."""
        numbers = without_ended(numbers, self.slots.ended)
        batch = padded_batch(numbers, self.slots.length, self._caches, room)
        out = self._model(self._ids(batch), batch, self._caches)
        self._finish_forward(out, batch)
        hidden[: room.tokens] = out

    def _eager(self, plan: StepPlan, numbers: Numbers) -> Tensor:
        """The forward for tokens that the host knows: hidden [T, H], at least of those that are
        read."""
        width = self._width_of(plan)
        room = Room(width, tokens_of(plan, width), plan.context)
        numbers = without_ended(numbers, self.slots.ended)
        batch = exact_batch(plan, numbers, self.slots.length, self._caches, room)
        head = self._config.speculation.head
        every = head or not plan.chunks or self._processors.reads_prompts(plan)
        selected = None
        if not every:
            ends = upload(chunk_ends(plan, width), self._device)
            selected = row_ends(plan, batch, ends)
        hidden: Tensor = self._model(self._ids(batch), batch, self._caches, selected)
        self._finish_forward(hidden, batch)
        return hidden

    def _finish_forward(self, hidden: Tensor, batch: Batch) -> None:
        """After a forward: tell the drafter of its tokens, and set the lengths of chunks."""
        if self.drafter is not None:
            self.drafter.observe(batch, hidden)
        if batch.prefill is not None:
            rows = batch.prefill
            lengths = rows.starts + rows.offsets.diff()
            self.slots.length[rows.slots] = lengths
            records.empty_windows(self._caches, rows.slots)
            self._set_fixed_fill(rows.slots, lengths)

    def _tail_of(
        self,
        plan: StepPlan,
        hidden: Tensor,
        numbers: Numbers | None,
        processors: StepProcessors | None,
        masks: MasksOfStep,
    ) -> StepOutput:
        """What follows the forward of a plan. numbers: its vector, if it is uploaded already."""
        if not plan.sampled_slots:
            return StepOutput()
        if self._graphs is not None and processors is None:
            _, filters = self._sampler.flags(plan)
            return StepOutput(self._graphs.tail(plan, filters))
        rows = self._rows(plan, numbers or self._numbers(plan))
        return self._sample_and_draft(hidden, rows, plan.context, processors, masks)

    def _tail(self, numbers: Numbers, hidden: Tensor, width: int, filters: bool) -> Tensor:
        """The same for rows that only the device knows, without processors."""
        rows = sampled_rows(numbers, self.slots.length, width, noise=True, filters=filters)
        out = self._sample_and_draft(hidden, rows, self._longest, None, None).tokens
        assert out is not None
        return out

    def _sample_and_draft(
        self,
        hidden: Tensor,
        rows: SampledRows,
        context: int,
        processors: StepProcessors | None,
        masks: MasksOfStep,
    ) -> StepOutput:
        """Sample, accept, write the tape, draft. context: no row is longer afterwards."""
        drawn, logprobs = self._sampler.targets(hidden, context, rows, processors, masks)
        drafted = self._within_window(self.slots.drafted[rows.slots], rows)
        count = self._sampler.accept(drawn, rows, drafted)
        self._write_tape(drawn, rows, count)
        self._advance_lengths(rows, count)
        if self._last is not None:
            live = torch.where(count > 0, rows.slots, 0)
            self._last[live] = self._features(hidden[rows.first + (count - 1).clamp(min=0)])
        if self.drafter is not None:
            self.drafter.draft(hidden, rows, count, context)
        out = StepOutput(torch.cat([drafted[:, None], count[:, None], drawn], dim=1), logprobs)
        if processors is not None and processors.masked:
            out = replace(out, drafts=self._drafts(rows, count))
        return out

    def _within_window(self, drafted: Tensor, rows: SampledRows) -> Tensor:
        """The rows' drafts, without those behind the end of a window that begins at a fixed
        position: the state is folded there first."""
        if not self._fixed_window:
            return drafted
        room = self._fixed_window - 1 - rows.base % self._fixed_window
        number = drafted % METHOD
        return drafted - number + torch.minimum(number, room)

    def _set_fixed_fill(self, slots: Tensor, lengths: Tensor) -> None:
        """Rows in the windows of slots of these lengths, where windows begin at fixed positions."""
        if self._fixed_window:
            self._caches.fill[slots] = records.fixed_fill(lengths, self._fixed_window)

    def _numbers(self, plan: StepPlan) -> Numbers:
        sizes = Sizes.of(plan)
        listed_numbers = listed(plan, self._width_of(plan), sizes)
        return Numbers.split(upload(listed_numbers, self._device), sizes)

    def _rows(self, plan: StepPlan, numbers: Numbers) -> SampledRows:
        noise, filters = self._sampler.flags(plan)
        noise = (
            noise or self._graphs is not None
        )  # always the kernel with noise: no other is compiled
        numbers, width = numbers.cut(Sizes.of(plan)), self._width_of(plan)
        return sampled_rows(numbers, self.slots.length, width, noise, filters)

    def _width_of(self, plan: StepPlan) -> int:
        """Tokens of the plan's decode rows."""
        return width_of(plan, self._width)

    def _features(self, hidden: Tensor) -> Tensor:
        """What the record of a prefix keeps of hidden vectors: what the draft head reads."""
        return hidden if self._model.mtp is None else self._model.mtp.features(hidden)

    def _fits(self, plan: StepPlan) -> bool:
        """Whether kernels that run in a graph have room for the lengths of a plan's chunks."""
        if self._device.type != "cuda":
            return True
        from millrace.kernels.gpu.attention.split import fits  # imports what only GPUs have

        lengths = [(chunk.start, chunk.count) for chunk in plan.chunks]
        size = DTYPES[self._config.dtype].itemsize
        return all(fits(lengths, group, size) for group in self._groups)

    # --- before the forward -----------------------------------------------------------------

    def _admit(self, plan: StepPlan) -> None:
        if plan.admissions:
            self.slots.admit(plan.admissions)
            for admission in plan.admissions:
                self._sampler.admit(admission)
                self._processors.admit(admission)
        grant_pages(self._caches.block_table, plan.admissions, plan.grants)
        if self._config.args.debug:
            self._poison(plan)
        if plan.copies:
            table = [[c.source for c in plan.copies], [c.target for c in plan.copies]]
            records.copy_pages(self._caches, *upload(table, self._device))
        fresh = [a.slot for a in plan.admissions if a.snapshot < 0]
        if fresh:
            records.reset(self._caches, upload(fresh, self._device))
        resumed = [a for a in plan.admissions if a.snapshot >= 0]
        if resumed:
            self._resume(resumed)

    def _resume(self, admissions: list[Admission]) -> None:
        """Restore snapshots, and tell the drafter of them."""
        table = [[a.slot for a in admissions], [a.snapshot for a in admissions]]
        slots, index = upload(table, self._device)
        hidden = self._snapshots.restore(self._caches, slots, index)
        self._set_fixed_fill(slots, self.slots.length[slots])
        if self.drafter is not None and hidden is not None:
            self.drafter.resume(slots, hidden)

    def _poison(self, plan: StepPlan) -> None:
        if plan.admissions:
            slots = [a.slot for a in plan.admissions]
            records.poison(self._caches, upload(slots, self._device))
        shared = {(a.slot, 0) for a in plan.admissions if a.start > 0}
        pages = [p for g in plan.grants if (g.slot, g.first) not in shared for p in g.pages]
        if pages:
            records.poison_pages(self._caches, upload(pages, self._device))

    def _ids(self, batch: Batch) -> Tensor:
        return self.slots.tokens[batch.token_slots, batch.positions]

    # --- after it ---------------------------------------------------------------------------

    def _advance_lengths(self, rows: SampledRows, count: Tensor) -> None:
        """Set lengths, window fills and offsets of decode rows to their values after the step."""
        s, caches, slots = self.slots, self._caches, rows.slots
        s.length[slots] = torch.where(rows.verify, rows.base + count, s.length[slots])
        fill, offset = caches.fill[slots], caches.conv_offset[slots]
        folded = fill + rows.width > self._config.window
        filled = torch.where(folded, 0, fill) + count
        if self._fixed_window:
            filled = records.fixed_fill(s.length[slots], self._fixed_window)
        ended = rows.verify & (count == 0)  # the step did not touch its state
        if not self._fixed_window:  # after a prompt it is empty
            filled = torch.where(rows.verify, filled, 0)
        caches.fill[slots] = torch.where(ended, fill, filled.to(torch.int32))
        shifted = torch.where(rows.verify, count - 1, 0).to(torch.int32)
        caches.conv_offset[slots] = torch.where(ended, offset, shifted)

    def _write_tape(self, drawn: Tensor, rows: SampledRows, count: Tensor) -> None:
        """Write tokens that count to their positions, the others to the null slot's tape."""
        place = torch.arange(rows.width, device=self._device)
        counts = place < count[:, None]
        slots = torch.where(counts, rows.slots[:, None], 0)
        positions = torch.where(counts, rows.base[:, None] + 1 + place, 0)
        drawn = torch.where(counts, drawn, 0).clamp_(min=0)  # NOT_FINITE is no token
        self.slots.tokens[slots, positions] = drawn

    def _drafts(self, rows: SampledRows, count: Tensor) -> Tensor:
        """What the tape has behind each row's last token, drafts or not: int64 [R, k]."""
        ahead = 1 + torch.arange(self._config.drafts, device=self._device)
        return self.slots.tokens[rows.slots[:, None], (rows.base + count)[:, None] + ahead]

    def _save_ends(self, plan: StepPlan) -> None:
        """Save what slots hold whose requests have ended."""
        for save in plan.ends:
            hidden = None if self._last is None else self._last[save.slot]
            self._snapshots.save_open(self._caches, save.slot, save.snapshot, hidden)

    def _keep_parts(self, plan: StepPlan, hidden: Tensor) -> None:
        """Keep the last vectors of unfinished prompts: a record of such a part needs its own."""
        parts = [(slot, at) for slot, at, last in self._chunk_ends(plan) if not last]
        if self._last is None or not parts:
            return
        slots, tokens = upload(list(zip(*parts, strict=True)), self._device)
        self._last[slots] = self._features(hidden[tokens])

    def _chunk_ends(self, plan: StepPlan) -> list[tuple[int, int, bool]]:
        """(slot, flat token that it ends with, whether the prompt ends) of the plan's chunks."""
        flat = chunk_ends(plan, self._width_of(plan))
        return [(c.slot, at, c.last) for c, at in zip(plan.chunks, flat, strict=True)]

    def _save(self, plan: StepPlan, hidden: Tensor) -> None:
        if not plan.saves:
            return
        last, saves = {slot: at for slot, at, _ in self._chunk_ends(plan)}, plan.saves
        table = [
            [s.slot for s in saves],
            [s.snapshot for s in saves],
            [last[s.slot] for s in saves],
        ]
        slots, index, tokens = upload(table, self._device)
        self._snapshots.save(self._caches, slots, index, self._features(hidden[tokens]))


def _vectors(slots: Slots, like: Tensor) -> Tensor:
    """Zeros, a vector as in `like` for each slot."""
    return like.new_zeros(slots.length.shape[0], *like.shape[1:])
