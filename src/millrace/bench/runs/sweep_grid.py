"""The points of a sweep: every combination of values of some flags."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import click

from millrace.errors import UserError

Point = dict[str, Any]


def grid(command: click.Command, over: Sequence[str]) -> list[Point]:
    """Every combination of `NAME=V1,V2` flags of the command, the last one varying fastest.

    Raises UserError for no flag at all, one that the command lacks, or a value that it refuses.
    """
    if not over:
        raise UserError("--over is missing: give a flag with values, as max-concurrency=1,8,64")
    axes = [_axis(command, text) for text in over]
    return [dict(zip((name for name, _ in axes), point, strict=True))
            for point in product(*(values for _, values in axes))]  # fmt: skip


def _axis(command: click.Command, text: str) -> tuple[str, list[Any]]:
    flag, found, listed = text.lstrip("-").partition("=")
    name = flag.replace("-", "_")
    known = {p.name: p for p in command.params if isinstance(p, click.Option) and not p.multiple}
    if not found or name not in known or known[name].is_flag:
        raise UserError(
            f"--over {text!r}: use a flag of this command with its values, as "
            "max-concurrency=1,8,64"
        )
    try:
        values = [known[name].type.convert(part, known[name], None) for part in listed.split(",")]
    except click.BadParameter as error:
        raise UserError(f"--over {text!r}: {error.message}") from None
    return name, values


def point_name(point: Point) -> str:
    """A point as a part of a file's name."""
    return "-".join(f"{name}_{value}" for name, value in point.items())
