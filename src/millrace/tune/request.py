"""From what a user asked for to a study: space, rules, and what is tuned.

The request is kept in the journal, so that `tune resume` needs the directory alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.load.options import BenchOptions
from millrace.bench.runs.options_from_flags import load_options, read_objectives
from millrace.common.http_client import Target, parse_base_url
from millrace.errors import ConfigError, UserError
from millrace.fleet.device_assignment import usable_cores, visible_gpus
from millrace.model_lookup import find_model, shipped_models
from millrace.tune.flag_checks import check_flags
from millrace.tune.model_facts import model_facts
from millrace.tune.options import TuneFlags
from millrace.tune.planner_seeds import price_of_gpu, seeds_of_planner
from millrace.tune.search.proposals import Seed
from millrace.tune.search.study import Rules, TuningTarget
from millrace.tune.servers.command_line import Served, engine_words
from millrace.tune.servers.load import LoadPlan
from millrace.tune.servers.local import LocalServers
from millrace.tune.servers.restarted import Restart, RestartedServer
from millrace.tune.servers.running import Visits
from millrace.tune.servers.targets import ServerTarget
from millrace.tune.space.knobs import Knob, Settings, Space, Value
from millrace.tune.space.space_file import (
    Circumstances,
    read_space,
    shipped_space,
    without_knobs,
)
from millrace.tune.trials.history import Goal
from millrace.tune.workload import longest_sequence
from millrace.tune.write_up import phase_seeds

_OF_PLACES = ("--download-dir", "--revision")  # where `millrace serve` looks for a model


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A model, arguments of every start, and flags; walk: the preset whose phases are walked."""

    model: str
    arguments: tuple[str, ...] = ()
    flags: TuneFlags
    walk: str = ""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A study that can begin."""

    request: Request
    served: Served
    space: Space
    rules: Rules
    load: LoadPlan

    def target(self, stop: asyncio.Event | None) -> TuningTarget:
        """What is tuned. stop: ends a visit."""
        flags = self.request.flags
        visits = Visits(
            space=self.space,
            plan=self.load,
            start_limit=flags.start_timeout,
            logs=Path(flags.dir) / "logs",
            stop=stop,
        )
        if flags.base_url is None:
            return ServerTarget(LocalServers(self.served, visits), visits)
        assert flags.restart_command is not None
        log = Path(flags.log_file) if flags.log_file else None
        restart = Restart(
            command=flags.restart_command, target=parse_base_url(flags.base_url), log=log
        )
        return ServerTarget(RestartedServer(restart, visits), visits)


def prepare(request: Request) -> Prepared:
    """Check a request. Raises UserError for the first thing that cannot work."""
    flags = request.flags
    check_flags(flags)
    load = _load_plan(flags)
    where = circumstances(request.model, flags, load.full)
    path = Path(flags.space) if flags.space else shipped_space(flags.engine)
    space, arguments = read_space(path, where)
    space = _narrowed(space, flags)
    served = Served(
        engine=flags.engine,
        model=_model(request),
        arguments=request.arguments,
        of_trials=tuple(arguments.split()),
        program=flags.engine_command or "",
    )
    if flags.base_url is None:
        engine_words(served, space, space.defaults)
    rules = _rules(request, space, load)
    return Prepared(request=request, served=served, space=space, rules=rules, load=load)


def _model(request: Request) -> str:
    """The model as its server knows it. Other engines know no model that ships by its name.

    Raises UserError where our own server would find none.
    """
    flags = request.flags
    if flags.base_url is not None:
        return request.model
    if flags.engine != "millrace":
        shipped = {} if Path(request.model).exists() else shipped_models()
        return str(shipped.get(request.model, request.model))
    elsewhere = [word for word in request.arguments if word.startswith(_OF_PLACES)]
    if not elsewhere and flags.engine_command is None:
        find_model(request.model)
    return request.model


def circumstances(model: str, flags: TuneFlags, load: BenchOptions) -> Circumstances:
    """What is there, and what the workload needs."""
    gpus = len(visible_gpus())
    if flags.base_url is not None:
        gpus = flags.gpus or max(gpus, 1)
    if flags.gpus is not None and flags.base_url is None and flags.gpus > max(gpus, 1):
        raise ConfigError(f"--gpus {flags.gpus}: {gpus} are visible; use at most {max(gpus, 1)}")
    facts = model_facts(flags.plan_model or model)
    return Circumstances(
        devices=flags.gpus or gpus or usable_cores(),
        gpus=gpus > 0,
        sequence=longest_sequence(load),
        concurrency=load.max_concurrency or 0,
        positions=facts.positions,
        experts=facts.experts,
    )


def _load_plan(flags: TuneFlags) -> LoadPlan:
    full = load_options(flags, Target("127.0.0.1", 0))
    full = msgspec.structs.replace(
        full, model=flags.served_model_name, objectives=read_objectives(flags.goodput)
    )
    return LoadPlan(
        full=full,
        short_share=flags.short_share,
        hang_seconds=flags.hang_timeout,
        max_itl_p99=flags.max_itl_p99_ms,
        task=flags.accuracy,
        items=flags.accuracy_items,
        timed=_timed(flags),
    )


def _timed(flags: TuneFlags) -> tuple[str, ...]:
    """The latencies that decide: those of a request's chunks, by which goodput is counted."""
    if flags.objective != "goodput":
        return ()
    limits = read_objectives(flags.goodput)
    first = ("ttft",) if limits.keys() & {"ttft", "e2el"} else ()
    return (*first, "itl") if flags.max_itl_p99_ms else first


def _rules(request: Request, space: Space, load: LoadPlan) -> Rules:
    flags = request.flags
    goal = Goal(
        objective=flags.objective,
        dollars=flags.price if flags.price is not None else price_of_gpu(flags.plan_gpu),
        max_failed=flags.max_failed,
        accuracy_drop=flags.max_accuracy_drop,
        min_accuracy=flags.min_accuracy,
        spread_penalty=flags.spread_penalty,
    )
    given = [
        Seed(settings=read_settings(space, text), source="given", why="--try-first")
        for text in flags.try_first
    ]
    if request.walk:
        seeds = phase_seeds(space)
    else:
        seeds = [*given, *seeds_of_planner(request.model, flags, space, load.full)]
    return Rules(
        goal=goal,
        seeds=tuple(seeds),
        trials=len(seeds) + 1 if request.walk else flags.trials,
        seconds=60.0 * flags.minutes,
        anchor_every=flags.anchor_every,
        finalists=flags.finalists,
        rounds=(flags.least_rounds, flags.most_rounds),
        full_runs=flags.full_runs,
        draft_rounds=0 if request.walk else flags.draft_rounds,
        streams=load.full.max_concurrency or Rules().streams,
        accuracy=flags.accuracy_items > 0,
        fixed=read_settings(space, ",".join(flags.set)),
        seed=flags.seed,
        walk=bool(request.walk),
    )


def _narrowed(space: Space, flags: TuneFlags) -> Space:
    """The space without knobs that are not to be tuned."""
    fixed = read_settings(space, ",".join(flags.set))
    unknown = [name for name in flags.only if name not in space]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: no such knob; use {_names(space)}")
    left_out = {
        knob.name: knob.default
        for knob in space.knobs
        if flags.only and knob.name not in flags.only and knob.name not in fixed
    }
    narrowed = without_knobs(space, left_out)
    if not narrowed.knobs:
        raise ConfigError("the search space has no knob that can be tuned here; see --space")
    return narrowed


def read_settings(space: Space, text: str) -> Settings:
    """NAME=VALUE pairs, comma-separated. Raises ConfigError for what the space does not have."""
    found: Settings = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.partition("=")
        if not equals or name.strip() not in space:
            raise ConfigError(f"{pair!r}: use NAME=VALUE, names being {_names(space)}")
        knob = space[name.strip()]
        if knob.name in found:
            raise ConfigError(f"{pair!r}: {knob.name} is given twice; use one value")
        found[knob.name] = _value_of(knob, value.strip())
    return found


def _value_of(knob: Knob, text: str) -> Value:
    for value in knob.values:
        if str(value).lower() == text.lower():
            return value
    listed = ", ".join(str(value) for value in knob.values)
    raise ConfigError(f"{knob.name}={text}: use one of {listed}")


def _names(space: Space) -> str:
    return ", ".join(knob.name for knob in space.knobs)


def fields_of(request: Request) -> dict[str, Any]:
    """A request for a journal: of its flags those that are not at their defaults, since JSON has no
    number for some of these."""
    fields: dict[str, Any] = msgspec.to_builtins(request)
    plain = msgspec.to_builtins(TuneFlags())
    fields["flags"] = {k: v for k, v in fields["flags"].items() if v != plain[k]}
    return fields


def request_from(content: dict[str, Any]) -> Request:
    """The request of a journal. Raises ConfigError if this version cannot read it."""
    try:
        return msgspec.convert(content, Request)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the study was begun by another version of millrace ({error})") from None


def of_command_line(model: str, arguments: Sequence[str], flags: TuneFlags) -> Request:
    """A request, with paths that hold wherever it is resumed."""
    directory = str(Path(flags.dir).resolve())
    space = str(Path(flags.space).resolve()) if flags.space else None
    if space is not None and not Path(space).is_file():
        raise UserError(f"--space {flags.space}: no such file")
    flags = msgspec.structs.replace(flags, dir=directory, space=space)
    return Request(model=model, arguments=tuple(arguments), flags=flags)
