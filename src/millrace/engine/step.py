"""A step in the making: the rows that are planned, with the requests behind them.

It is filled by the scheduler, and kept by it until the step's result is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from millrace.engine.request import Request
from millrace.protocol import Admission, Chunk, PageGrant, Save, StepPlan


@dataclass(slots=True)
class Step:
    """now: seconds, when it is made. context: tokens of its longest row. saves: of a request, how
    many of its tokens, into which snapshot."""

    now: float
    context: int = 0
    admissions: list[Admission] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)
    chunks: list[tuple[Request, Chunk]] = field(default_factory=list)
    saves: list[tuple[Request, int, int]] = field(default_factory=list)

    def requests(self) -> list[Request]:
        """Every request that it computes something for."""
        return self.decode + [request for request, _ in self.chunks]

    def sampled(self) -> list[Request]:
        """Whose rows bring new tokens, in the order of StepPlan.sampled_slots."""
        return self.decode + [request for request, chunk in self.chunks if chunk.last]

    def plan(self, number: int) -> StepPlan:
        """What the device is told."""
        return StepPlan(
            step=number,
            admissions=self.admissions,
            grants=self.grants,
            decode=[request.slot for request in self.decode],
            chunks=[chunk for _, chunk in self.chunks],
            saves=[Save(request.slot, snapshot) for request, _, snapshot in self.saves],
            context=self.context,
        )
