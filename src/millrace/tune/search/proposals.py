"""What to try next: the planner's seeds, then optuna's proposals by turns with moves of the leader.

Optuna gets every trial anew for each proposal, failed ones as violated constraints, and a seed that
follows from the number of trials. So a study that is resumed asks for what it would have asked for
anyway, and the journal is the one place where trials are kept.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice, product
from typing import Any

import msgspec

from millrace.common.optional import require
from millrace.tune.search.risk import RiskMap
from millrace.tune.search.surrogate import Surrogate
from millrace.tune.space.knobs import Settings, Space, key_of
from millrace.tune.trials.failures import TITLES
from millrace.tune.trials.history import History, Trial

_ASKS = 48  # proposals of optuna that are looked at; most are tried already or ruled out
_STARTUP = 6  # trials that optuna's model needs
_FIRST = 3  # trials that work, before a model is made of them
_WORTH_A_TRIAL = 0.5  # of the greatest hope
_DARING = 0.5  # the risk that is taken to learn what a knob does
_CALM = 0.5  # the risk at which a way to share out the devices is tried again
_ATTEMPTS = 2  # more at such a way, after its first
_SHARES = (0.0, 0.35, 0.5, 0.7, 1.0)  # of the way to the least risk
_OF_MEMORY = ("memory", "room")
_HELPFUL = 0.3  # risk that is taken for a move that relieves what limits a trial
_SCREENED = 12  # trials among which every knob is to be moved alone
_STARTS = 4  # of optuna's proposals, those from which the surrogate is climbed
_LONGEST_CLIMB = 24


class Seed(msgspec.Struct, frozen=True, kw_only=True):
    """Settings to try first. source: who proposes them."""

    settings: Settings
    source: str = "given"
    why: str = ""


class Proposal(msgspec.Struct, frozen=True):
    """Settings to try, who proposes them, and why, in words."""

    settings: Settings
    source: str
    why: str


def propose(
    history: History,
    seeds: Sequence[Seed],
    rng_seed: int,
    fixed: Settings,
    *,
    only_seeds: bool = False,
) -> Proposal | None:
    """The next setting; None where nothing is left that was not tried or ruled out.

    fixed: knobs that keep their values.
    """
    number = len(history.trials)
    space = history.space
    sources: list[Iterable[Proposal]] = [_seeds(space, seeds)]
    if not only_seeds:
        sources += _by_turns(history, number, rng_seed, fixed)
        sources.append(_anything(space, fixed, rng_seed + number))
    for source in sources:
        for found in source:
            settings = space.normal({**found.settings, **fixed})
            if _is_new(history, settings):
                return Proposal(settings, found.source, found.why)
    return None


def _is_new(history: History, settings: Settings) -> bool:
    return (
        key_of(settings) not in history.tried
        and not history.space.problem(settings)
        and history.no_go.blocks(settings) is None
    )


def _seeds(space: Space, seeds: Iterable[Seed]) -> Iterator[Proposal]:
    yield Proposal(space.defaults, "defaults", "what the server does by itself")
    for seed in seeds:
        yield Proposal(space.normal(seed.settings), seed.source, seed.why)
    yield from _arrangements(space)


def _arrangements(space: Space) -> Iterator[Proposal]:
    """The defaults on all devices, in every way to share these out among ranks and replicas."""
    taking = [knob for knob in space.knobs if knob.devices]
    if space.devices < 2 or len(taking) < 2:
        return
    for values in product(*(knob.values for knob in taking)):
        settings = space.normal(dict(zip((knob.name for knob in taking), values, strict=True)))
        if space.devices_of(settings) == space.devices:
            yield Proposal(settings, "arrangement", f"all {space.devices} devices")


def _by_turns(
    history: History, number: int, rng_seed: int, fixed: Settings
) -> list[Iterable[Proposal]]:
    model = _from_optuna(history, number, rng_seed)
    if not history.ranked():
        return [_retreats(history), model]
    if len(history.ranked()) < _FIRST:
        return [_reliefs(history, []), _unmoved(history), model]
    hopes = _hopes(history, fixed, [*islice(_from_optuna(history, number, rng_seed), _STARTS)])
    climbs = _climbs(hopes)
    if number % 3 == 0:
        return [_reliefs(history, hopes if number >= _SCREENED else []), climbs, model]
    if number % 3 == 1 or number < _SCREENED:
        return [_unmoved(history), _unproven(history), climbs, model]
    return [model, climbs] if number % 12 == 5 else [climbs, model]


# --- moves ----------------------------------------------------------------------------------------


def _reliefs(history: History, hopes: Sequence[tuple[float, Settings]]) -> Iterator[Proposal]:
    """Moves against what limits the leader, in the order of the space's knobs, where they are not
    daring. hopes: what the surrogate hopes of them, once it knows the knobs; it must be much."""
    leader = history.ranked()[0]
    walls = RiskMap(history.space, history.trials)
    least = _WORTH_A_TRIAL * hopes[0][0] if hopes else 0.0
    hoped = {key_of(settings) for value, settings in hopes if value >= least}
    why = next((run.why for run in reversed(leader.runs) if run.bottleneck), "")
    for settings in _relieving(history.space, leader):
        daring = float(walls.risks([settings])[0]) > _DARING
        if not daring and (not hopes or key_of(settings) in hoped):
            yield Proposal(settings, "bottleneck", f"trial {leader.number}: {why}")


def _retreats(history: History) -> Iterator[Proposal]:
    """Nothing works so far: the last trial's knobs moved half of the way to where its failure is
    least likely, and if that is not enough all of the way."""
    space, last = history.space, history.trials[-1]
    if last.failure is None:
        return
    for share in (1.0,) if last.source == "retreat" else (0.5, 1.0):
        yield Proposal(
            space.safer(last.settings, last.failure.risk, share),
            "retreat",
            f"trial {last.number}: {TITLES[last.failure.kind]}; away from that",
        )


def _unmoved(history: History) -> Iterator[Proposal]:
    """A good trial with one knob moved that was never moved alone between two that worked; the
    leader where that is safe, else one from which the step is safer."""
    space, ranked = history.space, history.ranked()
    known = _moved_alone(space, ranked)
    if space.devices > 1:  # the ways to share them out were tried
        known |= {knob.name for knob in space.knobs if knob.devices}
    walls = RiskMap(space, history.trials)
    found: list[tuple[float, int, str, Settings]] = []
    for place, trial in enumerate(ranked):
        reliefs = {key_of(one) for one in _relieving(space, trial)}
        for settings in space.neighbours(trial.settings):
            moved = space.differing(settings, trial.settings)
            if len(moved) == 1 and moved[0] not in known:
                risk = round(float(walls.risks([settings])[0]), 1)
                if risk <= _DARING:
                    liked = _HELPFUL if key_of(settings) in reliefs else 0.0
                    found.append((risk - liked, place, moved[0], settings))
    for _, place, name, settings in sorted(found, key=lambda one: one[:2]):
        why = f"trial {ranked[place].number} with {name} moved, which was not moved alone yet"
        yield Proposal(settings, "unmoved", why)


def _relieving(space: Space, trial: Trial) -> Iterator[Settings]:
    """Moves against what limited a trial, in the order of the space's knobs."""
    for run in reversed(trial.runs):
        if run.bottleneck is not None:
            yield from space.moves(trial.settings, run.bottleneck)
            return


def _unproven(history: History) -> Iterator[Proposal]:
    """Ways to share out the devices that only ran out of memory so far, with the leader's other
    knobs, as much safer as it takes: what such a way is worth nothing else tells."""
    space, leader = history.space, history.ranked()[0]
    shared = {knob.name for knob in space.knobs if knob.devices}
    walls = RiskMap(space, history.trials)
    proven = [_only(shared, trial.settings) for trial in history.ranked()]
    failed: dict[str, list[Trial]] = {}
    for trial in history.trials:
        way = _only(shared, trial.settings)
        most = space.devices_of(trial.settings) >= space.devices_of(leader.settings)
        if trial.failure and trial.failure.risk in _OF_MEMORY and way not in proven and most:
            failed.setdefault(key_of(way), []).append(trial)
    for trials in failed.values():
        if len(trials) > _ATTEMPTS:
            continue
        last = trials[-1]
        assert last.failure is not None
        begin = {**leader.settings, **_only(shared, last.settings)}
        steps = [space.safer(begin, last.failure.risk, share, share_out=False) for share in _SHARES]
        calm = [one for one, risk in zip(steps, walls.risks(steps), strict=True) if risk <= _CALM]
        why = f"trial {last.number} ran out of memory; the same devices with less risk"
        yield Proposal(calm[0] if calm else steps[-1], "arrangement", why)


def _only(names: Iterable[str], settings: Settings) -> Settings:
    return {name: settings[name] for name in names}


def _moved_alone(space: Space, trials: Sequence[Trial]) -> set[str]:
    """Knobs in which alone two trials differ."""
    pairs = (space.differing(a.settings, b.settings) for a, b in combinations(trials, 2))
    return {names[0] for names in pairs if len(names) == 1}


def _hopes(
    history: History, fixed: Settings, starts: Sequence[Proposal]
) -> list[tuple[float, Settings]]:
    """What the surrogate hopes for, the most first, on the way up from the leaders and from
    `starts`."""
    space, ranked = history.space, history.ranked()
    guess = Surrogate(
        space,
        [t.settings for t in ranked],
        [history.short_value(t) for t in ranked],
        history.noise,
    )
    walls = RiskMap(space, history.trials)
    least = _fewest_devices(history)
    seen: dict[str, tuple[float, Settings]] = {}

    def hope(found: Sequence[Settings]) -> list[float]:
        if not found:
            return []
        return [float(v) for v in guess.improvements(found) * (1.0 - walls.risks(found))]

    for begin in [*(trial.settings for trial in ranked[:3]), *(s.settings for s in starts)]:
        here, worth = begin, hope([begin])[0]
        for _ in range(_LONGEST_CLIMB):
            beside = [
                settings
                for one in space.neighbours(here)
                if not space.problem(settings := space.normal({**one, **fixed}))
                and history.no_go.blocks(settings) is None
                and space.devices_of(settings) >= least
            ]
            values = hope(beside)
            seen |= {key_of(s): (v, s) for s, v in zip(beside, values, strict=True)}
            if not values or max(values) <= worth:
                break
            worth, here = max(zip(values, beside, strict=True), key=lambda pair: pair[0])
    return sorted(seen.values(), key=lambda pair: -pair[0])


def _climbs(hopes: Sequence[tuple[float, Settings]]) -> Iterator[Proposal]:
    for value, settings in hopes:
        yield Proposal(settings, "model", f"the model expects {math.expm1(value):+.2%} on the mean")


def _fewest_devices(history: History) -> int:
    """Those of the leader, where idle devices earn nothing."""
    if history.goal.objective not in ("throughput", "goodput"):
        return 0
    return history.space.devices_of(history.ranked()[0].settings)


def _anything(space: Space, fixed: Settings, rng_seed: int) -> Iterator[Proposal]:
    rng = random.Random(rng_seed)
    for _ in range(20 * _ASKS):
        chosen = {knob.name: rng.choice(knob.values) for knob in space.knobs}
        yield Proposal(space.normal({**chosen, **fixed}), "random", "nothing better is left")


# --- optuna ---------------------------------------------------------------------------------------


def _from_optuna(history: History, number: int, rng_seed: int) -> Iterator[Proposal]:
    """Proposals of a tree-structured Parzen estimator that knows all trials."""
    optuna: Any = require("optuna", "millrace tune")
    study = _study(optuna, history, seed=(rng_seed * 1_000_003 + number) % 2**32)
    kinds = _distributions(optuna, history.space)
    for _ in range(_ASKS):
        trial = study.ask(kinds)
        chosen = {k.name: k.values[trial.params[k.name]] for k in history.space.knobs}
        study.tell(trial, state=optuna.trial.TrialState.FAIL)  # or it would be proposed again
        yield Proposal(history.space.normal(chosen), "optuna", "by the model of all trials")


def _distributions(optuna: Any, space: Space) -> dict[str, Any]:
    """A knob as the places of its values: whole numbers where they have an order."""
    kinds = optuna.distributions
    return {
        knob.name: (
            kinds.IntDistribution(0, len(knob.values) - 1)
            if knob.ordered
            else kinds.CategoricalDistribution(tuple(range(len(knob.values))))
        )
        for knob in space.knobs
    }


def _study(optuna: Any, history: History, seed: int) -> Any:
    """An optuna study in memory that holds every trial of the history."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=_STARTUP
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    kinds = _distributions(optuna, history.space)
    for trial in history.trials:
        if trial.failure is None and not trial.feasible:
            continue  # its first visit has not ended
        places = {k.name: k.index(trial.settings[k.name]) for k in history.space.knobs}
        study.add_trial(
            optuna.trial.create_trial(
                params=places,
                distributions=kinds,
                value=history.short_value(trial) if trial.feasible else 0.0,
                constraints={"failed": 0.0 if trial.feasible else 1.0},
            )
        )
    return study


def importances(history: History) -> dict[str, float]:
    """How much each knob moved the objective, as shares by PED-ANOVA; empty for too few trials."""
    optuna: Any = require("optuna", "millrace tune")
    fine = [trial for trial in history.trials if trial.feasible]
    if len(fine) < 2 * _STARTUP:
        return {}
    study = _study(optuna, history, seed=0)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):  # all values are equal
        return {}
    return {name: float(share) for name, share in found.items()}
