"""When requests are due: offsets from the start of a run, drawn from a seed or read from a trace.

A run has one sequence, whatever the number of its processes: each takes every nth time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

import msgspec
import numpy as np

from millrace.bench.flags.structs import RampStrategy
from millrace.errors import UserError

_BLOCK = 4096  # gaps drawn at a time


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """When requests are due.

    rate: requests a second; infinity makes all of them due at once. Gaps are gamma distributed
    with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, below 1 comes in bursts,
    above 1 is more even, infinity makes all gaps equal. A ramp takes the rate from ramp_start to
    ramp_end over the run's `count` requests. times: a trace's own offsets instead, in seconds,
    divided by `speed`.
    """

    rate: float = math.inf
    burstiness: float = 1.0
    ramp: RampStrategy | None = None
    ramp_start: float | None = None
    ramp_end: float | None = None
    count: int | None = None
    times: tuple[float, ...] | None = None
    speed: float = 1.0
    seed: int = 0

    @property
    def open_loop(self) -> bool:
        """Whether arrival times decide when requests are sent, and not the answers."""
        return self.times is not None or self.ramp is not None or math.isfinite(self.rate)


def check_schedule(schedule: Schedule) -> None:
    """Raise UserError for values that cannot be used; the message names the flag."""
    if not schedule.rate > 0:
        raise UserError(f"--request-rate {schedule.rate:g}: use a number above 0, or inf")
    if not schedule.burstiness > 0:
        raise UserError(
            f"--burstiness {schedule.burstiness:g}: use a number above 0 (1 is Poisson, inf steady)"
        )
    if not (schedule.speed > 0 and math.isfinite(schedule.speed)):
        raise UserError(f"--trace-speed {schedule.speed:g}: use a number above 0")
    if schedule.ramp is not None:
        _check_ramp(schedule)


def _check_ramp(schedule: Schedule) -> None:
    start, end = schedule.ramp_start, schedule.ramp_end
    if start is None or end is None:
        raise UserError("--ramp-up-strategy: give --ramp-up-start-rps and --ramp-up-end-rps too")
    if math.isfinite(schedule.rate):
        raise UserError("--ramp-up-strategy sets the rate itself; leave out --request-rate")
    if schedule.count is None:
        raise UserError("--ramp-up-strategy goes over the run's requests; give --num-prompts")
    if start < 0 or end <= 0 or start > end:
        raise UserError(
            f"--ramp-up-start-rps {start:g}, --ramp-up-end-rps {end:g}: "
            "use a start of 0 or more, and an end above 0 that is not below the start"
        )
    if schedule.ramp == "exponential" and start == 0:
        raise UserError("--ramp-up-start-rps 0: an exponential ramp needs a start above 0")


def due_times(schedule: Schedule) -> Iterator[float | None]:
    """Seconds after the start at which requests are due, ascending, the first 0.

    In a closed loop every time is None: a request is due when a slot is free. The sequence has no
    end, except that of a trace.
    """
    if schedule.times is not None:
        return iter([at / schedule.speed for at in schedule.times])
    if not schedule.open_loop:
        return repeat(None)
    return _drawn(schedule)


def _drawn(schedule: Schedule) -> Iterator[float]:
    rng = np.random.default_rng(schedule.seed)
    at, number = 0.0, 0
    while True:
        for gap in _unit_gaps(rng, schedule.burstiness):
            yield at
            at += gap / rate_at(schedule, number)
            number += 1


def _unit_gaps(rng: np.random.Generator, burstiness: float) -> list[float]:
    """Gaps of mean 1."""
    if math.isinf(burstiness):
        return [1.0] * _BLOCK
    drawn: list[float] = rng.gamma(burstiness, 1 / burstiness, size=_BLOCK).tolist()
    return drawn


def rate_at(schedule: Schedule, number: int) -> float:
    """Requests a second at request `number`; during a ramp it grows with the number."""
    if schedule.ramp is None:
        return schedule.rate
    start, end, count = schedule.ramp_start or 0.0, schedule.ramp_end or 0.0, schedule.count or 1
    share = min(1.0, number / max(1, count - 1))
    if schedule.ramp == "linear":
        # A ramp from 0 begins at the rate of its first step: at rate 0 it would never begin.
        return max(start + (end - start) * share, end / count)
    return float(start * (end / start) ** share)
