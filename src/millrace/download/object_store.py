"""A model in an object store: gs://, s3:// and whatever else fsspec has a file system for.

The package of the store (gcsfs, s3fs, ...) is the user's to install; credentials are those that it
finds.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from millrace.download.source import Digest, RemoteFile, TransferError
from millrace.errors import UserError, one_line

READ_BYTES = 1 << 20
READ_SECONDS = 60.0  # a read that takes longer is given up: libraries of stores wait for minutes
LIST_SECONDS = 300.0
_MD5 = re.compile(r"[0-9a-f]{32}")
_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}


@dataclass
class ObjectStoreModel:
    """The folder that a url with a scheme names."""

    name: str
    commit: str = ""
    _files: Any = field(default=None, repr=False)
    _root: str = ""

    def files(self) -> list[RemoteFile]:
        self._open()
        try:
            found = self._call("find", LIST_SECONDS, self._root, detail=True)
        except Exception as error:  # each store's library has exceptions of its own
            raise UserError(f"{self.name} cannot be listed: {one_line(error)[:300]}") from error
        start = len(self._root.rstrip("/")) + 1
        return [
            remote_file(path[start:], entry)
            for path, entry in sorted(found.items())
            if entry.get("type") == "file" and path[start:]
        ]

    def _open(self) -> None:
        import fsspec

        scheme = self.name.partition("://")[0]
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.name)
        except ImportError as error:
            package = _PACKAGES.get(scheme, "its fsspec package")
            raise UserError(f"{scheme}:// needs {package}; pip install {package}") from error
        except Exception as error:
            raise UserError(f"{self.name}: {one_line(error)[:300]}") from error

    def _call(self, method: str, seconds: float, *arguments: Any, **options: Any) -> Any:
        """A method of the file system, with a limit of time where the file system has a loop."""
        from fsspec.asyn import AsyncFileSystem, sync
        from fsspec.exceptions import FSTimeoutError

        if not isinstance(self._files, AsyncFileSystem):
            return getattr(self._files, method)(*arguments, **options)
        function = getattr(self._files, f"_{method}")
        try:
            return sync(self._files.loop, function, *arguments, timeout=seconds, **options)
        except FSTimeoutError as error:
            raise TimeoutError(f"no answer within {seconds:g} s") from error

    def has_ranges(self, file: RemoteFile) -> bool:
        return True

    def read(self, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        path = f"{self._root.rstrip('/')}/{file.name}"
        while start < end:
            middle = min(start + READ_BYTES, end)
            try:
                piece = self._call("cat_file", READ_SECONDS, path, start=start, end=middle)
            except Exception as error:
                raise TransferError(one_line(error)[:300]) from error
            if len(piece) != middle - start:
                raise TransferError(f"asked for {middle - start} bytes, got {len(piece)}")
            yield piece
            start = middle


def remote_file(name: str, entry: dict[str, Any]) -> RemoteFile:
    marks = [entry.get(key) for key in ("etag", "ETag", "generation", "mtime", "created", "size")]
    identity = "-".join(str(mark) for mark in marks if mark is not None)
    return RemoteFile(name, int(entry["size"]), _digest(entry), identity)


def _digest(entry: dict[str, Any]) -> Digest | None:
    """The MD5 that a store keeps: md5Hash in base64, or the ETag of an object that came whole."""
    if text := entry.get("md5Hash"):
        return Digest("md5", base64.b64decode(text).hex())
    etag = str(entry.get("ETag") or entry.get("etag") or "").strip('"')
    return Digest("md5", etag) if _MD5.fullmatch(etag) else None
