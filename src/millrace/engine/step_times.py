"""How long steps take, by kind, and for how much of it the device had nothing to do.

The host sees only how long it waited for a result. If it waited, the device was busy until then; if
a result was there already, the device had ended before and waited for the host's next step. With a
pipeline such a step counts as host-bound as a whole; without one, what the host does is never
hidden, and the share is exact.
"""

from __future__ import annotations

from millrace.protocol import StepPlan

_THERE = 0.02  # of a step: a shorter wait means that the result was there


class StepTimes:
    """totals: for steps that only decode, that only compute prompts, and that do both: the number,
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
