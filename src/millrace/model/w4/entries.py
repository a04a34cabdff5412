"""Entries of a `quantization_config`, and the one line that refuses what cannot be run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millrace.errors import CheckpointError

OTHERS = "--engine vllm serves others"


def checked_bits(entries: Mapping[str, Any], name: str, method: str) -> int:
    """4, under one of the names that methods have for it."""
    bits = entries.get(name, entries.get("bits", 4))
    if bits != 4:
        raise CheckpointError(
            f"quantization {method!r} with {bits} bits cannot be run; 4 bits can; {OTHERS}"
        )
    return 4


def checked_group(entries: Mapping[str, Any], name: str, default: int = 128) -> int:
    """Columns of a group: -1 for all, or a multiple of 8."""
    group = entries.get(name, default)
    if group is None:
        return -1
    if isinstance(group, bool) or not isinstance(group, int) or group < -1 or group == 0 or (
        group > 0 and group % 8
    ):  # fmt: skip
        raise CheckpointError(
            f"quantization with {name} {group!r} cannot be run; -1 and multiples of 8 can, such as "
            "32, 64 and 128"
        )
    return group


def flag(entries: Mapping[str, Any], name: str, default: bool) -> bool:
    found = entries.get(name)
    return default if found is None else bool(found)


def named(entries: Mapping[str, Any], name: str, default: str, *known: str) -> str:
    """One of the known values."""
    found = entries.get(name) or default
    if str(found).lower() not in known:
        raise CheckpointError(
            f"quantization with {name} {str(found)[:60]!r} cannot be run; {' and '.join(known)} "
            f"can; {OTHERS}"
        )
    return str(found).lower()


def listed(entries: Mapping[str, Any], name: str) -> list[Any]:
    """A list; none: empty; text: its parts between commas."""
    found = entries.get(name) or []
    if isinstance(found, str):
        return [part.strip() for part in found.split(",")]
    if not isinstance(found, list):
        raise CheckpointError(f"{name} must be a list of names, got {str(found)[:100]!r}")
    return found
