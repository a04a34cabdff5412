"""Result files found again: those of a file or a directory, and which of them belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.errors import UserError

# What makes two runs ask the same of a server; runs that agree in all of it are repeats.
LOAD = (
    "backend",
    "model_id",
    "dataset_name",
    "request_rate",
    "burstiness",
    "ramp_up_strategy",
    "ramp_up_start_rps",
    "ramp_up_end_rps",
    "max_concurrency",
    "duration_limit",
    "num_prompts",
    "random_range_ratio",
    "random_range_convention",
    "random_context_len",
    "multi_turn_turns",
    "mean_input_len",
    "mean_output_len",
)
_OF_TIME = ("num_prompts", "mean_input_len", "mean_output_len")  # vary where a time is the limit


class ResultFile(msgspec.Struct, frozen=True):
    """One file: its path and what stands in it."""

    path: Path
    fields: dict[str, Any]

    @property
    def is_run(self) -> bool:
        """Whether it is one run of one server (else it is a scaling table)."""
        return "total_token_throughput" in self.fields

    def raw(self, name: str) -> Path | None:
        """The raw data of that name, where they are still beside it."""
        for file in self.fields.get("raw_data") or []:
            path = self.path.parent / str(file)
            if f".{name}." in path.name and path.is_file():
                return path
        return None


def load_results(path: str) -> list[ResultFile]:
    """The result files at a path, a directory's by name; other JSON files are passed over.

    Raises UserError when there is none.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or directory; give one that --save-result wrote")
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    found = [result for file in files if (result := _read(file)) is not None]
    if not found:
        raise UserError(f"{path}: there is no result of `millrace bench` in it")
    return found


def _read(path: Path) -> ResultFile | None:
    try:
        fields = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
    if not isinstance(fields, dict):
        return None
    known = "total_token_throughput" in fields or ("table" in fields and "rows" in fields)
    return ResultFile(path, fields) if known else None


def load_key(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run asked, as something to compare by."""
    timed = fields.get("duration_limit") is not None
    return tuple(
        None if timed and name in _OF_TIME else fields.get(name)
        for name in LOAD
        if name != "model_id"  # two servers may name one model differently
    )


def mean_lengths(fields: Mapping[str, Any]) -> tuple[float, float]:
    """Mean tokens in and out of a request: as asked, or, in another tool's file, as served."""
    done = fields.get("completed") or 1
    return (
        float(fields.get("mean_input_len") or fields.get("total_input_tokens", 0) / done),
        float(fields.get("mean_output_len") or fields.get("total_output_tokens", 0) / done),
    )


def interactivity(fields: Mapping[str, Any]) -> float:
    """Tokens a second that one user sees: the inverse of the median TPOT."""
    tpot = fields.get("median_tpot_ms") or 0.0
    return 1e3 / tpot if tpot else 0.0


def load_label(fields: Mapping[str, Any]) -> str:
    """What a run asked, in a few words."""
    parts = []
    if fields.get("max_concurrency"):
        parts.append(f"{fields['max_concurrency']} users")
    if fields.get("request_rate") not in (None, "inf"):
        parts.append(f"{fields['request_rate']:g} req/s")
    if fields.get("ramp_up_strategy"):
        low, high = fields["ramp_up_start_rps"], fields["ramp_up_end_rps"]
        parts.append(f"{fields['ramp_up_strategy']} ramp {low:g} to {high:g} req/s")
    mean = mean_lengths(fields)
    parts.append(f"{mean[0]:.0f} in / {mean[1]:.0f} out")
    return ", ".join(parts)


def grouped(results: Sequence[ResultFile]) -> dict[tuple[Any, ...], list[ResultFile]]:
    """Runs by what they asked, in the order in which each kind first occurs."""
    groups: dict[tuple[Any, ...], list[ResultFile]] = {}
    for result in results:
        if result.is_run:
            groups.setdefault(load_key(result.fields), []).append(result)
    return groups
