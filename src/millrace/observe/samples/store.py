"""Samples in a directory: files of Parquet, or of JSON lines without pyarrow, and events.

A directory that takes nothing more, such as one on a full disk, is tried again; the newest samples
wait for it in memory.

A file is written whole and then renamed, so a kill loses the seconds since the last one and tears
none. A later run in the same directory goes on behind the files that are there.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from millrace.common.optional import probe
from millrace.errors import UserError
from millrace.observe.samples.sample import KEY, Array, Key, Points, Row, points_of

FLUSH_EVERY = 10.0  # seconds
MOST_ROWS = 500_000  # that wait in memory
FILES_AT_ONCE = 30  # that are read
EVENTS, META = "events.jsonl", "meta.json"


class Store:
    """Writes samples. as_text: as JSON lines in any case. lost: samples that were dropped because
    they could not be written. Raises UserError for a directory that cannot be made."""

    def __init__(self, directory: Path, *, as_text: bool = False) -> None:
        self.directory = directory
        self._rows: list[Row] = []
        self.lost = 0
        self._since: float | None = None
        self._arrow = None if as_text else probe("pyarrow").module
        try:
            directory.mkdir(parents=True, exist_ok=True)
            numbers = [int(path.stem.rpartition("-")[2]) for path in _files(directory)]
        except (OSError, ValueError) as error:
            raise UserError(f"--out {directory}: {error}") from None
        self._next = max(numbers, default=0) + 1

    @property
    def suffix(self) -> str:
        return "parquet" if self._arrow is not None else "jsonl"

    @property
    def waits(self) -> bool:
        """Whether samples wait to be written."""
        return bool(self._rows)

    def add(self, rows: list[Row]) -> None:
        """Keep samples; writes a file when it is time. Raises UserError where that cannot be done;
        the samples are written with the next ones then."""
        if not rows:
            return
        self._rows += rows
        self.lost += max(0, len(self._rows) - MOST_ROWS)
        del self._rows[:-MOST_ROWS]
        if self._since is None:
            self._since = rows[0].t
        if rows[-1].t - self._since >= FLUSH_EVERY:
            self._since = rows[-1].t
            self.flush()

    def flush(self) -> None:
        """Write what waits. Raises UserError where that cannot be done."""
        if not self._rows:
            return
        target = self.directory / f"samples-{self._next:06d}.{self.suffix}"
        part = target.with_name(f".{target.name}.part")
        try:
            self._write(part)
            os.replace(part, target)
        except OSError as error:
            raise UserError(f"{target}: {error.strerror or error}") from None
        self._rows, self._since, self._next = [], None, self._next + 1

    def _write(self, path: Path) -> None:
        if self._arrow is None:
            path.write_text("".join(f"{json.dumps(row)}\n" for row in self._rows))
            return
        import pyarrow as pa
        import pyarrow.parquet as parquet

        columns = list(zip(*self._rows, strict=True))
        types = [pa.float64(), pa.string(), pa.string(), pa.string(), pa.float64()]
        arrays = [pa.array(c, type=kind) for c, kind in zip(columns, types, strict=True)]
        table = pa.table(arrays, names=list(Row._fields))
        parquet.write_table(table, path, compression="zstd")

    def note(self, meta: dict[str, Any]) -> None:
        """Facts of the run, over those that are there. Raises UserError like `flush`."""
        path = self.directory / META
        part = path.with_name(f".{META}.part")
        try:
            part.write_text(json.dumps(read_meta(self.directory) | meta, indent=1))
            os.replace(part, path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None


def _files(directory: Path) -> list[Path]:
    found = [*directory.glob("samples-*.parquet"), *directory.glob("samples-*.jsonl")]
    return sorted(found, key=lambda path: path.stem)


def mark(directory: Path, t: float, name: str) -> None:
    """Write that a phase begins."""
    with (directory / EVENTS).open("a") as file:
        file.write(json.dumps({"t": t, "phase": name}) + "\n")


def read_events(directory: Path) -> list[tuple[float, str]]:
    """(when, phase that begins then), in order."""
    path = directory / EVENTS
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((float(e["t"]), str(e["phase"])) for e in map(json.loads, lines))


def read_meta(directory: Path) -> dict[str, Any]:
    path = directory / META
    return dict(json.loads(path.read_text())) if path.exists() else {}


def read_rows(directory: Path) -> Iterator[Row]:
    """All samples of a directory, in the order of their files. Raises UserError without any."""
    for path in _some_files(directory):
        if path.suffix == ".jsonl":
            yield from (Row(*json.loads(line)) for line in path.read_text().splitlines())
        else:
            columns = _read_table([path], None).to_pydict()
            yield from map(Row, *(columns[name] for name in Row._fields))


def read_points(directory: Path, names: Collection[str]) -> Points:
    """The samples of these figures. A day of a fleet fits into memory so, which rows would not.
    Raises UserError like `read_rows`."""
    files = _some_files(directory)
    parts: dict[Key, list[tuple[Array, Array]]] = defaultdict(list)
    tables = [path for path in files if path.suffix == ".parquet"]
    for start in range(0, len(tables), FILES_AT_ONCE):
        for key, part in _grouped(_read_table(tables[start : start + FILES_AT_ONCE], names)):
            parts[key].append(part)
    for path in set(files) - set(tables):
        rows = (Row(*json.loads(line)) for line in path.read_text().splitlines())
        for key, part in points_of(row for row in rows if row.name in names).items():
            parts[key].append(part)
    return {
        key: (np.concatenate([t for t, _ in found]), np.concatenate([v for _, v in found]))
        for key, found in parts.items()
    }


def _grouped(table: Any) -> Iterator[tuple[Key, tuple[Array, Array]]]:
    """The points of each series of a table of pyarrow's."""
    columns = [table.column(name).combine_chunks() for name in KEY]
    code = np.zeros(len(table), dtype=np.int64)
    for column in columns:
        code = code * len(column.dictionary) + column.indices.to_numpy()
    order = np.argsort(code, kind="stable")
    t, values = (table.column(name).to_numpy()[order] for name in ("t", "value"))
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    for start, end in pairwise([*starts.tolist(), len(order)]):
        row = int(order[start])
        name, source, labels = (str(column[row].as_py()) for column in columns)
        yield (name, source, labels), (t[start:end], values[start:end])


def _read_table(paths: Sequence[Path], names: Collection[str] | None) -> Any:
    """Samples as a table of pyarrow's; names: of figures, None for all."""
    found = probe("pyarrow")
    if found.module is None:
        raise UserError(f"{paths[0]}: {found.problem}; {found.remedy}")
    import pyarrow.parquet as parquet

    wanted = None if names is None else [("name", "in", list(names))]
    table = parquet.read_table(list(map(str, paths)), filters=wanted, read_dictionary=list(KEY))
    return table.unify_dictionaries()


def _some_files(directory: Path) -> list[Path]:
    files = _files(directory)
    if not files:
        raise UserError(f"{directory}: no samples; give the --out of a `millrace observe` run")
    return files
