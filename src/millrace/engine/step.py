"""A step while it is planned: its rows, and the requests that they belong to; and how long steps
take.

The scheduler fills a step, and keeps it until the step's result is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from millrace.engine.request import Request
from millrace.protocol import Admission, Chunk, PageCopy, PageGrant, Save, StepPlan, Transfer

_THERE = 0.02  # of a step: a shorter wait means that the result was there


class StepCounts(NamedTuple):
    """What a step computed, in rows and tokens; named and ordered as `model.work.StepShape` is.

    decode_context: as far as the host knew the lengths when the step was planned: with a pipeline,
    without the tokens of the step before.
    """

    decode_rows: int
    decode_tokens: int
    decode_context: int
    prompts: int
    prompt_tokens: int
    prompt_context: int
    prompt_attention: float
    sampled_rows: int


@dataclass(slots=True)
class Step:
    """now: when it is planned, seconds. context: tokens of its longest row. saves: (request, number
    of its first tokens, snapshot to write them to). ends: slots whose requests have ended, to be
    saved first. admitted: requests that run for the first time. drafts: of each decode row.
    made: those that the step before made for it. known: tokens of all decode rows, as far as they
    are known."""

    now: float
    context: int = 0
    drafts: int = 0
    made: int = 0
    known: int = 0
    ends: list[Save] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    deletes: list[tuple[str, bool]] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    admissions: list[Admission] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, Chunk]] = field(default_factory=list)
    saves: list[tuple[Request, int, int]] = field(default_factory=list)

    def requests(self) -> list[Request]:
        """Every request with a row in this step."""
        return self.decode + [request for request, _ in self.chunks]

    def sampled(self) -> list[Request]:
        """Requests whose rows bring new tokens, in the order of StepPlan.sampled_slots."""
        return self.decode + [request for request, chunk in self.chunks if chunk.last]

    def counts(self) -> StepCounts:
        """Its sizes; costs a few operations for each piece of a prompt, and none for rows."""
        rows, ends = len(self.decode), 0
        tokens = context = 0
        attention = 0.0
        for _, chunk in self.chunks:
            tokens += chunk.count
            context += chunk.start
            attention += chunk.count * (chunk.start + (chunk.count + 1) / 2)
            ends += chunk.last
        return StepCounts(
            rows, rows * (self.drafts + 1), self.known, len(self.chunks), tokens, context,
            attention, rows + ends,
        )  # fmt: skip

    def plan(self, number: int) -> StepPlan:
        """The plan that the worker runs."""
        return StepPlan(
            step=number,
            admissions=self.admissions,
            grants=self.grants,
            decode=[request.slot for request in self.decode],
            chunks=[chunk for _, chunk in self.chunks],
            saves=[Save(request.slot, snapshot) for request, _, snapshot in self.saves],
            context=self.context,
            ends=self.ends,
            copies=self.copies,
            transfers=self.transfers,
            deletes=self.deletes,
            drafts=self.drafts,
        )


class StepTimes:
    """How long steps take, by kind, and for how much of it the device had nothing to do.

    The host sees only how long it waited for a result. If it waited, the device was busy until
    then; if a result was there already, the device had ended before and waited for the host's next
    step. With a pipeline such a step counts as host-bound as a whole; without one, what the host
    does is never hidden, and the share is exact.

    totals: for steps that only decode, that only compute prompts, and that do both: the number,
    seconds, and seconds that are host-bound.

    overlaps: the host works on a step while the device runs the one before. has_device: the device
    is not the host itself.
    """

    def __init__(self, *, overlaps: bool, has_device: bool) -> None:
        self._overlaps, self._has_device = overlaps, has_device
        self.totals = [0.0] * 9

    def add(self, plan: StepPlan, seconds: float, waited: float) -> None:
        """A step has ended. seconds: since the one before, or since it was launched. waited: how
        much of it the host waited for the result."""
        at = (2 if plan.decode else 1) * 3 if plan.chunks else 0
        totals = self.totals
        totals[at] += 1
        totals[at + 1] += seconds
        if self._has_device:
            totals[at + 2] += self._host_bound(seconds, waited)

    def _host_bound(self, seconds: float, waited: float) -> float:
        if self._overlaps:
            return seconds if waited < _THERE * seconds else 0.0
        return max(0.0, seconds - waited)
