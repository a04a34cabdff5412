"""Uploads as multipart/form-data: short fields in memory, the content of a file straight to a file.

Bytes come in pieces of any size. What the fields mean is not known here.
"""

from __future__ import annotations

import re
from typing import BinaryIO

from millrace.common.api_errors import ApiError

MAX_FIELD = 64 << 10  # bytes of a field that is no file
MAX_PARTS = 32
_MAX_HEAD = 16 << 10  # bytes of one part's headers
_BOUNDARY = re.compile(r'multipart/form-data\s*;.*?boundary=(?:"([^"]{1,200})"|([^\s;"]{1,200}))',
                       re.IGNORECASE)  # fmt: skip
_NAME = re.compile(r'[;\s]name="([^"]*)"', re.IGNORECASE)
_FILENAME = re.compile(r'[;\s]filename="([^"]*)"', re.IGNORECASE)


class Upload:
    """An upload that comes in. fields: by name. filename: of the file; None before it came.

    file: takes the content of the part `file`. most: bytes that it may have.
    """

    def __init__(self, content_type: str, file: BinaryIO, most: int) -> None:
        found = _BOUNDARY.match(content_type.strip())
        if found is None:
            raise ApiError(415, "send the file as multipart/form-data with a boundary")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.size = 0  # of the file
        self._file = file
        self._most = most
        self._mark = b"\r\n--" + (found.group(1) or found.group(2)).encode()
        self._buffer = bytearray(b"\r\n")  # the first boundary has none before it
        self._name: str | None = None  # of the part that comes; None between parts
        self._to_file = False
        self._value = bytearray()
        self._parts = 0
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Take bytes. Raises ApiError; OSError of the file."""
        self._buffer += data
        while not self.complete and (self._read_content() if self._open else self._read_head()):
            pass
        if self.complete:
            self._buffer.clear()

    @property
    def _open(self) -> bool:
        return self._name is not None or self._parts == 0

    def _read_content(self) -> bool:
        """Take content up to the next boundary. False: more bytes are needed."""
        at = self._buffer.find(self._mark)
        if at < 0:
            ready = max(0, len(self._buffer) - len(self._mark) + 1)
            self._take(ready)
            return False
        if len(self._buffer) < at + len(self._mark) + 2:
            self._take(at)
            return False
        self._take(at)
        ending = bytes(self._buffer[len(self._mark) : len(self._mark) + 2])
        del self._buffer[: len(self._mark)]
        self._end_part()
        self._parts += 1
        if ending == b"--":
            self.complete = True
        elif self._parts > MAX_PARTS:
            raise ApiError(400, f"the form has more than {MAX_PARTS} parts")
        return True

    def _take(self, count: int) -> None:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        if self._to_file:
            self.size += len(data)
            if self.size > self._most:
                raise ApiError(413, f"the file has more than {self._most} bytes")
            self._file.write(data)
        elif self._name is not None:
            self._value += data
            if len(self._value) > MAX_FIELD:
                raise ApiError(413, f"the field {self._name} has more than {MAX_FIELD} bytes")

    def _end_part(self) -> None:
        if self._name is not None and not self._to_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")
        self._name, self._to_file = None, False
        self._value.clear()

    def _read_head(self) -> bool:
        """Take the headers of a part. False: more bytes are needed."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > _MAX_HEAD:
                raise ApiError(400, "the headers of a part are too long")
            return False
        head = self._buffer[:end].decode("utf-8", "replace")
        del self._buffer[: end + 4]
        disposition = next(
            (line for line in head.split("\r\n") if line.lower().startswith("content-disposition")),
            "",
        )
        name, filename = _NAME.search(disposition), _FILENAME.search(disposition)
        if name is None:
            raise ApiError(400, "a part of the form has no name")
        self._name = name.group(1)
        if self._name == "file" or filename is not None:
            if self._name != "file" or self.filename is not None:
                raise ApiError(400, "send one file, in the part named file", param="file")
            self._to_file = True
            self.filename = filename.group(1) if filename is not None else "upload"
        return True
