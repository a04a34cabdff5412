"""Knobs: what the tuner may choose of a server, each with a finite list of values in order.

A setting is a value for every knob. None stands for the server's own default, where that is not one
of the values. What a value does is not known here, and what happened to it neither.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Literal

import msgspec

Value = bool | int | float | str | None
Settings = dict[str, Value]
Direction = Literal["up", "down"]  # along the list of values
# What a failure says about other settings: it ran out of memory; it left no room for a KV cache; it
# crashed or hung; its answers got worse; the server refused its command line, or a prompt's length.
Risk = Literal["memory", "room", "stability", "quality", "refused", "length"]
# What limits a server, read from its metrics.
Bottleneck = Literal[
    "kv_full", "slots_full", "host_bound", "decode_bandwidth", "prefill_compute", "imbalance",
    "client_bound", "drafts_rejected", "idle",
]  # fmt: skip
FLEET_KNOBS = ("replicas", "policy")  # of the gateway and its replicas, not of an engine
COPIES = ("replicas", "data_parallel_size")  # engines that have the whole model each


class Knob(msgspec.Struct, frozen=True, kw_only=True):
    """One choice. values: in order, where `ordered`, else mere alternatives.

    default: what the server does without it; None: it works that out by itself, and that is
    something like `like`. flag: of the server; key: the knob is an entry of the flag's JSON object;
    omit: the value for which the flag is not given; by_batch: the entry of that object that has
    the values by batch size, if there is one; words: of each value, instead of a flag;
    always: also those of the default are given.
    riskier: in which direction of the values a failure of that kind gets more likely. neutral:
    kinds of failure that it has no influence on. helps: which bottleneck a move relieves. when:
    values of other knobs without which it does nothing; ranks: it does nothing where a replica has
    one device. devices: the replica takes as many. covers: knobs whose values it may not be below.
    seen: a length of the workload that it must be able to hold.
    """

    name: str
    values: tuple[Value, ...]
    default: Value = None
    like: Value = None
    ordered: bool = True
    flag: str = ""
    key: str = ""
    omit: Value = None
    by_batch: str = ""
    words: tuple[str, ...] = ()
    always: bool = False
    riskier: dict[Risk, Direction] = {}
    neutral: tuple[Risk, ...] = ()
    helps: dict[Bottleneck, Direction] = {}
    when: dict[str, tuple[Value, ...]] = {}
    devices: bool = False
    ranks: bool = False
    covers: tuple[str, ...] = ()
    seen: Literal["", "sequence"] = ""
    about: str = ""

    def index(self, value: Value) -> int:
        """The place of a value; of None, that of what the default is like."""
        return self.values.index(self.like if value is None else value)

    @property
    def place_of_default(self) -> int:
        return self.index(self.default)

    def moved(self, value: Value, direction: Direction) -> Value:
        """The next value in a direction; the value itself at the end of the list."""
        step = 1 if direction == "up" else -1
        at = self.index(value) + step
        return self.values[at] if 0 <= at < len(self.values) else value


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """All knobs of one kind of server. devices: how many a setting may take in all; 0: no limit.
    cores: they are the cores of one host, of which every setting has all."""

    engine: str
    knobs: tuple[Knob, ...]
    devices: int = 0
    cores: bool = False

    def __getitem__(self, name: str) -> Knob:
        return next(knob for knob in self.knobs if knob.name == name)

    def __contains__(self, name: str) -> bool:
        return any(knob.name == name for knob in self.knobs)

    @property
    def defaults(self) -> Settings:
        """The setting in which every knob is left alone."""
        return {knob.name: knob.default for knob in self.knobs}

    def normal(self, given: Mapping[str, Value]) -> Settings:
        """A whole setting: missing knobs, and those that do nothing, have their defaults."""
        found = {**self.defaults, **{k: v for k, v in given.items() if k in self}}
        for knob in self.knobs:
            if not self.active(knob, found):
                found[knob.name] = knob.default
        return found

    def active(self, knob: Knob, settings: Mapping[str, Value]) -> bool:
        """Whether a knob does anything in a setting."""
        if knob.ranks and self.devices_of(settings) <= replicas_of(settings):
            return False
        return all(settings.get(name) in wanted for name, wanted in knob.when.items())

    def problem(self, settings: Mapping[str, Value]) -> str:
        """Why a setting cannot be meant; empty if it can."""
        taken = self.devices_of(settings)
        if self.devices and taken > self.devices:
            return f"it takes {taken} devices of {self.devices}"
        for knob in self.knobs:
            value = settings[knob.name] if settings[knob.name] is not None else knob.like
            for name in knob.covers:
                other = settings.get(name)
                if (
                    _is_number(value)
                    and _is_number(other)
                    and float(value or 0) < float(other or 0)
                ):
                    return f"{knob.name} {value} is below {name} {other}"
        return ""

    def counted(self, settings: Mapping[str, Value]) -> int:
        """By how many devices the figures of a setting are to be divided."""
        return 1 if self.cores else self.devices_of(settings)

    def devices_of(self, settings: Mapping[str, Value]) -> int:
        """How many devices a setting takes."""
        taken = 1
        for knob in self.knobs:
            if knob.devices:
                taken *= int(settings[knob.name] or 1)
        return taken

    def differing(self, a: Mapping[str, Value], b: Mapping[str, Value]) -> list[str]:
        """Names of the knobs in which two settings differ."""
        return [knob.name for knob in self.knobs if a[knob.name] != b[knob.name]]

    def neighbours(self, settings: Mapping[str, Value]) -> Iterator[Settings]:
        """Settings that differ in one knob: by one place, or by any where there is no order. Knobs
        that take devices also move in pairs, one up and one down."""
        for knob in self.knobs:
            if self.active(knob, settings):
                for value in _next_values(knob, settings[knob.name]):
                    yield self.normal({**settings, knob.name: value})
        taking = [knob for knob in self.knobs if knob.devices]
        for more, less in permutations(taking, 2):
            moved = {
                more.name: more.moved(settings[more.name], "up"),
                less.name: less.moved(settings[less.name], "down"),
            }
            yield self.normal({**settings, **moved})

    def safer(
        self, settings: Mapping[str, Value], risk: Risk, share: float, *, share_out: bool = True
    ) -> Settings:
        """A setting moved to where a kind of failure is least likely: each knob by a share of its
        way. At the end of the way one engine has all devices, where these may be shared out
        anew."""
        found = dict(settings)
        for knob in self.knobs:
            direction = knob.riskier.get(risk)
            if direction and not knob.devices and self.active(knob, settings):
                end = 0 if direction == "up" else len(knob.values) - 1
                at = knob.index(settings[knob.name])
                found[knob.name] = knob.values[at + math.trunc((end - at) * share)]
            elif direction and share == 1.0 and share_out:
                copies = {name: 1 for name in COPIES if name in found}
                most = [v for v in knob.values if not self.devices or int(v or 1) <= self.devices]
                found |= {**copies, knob.name: most[-1] if direction == "down" else most[0]}
        return self.normal(found)

    def moves(self, settings: Mapping[str, Value], bottleneck: Bottleneck) -> Iterator[Settings]:
        """Settings in which one knob is moved by a place to relieve a bottleneck."""
        for knob in self.knobs:
            direction = knob.helps.get(bottleneck)
            if direction and self.active(knob, settings):
                value = knob.moved(settings[knob.name], direction)
                if value != settings[knob.name]:
                    yield self.normal({**settings, knob.name: value})


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _next_values(knob: Knob, value: Value) -> Sequence[Value]:
    if not knob.ordered:
        return [other for other in knob.values if other != value]
    beside = (knob.moved(value, "up"), knob.moved(value, "down"))
    return [other for other in beside if other != value]


def replicas_of(settings: Mapping[str, Value]) -> int:
    """Replicas behind the gateway."""
    return int(settings.get("replicas") or 1)


def engines_of(settings: Mapping[str, Value]) -> int:
    """Engines among which the requests are shared out."""
    return math.prod(int(settings.get(name) or 1) for name in COPIES)


def copies_knob(space: Space) -> str:
    """The knob by which engines are multiplied: the server's own way where it has one."""
    return COPIES[1] if COPIES[1] in space else COPIES[0]


def key_of(settings: Mapping[str, Value]) -> str:
    """A text by which equal settings are known."""
    return json.dumps(settings, sort_keys=True)


def changed(space: Space, settings: Mapping[str, Value]) -> Settings:
    """The knobs that are not at their defaults."""
    return {k.name: settings[k.name] for k in space.knobs if settings[k.name] != k.default}


def label(space: Space, settings: Mapping[str, Value]) -> str:
    """A setting in few words: what differs from the defaults."""
    found = changed(space, settings)
    return ", ".join(f"{name} {_text(value)}" for name, value in found.items()) or "defaults"


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "default" if value is None else str(value)
