"""The file with a batch's requests: checked line by line, hashed, and read again line by line.

It is never in memory as a whole. What becomes of its requests is not known here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from millrace.batch.lines import MAX_LINE_BYTES, LineError, RequestLine, read_line
from millrace.errors import UserError

_CHUNK = 1 << 20


class Place(msgspec.Struct, frozen=True):
    """Where a line is. number: from 1. offset, size: bytes of the file, without the line break."""

    number: int
    offset: int
    size: int


class InputFile:
    """A file of requests. model, url: as in `read_line`."""

    def __init__(self, path: Path, model: str | None = None, url: str | None = None) -> None:
        self.path = path
        self._model = model
        self._url = url
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None

    def close(self) -> None:
        self._file.close()

    def digest(self) -> str:
        """The SHA-256 of the file, and of what the requests are changed to."""
        found = hashlib.sha256(f"{self._model}\0{self._url}\0".encode())
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            found.update(chunk)
        return found.hexdigest()

    def lines(self) -> Iterator[tuple[Place, RequestLine | LineError]]:
        """Every line that is not blank, with its request, or with what is wrong with it."""
        self._file.seek(0)
        number = offset = 0
        while data := self._file.readline(MAX_LINE_BYTES + 1):
            number += 1
            place = Place(number, offset, len(data.rstrip(b"\r\n")))
            offset += len(data)
            if len(data) > MAX_LINE_BYTES and not data.endswith(b"\n"):
                offset += self._skip_line()
                yield place, LineError(f"the line has more than {MAX_LINE_BYTES} bytes")
            elif data.strip():
                yield place, self._read(data)

    def _skip_line(self) -> int:
        skipped = 0
        while rest := self._file.readline(_CHUNK):
            skipped += len(rest)
            if rest.endswith(b"\n"):
                break
        return skipped

    def _read(self, data: bytes) -> RequestLine | LineError:
        try:
            return read_line(data, self._model, self._url)
        except LineError as error:
            return error

    def request(self, place: Place) -> RequestLine:
        """The request at a place. Raises UserError if the file has been changed since."""
        data = os.pread(self._file.fileno(), place.size, place.offset)
        try:
            return read_line(data, self._model, self._url)
        except LineError as error:
            raise UserError(
                f"{self.path}: line {place.number} was changed while it was being sent: {error}"
            ) from None
