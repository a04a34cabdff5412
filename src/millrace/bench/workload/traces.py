"""Traces as they are published: arrival times and lengths, without texts.

| published by | file | times | checked against |
|---|---|---|---|
| Mooncake (and AIPerf) | JSON Lines | ms | blocks of 512 tokens |
| Bailian (Qwen) | JSON Lines | seconds | blocks of 16 tokens |
| Azure LLM inference | CSV | dates | |
| BurstGPT | CSV | seconds | its column of total tokens |

A file is read as what it is, or refused: units are never guessed from the size of numbers.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.workload.prompts import TraceRow, TraceSpec
from millrace.bench.workload.text_files import read_text, rows_of, whole_number
from millrace.errors import UserError

_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens", "Total tokens")
_MOONCAKE_BLOCK, _BAILIAN_BLOCK = 512, 16
_KNOWN = (
    "known traces are Mooncake's and Bailian's (JSON Lines with timestamp, input_length and "
    f"output_length), Azure's (CSV with {', '.join(_AZURE)}) and BurstGPT's (CSV with "
    f"{', '.join(_BURSTGPT)})"
)


class _Arrival(msgspec.Struct, frozen=True):
    """A request of a trace. at: seconds from any moment. line: where it is in the file."""

    at: float
    row: TraceRow
    line: int


class _Trace(msgspec.Struct, frozen=True):
    arrivals: list[_Arrival]
    block_tokens: int = _MOONCAKE_BLOCK
    left_out: int = 0  # requests that failed when the trace was taken


def read_trace(path: str, *, count: int | None, seed: int) -> tuple[TraceSpec, tuple[float, ...]]:
    """A trace, and the arrival times of its requests, in seconds from the first one.

    Raises UserError for a file that is not a known trace, or contradicts itself.
    """
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise UserError(f"--dataset-path {path}: there is no request in it")
    if first.lstrip().startswith("{"):
        trace = _json_trace(path, text)
    else:
        trace = _csv_trace(path, text, [name.strip() for name in first.split(",")])
    arrivals = sorted(trace.arrivals, key=lambda arrival: arrival.at)[:count]
    if not arrivals:
        raise UserError(f"--dataset-path {path}: there is no request in it")
    source = Path(path).name
    if trace.left_out:
        source += f" without {trace.left_out} failed request(s)"
    spec = TraceSpec(
        rows=tuple(arrival.row for arrival in arrivals),
        count=len(arrivals),
        block_tokens=trace.block_tokens,
        seed=seed,
        source=source,
    )
    return spec, tuple(arrival.at - arrivals[0].at for arrival in arrivals)


# --- JSON Lines --------------------------------------------------------------------------------


def _json_trace(path: str, text: str) -> _Trace:
    arrivals, bailian = [], False
    for line, row in rows_of(path, text):
        where = f"{path}, line {line}"
        at = _time(row.get("timestamp"))
        length, output = (whole_number(row.get(k)) for k in ("input_length", "output_length"))
        if at is None or length is None or output is None:
            raise UserError(
                f"{where}: a trace needs the numbers timestamp, input_length and output_length; "
                f"{_KNOWN}"
            )
        blocks = row.get("hash_ids") or []
        numbers = [whole_number(b) for b in blocks] if isinstance(blocks, list) else [None]
        if any(number is None for number in numbers):
            raise UserError(f"{where}: hash_ids must be a list of whole numbers from 0 on")
        bailian = bailian or "chat_id" in row or "parent_chat_id" in row
        made = TraceRow(max(1, length), max(1, output), tuple(n for n in numbers if n is not None))
        arrivals.append(_Arrival(at, made, line))
    block_tokens = _block_size(path, arrivals, bailian)
    if block_tokens == _MOONCAKE_BLOCK:
        arrivals = [msgspec.structs.replace(one, at=one.at / 1e3) for one in arrivals]
    return _Trace(arrivals, block_tokens)


def _time(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _block_size(path: str, arrivals: Sequence[_Arrival], bailian: bool) -> int:
    """The block size that the lengths and the numbers of blocks of all rows agree on."""
    size = _BAILIAN_BLOCK if bailian else _MOONCAKE_BLOCK
    with_blocks = [one for one in arrivals if one.row.blocks]
    misfit = next((one for one in with_blocks if not _fits(one.row, size)), None)
    if misfit is None:
        return size
    other = _MOONCAKE_BLOCK if bailian else _BAILIAN_BLOCK
    if all(_fits(one.row, other) for one in with_blocks):
        return other
    raise UserError(
        f"{path}, line {misfit.line}: input_length {misfit.row.input_tokens} does not fit its "
        f"{len(misfit.row.blocks)} hash_ids, neither with blocks of {_MOONCAKE_BLOCK} tokens "
        f"(Mooncake, times in ms) nor of {_BAILIAN_BLOCK} (Bailian, times in seconds)"
    )


def _fits(row: TraceRow, block_tokens: int) -> bool:
    """Whether a prompt has that many blocks, of which the last one may be missing or short."""
    return abs(len(row.blocks) - row.input_tokens / block_tokens) < 1


# --- CSV ---------------------------------------------------------------------------------------


def _csv_trace(path: str, text: str, header: Sequence[str]) -> _Trace:
    if set(_AZURE) <= set(header):
        return _Trace([_azure_row(path, line, row) for line, row in _csv_rows(text)])
    if set(_BURSTGPT) <= set(header):
        return _burstgpt(path, text)
    shown = ", ".join(header)[:120]
    raise UserError(f"--dataset-path {path}: not a known trace (it begins with {shown}); {_KNOWN}")


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(line, row) of each row that is not empty."""
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        yield reader.line_num, {name: value or "" for name, value in row.items() if name}


def _azure_row(path: str, line: int, row: Mapping[str, str]) -> _Arrival:
    try:
        at = datetime.fromisoformat(row["TIMESTAMP"].strip()).timestamp()
        made = TraceRow(_tokens(row["ContextTokens"]), _tokens(row["GeneratedTokens"]))
    except ValueError:
        raise UserError(
            f"{path}, line {line}: Azure's trace has a date and two numbers of tokens a row"
        ) from None
    return _Arrival(at, made, line)


def _tokens(text: str) -> int:
    return max(1, int(text))


def _burstgpt(path: str, text: str) -> _Trace:
    """Rows without response tokens failed when the trace was taken, and are left out."""
    arrivals, left_out = [], 0
    for line, row in _csv_rows(text):
        try:
            at = float(row["Timestamp"])
            prompt, output, total = (int(row[name]) for name in _BURSTGPT[1:])
        except ValueError:
            raise UserError(
                f"{path}, line {line}: BurstGPT's trace has seconds and three numbers of tokens "
                "a row"
            ) from None
        if prompt + output != total:
            raise UserError(
                f"{path}, line {line}: {prompt} request and {output} response tokens are not the "
                f"{total} total tokens that the row names"
            )
        if output:
            arrivals.append(_Arrival(at, TraceRow(max(1, prompt), output), line))
        else:
            left_out += 1
    return _Trace(arrivals, left_out=left_out)
