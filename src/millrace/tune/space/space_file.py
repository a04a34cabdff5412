"""Reading search spaces: those that ship, one for each engine, and files of the user.

A space is then fitted to what is there: the devices, the longest sequence of the workload, and how
many requests are in flight.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from millrace.common.yaml_file import read_mapping
from millrace.errors import ConfigError
from millrace.tune.space.knobs import (
    FLEET_KNOBS,
    Bottleneck,
    Direction,
    Knob,
    Risk,
    Space,
    Value,
)

_MOST_VALUES = 64
_LENGTH_STEP = 64  # tokens to which the longest sequence is rounded up
_TEMPLATE = 64  # tokens that a chat template may add to it
_FITTING = ("range", "gpu", "cpu", "experts")  # said in files alone
EXAMPLE = "knobs: {max_num_seqs: {flag: --max-num-seqs, values: [32, 64, 128]}}"


class _Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From low to high, by a step or by a factor."""

    low: float
    high: float
    step: float = 0.0
    factor: float = 0.0


class _KnobFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A knob as it stands in a file: the fields of Knob, values also as a range. gpu: only where
    there are GPUs; cpu: fields that are otherwise where there are none. experts: only for a mixture
    of experts."""

    values: list[Value] = []
    range: _Range | None = None
    default: Value = None
    like: Value = None
    ordered: bool = True
    flag: str = ""
    key: str = ""
    omit: Value = None
    by_batch: str = ""
    words: list[str] = []
    always: bool = False
    riskier: dict[Risk, Direction] = {}
    neutral: list[Risk] = []
    helps: dict[Bottleneck, Direction] = {}
    when: dict[str, list[Value]] = {}
    devices: bool = False
    ranks: bool = False
    covers: list[str] = []
    seen: Literal["", "sequence"] = ""
    about: str = ""
    gpu: bool = False
    cpu: dict[str, Any] = {}
    experts: bool = False


class _SpaceFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file. arguments: further ones, of starts for trials alone."""

    engine: str = ""
    arguments: str = ""
    knobs: dict[str, _KnobFile]


class Circumstances(msgspec.Struct, frozen=True, kw_only=True):
    """What a space is fitted to. devices: GPUs, or cores of a host without. sequence: tokens of the
    longest prompt and answer together. concurrency: requests in flight; positions: of the model,
    the longest sequence that it knows; 0: not known. experts: the model is a mixture of them."""

    devices: int = 1
    gpus: bool = False
    sequence: int = 0
    concurrency: int = 0
    positions: int = 0
    experts: bool = False


def shipped_space(engine: str) -> Path:
    """The file of an engine's space. Raises ConfigError for an unknown engine."""
    folder = resources.files("millrace.tune").joinpath("spaces")
    path = Path(str(folder.joinpath(f"{engine}.yaml")))
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(str(folder)).glob("*.yaml")))
        raise ConfigError(f"--engine {engine}: no search space ships; use {known}, or --space")
    return path


def read_space(path: Path, where: Circumstances) -> tuple[Space, str]:
    """A space fitted to what is there, and the arguments of every start for a trial.

    Raises ConfigError that names the knob that is wrong.
    """
    content = read_mapping(path, str(path), EXAMPLE)
    try:
        file = msgspec.convert(content, _SpaceFile)
        given = {
            name: one if where.gpus else _on_a_cpu(one)
            for name, one in file.knobs.items()
            if (where.gpus or not one.gpu) and (where.experts or not one.experts)
        }
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {error}") from None
    knobs = [_fitted(_knob(path, name, one), where) for name, one in given.items()]
    space = Space(
        engine=file.engine, knobs=tuple(knobs), devices=where.devices, cores=not where.gpus
    )
    left_out = {name: one.default for name, one in file.knobs.items() if name not in given}
    _check(path, space, left_out)
    return without_knobs(space, left_out), file.arguments


def _on_a_cpu(knob: _KnobFile) -> _KnobFile:
    """A knob with what is otherwise on a host without GPUs."""
    fields = {**msgspec.structs.asdict(knob), **knob.cpu, "cpu": {}}
    return msgspec.convert(msgspec.to_builtins(fields), _KnobFile)


def without_knobs(space: Space, left_out: Mapping[str, Value]) -> Space:
    """A space without some knobs, and without those that do nothing at their defaults.

    left_out: names and defaults."""
    knobs = [
        msgspec.structs.replace(
            knob,
            when={name: values for name, values in knob.when.items() if name not in left_out},
            covers=tuple(name for name in knob.covers if name not in left_out),
        )
        for knob in space.knobs
        if knob.name not in left_out
        and all(left_out.get(name, values[0]) in values for name, values in knob.when.items())
    ]
    return msgspec.structs.replace(space, knobs=tuple(knobs))


def _knob(path: Path, name: str, given: _KnobFile) -> Knob:
    values = list(given.values) or (_spread(path, name, given.range) if given.range else [])
    if not 1 <= len(values) <= _MOST_VALUES:
        raise ConfigError(f"{path}: {name}: give values or a range, 1 to {_MOST_VALUES} of them")
    if len(set(map(repr, values))) < len(values):
        raise ConfigError(f"{path}: {name}: a value stands twice in {values}")
    if given.words and len(given.words) != len(values):
        raise ConfigError(f"{path}: {name}: give as many words as values ({len(values)})")
    for field in ("default", "like"):
        value = getattr(given, field)
        if value is not None and value not in values:
            raise ConfigError(f"{path}: {name}: {field} {value} is none of {values}")
    _check_words(path, name, given)
    if given.devices and not all(type(one) is int and one > 0 for one in values):
        raise ConfigError(f"{path}: {name}: devices are counted: use whole numbers, not {values}")
    fields = {k: v for k, v in msgspec.structs.asdict(given).items() if k not in _FITTING}
    like = given.like if given.like is not None else values[len(values) // 2]
    found: Any = {**fields, "name": name, "values": values, "like": like}
    return msgspec.convert(found, Knob)


def _check_words(path: Path, name: str, given: _KnobFile) -> None:
    """What is to stand in a command line must be words of one."""
    if not given.flag and not given.words and name not in FLEET_KNOBS:
        raise ConfigError(f"{path}: {name}: give its flag, or words for each value")
    if given.flag and not given.flag.startswith("--"):
        raise ConfigError(f"{path}: {name}: flag {given.flag!r}: a flag begins with --")
    for words in given.words:
        try:
            shlex.split(words)
        except ValueError as error:
            raise ConfigError(f"{path}: {name}: words {words!r}: {error}") from None


def _spread(path: Path, name: str, given: _Range) -> list[Value]:
    """The values of a range; whole numbers where all of it is whole."""
    if given.high < given.low or (given.step > 0) == (given.factor > 1):
        raise ConfigError(
            f"{path}: {name}: a range has low, high, and a step above 0 or a factor above 1"
        )
    found: list[float] = []
    value = given.low
    while value <= given.high * (1 + 1e-9) and len(found) <= _MOST_VALUES:
        found.append(round(value, 9))
        value = value * given.factor if given.factor else value + given.step
    whole = all(one == int(one) for one in found)
    return [int(one) if whole else one for one in found]


def _fitted(knob: Knob, where: Circumstances) -> Knob:
    """A knob without the values that make no sense here."""
    values = list(knob.values)
    if knob.devices:
        values = [one for one in values if int(one or 1) <= where.devices]
    if knob.seen == "sequence" and where.sequence:
        least = -(-(where.sequence + _TEMPLATE) // _LENGTH_STEP) * _LENGTH_STEP
        least = min(least, where.positions or least)
        most = where.positions or max(least, *(int(one or 0) for one in values))
        longer: list[Value] = [one for one in values if least < int(one or 0) <= most]
        values = [least, *longer]
    if knob.name == "max_num_seqs" and where.concurrency:
        most = 2 * where.concurrency  # what is above has the same effect
        enough: list[Value] = [one for one in values if isinstance(one, int) and one < most]
        values = enough or values[:1]
    if knob.default is not None and knob.default not in values:
        values = [one for one in knob.values if one in values or one == knob.default]
    like = knob.like if knob.like in values else values[-1]
    return msgspec.structs.replace(knob, values=tuple(values), like=like)


def _check(path: Path, space: Space, left_out: Mapping[str, Value]) -> None:
    for knob in space.knobs:
        for other in [*knob.when, *knob.covers]:
            if other == knob.name:
                raise ConfigError(f"{path}: {knob.name}: it names itself in `when` or `covers`")
            if other not in space and other not in left_out:
                raise ConfigError(f"{path}: {knob.name}: there is no knob {other!r}")
