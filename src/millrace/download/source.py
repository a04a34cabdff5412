"""What a place to download from has to offer, and the ways in which it fails.

It knows neither HTTP nor disks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, Protocol

from millrace.errors import UserError

Algorithm = Literal["sha256", "git", "md5"]


@dataclass(frozen=True, slots=True)
class Digest:
    """algorithm: "git" is the SHA-1 that git gives a file: of "blob <size>", a zero byte and the
    content. value: hexadecimal."""

    algorithm: Algorithm
    value: str

    def hasher(self, size: int) -> hashlib._Hash:
        """A hash object to which the content is yet to be given."""
        if self.algorithm == "git":
            found = hashlib.sha1(usedforsecurity=False)
            found.update(b"blob %d\0" % size)
            return found
        return hashlib.new(self.algorithm, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """name: with / between folders, relative to the model. size: bytes. digest: None where the
    source has none. identity: changes when the content does."""

    name: str
    size: int
    digest: Digest | None
    identity: str

    def __post_init__(self) -> None:
        parts = PurePosixPath(self.name).parts
        if not parts or self.name.startswith("/") or ".." in parts or "\0" in self.name:
            raise UserError(f"the source lists a file named {self.name!r}, which leads elsewhere")


class TransferError(Exception):
    """A transfer that failed and may be tried again. wait: seconds that the source asks for; None
    leaves them to the caller."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Source(Protocol):
    """One version of one model at a place."""

    name: str
    """What messages call the model."""
    commit: str
    """The version's hash; empty where versions have none."""

    def files(self) -> list[RemoteFile]:
        """All files of the model. Raises UserError when there is no such model."""

    def has_ranges(self, file: RemoteFile) -> bool:
        """Whether parts of a file can be asked for; False once the source ignored a range."""

    def read(self, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        """The bytes [start, end) of a file, in pieces as they arrive; never more, and fewer only
        with a TransferError. Raises UserError for what no further try can mend."""
