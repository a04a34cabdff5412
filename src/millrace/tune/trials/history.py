"""The trials of a study, made from its journal: what was tried, what failed, what it was worth.

A pure function of the records. What to try next is not decided here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec

from millrace.tune.space.knobs import Settings, Space, key_of
from millrace.tune.space.no_go import Known, NoGo, at_least_as_risky
from millrace.tune.trials.failures import Failure
from millrace.tune.trials.journal import Abandoned, Began, Ended, Record
from millrace.tune.trials.outcome import Objective, Outcome, Run, Visit

_GATE_Z = 1.96  # accuracy is lost where the drop is beyond chance, at 95%


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    """What a trial is judged by. dollars: of a device, an hour. max_failed: share of requests that
    may fail. accuracy_drop: share of items by which accuracy may be below that of the defaults.
    min_accuracy: which it must have in any case; None for no limit. spread_penalty: of the spread
    between runs, what is taken off their median."""

    objective: Objective = "throughput"
    dollars: float = 1.0
    max_failed: float = 0.0
    accuracy_drop: float = 0.03
    min_accuracy: float | None = None
    spread_penalty: float = 1.0


@dataclass
class Trial:
    """One setting that was tried. done: its visits with what they found, in order."""

    number: int
    settings: Settings
    source: str
    why: str
    devices: int
    done: list[tuple[Visit, Outcome]] = field(default_factory=list)
    failure: Failure | None = None

    @property
    def feasible(self) -> bool:
        return self.failure is None and any(outcome.runs for _, outcome in self.done)

    @property
    def runs(self) -> list[Run]:
        return [run for _, outcome in self.done for run in outcome.runs]

    @property
    def accuracy(self) -> tuple[float, int] | None:
        """(share of right answers, items) over all visits that measured it."""
        known = [(o.accuracy, o.items) for _, o in self.done if o.accuracy is not None and o.items]
        items = sum(count for _, count in known)
        return (sum(share * count for share, count in known) / items, items) if items else None

    def rounds(self) -> dict[int, Outcome]:
        """Its full visits by round."""
        return {v.round: o for v, o in self.done if v.purpose == "full" and o.runs}


class History:
    """All trials. open: the visit that began and has not ended, with how often it began.
    draft_visits: of the best settings with other numbers of drafts; they are no trials."""

    def __init__(self, space: Space, goal: Goal, records: Iterable[Record]) -> None:
        self.space = space
        self.goal = goal
        self.trials: list[Trial] = []
        self.no_go = NoGo(space)
        self.visits = 0
        self.seconds = 0.0
        self.open: tuple[Visit, int] | None = None
        self.order: list[tuple[Visit, Outcome]] = []
        self.draft_visits: list[tuple[Visit, Outcome]] = []
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Take the next record of the journal."""
        if isinstance(record, Began):
            self._begin(record.visit)
        elif isinstance(record, Ended):
            self._end(record.outcome)
        elif isinstance(record, Abandoned) and self.open is not None:
            self.open = (self.open[0], 0)

    def _begin(self, visit: Visit) -> None:
        times = self.open[1] if self.open else 0
        self.open = (visit, times + 1)
        self.visits = max(self.visits, visit.number + 1)
        if visit.trial == len(self.trials):
            devices = self.space.counted(visit.settings)
            self.trials.append(Trial(visit.trial, visit.settings, visit.source, visit.why, devices))

    def _end(self, outcome: Outcome) -> None:
        assert self.open is not None
        visit, self.open = self.open[0], None
        self.seconds += outcome.seconds
        if visit.purpose == "drafts":
            self._end_of_drafts(visit, outcome)
            return
        trial = self.trials[visit.trial]
        trial.done.append((visit, outcome))
        self.order.append((visit, outcome))
        failure = outcome.failure or self._failed_requests(outcome) or self._lost(trial)
        if failure is not None and trial.failure is None:
            trial.failure = failure
            self.no_go.add(Known(trial.settings, failure.risk, trial.number, str(failure)))

    def _end_of_drafts(self, visit: Visit, outcome: Outcome) -> None:
        """What a failure says of these settings holds as for a trial; the best stays as it is."""
        failure = outcome.failure or self._failed_requests(outcome)
        if failure is None and outcome.accuracy is not None:
            failure = self._worse(outcome.accuracy, outcome.items)
        if failure is not None:
            outcome = msgspec.structs.replace(outcome, failure=failure)
            self.no_go.add(Known(visit.settings, failure.risk, visit.trial, str(failure)))
        self.draft_visits.append((visit, outcome))

    def _failed_requests(self, outcome: Outcome) -> Failure | None:
        for run in outcome.runs:
            ended = run.completed + run.failed
            if not run.completed or run.failed > self.goal.max_failed * ended:
                return Failure("failed_requests", "run", f"{run.failed} of {ended} requests failed")
        return None

    def _lost(self, trial: Trial) -> Failure | None:
        """Whether answers got worse than the gate allows, beyond what chance explains."""
        found = trial.accuracy
        if found is None:
            return None
        share, items = found
        least = self.goal.min_accuracy
        if least is not None and share + _GATE_Z * _deviation(share, items) < least:
            return Failure("lost_accuracy", "run", f"{share:.1%} of {items}, less than {least:.1%}")
        return self._worse(share, items) if trial.number else None

    def _worse(self, share: float, items: int) -> Failure | None:
        """Whether answers are worse than those of the defaults."""
        base = self.trials[0].accuracy
        if base is None:
            return None
        doubt = _GATE_Z * math.hypot(_deviation(share, items), _deviation(*base))
        if base[0] - share > self.goal.accuracy_drop + doubt:
            line = f"{share:.1%} of {items} items, {base[0]:.1%} with the defaults"
            return Failure("lost_accuracy", "run", line)
        return None

    # --- values ----------------------------------------------------------------------------------

    @property
    def tried(self) -> set[str]:
        """Keys of all settings that were tried."""
        return {key_of(trial.settings) for trial in self.trials}

    @property
    def anchor(self) -> Trial | None:
        """The trial that is measured again and again, so that drift of the machine shows: the
        defaults, else the first that works."""
        return next((trial for trial in self.trials if trial.feasible), None)

    def values(self, trial: Trial, outcome: Outcome) -> list[float]:
        """The objective in each run of a visit."""
        goal = self.goal
        return [run.value(goal.objective, trial.devices, goal.dollars) for run in outcome.runs]

    def short_value(self, trial: Trial) -> float:
        """The objective in the first load of the short visit, relative to what the anchor had at
        that time."""
        for at, (visit, outcome) in enumerate(self.order):
            if visit.trial == trial.number and visit.purpose == "short" and outcome.runs:
                return self.values(trial, outcome)[0] / self._level(at)
        return 0.0

    def _level(self, at: int) -> float:
        """The anchor's objective at a place in the order of visits, by the visits of it before and
        after; 1 without any."""
        anchor = self.anchor
        if anchor is None:
            return 1.0
        seen = [
            (place, self.values(anchor, outcome)[0])
            for place, (visit, outcome) in enumerate(self.order)
            if visit.trial == anchor.number and visit.purpose != "full" and outcome.runs
        ]
        before = [pair for pair in seen if pair[0] <= at][-1:] or seen[:1]
        after = [pair for pair in seen if pair[0] >= at][:1] or seen[-1:]
        (x, low), (y, high) = before[0], after[0]
        share = (at - x) / (y - x) if y > x else 0.0
        return max(low + share * (high - low), 1e-12)

    @property
    def noise(self) -> float:
        """How far two short runs of one setting are apart: the standard deviation of their
        logarithms, by the visits of the anchor; 0 before there are two."""
        seen = [
            math.log(max(self.values(self.anchor, outcome)[0], 1e-12))
            for visit, outcome in self.order
            if self.anchor is not None
            and visit.trial == self.anchor.number
            and visit.purpose != "full"
            and outcome.runs
        ]
        steps = [(b - a) ** 2 / 2.0 for a, b in pairwise(seen)]
        return math.sqrt(statistics.fmean(steps)) if steps else 0.0

    def proven(self, settings: Settings) -> bool:
        """Whether something that is at least as likely to crash lived through two loads of one
        start. True where no knob makes crashes likelier."""
        doubtful = [knob for knob in self.space.knobs if "stability" in knob.riskier]
        lived = [
            trial.settings
            for trial in self.trials
            if trial.feasible and any(len(outcome.runs) > 1 for _, outcome in trial.done)
        ]
        return not doubtful or any(
            all(at_least_as_risky(k, "stability", settings[k.name], one[k.name]) for k in doubtful)
            for one in lived
        )

    def ranked(self) -> list[Trial]:
        """Feasible trials by their short runs, best first."""
        fine = [trial for trial in self.trials if trial.feasible]
        return sorted(fine, key=lambda trial: (-self.short_value(trial), trial.number))


def penalised(ratios: Sequence[float], penalty: float) -> float:
    """The median of ratios less a penalty for their spread, both of their logarithms: a ratio that
    is doubled in some rounds is as far off as one that is halved. Spread is 1.4826 times the median
    absolute deviation."""
    logs = [math.log(max(ratio, 1e-12)) for ratio in ratios]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(one - middle) for one in logs)
    return math.exp(middle - penalty * spread)


def _deviation(share: float, items: int) -> float:
    """Standard deviation of a share, never 0: Laplace's estimate of the share."""
    smooth = (share * items + 1.0) / (items + 2.0)
    return math.sqrt(smooth * (1.0 - smooth) / items)
