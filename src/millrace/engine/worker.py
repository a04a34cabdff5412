"""What an engine asks of whoever carries its plans out: a device, a group of ranks, or a test."""

from __future__ import annotations

from typing import Protocol

from millrace.protocol import StepPlan, StepResult


class Pending(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait until the step has run."""


class Worker(Protocol):
    """Whatever carries plans out, in the order they are launched."""

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step without waiting for it."""

    def close(self) -> None:
        """Free the device; nothing is launched afterwards."""
