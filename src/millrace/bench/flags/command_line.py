"""From structs of flags to options of a command, and from a command line back to a struct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click
import msgspec

from millrace.bench.flags.help_texts import HELP
from millrace.bench.flags.presets import preset_values
from millrace.bench.flags.structs import LoadFlags
from millrace.common.flags import given, struct_options

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Flags = TypeVar("_Flags", bound=msgspec.Struct)


def flags_of(kind: type[msgspec.Struct]) -> Callable[[_Command], _Command]:
    """Decorator: the options of a command whose flags are `kind`."""
    return struct_options(kind, HELP)


class SeveralValues(click.Command):
    """A command some of whose flags take several values: `--goodput a b`. Its arguments, if it has
    any, stand before those flags."""

    SEVERAL = ("--goodput", "--metadata", "--header", "--metrics-url", "--over")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        flag: str | None = None  # that may take one more value
        awaited = False  # whether the next word is its first value
        for word in args:
            if awaited:
                awaited = False
            elif word.startswith("-"):
                flag = word if word in self.SEVERAL else None
                awaited = flag is not None
            elif flag is not None:
                spread.append(flag)
            spread.append(word)
        return super().parse_args(ctx, spread)


def read_flags(kind: type[_Flags], values: Mapping[str, Any]) -> _Flags:
    """The flags of a command line: as given, else the preset's, else the defaults.

    values: what click hands to the command. Raises UserError for a preset that lacks a flag.
    """
    chosen = given(values, kind)
    flags = kind(**chosen)
    if isinstance(flags, LoadFlags) and flags.preset is not None:
        return msgspec.structs.replace(flags, **preset_values(flags, chosen.keys()))
    return flags
