"""What a study found, as data: for JSON, the terminal and the report."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from millrace.tune.search.comparison import Verdict, full_score, standing, verdict, versus
from millrace.tune.search.draft_schedule import DraftSchedule, draft_schedule
from millrace.tune.search.proposals import importances
from millrace.tune.servers.command_line import Served, flags_of, shown_command
from millrace.tune.space.knobs import Settings, Space, changed, label
from millrace.tune.trials.failures import Failure
from millrace.tune.trials.history import History, Trial


class TrialRow(msgspec.Struct, frozen=True, kw_only=True):
    """One trial. value: the objective in its runs, the median; relative: to the anchor at that
    time, by short runs, and by full rounds less the spread; against: the defaults in full rounds,
    in words."""

    number: int
    label: str
    settings: Settings
    source: str
    why: str
    value: float
    short: float
    full: float
    against: str
    runs: int
    total: float
    tpot_ms: float
    ttft_p99_ms: float
    itl_p99_ms: float
    accuracy: str
    bottleneck: str
    devices: int
    failure: Failure | None


class DraftsByBatch(msgspec.Struct, frozen=True, kw_only=True):
    """The drafts that are best by batch size: as measured, and as a server takes them."""

    schedule: DraftSchedule
    command: str
    options: dict[str, Any]


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """Everything: trials in order, who won and why, the command line and options of the best, how
    much each knob matters, which failures ruled out what, the drafts that are best by batch size;
    None where those were not measured, or none are best."""

    objective: str
    model: str
    engine: str
    verdict: Verdict | None
    command: str
    options: dict[str, Any]
    trials: list[TrialRow]
    importances: dict[str, float]
    no_go: list[str]
    seconds: float
    drafts: DraftsByBatch | None = None
    finished: bool = False


def results_of(history: History, space: Space, served: Served, *, finished: bool) -> Results:
    """The results of a study, whole or so far."""
    found = verdict(history)
    best = history.trials[found.best].settings if found else space.defaults
    return Results(
        objective=history.goal.objective,
        model=served.model,
        engine=served.engine,
        verdict=found,
        command=shown_command(served, space, best),
        options=options_of(space, best),
        trials=[_row(history, space, trial) for trial in history.trials],
        importances=importances(history),
        no_go=[
            f"{label(space, known.settings)}, and all that is riskier (trial {known.trial}: "
            f"{known.reason})"
            for known in history.no_go
        ],
        seconds=history.seconds,
        drafts=_drafts(history, space, served),
        finished=finished,
    )


def _drafts(history: History, space: Space, served: Served) -> DraftsByBatch | None:
    found = draft_schedule(history)
    if found is None:
        return None
    return DraftsByBatch(
        schedule=found,
        command=shown_command(served, space, found.settings, found.ranges),
        options=options_of(space, found.settings, found.ranges),
    )


def options_of(
    space: Space, settings: Settings, drafts: Sequence[tuple[int, int, int]] = ()
) -> dict[str, Any]:
    """The flags of a setting as the entries of a file for --config. drafts: by batch size."""
    words = flags_of(space, settings, drafts)
    found: dict[str, Any] = {}
    for at, word in enumerate(words):
        if not word.startswith("--"):
            continue
        value = words[at + 1] if at + 1 < len(words) else "--"
        if value.startswith("--"):
            negated = word.startswith("--no-")
            found[word.removeprefix("--no-" if negated else "--")] = not negated
        else:
            found[word.removeprefix("--")] = _typed(value)
    return found


def _typed(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def _row(history: History, space: Space, trial: Trial) -> TrialRow:
    runs = trial.runs
    values = [value for _, outcome in trial.done for value in history.values(trial, outcome)]
    base = history.trials[0]
    against = ""
    if trial.rounds() and trial.number and base.rounds():
        against = str(versus(history, trial, base))
    accuracy = trial.accuracy
    why = [run.why for run in runs if run.why]
    return TrialRow(
        number=trial.number,
        label=label(space, trial.settings),
        settings=changed(space, trial.settings),
        source=trial.source,
        why=trial.why,
        value=_median(values),
        short=history.short_value(trial),
        full=full_score(history, trial) if trial in standing(history) else 0.0,
        against=against,
        runs=len(runs),
        total=_median([run.total for run in runs]),
        tpot_ms=_median([run.tpot_p50 for run in runs]),
        ttft_p99_ms=_median([run.ttft_p99 for run in runs]),
        itl_p99_ms=_median([run.itl_p99 for run in runs]),
        accuracy="not measured" if accuracy is None else f"{accuracy[0]:.1%} of {accuracy[1]}",
        bottleneck=why[-1] if why else "",
        devices=trial.devices,
        failure=trial.failure,
    )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0
