"""When requests are due: offsets from the start of a run, drawn from a seed."""

from __future__ import annotations

import math

import numpy as np

from millrace.errors import UserError


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which each of `count` requests is due, ascending, the first 0.

    rate: requests a second; infinity makes all of them due at once. Gaps are gamma distributed
    with shape `burstiness` and mean 1 / rate: 1 is a Poisson process, below 1 comes in bursts,
    above 1 is more even. Raises UserError for a rate or burstiness that is not positive.
    """
    if not rate > 0:
        raise UserError(f"--request-rate {rate}: use a number above 0, or inf")
    if not (burstiness > 0 and math.isfinite(burstiness)):
        raise UserError(f"--burstiness {burstiness}: use a number above 0 (1 is Poisson)")
    if math.isinf(rate) or count == 0:
        return [0.0] * count
    draws = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), size=count - 1)
    return [0.0, *np.cumsum(draws).tolist()]
