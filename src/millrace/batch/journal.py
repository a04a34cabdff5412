"""What makes each request's result stand in the output exactly once: an SQLite database beside it.

The journal knows every line of the input, which of them are done, and the results that are not yet
safely in the result files. A result is committed here first, then appended to its file. From time
to time the files are synchronised with the disk; then their sizes are noted, and the results up to
there dropped. After a crash the files are cut to the sizes noted, and the results that the journal
still has are appended again. So a kill or a loss of power costs no result that was committed, tears
no line and doubles none. Requests that were being answered are asked again.

Methods block; one thread at a time calls them. How requests are answered is not known here.
"""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from time import monotonic

import msgspec

from millrace.batch.input_file import InputFile, Place
from millrace.batch.lines import LineError, Usage, error_line
from millrace.batch.result_file import ResultFile
from millrace.errors import UserError, one_line

SUFFIX = ".journal"
SYNC_SECONDS = 1.0  # between two times that the result files are synchronised
SYNC_BYTES = 8 << 20
_ABANDONED_AT_ONCE = 1000
_SHOWN = 20  # bad lines that are listed
_VERSION = "1"
_SCHEMA = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE lines (
    number INTEGER PRIMARY KEY, custom_id TEXT NOT NULL UNIQUE, offset INTEGER NOT NULL,
    size INTEGER NOT NULL, grouped BLOB NOT NULL, done INTEGER NOT NULL DEFAULT 0);
CREATE INDEX pending ON lines (grouped, number) WHERE done = 0;
CREATE TABLE results (
    place INTEGER PRIMARY KEY AUTOINCREMENT, failed INTEGER NOT NULL, data BLOB NOT NULL);
"""


class StopError(Exception):
    """The run cannot go on now; the same command goes on later. The message says why."""


class Pending(msgspec.Struct, frozen=True):
    """A request that is not done. key: of its idempotency, the same each time it is sent."""

    place: Place
    custom_id: str
    key: str


class Result(msgspec.Struct, frozen=True):
    """The result of a request. line: for its file. failed: whether that is the error file."""

    number: int
    line: bytes
    failed: bool
    usage: Usage = Usage()


class Counts(msgspec.Struct, frozen=True):
    """How far a batch is. seconds: that all runs of it have taken."""

    total: int = 0
    done: int = 0
    failed: int = 0
    usage: Usage = Usage()
    seconds: float = 0.0


class Journal:
    """The journal of one output file, open, with its result files. output, errors: their paths.

    The error file is made with the first line for it.
    """

    def __init__(self, output: Path, errors: Path) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        self._files: list[ResultFile | None] = [ResultFile(output), None]
        self._errors = errors
        self._database: sqlite3.Connection | None = None
        self._reading: sqlite3.Connection | None = None  # beside transactions of another thread
        self._unsynced = 0
        self._synced_at = monotonic()
        self._last_place = 0
        self.counts = Counts()
        try:
            self._output.lock()
            self._begun = self.path.exists()
            if not self._begun and self._output.found_size():
                raise UserError(f"{output} is there already, without a journal; name another file")
            self._open()
        except BaseException:
            self.close()
            raise

    @property
    def _output(self) -> ResultFile:
        output = self._files[0]
        assert output is not None
        return output

    @property
    def _db(self) -> sqlite3.Connection:
        assert self._database is not None, "the journal is closed"
        return self._database

    def _open(self) -> None:
        try:
            self._database, self._reading = (
                sqlite3.connect(
                    self.path, timeout=5.0, isolation_level=None, check_same_thread=False
                )
                for _ in range(2)
            )
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
        except sqlite3.Error as error:
            raise UserError(f"{self.path}: {one_line(error)}") from None

    # --- the beginning ---------------------------------------------------------------------------

    def load(self, source: InputFile) -> None:
        """Take in the input's lines, or find out how far its batch is.

        Raises UserError: bad lines, or another input than before; StopError: the disk is full.
        """
        with self._guarded():
            if not self._tables():
                if self._output.found_size():
                    raise UserError(f"{self.path} is empty, and {self._output.path} is not")
                self._take_in(source)
            else:
                self._check(source)
            self._recover()

    def _tables(self) -> bool:
        row = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'facts'").fetchone()
        return row is not None

    def _take_in(self, source: InputFile) -> None:
        with self._transaction():
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            bad = list[str]()
            count = bad_count = 0
            for place, line in source.lines():
                count += 1
                problem = str(line) if isinstance(line, LineError) else None
                if not isinstance(line, LineError):
                    problem = self._insert(place, line.custom_id, line.group())
                if problem is not None:
                    bad_count += 1
                    bad += [f"line {place.number}: {problem}"] if len(bad) < _SHOWN else []
            if bad:
                more = f"; and {bad_count - len(bad)} more" if bad_count > len(bad) else ""
                raise InputError(f"{source.path}: {'; '.join(bad)}{more}. Nothing was sent", bad)
            if not count:
                raise InputError(f"{source.path} holds no request", [])
            facts = {
                "version": _VERSION, "input": source.digest(), "batch": uuid.uuid4().hex,
                "total": count, "done": 0, "failed": 0, "seconds": 0.0,
                "prompt": 0, "output": 0, "cached": 0, "size0": 0, "size1": 0,
            }  # fmt: skip
            self._note(facts)

    def _insert(self, place: Place, custom_id: str, group: bytes) -> str | None:
        """Add a line; what is wrong with it."""
        row = (place.number, custom_id, place.offset, place.size, group)
        try:
            self._db.execute(
                "INSERT INTO lines (number, custom_id, offset, size, grouped) "
                "VALUES (?, ?, ?, ?, ?)",
                row,
            )
        except sqlite3.IntegrityError:
            found = self._db.execute("SELECT number FROM lines WHERE custom_id = ?", row[1:2])
            return f"custom_id {custom_id[:100]!r} stands in line {found.fetchone()[0]} too"
        except UnicodeEncodeError:
            return "custom_id holds half of a surrogate pair"
        return None

    def _check(self, source: InputFile) -> None:
        facts = self._facts()
        if facts.get("version") != _VERSION:
            raise UserError(f"{self.path} is of another version of Millrace; use another output")
        if facts["input"] != source.digest():
            raise UserError(
                f"{source.path} (or --model) has changed since {self._output.path} was begun; "
                "put it back, or name another output file"
            )

    def _recover(self) -> None:
        """Bring the result files to what the journal says."""
        facts = self._facts()
        self._batch = facts["batch"]
        self.counts = _counts_of(facts)
        self._output.cut(int(facts["size0"]))
        if int(facts["size1"]) or self._errors.exists():
            self._file(True).cut(int(facts["size1"]))
        for place, failed, data in self._db.execute("SELECT * FROM results ORDER BY place"):
            self._file(bool(failed)).append(data)
            self._last_place = place
        self._sync()

    def _file(self, failed: bool) -> ResultFile:
        found = self._files[failed]
        if found is None:
            found = self._files[failed] = ResultFile(self._errors)
        return found

    # --- the run ---------------------------------------------------------------------------------

    def pending(self) -> Iterator[Pending]:
        """All requests that are not done, those whose prompts begin alike together."""
        after: tuple[bytes, int] = (b"", 0)
        while True:
            assert self._reading is not None, "the journal is closed"
            rows = self._reading.execute(
                "SELECT number, custom_id, offset, size, grouped FROM lines "
                "WHERE done = 0 AND (grouped, number) > (?, ?) ORDER BY grouped, number LIMIT 256",
                after,
            ).fetchall()
            for number, custom_id, offset, size, _ in rows:
                key = f"{self._batch}-{number}"
                yield Pending(Place(number, offset, size), custom_id, key)
            if not rows:
                return
            after = rows[-1][4], rows[-1][0]

    def record(self, results: Sequence[Result], seconds: float) -> None:
        """Keep results for good. seconds: of this run since the last call. Raises StopError."""
        with self._guarded():
            with self._transaction():
                for result in results:
                    changed = self._db.execute(
                        "UPDATE lines SET done = 1 WHERE number = ? AND done = 0", (result.number,)
                    )
                    assert changed.rowcount == 1, f"line {result.number} is done already"
                    inserted = self._db.execute(
                        "INSERT INTO results (failed, data) VALUES (?, ?)",
                        (int(result.failed), result.line),
                    )
                    self._last_place = inserted.lastrowid or 0
                counts = _added(self.counts, results, seconds)
                self._note(_facts_of(counts))
            self.counts = counts
            for failed in (False, True):
                data = b"".join(one.line for one in results if one.failed == failed)
                if data:
                    self._file(failed).append(data)
                    self._unsynced += len(data)
            if self._unsynced >= SYNC_BYTES or monotonic() - self._synced_at >= SYNC_SECONDS:
                self._sync()

    def abandon(self, code: str, message: str) -> None:
        """Give an error to every request that is not done. Raises StopError."""
        while True:
            pending = list(islice(self.pending(), _ABANDONED_AT_ONCE))
            if not pending:
                break
            self.record(
                [Result(p.place.number, error_line(p.custom_id, code, message), True)
                 for p in pending],
                0.0,
            )  # fmt: skip
        self.finish()

    def finish(self) -> None:
        """Synchronise the result files. Raises StopError."""
        with self._guarded():
            self._sync()
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _sync(self) -> None:
        """Have the result files on the disk, and drop what the journal kept for them."""
        for file in self._files:
            if file is not None:
                file.sync()
        with self._transaction():
            self._note({f"size{i}": f.size for i, f in enumerate(self._files) if f is not None})
            self._db.execute("DELETE FROM results WHERE place <= ?", (self._last_place,))
        self._unsynced = 0
        self._synced_at = monotonic()

    def close(self) -> None:
        """Close everything, in whatever state it is."""
        if self._database is not None:
            empty = False
            with contextlib.suppress(sqlite3.Error):
                empty = not self._tables()
            if self._reading is not None:
                self._reading.close()
                self._reading = None
            self._database.close()
            self._database = None
            if empty and not self._output.found_size():  # nothing was taken in
                self.path.unlink(missing_ok=True)
                self._output.path.unlink(missing_ok=True)
        for index, file in enumerate(self._files):
            if file is not None:
                file.close()
                self._files[index] = None

    # --- the database ----------------------------------------------------------------------------

    def _facts(self) -> dict[str, str]:
        return dict(self._db.execute("SELECT name, value FROM facts"))

    def _note(self, facts: dict[str, object]) -> None:
        rows: Iterable[tuple[str, str]] = ((name, str(value)) for name, value in facts.items())
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Failures of the disk as StopError."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise StopError(_stopped(f"{self.path}: {one_line(error)}")) from error
        except OSError as error:
            name = error.filename or self._output.path
            raise StopError(_stopped(f"{name}: {error.strerror or error}")) from error


class InputError(UserError):
    """An input with bad lines. problems: the first of them, each with its number."""

    def __init__(self, message: str, problems: Sequence[str]) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


def read_counts(output: Path) -> Counts:
    """How far the batch of an output file is, or was; nobody needs to have it open."""
    path = output.with_name(output.name + SUFFIX)
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        ) as db:
            return _counts_of(dict(db.execute("SELECT name, value FROM facts")))
    except sqlite3.Error as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def _counts_of(facts: Mapping[str, str]) -> Counts:
    usage = Usage(*(int(facts[name]) for name in ("prompt", "output", "cached")))
    return Counts(
        int(facts["total"]), int(facts["done"]), int(facts["failed"]), usage,
        float(facts["seconds"]),
    )  # fmt: skip


def _stopped(reason: str) -> str:
    return (
        f"stopped, because results cannot be kept: {reason}. Nothing is lost: make room, and run "
        "the same command again; it goes on where it stopped"
    )


def _added(counts: Counts, results: Sequence[Result], seconds: float) -> Counts:
    return Counts(
        counts.total,
        counts.done + len(results),
        counts.failed + sum(result.failed for result in results),
        sum((result.usage for result in results), counts.usage),
        counts.seconds + seconds,
    )


def _facts_of(counts: Counts) -> dict[str, object]:
    usage = counts.usage
    return {
        "done": counts.done, "failed": counts.failed, "seconds": counts.seconds,
        "prompt": usage.prompt, "output": usage.output, "cached": usage.cached,
    }  # fmt: skip
