"""How many drafts the rows of a step verify: as many as bring the most tokens a second.

A step of more drafts brings more tokens and takes longer. How many of them are accepted differs
from request to request, and how much longer it takes from batch size to batch size; both are
measured while the engine runs. All rows of a step verify the same number, one of a few for which
there are CUDA graphs. This module decides about time alone: no token depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from millrace.engine.request import Request
from millrace.protocol import Limits

PRIOR = 0.7  # of drafts behind accepted ones are accepted, before anything is known
PRIOR_COST = 0.03  # that one draft more adds to a step, before it was measured
LEARNING = 1 / 16  # weight of a new observation of one request; of all together a tenth of it
COST_LEARNING = 1 / 8
GAIN = 1.02  # another depth must promise so much more
STALE = 256  # steps after which a depth is tried again
TRIAL = 3  # steps of a trial: the first one still has the drafts of the depth before


@dataclass(slots=True)
class _Batches:
    """Steps of about one number of rows. depth: the best one. trial: another one, and steps that it
    is still tried for. seconds: of a step, by depth. last: the step that each depth last ran in, of
    `steps`."""

    depth: int
    trial: tuple[int, int] = (0, 0)
    seconds: dict[int, float] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    steps: int = 0

    def estimate(self, depth: int) -> float:
        """Seconds of a step at `depth`; of one that has not run yet, by the nearest that has."""
        if depth in self.seconds:
            return self.seconds[depth]
        nearest = min(self.seconds, key=lambda one: abs(one - depth), default=None)
        if nearest is None:
            return 1.0 + PRIOR_COST * depth
        return self.seconds[nearest] * (1.0 + PRIOR_COST * (depth - nearest))


class DraftDepth:
    """Chooses the depth of each step. limits: `depths` to choose from; without them it is always
    `drafts`. `depth_schedule`: (least rows, most rows, depth), which takes the choice away."""

    def __init__(self, limits: Limits) -> None:
        self._depths = sorted(limits.depths) or [limits.drafts]
        self._schedule = limits.depth_schedule
        self._shares = [PRIOR] * limits.drafts
        self._batches: dict[int, _Batches] = {}

    def choose(self, requests: Sequence[Request]) -> int:
        """The depth of a step with a decode row of each request."""
        rows = len(requests)
        if self._schedule:
            fits = (depth for low, high, depth in self._schedule if low <= rows <= high)
            return next(fits, self._depths[-1])
        if len(self._depths) == 1 or not rows:
            return self._depths[-1]
        batches = self._of(rows)
        batches.steps += 1
        tried = self._tried(batches)
        depth = self._best(batches, requests) if tried is None else tried
        batches.last[depth] = batches.steps
        return depth

    def took(self, rows: int, depth: int, seconds: float) -> None:
        """A step of decode rows alone has taken so long."""
        known = self._of(rows).seconds
        if depth not in known:
            known[depth] = seconds
        else:  # a pause of the machine is no cost of the depth
            known[depth] += COST_LEARNING * (min(seconds, 2 * known[depth]) - known[depth])

    def accepted(self, request: Request, depth: int, count: int) -> None:
        """A row that verified up to `depth` drafts had `count` of them accepted. A draft says
        something only if all before it were accepted, so what is known of the later ones stays
        while there are few drafts, or wrong ones."""
        if len(self._depths) == 1:
            return
        if not request.acceptance:
            request.acceptance = list(self._shares)
        for shares, weight in ((request.acceptance, LEARNING), (self._shares, LEARNING / 10)):
            for position in range(min(depth, count + 1)):
                shares[position] += weight * ((count > position) - shares[position])

    def _of(self, rows: int) -> _Batches:
        """What is known of steps of about so many rows: up to twice as many."""
        return self._batches.setdefault(rows.bit_length(), _Batches(self._depths[-1]))

    def _tried(self, batches: _Batches) -> int | None:
        """The depth that is being tried, if one is."""
        depth, steps = batches.trial
        if not steps:
            stale = (
                one
                for one in self._depths
                if one != batches.depth and batches.steps - batches.last.get(one, 0) > STALE
            )
            if (found := next(stale, None)) is None:
                return None
            depth, steps = found, TRIAL
        batches.trial = depth, steps - 1
        return depth

    def _best(self, batches: _Batches, requests: Sequence[Request]) -> int:
        """The depth of the most tokens a second; the one before, unless another is better by
        GAIN."""
        tokens = self._tokens(requests)
        rates = {depth: tokens[depth] / batches.estimate(depth) for depth in self._depths}
        best = max(self._depths, key=lambda depth: rates[depth])
        if rates[best] > GAIN * rates[batches.depth]:
            batches.depth = best
        return batches.depth

    def _tokens(self, requests: Sequence[Request]) -> list[float]:
        """Tokens that a step is expected to bring, by depth."""
        sums = [0.0] * len(self._shares)
        for request in requests:
            accepted = 1.0
            for position, share in enumerate(request.acceptance or self._shares):
                accepted *= share
                sums[position] += accepted
        found = [float(len(requests))]
        for share in sums:
            found.append(found[-1] + share)
        return found
