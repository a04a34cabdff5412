"""Reading text files of workloads: encodings, lines, and numbers that are numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from millrace.errors import UserError

_MAGIC = {b"PAR1": "a Parquet file", b"\x1f\x8b": "a gzip file", b"PK\x03\x04": "a zip file"}


def read_text(path: str) -> str:
    """The text of a file, without a byte order mark. Raises UserError, which names the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--dataset-path {path}: {error.strerror}; give a file") from None
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            raise UserError(f"--dataset-path {path}: {name}; give it as JSON Lines or CSV")
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"--dataset-path {path}: not UTF-8 text ({error.reason})") from None


def rows_of(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line of JSON Lines that is not empty.

    Raises UserError, which names the file and the line.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError as error:
                raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None


def whole_number(value: Any, least: int = 0) -> int | None:
    """A whole number from `least` on; None for anything else. 7.0 is one, true is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        return None
    return int(value) if value >= least else None
