"""The interface of an engine to its worker: a device, a group of ranks, or a fake in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from millrace.engine.step import StepCounts
from millrace.protocol import Masks, StepPlan, StepResult, TransferEnd, WorkStats


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait until the step has run."""


class Worker(Protocol):
    """Runs plans in the order in which they are launched."""

    def launch(self, plan: StepPlan, masks: Callable[[], Masks] | None = None) -> Pending:
        """Start a step without waiting for it.

        masks: builds the token masks of the step's grammars; None: it has none. It is called at
        most once, after the forward is launched, so that the masks are built while it runs.
        """

    def finished(self) -> list[TransferEnd]:
        """Transfers that have ended since the last call."""

    def close(self) -> None:
        """Free the device; nothing is launched afterwards."""


class Account(Protocol):
    """Adds up what steps have computed and moved."""

    def add(self, counts: StepCounts, drafts: int, seconds: float) -> None:
        """A step of this size has ended. drafts: of each decode row. seconds: that it ran for."""

    def totals(self) -> WorkStats:
        """What all steps so far have computed and moved, on one rank."""
