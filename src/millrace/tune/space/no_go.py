"""No-go regions: settings that are at least as risky as one that failed are not tried again.

A failure rules out every setting that is at least as far in the risky direction of each knob, and
equal in the knobs of which nothing is known. So a wall that was hit once is not hit again, however
far behind it a setting lies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from millrace.tune.space.knobs import Knob, Risk, Settings, Space, Value


class Known(msgspec.Struct, frozen=True):
    """A failure that is remembered. trial: whose it was. reason: in words, for reports."""

    settings: Settings
    risk: Risk
    trial: int
    reason: str


class NoGo:
    """What failed so far, asked before anything is tried."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._known: list[Known] = []

    def __iter__(self) -> Iterator[Known]:
        return iter(self._known)

    def add(self, failure: Known) -> None:
        self._known.append(failure)

    def blocks(self, settings: Mapping[str, Value]) -> Known | None:
        """The failure that rules a setting out; None if none does."""
        return next((known for known in self._known if self._covers(known, settings)), None)

    def _covers(self, known: Known, settings: Mapping[str, Value]) -> bool:
        return all(
            _at_least_as_risky(knob, known.risk, known.settings[knob.name], settings[knob.name])
            for knob in self._space.knobs
        )


def _at_least_as_risky(knob: Knob, risk: Risk, failed: Value, value: Value) -> bool:
    if value == failed or risk in knob.neutral:
        return True
    direction = knob.riskier.get(risk)
    if direction is None or None in (failed, value):  # where a default lies is not known
        return False
    step = knob.index(value) - knob.index(failed)
    return step > 0 if direction == "up" else step < 0
