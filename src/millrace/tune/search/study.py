"""The study: which visit comes next, given all that is in the journal, until nothing is left to do.

First every trial gets a short visit, and now and then the anchor gets one more, so that drift of
the machine can be taken out. Then the finalists run in rounds, by turns, until the runs tell them
apart. At last the best settings run with other numbers of drafts, for a schedule by batch size.
What comes next is a pure function of the records: that is what makes a study resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Protocol, TypeVar

import msgspec

from millrace.tune.search.comparison import standing, verdict, versus
from millrace.tune.search.draft_schedule import batch_sizes, to_measure
from millrace.tune.search.proposals import Seed, propose
from millrace.tune.space.knobs import Settings, engines_of, key_of
from millrace.tune.trials.failures import Failure
from millrace.tune.trials.history import Goal, History, Trial
from millrace.tune.trials.journal import Began, Ended, Journal
from millrace.tune.trials.outcome import Outcome, Purpose, Visit

_T = TypeVar("_T")
_HOPELESS = 5  # trials that failed for another cause than memory, while none worked
_MOST_BEGINNINGS = 3  # of one visit: settings that take the tuner down with them are given up


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a study goes. trials: settings that are tried. seconds: after which no trial begins; 0:
    no limit. anchor_every: trials between two visits of the anchor. finalists: besides the
    defaults. rounds: fewest and most of them. full_runs: loads of a full visit. draft_rounds: of
    all numbers of drafts; 0: none. streams: requests in flight of the load. accuracy: whether
    answers are checked. fixed: knobs that keep their values. walk: the seeds are tried, and no
    more."""

    goal: Goal = Goal()
    seeds: tuple[Seed, ...] = ()
    trials: int = 25
    seconds: float = 0.0
    anchor_every: int = 6
    finalists: int = 2
    rounds: tuple[int, int] = (3, 6)
    full_runs: int = 2
    draft_rounds: int = 0
    streams: int = 32
    accuracy: bool = False
    fixed: Settings = {}
    seed: int = 0
    walk: bool = False


class TuningTarget(Protocol):
    """What is tuned: something that can be started with settings, loaded and stopped."""

    async def visit(self, visit: Visit) -> Outcome:
        """Start it with the visit's settings, run a load for each seed, and stop it. What goes
        wrong with it is part of the outcome; what is raised ends the study."""
        ...


async def run_study(
    journal: Journal,
    history: History,
    rules: Rules,
    target: TuningTarget,
    on_visit: Callable[[Visit, Outcome | None], None] = lambda visit, outcome: None,
) -> None:
    """Go on until nothing is left. history: that of the journal. on_visit: called before a visit
    with None, and after it."""
    while (visit := next_visit(history, rules)) is not None:
        _write(journal, history, Began(visit))
        assert history.open is not None
        if history.open[1] > _MOST_BEGINNINGS:
            line = f"the tuner was killed {_MOST_BEGINNINGS} times while this ran"
            outcome = Outcome(failure=Failure("interrupted", "run", line))
        else:
            on_visit(visit, None)
            outcome = await target.visit(visit)
        _write(journal, history, Ended(visit.number, outcome))
        on_visit(visit, outcome)


def _write(journal: Journal, history: History, record: Began | Ended) -> None:
    journal.write(record)
    history.add(record)


def next_visit(history: History, rules: Rules) -> Visit | None:
    """What is to be done now; None at the end."""
    if history.open is not None:
        return history.open[0]
    if not _search_is_over(history, rules):
        if (anchor := _anchor_due(history, rules)) is not None:
            return _visit(history, rules, anchor, "anchor")
        if (trial := _new_trial(history, rules)) is not None:
            return _visit(history, rules, trial, "short")
    return _full_visit(history, rules) or _draft_visit(history, rules)


def _search_is_over(history: History, rules: Rules) -> bool:
    if any(visit.purpose == "full" for visit, _ in history.order):
        return True
    if hopeless(history) and not rules.walk:
        return True
    late = rules.seconds and history.seconds >= rules.seconds
    return len(history.trials) >= rules.trials or bool(late)


def hopeless(history: History) -> bool:
    """Whether nothing ever worked, and that is not for want of memory or length: a model that is
    not there, or a server that does not start on this machine, no setting mends."""
    failures = [trial.failure for trial in history.trials if trial.failure]
    last = failures[-_HOPELESS:]
    return (
        len(failures) == len(history.trials)
        and len(last) == _HOPELESS
        and all(one.risk in ("stability", "refused") for one in last)
    )


def _anchor_due(history: History, rules: Rules) -> Trial | None:
    """The anchor, if enough trials came since its last visit."""
    anchor = history.anchor
    if anchor is None or not rules.anchor_every:
        return None
    since = 0
    for visit, _ in reversed(history.order):
        if visit.trial == anchor.number:
            break
        since += 1
    return anchor if since >= rules.anchor_every else None


def _new_trial(history: History, rules: Rules) -> Trial | None:
    number = len(history.trials)
    found = propose(history, rules.seeds, rules.seed, rules.fixed, only_seeds=rules.walk)
    if found is None:
        return None
    devices = history.space.counted(found.settings)
    return Trial(number, found.settings, found.source, found.why, devices)


def _visit(
    history: History, rules: Rules, trial: Trial, purpose: Purpose, number: int = 0
) -> Visit:
    runs = _loads(history, rules, trial, purpose)
    at = history.visits
    # In a round all finalists get the same prompts; no two visits of one trial do.
    place = f"round {number}" if purpose == "full" else f"visit {at}"
    return Visit(
        number=at,
        trial=trial.number,
        settings=trial.settings,
        purpose=purpose,
        round=number,
        seeds=tuple(_seed(rules.seed, place, run) for run in range(runs)),
        accuracy=rules.accuracy and (purpose == "short" or number == 1),
        source=trial.source,
        why=trial.why,
    )


def _loads(history: History, rules: Rules, trial: Trial, purpose: Purpose) -> int:
    """Loads of a visit. Some settings die in their second one: what may be likelier to crash than
    all that lived so far gets a second one at once, before the search builds upon it."""
    if purpose == "full":
        return rules.full_runs
    daring = purpose == "short" and not history.proven(trial.settings)
    return min(2, rules.full_runs) if daring else 1


def _seed(*parts: object) -> int:
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(blake2b(text, digest_size=6).digest())


# --- finals ---------------------------------------------------------------------------------------


def _full_visit(history: History, rules: Rules) -> Visit | None:
    """The next visit of the finals: of the lowest round that somebody lacks."""
    entrants = finalists(history, rules)
    if not any(trial.number for trial in entrants):
        return None  # the defaults have nothing to be compared with
    for number in range(1, rules.rounds[1] + 1):
        if number > rules.rounds[0]:
            entrants = _undecided(history, entrants)
        if len(entrants) < 2 and number > rules.rounds[0]:
            return None
        lacking = [trial for trial in _turns(entrants, number) if number not in trial.rounds()]
        if lacking:
            return _visit(history, rules, lacking[0], "full", number)
    return None


def finalists(history: History, rules: Rules) -> list[Trial]:
    """The defaults, and the best others by their short runs that still work."""
    ranked = history.ranked()
    others = [trial for trial in ranked if trial.number != 0][: rules.finalists]
    base = [trial for trial in ranked if trial.number == 0]
    return [*base, *others]


def _turns(entrants: Sequence[_T], number: int) -> list[_T]:
    """The entrants in the order of a round: each round begins with another one."""
    shift = (number - 1) % max(1, len(entrants))
    return [*entrants[shift:], *entrants[:shift]]


def _undecided(history: History, entrants: Sequence[Trial]) -> list[Trial]:
    """The leader, and those that the runs have not shown to be worse."""
    order = [trial for trial in standing(history) if trial in entrants]
    if not order:
        return list(entrants)
    leader = order[0]
    return [leader, *(t for t in order[1:] if not versus(history, leader, t).better)]


# --- drafts by batch size -------------------------------------------------------------------------


def _draft_visit(history: History, rules: Rules) -> Visit | None:
    """The next visit for the schedule of drafts: of the lowest round that some number lacks."""
    found = verdict(history) if rules.draft_rounds else None
    if found is None:
        return None
    settings = to_measure(history, rules.fixed)
    done = {(key_of(visit.settings), visit.round) for visit, _ in history.draft_visits}
    for number in range(1, rules.draft_rounds + 1):
        for one in _turns(settings, number):
            if (key_of(one), number) not in done:
                return _drafts_of(history, rules, found.best, one, number)
    return None


def _drafts_of(history: History, rules: Rules, best: int, settings: Settings, number: int) -> Visit:
    sizes = batch_sizes(-(-rules.streams // engines_of(history.trials[best].settings)))
    return Visit(
        number=history.visits,
        trial=best,
        settings=settings,
        purpose="drafts",
        round=number,
        seeds=tuple(_seed(rules.seed, f"drafts {number}", size) for size in sizes),
        streams=sizes,
        accuracy=rules.accuracy and number == 1,
        why=f"drafts by batch size, {', '.join(map(str, sizes))} in flight",
    )
