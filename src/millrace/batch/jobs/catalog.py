"""Which files and batches there are: a directory with their contents and an SQLite database.

Several processes share it: those that answer the API, and the one that runs the batches. A client
sees its own objects only. How batches run is not known here.

    DIR/catalog.sqlite    the objects
    DIR/files/ID          contents
    DIR/jobs/BATCH_ID/    result files and journal of a batch that runs
    DIR/uploads/          files that are coming in
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from millrace.batch.jobs.objects import OPEN, BatchObject, Deleted, FileObject, Page
from millrace.common.api_errors import ApiError
from millrace.errors import ConfigError, one_line

Kind = Literal["file", "batch"]
_Object = TypeVar("_Object", FileObject, BatchObject)

MOST_LISTED = 100
UPLOAD_SECONDS = 3600  # after which an upload that is not complete has been given up
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL,
    owner TEXT NOT NULL, purpose TEXT NOT NULL, status TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS listed ON objects (kind, owner, place);
CREATE INDEX IF NOT EXISTS open ON objects (kind, status);
CREATE TABLE IF NOT EXISTS keeps (batch TEXT PRIMARY KEY, seconds INTEGER NOT NULL);
"""
_TYPES: dict[Kind, type[FileObject] | type[BatchObject]] = {
    "file": FileObject, "batch": BatchObject,
}  # fmt: skip
_encode = msgspec.json.Encoder().encode


class Catalog:
    """The catalog of a directory. most_bytes: of all files together."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self.directory = directory
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        try:
            for name in ("files", "jobs", "uploads"):
                (directory / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(
                directory / "catalog.sqlite", timeout=10.0, isolation_level=None,
                check_same_thread=False,
            )  # fmt: skip
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"--batch-dir {directory}: {one_line(error)}") from None

    def close(self) -> None:
        self._db.close()

    # --- places ----------------------------------------------------------------------------------

    def content(self, file_id: str) -> Path:
        """Where a file's content is."""
        return self.directory / "files" / file_id

    def job(self, batch_id: str) -> Path:
        """Where a batch works."""
        return self.directory / "jobs" / batch_id

    def new_upload(self) -> Path:
        """Where a file can be written that comes in."""
        self._remove_old_uploads()
        return self.directory / "uploads" / uuid.uuid4().hex

    def _remove_old_uploads(self) -> None:
        for path in (self.directory / "uploads").iterdir():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < time.time() - UPLOAD_SECONDS:
                    path.unlink()

    def check_room(self, more: int) -> None:
        """Raise ApiError (413) unless so many bytes more may be kept."""
        used = sum(path.stat().st_size for path in (self.directory / "files").iterdir())
        if used + more > self._most_bytes:
            raise ApiError(
                413,
                f"files have {used} bytes of the {self._most_bytes} that are kept "
                "(--batch-dir-gb); delete some",
                code="storage_full",
            )

    # --- files -----------------------------------------------------------------------------------

    def add_file(
        self, path: Path, owner: str, filename: str, purpose: str, keep: int | None,
        file_id: str = "",
    ) -> FileObject:  # fmt: skip
        """Take over a file that is complete. keep: seconds. file_id: if it has one already."""
        now = int(time.time())
        made = FileObject(
            id=file_id or f"file-{uuid.uuid4().hex}",
            bytes=path.stat().st_size,
            created_at=now,
            filename=filename,
            purpose=purpose,
            expires_at=None if keep is None else now + keep,
        )
        _sync(path)
        os.replace(path, self.content(made.id))
        _sync(self.content(made.id).parent)
        self._insert("file", made.id, owner, purpose, "", made)
        return made

    def file(self, file_id: str, owner: str) -> FileObject:
        """A file. Raises ApiError (404)."""
        return self._get("file", file_id, owner, FileObject)

    def delete_file(self, file_id: str, owner: str) -> Deleted:
        """Forget a file. Raises ApiError (404)."""
        self.file(file_id, owner)
        with self._transaction() as db:
            db.execute("DELETE FROM objects WHERE id = ?", (file_id,))
        self.content(file_id).unlink(missing_ok=True)
        return Deleted(file_id)

    def remove_expired(self, now: float) -> None:
        """Delete the files whose time is over."""
        for file, owner in self._all("file", ()):
            assert isinstance(file, FileObject)
            if file.expires_at is not None and file.expires_at <= now:
                with contextlib.suppress(ApiError):
                    self.delete_file(file.id, owner)

    # --- batches ---------------------------------------------------------------------------------

    def add_batch(self, batch: BatchObject, owner: str, keep: int | None) -> None:
        """A new batch. keep: seconds for its result files."""
        self._insert("batch", batch.id, owner, "", batch.status, batch)
        if keep is not None:
            with self._transaction() as db:
                db.execute("INSERT INTO keeps VALUES (?, ?)", (batch.id, keep))

    def batch(self, batch_id: str, owner: str) -> BatchObject:
        """A batch. Raises ApiError (404)."""
        return self._get("batch", batch_id, owner, BatchObject)

    def keep(self, batch_id: str) -> int | None:
        """Seconds for which a batch's result files are kept; None: until they are deleted."""
        with self._lock:
            row = self._db.execute("SELECT seconds FROM keeps WHERE batch = ?", (batch_id,))
            found = row.fetchone()
        return None if found is None else int(found[0])

    def open_batches(self) -> list[tuple[BatchObject, str]]:
        """Batches that have not ended, oldest first, each with its owner."""
        return [
            (batch, owner)
            for batch, owner in self._all("batch", OPEN)
            if isinstance(batch, BatchObject)
        ]

    def change(self, batch_id: str, change: Callable[[BatchObject], None]) -> BatchObject:
        """Change a batch, whoever else does at the same time. Raises ApiError (404)."""
        with self._transaction() as db:
            row = db.execute("SELECT data FROM objects WHERE id = ?", (batch_id,)).fetchone()
            if row is None:
                raise _not_found("batch", batch_id)
            batch = msgspec.json.decode(row[0], type=BatchObject)
            change(batch)
            db.execute(
                "UPDATE objects SET data = ?, status = ? WHERE id = ?",
                (_encode(batch), batch.status, batch_id),
            )
        return batch

    # --- both ------------------------------------------------------------------------------------

    def page(
        self, kind: Kind, owner: str, limit: int, after: str, ascending: bool, purpose: str = ""
    ) -> Page:
        """A part of a list, behind the object `after`."""
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        start = f"AND place {sign} (SELECT place FROM objects WHERE id = ?) " if after else ""
        only = "AND purpose = ? " if purpose else ""
        values = [kind, owner, *([after] if after else []), *([purpose] if purpose else [])]
        with self._lock:
            rows = self._db.execute(
                f"SELECT data FROM objects WHERE kind = ? AND owner = ? {start}{only}"
                f"ORDER BY place {order} LIMIT ?",
                [*values, limit + 1],
            ).fetchall()
        found = [msgspec.json.decode(row[0], type=_TYPES[kind]) for row in rows[:limit]]
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return Page(found, first, last, len(rows) > limit)

    def _insert(
        self, kind: Kind, id: str, owner: str, purpose: str, status: str, data: msgspec.Struct
    ) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO objects (id, kind, owner, purpose, status, data) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (id, kind, owner, purpose, status, _encode(data)),
            )

    def _get(self, kind: Kind, id: str, owner: str, type: type[_Object]) -> _Object:
        with self._lock:
            row = self._db.execute(
                "SELECT data FROM objects WHERE id = ? AND kind = ? AND owner = ?",
                (id, kind, owner),
            ).fetchone()
        if row is None:
            raise _not_found(kind, id)
        return msgspec.json.decode(row[0], type=type)

    def _all(
        self, kind: Kind, statuses: tuple[str, ...]
    ) -> Iterator[tuple[FileObject | BatchObject, str]]:
        """All objects of a kind, oldest first, with their owners. statuses: only with these."""
        only = f"AND status IN ({','.join('?' * len(statuses))}) " if statuses else ""
        with self._lock:
            rows = self._db.execute(
                f"SELECT data, owner FROM objects WHERE kind = ? {only}ORDER BY place",
                (kind, *statuses),
            ).fetchall()
        for data, owner in rows:
            yield msgspec.json.decode(data, type=_TYPES[kind]), owner

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


def _not_found(kind: Kind, id: str) -> ApiError:
    return ApiError(404, f"No such {kind}: {id[:100]!r}", param="id", code=f"{kind}_not_found")


def _sync(path: Path) -> None:
    """Have a file, or a directory, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
