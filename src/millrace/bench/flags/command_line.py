"""From structs of flags to options of a command, and from a command line back to a struct."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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


def read_flags(kind: type[_Flags], values: Mapping[str, Any]) -> _Flags:
    """The flags of a command line: as given, else the preset's, else the defaults.

    values: what click hands to the command. Raises UserError for a preset that lacks a flag.
    """
    chosen = given(values, kind)
    flags = kind(**chosen)
    if isinstance(flags, LoadFlags) and flags.preset is not None:
        return msgspec.structs.replace(flags, **preset_values(flags, chosen.keys()))
    return flags
