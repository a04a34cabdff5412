"""The command lines of a setting: of one server, or of replicas behind a gateway.

What starts an engine is made by the fleet's drivers; the flags come from the search space.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec

from millrace.common.child_process import python_module
from millrace.errors import ConfigError
from millrace.fleet.drivers import Engine, engine_command
from millrace.tune.space.knobs import FLEET_KNOBS, Knob, Settings, Space, Value, replicas_of


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What is served. arguments: of every start, in the server's own syntax. of_trials: those that
    only trials need. program: what to run instead of the engine on PATH."""

    engine: str
    model: str
    arguments: tuple[str, ...] = ()
    of_trials: tuple[str, ...] = ()
    program: str = ""


def flags_of(
    space: Space,
    settings: Mapping[str, Value],
    drafts: Sequence[tuple[int, int, int]] = (),
) -> list[str]:
    """The flags of a setting; those at the server's own default are not given. drafts: a schedule
    by batch size, which goes into the object of the knob that has one."""
    words: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    for knob in space.knobs:
        value = settings[knob.name]
        if knob.name in FLEET_KNOBS or not space.active(knob, settings):
            continue
        if knob.key:
            if _is_given(knob, value):
                objects.setdefault(knob.flag, {})[knob.key] = value
                if knob.by_batch and drafts:
                    objects[knob.flag][knob.by_batch] = [list(one) for one in drafts]
        elif value is not None and (knob.always or value != knob.default):
            words += _words(knob, value)
    for flag, content in objects.items():
        words += [flag, json.dumps(content)]
    return words


def _is_given(knob: Knob, value: Value) -> bool:
    """Entries of one object go together, also those at their defaults."""
    return value is not None and (knob.omit is None or value != knob.omit)


def _words(knob: Knob, value: Value) -> list[str]:
    if knob.words:
        return shlex.split(knob.words[knob.values.index(value)])
    if isinstance(value, bool):
        return [knob.flag if value else f"--no-{knob.flag.removeprefix('--')}"]
    return [] if knob.omit is not None and value == knob.omit else [knob.flag, str(value)]


def engine_words(served: Served, space: Space, settings: Mapping[str, Value]) -> list[str]:
    """The command of one replica, without host and port.

    Raises ConfigError if the engine is not installed.
    """
    flags = [*flags_of(space, settings), *served.arguments, *served.of_trials]
    if served.engine == "millrace":
        start = shlex.split(served.program) or python_module("millrace.cli")
        return [*start, "serve", served.model, *flags]
    if served.engine not in get_args(Engine):
        if not served.program:
            raise ConfigError(f"--engine {served.engine}: name its program with --engine-command")
        return [*shlex.split(served.program), *flags]
    engine: Engine = "vllm" if served.engine == "vllm" else "sglang"
    own = shlex.join(flags)
    return engine_command(engine, served.model, {}, own=own, program=served.program)


def fleet_content(
    command: Sequence[str], space: Space, settings: Mapping[str, Value], port: int
) -> dict[str, Any]:
    """What `millrace fleet up` needs for replicas of a command behind a gateway."""
    taken = space.devices_of(settings) // max(1, replicas_of(settings))
    content: dict[str, Any] = {
        "command": list(command),
        "replicas": replicas_of(settings),
        "gpus_per_replica": taken,
        "port": port,
    }
    if settings.get("policy") is not None:
        content["policy"] = settings["policy"]
    return content


def shown_command(
    served: Served,
    space: Space,
    settings: Settings,
    drafts: Sequence[tuple[int, int, int]] = (),
) -> str:
    """A command line that a user types."""
    flags = [*flags_of(space, settings, drafts), *served.arguments]
    if served.engine == "millrace":
        replicas = replicas_of(settings)
        own = ["--replicas", str(replicas)] if replicas > 1 else []
        if replicas > 1 and settings.get("policy") is not None:
            own += ["--policy", str(settings["policy"])]
        return shlex.join(["millrace", "serve", served.model, *own, *flags])
    start = {
        "vllm": ["vllm", "serve", served.model],
        "sglang": ["python", "-m", "sglang.launch_server", "--model-path", served.model],
    }
    return shlex.join([*start.get(served.engine, shlex.split(served.program)), *flags])
