"""Reading result files: those of a directory, and which of them are repeats of one load."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from millrace.errors import UserError

# The fields that describe a load; runs that agree in all of them are repeats.
LOAD_FIELDS = (
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
    "workload",
    "mean_input_len",
    "mean_output_len",
)
_LENGTHS = ("mean_input_len", "mean_output_len")
_VARIES_WITH_TIME = ("num_prompts", *_LENGTHS)  # where a duration is the limit


class ResultFile(msgspec.Struct, frozen=True):
    """One file: its path and its fields."""

    path: Path
    fields: dict[str, Any]

    @property
    def is_run(self) -> bool:
        """Whether it is one run of one server (else it is a scaling table)."""
        return "total_token_throughput" in self.fields

    def raw(self, name: str) -> Path | None:
        """The file of the raw data of that name, where it is still beside this one."""
        for file in self.fields.get("raw_data") or []:
            path = self.path.parent / str(file)
            if f".{name}." in path.name and path.is_file():
                return path
        return None


def load_results(path: str) -> list[ResultFile]:
    """The result files at a path, those of a directory by name. Other files are skipped.

    Raises UserError when there is none.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such file or directory; give one that --save-result wrote")
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    found = [result for file in files for result in _read(file)]
    if not found:
        raise UserError(f"{path}: there is no result of `millrace bench` in it")
    return found


def _read(path: Path) -> list[ResultFile]:
    """The results in a file: one, or one in each line of a file that was appended to."""
    if path.suffix in (".parquet", ".jsonl", ".html") or not path.is_file():
        return []
    try:
        data = path.read_bytes() if _begins_like_json(path) else b""
        try:
            contents = [msgspec.json.decode(data)]
        except msgspec.DecodeError:
            contents = [msgspec.json.decode(line) for line in data.splitlines() if line.strip()]
    except (OSError, msgspec.DecodeError):
        return []
    return [ResultFile(path, fields) for fields in contents if _is_result(fields)]


def _begins_like_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _is_result(fields: Any) -> bool:
    if not isinstance(fields, dict):
        return False
    return "total_token_throughput" in fields or ("table" in fields and "rows" in fields)


def load_key(fields: Mapping[str, Any], by_lengths: bool = False) -> tuple[Any, ...]:
    """The load of a run, as a key; equal keys are the same load.

    Repeats draw prompts of their own, so their mean lengths differ where lengths are drawn: the
    workload as it was asked for tells loads apart. by_lengths: use the mean lengths instead, for
    files that do not say what was asked for.
    """
    left_out = {"model_id"}  # two servers may name one model differently
    left_out |= {"workload"} if by_lengths else set(_LENGTHS)
    if fields.get("duration_limit") is not None:
        left_out |= set(_VARIES_WITH_TIME)
    return tuple(None if name in left_out else fields.get(name) for name in LOAD_FIELDS)


def load_order(fields: Mapping[str, Any]) -> tuple[float, ...]:
    """From the lightest load to the heaviest: limits on users, then rates, then no limit."""
    users = float(fields.get("max_concurrency") or 0)
    rate = fields.get("request_rate")
    endless = 0.0 if users else math.inf
    asked = endless if rate is None or rate == "inf" else float(rate)
    return (asked, users, *mean_lengths(fields))


def mean_lengths(fields: Mapping[str, Any]) -> tuple[float, float]:
    """Mean input and output tokens of a request: as asked, or as served in another tool's file."""
    done = fields.get("completed") or 1
    return (
        float(fields.get("mean_input_len") or fields.get("total_input_tokens", 0) / done),
        float(fields.get("mean_output_len") or fields.get("total_output_tokens", 0) / done),
    )


def hit_rate(fields: Mapping[str, Any]) -> float | None:
    """The share of prompt tokens that prefix caches had; None where it is unknown."""
    found = fields.get("prefix_cache_hit_rate")
    if found is None:  # files from before that field
        found = ((fields.get("server") or {}).get("prefix_cache") or {}).get("hit_rate")
    return None if found is None else float(found)


def hit_text(rate: float | None) -> str:
    """A hit rate in a table; empty where it is unknown."""
    return "" if rate is None else f"{rate:.1%}"


def interactivity(fields: Mapping[str, Any]) -> float:
    """Tokens a second that one user sees: the inverse of the median TPOT."""
    tpot = fields.get("median_tpot_ms") or 0.0
    return 1e3 / tpot if tpot else 0.0


_SHARED_BY_TEMPLATE = 64  # tokens that a chat template may put before every prompt


def unexpected_hits(fields: Mapping[str, Any]) -> str | None:
    """A warning where random prompts, which share little, were found in a prefix cache."""
    rate, done = hit_rate(fields), fields.get("completed") or 0
    single = (fields.get("multi_turn_turns") or 1) == 1
    if fields.get("dataset_name") != "random" or not single or not rate or not done:
        return None
    mean = fields["total_input_tokens"] / done
    shared = float(fields.get("random_prefix_len") or 0)
    if fields.get("backend") == "openai-chat":
        shared += _SHARED_BY_TEMPLATE
    if rate * mean - shared <= max(16.0, 0.05 * mean):
        return None
    return (
        f"warning: {rate:.1%} of the prompt tokens came from a prefix cache, though random prompts "
        f"are new: the server has had these prompts before. Give each run another --seed (this one "
        f"was {fields.get('seed', 'unknown')}), or use --reset-prefix-cache"
    )


def load_label(fields: Mapping[str, Any]) -> str:
    """The load of a run, in a few words."""
    parts = []
    if fields.get("max_concurrency"):
        users = fields["max_concurrency"]
        parts.append(f"{users} user{'s' if users > 1 else ''}")
    if fields.get("request_rate") not in (None, "inf"):
        parts.append(f"{fields['request_rate']:g} req/s")
    if fields.get("ramp_up_strategy"):
        low, high = fields["ramp_up_start_rps"], fields["ramp_up_end_rps"]
        parts.append(f"{fields['ramp_up_strategy']} ramp {low:g} to {high:g} req/s")
    mean = mean_lengths(fields)
    parts.append(f"{mean[0]:.0f} in / {mean[1]:.0f} out")
    return ", ".join(parts)


def grouped(
    results: Sequence[ResultFile], among: Sequence[ResultFile] = ()
) -> dict[tuple[Any, ...], list[ResultFile]]:
    """Runs grouped by load, the lightest load first; repeats in the order of their dates.

    among: all runs whose loads are compared, where they are more than these.
    """
    runs = [result for result in results if result.is_run]
    by_lengths = any("workload" not in run.fields for run in [*runs, *among])
    groups: dict[tuple[Any, ...], list[ResultFile]] = {}
    for run in sorted(runs, key=lambda run: str(run.fields.get("date", ""))):
        groups.setdefault(load_key(run.fields, by_lengths), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: load_order(item[1][0].fields)))
