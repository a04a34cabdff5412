"""The journal of a study: one JSON record a line, each on disk before anything follows from it.

A process that is killed leaves whole lines, and at most one torn one behind them, which is cut off.
What is to be done next follows from the records alone, so a study goes on as if nothing had
happened. Two processes cannot write one journal.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import msgspec

from millrace.errors import ConfigError
from millrace.tune.space.knobs import Space
from millrace.tune.trials.outcome import Outcome, Visit

FILE = "journal.jsonl"
VERSION = 1


class Header(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first record: what the study is. request: what was asked for, so that it can be resumed;
    read by the command alone."""

    version: int = VERSION
    space: Space
    request: dict[str, Any] = {}


class Began(msgspec.Struct, frozen=True, tag=True):
    """A visit begins, or begins again after a kill."""

    visit: Visit


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A visit has ended."""

    number: int
    outcome: Outcome


class Abandoned(msgspec.Struct, frozen=True, tag=True):
    """A visit was ended in good order, by the user; it begins anew."""

    number: int


Record = Header | Began | Ended | Abandoned
_DECODER = msgspec.json.Decoder(Record)


class Journal:
    """The journal in a directory, for one process at a time; a context that closes it.

    Raises ConfigError if another process has it, or if it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{directory}: {error.strerror}; give another --dir") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigError(
                f"{directory}: another `millrace tune` works there; wait for it, or give --dir"
            ) from None
        self.records: list[Record] = []
        try:
            self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write(self, record: Record) -> None:
        """Add a record; it is on disk when this returns."""
        data = msgspec.json.encode(record) + b"\n"
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self.records.append(record)

    def _recover(self) -> None:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        self.records = decode(whole, self._path)
        if len(whole) < len(data):
            os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)
        os.fsync(self._file)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the file's name
        finally:
            os.close(folder)


def read_journal(directory: Path) -> list[Record]:
    """The records in a directory, also while a study goes on. Raises ConfigError for none."""
    path = directory / FILE
    try:
        data = path.read_bytes()
    except OSError:
        raise ConfigError(
            f"{directory}: no study of `millrace tune` is there; give the --dir of one"
        ) from None
    records = decode(data[: data.rfind(b"\n") + 1], path)
    if not records:
        raise ConfigError(f"{directory}: the study there has not begun; start it again")
    return records


def decode(data: bytes, path: Path, *, headed: bool = True) -> list[Record]:
    """Records of whole lines. headed: the first must be a Header. Raises ConfigError for others."""
    records: list[Record] = []
    under_way = -1
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            record = _DECODER.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path}: line {number} is no record ({error})") from None
        if isinstance(record, Began):
            under_way = record.visit.number
        elif not isinstance(record, Header) and record.number != under_way:
            raise ConfigError(f"{path}: line {number} ends visit {record.number}, not under way")
        elif isinstance(record, Ended):
            under_way = -1
        records.append(record)
    if headed and records and not isinstance(records[0], Header):
        raise ConfigError(f"{path}: it begins with no header; this is no study")
    if records and isinstance(records[0], Header) and records[0].version != VERSION:
        raise ConfigError(f"{path}: its version is {records[0].version}; this reads {VERSION}")
    return records
