"""Which of the finalists is best, and whether the runs show it.

Finalists run by turns, a round after the other. Two are compared by the ratios of their rounds, so
that a machine that gets slower does not favour either. A winner is named only where the 95%
interval of that ratio excludes 1, with the load generator's own error added to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import msgspec

from millrace.bench.report.compare import paired_interval
from millrace.tune.trials.history import History, Trial, penalised
from millrace.tune.trials.outcome import Outcome

_TINY = 1e-12
_FEWEST = 2  # rounds that show something


class Versus(msgspec.Struct, frozen=True):
    """A ratio of two trials over shared rounds. low and high: 95% interval, None for fewer than two
    rounds. refused: why the runs can show nothing; empty if they can."""

    ratio: float
    low: float | None
    high: float | None
    rounds: int
    refused: str = ""

    @property
    def better(self) -> bool:
        return self.low is not None and self.low > 1.0 and not self.refused

    @property
    def worse(self) -> bool:
        return self.high is not None and self.high < 1.0 and not self.refused

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"x {self.ratio:.3f}, no interval"
        return f"x {self.ratio:.3f} (95%: {self.low:.3f} to {self.high:.3f}, {self.rounds} rounds)"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """best: the number of the trial to use. tied: others that may be as good. gain: of the best
    over the defaults. clear: whether the best is shown to beat the defaults. why: in words."""

    best: int
    tied: tuple[int, ...]
    gain: Versus | None
    clear: bool
    why: str


def versus(history: History, a: Trial, b: Trial) -> Versus:
    """a relative to b, over the rounds that both have. What the load generator limited is at least
    as good as it seems: a round shows nothing where it limited the one that seems worse."""
    of_a, of_b = a.rounds(), b.rounds()
    rounds = [
        _Round(history.values(a, of_a[number]), of_a[number], history.values(b, of_b[number]),
               of_b[number])
        for number in sorted(of_a.keys() & of_b.keys())
    ]  # fmt: skip
    if not rounds:
        return Versus(1.0, None, None, 0, "they share no round")
    ahead = sum(one.log for one in rounds) >= 0.0
    bound = [one.bound_of_b if ahead else one.bound_of_a for one in rounds]
    valid = [one for one, why in zip(rounds, bound, strict=True) if not why]
    refused = "" if len(valid) >= _FEWEST else next(filter(None, bound), "")
    kept = rounds if refused else valid
    interval = paired_interval([one.log for one in kept], max(one.error for one in kept))
    return Versus(*interval, len(kept), refused)


class _Round:
    """Two trials in a shared round."""

    def __init__(
        self, of_a: Sequence[float], a: Outcome, of_b: Sequence[float], b: Outcome
    ) -> None:
        pairs = zip(of_a, of_b, strict=False)  # first loads with first loads: caches are as warm
        self.log = statistics.fmean(_log(x) - _log(y) for x, y in pairs)
        self.error = max(run.client_error for run in [*a.runs, *b.runs])
        self.bound_of_a = next((run.client_bound for run in a.runs if run.client_bound), "")
        self.bound_of_b = next((run.client_bound for run in b.runs if run.client_bound), "")


def _log(value: float) -> float:
    return math.log(max(value, _TINY))


def full_score(history: History, trial: Trial) -> float:
    """The median over full rounds, relative to the anchor of each round, less the spread."""
    anchor = history.anchor
    levels = {} if anchor is None else anchor.rounds()
    shares = []
    for number, outcome in trial.rounds().items():
        level = 1.0
        if anchor is not None and number in levels:
            level = statistics.median(history.values(anchor, levels[number]))
        elif levels:
            continue
        shares.append(statistics.median(history.values(trial, outcome)) / max(level, _TINY))
    return penalised(shares, history.goal.spread_penalty) if shares else 0.0


def standing(history: History) -> list[Trial]:
    """Feasible trials with full rounds, best first."""
    known = [trial for trial in history.trials if trial.feasible and trial.rounds()]
    return sorted(known, key=lambda trial: (-full_score(history, trial), trial.number))


def verdict(history: History) -> Verdict | None:
    """Who won; None where nothing worked."""
    order: Sequence[Trial] = standing(history) or history.ranked()[:1]
    if not order:
        return None
    first, base = order[0], history.trials[0]
    tied = tuple(t.number for t in order[1:] if not versus(history, first, t).better)
    if not base.feasible:
        why = f"the defaults do not work here ({base.failure})"
        return Verdict(best=first.number, tied=tied, gain=None, clear=True, why=why)
    gain = versus(history, first, base)
    if first is base:
        why = "nothing that was tried is better than the defaults"
        return Verdict(best=base.number, tied=tied, gain=None, clear=False, why=why)
    if gain.better:
        why = f"better than the defaults: {gain}"
        return Verdict(best=first.number, tied=tied, gain=gain, clear=True, why=why)
    why = f"no setting is shown to be better than the defaults: the nearest has {gain}"
    if gain.refused:
        why += f"; {gain.refused}"
    return Verdict(best=base.number, tied=(first.number,), gain=gain, clear=False, why=why)
