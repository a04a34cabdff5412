"""No-go regions: settings that are at least as risky as one that failed are not tried again.

A failure rules out every setting that is at least as far in the risky direction of each knob, and
equal in the knobs of which nothing is known. So a wall that was hit once is not hit again, however
far behind it a setting lies.

What a server refuses it names. Then the knobs that it does not name have no part in it, and a
refusal is not met again with all their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

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
        self._known: list[tuple[Known, tuple[Knob, ...]]] = []  # with the knobs that have a part

    def __iter__(self) -> Iterator[Known]:
        return (known for known, _ in self._known)

    def add(self, failure: Known) -> None:
        self._known.append((failure, _blamed(self._space, failure)))

    def blocks(self, settings: Mapping[str, Value]) -> Known | None:
        """The failure that rules a setting out; None if none does."""
        return next(
            (known for known, knobs in self._known if _covers(known, knobs, settings)), None
        )


def _covers(known: Known, knobs: Iterable[Knob], settings: Mapping[str, Value]) -> bool:
    return all(
        at_least_as_risky(knob, known.risk, known.settings[knob.name], settings[knob.name])
        for knob in knobs
    )


def _blamed(space: Space, failure: Known) -> tuple[Knob, ...]:
    """The knobs that have a part in a failure."""
    told = [knob for knob in space.knobs if failure.risk in knob.riskier]
    if failure.risk == "length" and told:
        return tuple(told)
    named = [knob for knob in space.knobs if _names(failure.reason, knob)]
    if failure.risk == "refused" and named:
        return tuple(knob for knob in space.knobs if knob in told or knob in named)
    return space.knobs


def _names(reason: str, knob: Knob) -> bool:
    words = {knob.name, knob.flag.removeprefix("--"), *knob.words} - {""}
    plain = reason.replace("-", "_")
    return any(word.removeprefix("--").replace("-", "_") in plain for word in words)


def at_least_as_risky(knob: Knob, risk: Risk, failed: Value, value: Value) -> bool:
    """Whether a value of a knob is known to be no safer than one that failed."""
    if value == failed or risk in knob.neutral:
        return True
    direction = knob.riskier.get(risk)
    if direction is None or None in (failed, value):  # where a default lies is not known
        return False
    step = knob.index(value) - knob.index(failed)
    return step > 0 if direction == "up" else step < 0
