"""The files of a run: its JSON file, the raw data beside it, and the provenance in it.

Raw data are Parquet where pyarrow is installed (`pip install millrace[bench]`), else JSON Lines of
the same columns.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from millrace.bench.flags.structs import RawFormat
from millrace.bench.load.records import INT_FIELDS, RequestTiming
from millrace.bench.measure.telemetry import Sample
from millrace.bench.report.run_report import DETAIL
from millrace.common.optional import probe, require
from millrace.errors import UserError
from millrace.version import __version__

_PACKAGES = ("uvloop", "httptools", "msgspec", "numpy")
_SECRET = ("authorization", "api-key", "token", "cookie")


def default_name(fields: Mapping[str, Any]) -> str:
    """The name of a run's file, as `vllm bench serve` makes it."""
    concurrency = f"-concurrency{fields['max_concurrency']}" if fields["max_concurrency"] else ""
    model = str(fields["model_id"]).rstrip("/").rsplit("/", 1)[-1]
    rate = f"{fields['request_rate']}qps"
    label = str(fields.get("label") or fields["backend"]).replace("/", "_")
    return f"{label}-{rate}{concurrency}-{model}-{fields['date']}.json"


def new_file(path: Path) -> Path:
    """An empty file at `path`, or beside it with a number where there is one already.

    It is there when this returns, so two processes never get the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, number = path.name.removesuffix(".json"), 1
    while True:
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            path = path.with_name(f"{stem}-{number}.json")
        else:
            return path


def write_json(path: Path, content: Any) -> Path:
    """Write `content` as JSON, its directory made if need be; a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(content)))
    partial.replace(path)
    return path


def save_run(
    path: Path,
    fields: Mapping[str, Any],
    records: Sequence[RequestTiming],
    samples: Sequence[Sample],
    *,
    detailed: bool,
    raw: RawFormat,
    append: bool = False,
) -> list[Path]:
    """Write the JSON file of a run and its raw data; returns the paths.

    append: add a line to the file, and keep the raw data of the runs before it.

    Raises UserError when raw data are to be Parquet and pyarrow is not installed.
    """
    kept = {name: v for name, v in fields.items() if detailed or name not in DETAIL}
    columns = {"requests": request_columns(records), "samples": sample_columns(samples)}
    stem, written = path.name.removesuffix(".json"), []
    if append:
        stem = _free_stem(path, stem)
    for name, table in columns.items():
        if raw != "none" and any(table.values()):
            written.append(_write_table(path.with_name(f"{stem}.{name}"), table, raw))
    kept["raw_data"] = [file.name for file in written]
    if append:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            start = b"\n" if file.tell() else b""
            file.write(start + msgspec.json.encode(kept))
        return [path, *written]
    return [write_json(path, kept), *written]


def _free_stem(path: Path, stem: str) -> str:
    """A stem of names of raw data that are not there yet."""
    number, found = 1, stem
    while any(path.parent.glob(f"{found}.requests.*")) or any(
        path.parent.glob(f"{found}.samples.*")
    ):
        number += 1
        found = f"{stem}-{number}"
    return found


def check_raw(raw: RawFormat) -> str:
    """A remark when raw data will be JSON Lines for want of pyarrow; else empty.

    Raises UserError when the format cannot be written here.
    """
    if raw not in ("auto", "parquet"):
        return ""
    found = probe("pyarrow")
    if raw == "parquet" and found.problem:
        raise UserError(f"--raw parquet: {found.problem}; {found.remedy}, or use --raw jsonl")
    return found.problem and f"raw data will be JSON Lines: {found.problem}; {found.remedy}"


def request_columns(records: Sequence[RequestTiming]) -> dict[str, list[Any]]:
    """The columns of all requests; times in ns of the monotonic clock, as taken."""
    columns: dict[str, list[Any]] = {
        name: [int(getattr(r, name)) for r in records] for name in INT_FIELDS
    }
    columns["error"] = [r.error for r in records]
    columns["chunk_ns"] = [list(r.chunk_ns) for r in records]
    if any(len(r.sent_ns) for r in records):
        columns["sent_ns"] = [list(r.sent_ns) for r in records]
    return columns


def sample_columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """The columns of all samples of servers and GPUs; an unknown figure is null."""
    names = sorted({f"server_{n}" for s in samples for n in s.server})
    names += sorted({f"gpu_{n}" for s in samples for n in s.gpu})
    columns: dict[str, list[Any]] = {"at_ns": [s.at_ns for s in samples]}
    for name in names:
        kind, _, figure = name.partition("_")
        columns[name] = [getattr(s, kind).get(figure) for s in samples]
    return columns


def _write_table(path: Path, columns: Mapping[str, list[Any]], raw: RawFormat) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if raw == "parquet" or (raw == "auto" and not probe("pyarrow").problem):
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = path.with_suffix(f"{path.suffix}.parquet")
        pq.write_table(pa.table(dict(columns)), path, compression="zstd")
        return path
    path = path.with_suffix(f"{path.suffix}.jsonl")
    with path.open("wb") as file:
        for row in zip(*columns.values(), strict=True):
            file.write(msgspec.json.encode(dict(zip(columns, row, strict=True))) + b"\n")
    return path


def read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a raw data file, of either kind. Raises UserError when it cannot be read."""
    if path.suffix == ".parquet":
        require("pyarrow", str(path))
        import pyarrow.parquet as pq

        table: dict[str, list[Any]] = pq.read_table(path).to_pydict()
        return table
    rows = [msgspec.json.decode(line, type=dict[str, Any]) for line in path.open("rb")]
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


# --- provenance --------------------------------------------------------------------------------


def provenance(server_version: str | None = None) -> dict[str, Any]:
    """The command, the versions and the machine of the generator, for the result file.

    Values of headers that look like secrets are left out.
    """
    return {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": hide_secrets(sys.argv),
        "millrace": __version__,
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(os.getloadavg()[0], 2),
        "server_version": server_version,
    }


def hide_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line without the values of headers that carry a key."""
    shown = [Path(arguments[0]).name, *arguments[1:]] if arguments else []
    for number, text in enumerate(shown):
        name, found, _ = text.removeprefix("--header=").partition("=")
        if found and any(word in name.lower() for word in _SECRET) and " " not in name:
            shown[number] = text[: text.index(name) + len(name)] + "=..."
    return shown


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
