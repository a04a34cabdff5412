"""What an engine asks of whoever carries its plans out: a device, a group of ranks, or a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from millrace.protocol import Masks, StepPlan, StepResult


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait until the step has run."""


class Worker(Protocol):
    """Whatever carries plans out, in the order they are launched."""

    def launch(self, plan: StepPlan, masks: Callable[[], Masks] | None = None) -> Pending:
        """Start a step without waiting for it.

        masks: what the step's grammars allow, where it has any. Called at most once, behind the
        start of the forward, so that they are worked out while it runs.
        """

    def close(self) -> None:
        """Free the device; nothing is launched afterwards."""
