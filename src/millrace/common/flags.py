"""Command-line options made from the fields of a msgspec struct, so that each stands in one place.

An option that is not given is not passed on: defaults belong to the struct.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
import msgspec

_Command = TypeVar("_Command", bound=Callable[..., Any])

_COUNT = re.compile(r"([+-]?\d+(?:\.\d+)?)([kKmMgGtT])")
_POWERS = "kmgt"


class Count(click.ParamType[int]):
    """A whole number, also as vLLM takes it: 32k is 32,000, 32K is 32,768; 1.5m, 2M, 80g, 1T."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _COUNT.fullmatch(str(value).strip())
        try:
            if found is None:
                return int(value)
            number, suffix = found.groups()
            power = _POWERS.index(suffix.lower()) + 1
            return int(number) * 1024**power if suffix.isupper() else _decimal(number, power)
        except ValueError:
            self.fail(f"{value!r} is not a whole number, such as 32768, 32k or 32K", param, ctx)


def _decimal(number: str, power: int) -> int:
    """number x 1000^power; ValueError where that is not whole."""
    whole, _, fraction = number.partition(".")
    places = 3 * power
    if len(fraction) > places:
        raise ValueError(number)
    return int(whole + fraction.ljust(places, "0"))


def struct_options(
    kind: type[msgspec.Struct], help: Mapping[str, str], skip: frozenset[str] = frozenset()
) -> Callable[[_Command], _Command]:
    """Decorator that adds an option for each field of `kind` but those in `skip`."""

    def decorate(command: _Command) -> _Command:
        for field in reversed(msgspec.structs.fields(kind)):
            if field.name not in skip:
                command = _option(field, help[field.name])(command)
        return command

    return decorate


def given(values: Mapping[str, Any], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Of a command's options, those of `kind` that were on the command line."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name in kind.__struct_fields__ and value is not None and value != ()
    }


def _option(field: msgspec.structs.FieldInfo, text: str) -> Callable[[_Command], _Command]:
    flag = f"--{field.name.replace('_', '-')}"
    inner = _without_none(field.type)
    text += _default_note(field)
    if inner is bool:
        names = f"{flag}/--no-{flag[2:]}"
        return click.option(names, field.name, default=None, help=text)
    if get_origin(inner) is list:
        return click.option(
            flag, field.name, multiple=True, callback=_parse_list, help=f"{text} May be repeated."
        )
    if get_origin(inner) is Literal:
        choice = click.Choice(get_args(inner))
        return click.option(flag, field.name, type=choice, default=None, help=text)
    if get_origin(inner) is dict or (isinstance(inner, type) and issubclass(inner, msgspec.Struct)):
        return click.option(flag, field.name, callback=_parse_json, metavar="JSON", help=text)
    kind = Count() if inner is int else inner
    return click.option(flag, field.name, type=kind, default=None, help=text)


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, UnionType):
        (inner,) = (part for part in get_args(kind) if part is not NoneType)
        return inner
    return kind


def _default_note(field: msgspec.structs.FieldInfo) -> str:
    default = field.default
    if default is True:
        return "  [default: on]"
    unsaid = default is None or default is False or default is msgspec.NODEFAULT or default == {}
    return "" if unsaid else f"  [default: {default}]"


def _parse_list(_: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
    """What was repeated; a JSON list of texts counts as so many repetitions, as vLLM takes it."""
    listed: list[str] = []
    for value in values:
        if not value.startswith("["):
            listed.append(value)
            continue
        try:
            listed += msgspec.json.decode(value, type=list[str])
        except msgspec.DecodeError as error:
            raise click.BadParameter(
                f"{value!r} is not a JSON list of texts: {error}", param=param
            ) from None
    return tuple(listed)


def _parse_json(_: click.Context, param: click.Parameter, value: str | None) -> Any:
    """A JSON object on the command line, decoded; or one line that says it is none."""
    try:
        return None if value is None else msgspec.json.decode(value, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise click.BadParameter(f"{value!r} is not a JSON object: {error}", param=param) from None
