"""The directory of a report: a file for each step that is done, whole or not there at all.

A process that is killed loses the step that it was in. What is to be done next follows from the
files alone. Two processes cannot work in one directory.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import msgspec

from millrace.errors import ConfigError
from millrace.report.steps.document import StepRecord, hash_matches, sealed_step

_HEADER = "request.json"
_LOCK = ".lock"


class Journal:
    """The steps in a directory, for one process at a time; a context that closes it.

    Raises ConfigError if another process has it, or if it cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._steps = directory / "steps"
        try:
            self._steps.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"{directory}: {error.strerror}; give another --dir") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"{directory}: another `millrace report` works there; wait for it, or give --dir"
            ) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def begin(self, header: dict[str, Any]) -> bool:
        """Say what the steps are of; whether there were some already.

        Raises ConfigError where those are of something else: the first difference is named.
        """
        path = self.directory / _HEADER
        try:
            there = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
        except FileNotFoundError:
            write_whole(path, msgspec.json.encode(header))
            return False
        except msgspec.DecodeError as error:
            raise ConfigError(f"{path} cannot be read ({error}); give another --dir") from None
        for name, value in header.items():
            if there.get(name) != value:
                raise ConfigError(
                    f"{self.directory} has a report of another {name.replace('_', ' ')}; "
                    "give another --dir, or remove that directory"
                )
        return True

    def read(self, name: str) -> StepRecord | None:
        """A step that is done; None where it is not, or where its file is no longer what it was."""
        try:
            found = msgspec.json.decode(self._path(name).read_bytes(), type=StepRecord)
        except (OSError, msgspec.DecodeError):
            return None
        return found if found.name == name and hash_matches(found) else None

    def write(self, record: StepRecord) -> StepRecord:
        """Keep a step; it is on disk when this returns, with its hash."""
        record = sealed_step(record)
        write_whole(self._path(record.name), msgspec.json.encode(record))
        return record

    def _path(self, name: str) -> Path:
        return self._steps / f"{name.replace('/', '-')}.json"


def write_whole(path: Path, data: bytes) -> Path:
    """Write a file that a reader, or a start after a kill, sees as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the file's name
    finally:
        os.close(folder)
    return path
