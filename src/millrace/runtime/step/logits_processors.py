"""Sampling options beyond temperature, top_k and top_p, which few requests use: Extras to tensors.

Steps without such rows do not come here. Everything that depends on a candidate's context is read
from the tape, so only the options are kept from step to step. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from millrace.kernels.logits import (
    apply_masks,
    apply_min_p,
    apply_penalties,
    completes_sequence,
    force_reasoning_end,
    logprobs_of,
    token_logprobs,
)
from millrace.protocol import Admission, Extras, Masks, StepPlan
from millrace.runtime.step.slots import Slots
from millrace.runtime.step.upload import upload

# Rows of prompt log-probabilities computed at once; their logits are a step's largest tensor.
PROMPT_ROWS = 128
# Candidates that one processor works on at once: it may need eight times the size of their logits
# in float32, and no memory is set aside for that.
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities on the device. rows: what each of the N lines belongs to; see the caller.

    ids: int64 [N, 1 + K]; values: float32 [N, 1 + K]; ranks: int64 [N]; as `token_logprobs` says.
    """

    rows: list[int]
    ids: Tensor
    values: Tensor
    ranks: Tensor


@dataclass(frozen=True, slots=True)
class _RowOptions:
    """One slot's extras. allowed: int32 [ceil(V / 32)] on the device, a bit a token, or None."""

    extras: Extras
    stop_ids: list[int]
    allowed: Tensor | None


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A candidate of a row with options. index: among all candidates; every row has `width`."""

    index: int
    options: _RowOptions


class LogitsProcessors:
    """The options of every slot."""

    def __init__(self, slots: Slots, vocab_size: int) -> None:
        self._slots = slots
        self._vocab_size = vocab_size
        self._device = slots.length.device
        self._by_slot: dict[int, _RowOptions] = {}

    def admit(self, admission: Admission) -> None:
        """A request gets a slot."""
        extras = admission.extras
        if extras is None:
            self._by_slot.pop(admission.slot, None)
            return
        allowed = None
        if extras.allowed_token_ids:
            words = _words(extras.allowed_token_ids, self._vocab_size)
            allowed = upload(words, self._device, torch.int32)
        self._by_slot[admission.slot] = _RowOptions(extras, admission.stop_token_ids, allowed)

    def of_step(self, plan: StepPlan, width: int) -> StepProcessors | None:
        """The processors of the step's sampled rows; None if no row has options. width: candidates
        of a decode row."""
        if not self._by_slot:
            return None
        found = []
        for row, slot in enumerate(plan.sampled_slots):
            candidates = width if row < len(plan.decode) else 1
            if options := self._by_slot.get(slot):
                first = row * width
                found += [_Candidate(first + place, options) for place in range(candidates)]
        return StepProcessors(found, self._slots) if found else None

    def reads_prompts(self, plan: StepPlan) -> bool:
        """Whether `prompt_logprobs` reads the hidden of this plan's chunks."""
        processors = (self._by_slot.get(chunk.slot) for chunk in plan.chunks)
        return any(
            options is not None and options.extras.prompt_logprobs >= 0 for options in processors
        )

    def prompt_logprobs(
        self, plan: StepPlan, hidden: Tensor, offset: int, head: Callable[[Tensor], Tensor]
    ) -> list[tuple[int, int, Logprobs]]:
        """(slot, position, log-probabilities) of the prompt tokens that the plan's chunks predict.

        hidden: [T, H], the chunks' tokens from row `offset` on. head: hidden rows to logits.
        """
        out = []
        starts = accumulate((chunk.count for chunk in plan.chunks), initial=offset)
        for chunk, start in zip(plan.chunks, starts, strict=False):
            options = self._by_slot.get(chunk.slot)
            if options is None or options.extras.prompt_logprobs < 0:
                continue
            count = min(chunk.start + chunk.count, options.extras.prompt_len - 1) - chunk.start
            for at in range(0, max(count, 0), PROMPT_ROWS):
                rows = min(PROMPT_ROWS, count - at)
                first = chunk.start + at + 1
                tokens = self._slots.tokens[chunk.slot, first : first + rows]
                logits = head(hidden[start + at : start + at + rows]).float()
                found = token_logprobs(logits, tokens, options.extras.prompt_logprobs)
                out.append((chunk.slot, first, Logprobs(list(range(rows)), *found)))
        return out


class StepProcessors:
    """The options of one step's candidates."""

    def __init__(self, candidates: list[_Candidate], slots: Slots) -> None:
        self._candidates = candidates
        self._slots = slots
        self._device = slots.length.device
        self._raw: Tensor | None = None

    @property
    def masked(self) -> bool:
        """Whether a row follows a grammar."""
        return any(c.options.extras.masked for c in self._candidates)

    def adjust(
        self, logits: Tensor, slots: Tensor, ends: Tensor, context: int, masks: Masks | None
    ) -> Tensor:
        """The logits to draw from: float32 [C, V], a new tensor.

        logits: [C, V] as the model has them. slots, ends: int64 [C], each candidate's slot and the
        position its token will take. context: no end is greater. masks: of the step's grammars.
        """
        self._raw = logits if self._wanting_logprobs() else None  # before any processor
        logits = logits.to(torch.float32, copy=True)
        if masks is not None:
            self._apply_masks(logits, masks)
        self._allow(logits)
        self._add_bias(logits)
        self._hold_stops_back(logits, ends)
        self._ban_words(logits, slots, ends)
        self._apply_penalties(logits, slots, ends, context)
        self._apply_min_p(logits, slots)
        self._force_reasoning_end(logits, slots, ends, context)
        return logits

    def logprobs(self, drawn: Tensor) -> Logprobs | None:
        """Log-probabilities of the sampled tokens (int64 [C]) by candidate; None if not asked
        for."""
        if self._raw is None:
            return None
        wanting = self._wanting_logprobs()
        indices = [c.index for c in wanting]
        named = [c.options.extras.logprob_token_ids for c in wanting]
        top = max([c.options.extras.logprobs for c in wanting] + [len(ids) for ids in named])
        found = []
        for start in range(0, len(indices), AT_ONCE):
            rows = upload(indices[start : start + AT_ONCE], self._device)
            logits = self._raw[rows].float()
            part = token_logprobs(logits, drawn[rows], top)
            self._put_named(logits, named[start : start + AT_ONCE], *part[:2])
            found.append(part)
        return Logprobs(indices, *(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _put_named(
        self, logits: Tensor, named: Sequence[list[int]], ids: Tensor, values: Tensor
    ) -> None:
        """Put the tokens that rows name in place of their most probable ones.

        logits: float32 [R, V]; named: R lists, empty for rows that name none; ids, values: as
        `token_logprobs` returns them.
        """
        chosen = [(at, row) for at, row in enumerate(named) if row]
        if not chosen:
            return
        width = ids.shape[1] - 1
        rows = upload([at for at, _ in chosen], self._device)
        tokens = upload([row + [0] * (width - len(row)) for _, row in chosen], self._device)
        ids[rows, 1:] = tokens
        values[rows, 1:] = logprobs_of(logits[rows], tokens)

    # --- processors, in the order in which they apply -----------------------------------------

    def _wanting_logprobs(self) -> list[_Candidate]:
        return [c for c in self._candidates if c.options.extras.logprobs >= 0]

    def _apply_masks(self, logits: Tensor, masks: Masks) -> None:
        indices = [c.index for c in self._candidates if c.options.extras.masked]
        words = torch.frombuffer(bytearray(masks.words), dtype=torch.int32)
        words = words.view(len(indices), -1)
        if self._device.type != "cpu":
            words = words.pin_memory().to(self._device, non_blocking=True)
        rows = upload(indices, self._device)
        _revise(logits, rows, lambda some, part: apply_masks(some, words[part]))

    def _allow(self, logits: Tensor) -> None:
        chosen = [
            (c.index, c.options.allowed) for c in self._candidates if c.options.allowed is not None
        ]
        if chosen:
            rows = upload([index for index, _ in chosen], self._device)
            words = torch.stack([words for _, words in chosen])
            _revise(logits, rows, lambda some, part: apply_masks(some, words[part]))

    def _add_bias(self, logits: Tensor) -> None:
        terms = [
            (c.index, token, bias)
            for c in self._candidates
            for token, bias in c.options.extras.logit_bias.items()
        ]
        if terms:
            rows, tokens, biases = zip(*terms, strict=True)
            values = upload(biases, self._device, torch.float32)
            self._add(logits, rows, tokens, values)

    def _hold_stops_back(self, logits: Tensor, ends: Tensor) -> None:
        terms = [
            (c.index, token, c.options.extras.min_total)
            for c in self._candidates
            if c.options.extras.min_total
            for token in c.options.stop_ids
        ]
        if terms:
            rows, tokens, limits = zip(*terms, strict=True)
            early = ends[upload(rows, self._device)] < upload(limits, self._device)
            self._add(logits, rows, tokens, _ban(early))

    def _ban_words(self, logits: Tensor, slots: Tensor, ends: Tensor) -> None:
        terms = [(c.index, word) for c in self._candidates for word in c.options.extras.bad_words]
        if not terms:
            return
        longest = max(len(word) for _, word in terms)
        padded = [[-1] * (longest - len(word)) + word for _, word in terms]
        rows = [index for index, _ in terms]
        at = upload(rows, self._device)
        tapes = self._slots.tokens[slots[at]]
        hit = completes_sequence(tapes, ends[at], upload(padded, self._device))
        self._add(logits, rows, [word[-1] for _, word in terms], _ban(hit))

    def _apply_penalties(self, logits: Tensor, slots: Tensor, ends: Tensor, context: int) -> None:
        chosen = [c for c in self._candidates if _has_penalties(c.options.extras)]
        if not chosen:
            return
        extras = [c.options.extras for c in chosen]
        table = upload([[c.index for c in chosen], [e.prompt_len for e in extras]], self._device)
        rates = [
            [e.repetition_penalty for e in extras],
            [e.presence_penalty for e in extras],
            [e.frequency_penalty for e in extras],
        ]
        rows, tapes = table[0], self._slots.tokens[:, :context]
        penalties = upload(rates, self._device, torch.float32)

        def rule(some: Tensor, part: slice) -> Tensor:
            known, end = tapes[slots[rows[part]]], ends[rows[part]]
            return apply_penalties(some, known, end, table[1, part], *penalties[:, part].unbind())

        _revise(logits, rows, rule)

    def _apply_min_p(self, logits: Tensor, slots: Tensor) -> None:
        chosen = [c for c in self._candidates if c.options.extras.min_p > 0]
        if not chosen:
            return
        rows = upload([c.index for c in chosen], self._device)
        least = upload([c.options.extras.min_p for c in chosen], self._device, torch.float32)
        heat = self._slots.temperature[slots[rows]]
        _revise(logits, rows, lambda some, part: apply_min_p(some, least[part], heat[part]))

    def _force_reasoning_end(
        self, logits: Tensor, slots: Tensor, ends: Tensor, context: int
    ) -> None:
        terms = [
            (c.index, c.options.extras.prompt_len, bound.tokens, bound.end)
            for c in self._candidates
            if (bound := c.options.extras.reasoning) is not None
        ]
        if not terms:
            return
        rows, begin, budget, token = upload(list(zip(*terms, strict=True)), self._device)
        tapes = self._slots.tokens[:, :context][slots[rows]]
        force_reasoning_end(logits, rows, tapes, ends[rows], begin, begin + budget, token)

    def _add(
        self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], values: Tensor
    ) -> None:
        """Add values at (row, token); duplicates add up."""
        at = upload([list(rows), list(tokens)], self._device)
        logits.index_put_((at[0], at[1]), values, accumulate=True)


def _revise(logits: Tensor, rows: Tensor, rule: Callable[[Tensor, slice], Tensor]) -> None:
    """Replace these rows by the result of `rule`, some at a time. rule: from their logits, and
    which part of the rows they are, to new logits."""
    for start in range(0, len(rows), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        logits[rows[part]] = rule(logits[rows[part]], part)


def _has_penalties(extras: Extras) -> bool:
    penalties = (extras.presence_penalty, extras.frequency_penalty, extras.repetition_penalty)
    return penalties != (0.0, 0.0, 1.0)


def _ban(where: Tensor) -> Tensor:
    return torch.where(where, -torch.inf, 0.0)


def _words(tokens: Sequence[int], vocab_size: int) -> list[int]:
    """A bit for each token, in signed 32-bit words."""
    words = [0] * -(-vocab_size // 32)
    for token in tokens:
        words[token // 32] |= 1 << (token % 32)
    return [word - (1 << 32) if word >> 31 else word for word in words]
