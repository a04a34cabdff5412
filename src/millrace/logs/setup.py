"""The format and the level of all logs: one line a record, with time, level and source.

A text line is `2026-11-30 12:00:00.123 INFO engine: message`; with the format "json" it is an
object. The source names the program, and in a replica that a gateway runs also the replica:
`replica 3 engine`. Children get level, format and the replica's name by environment variables, so
all processes of a service write the same lines. Where lines go is known in safe_log.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

import msgspec

from millrace.common.safe_log import ProtectedStream, stderr_line
from millrace.errors import ConfigError

LogLevel = Literal["critical", "error", "warning", "info", "debug"]
LogFormat = Literal["text", "json"]

LEVEL_VARIABLE = "MILLRACE_LOG_LEVEL"
FORMAT_VARIABLE = "MILLRACE_LOG_FORMAT"
REPLICA_VARIABLE = "MILLRACE_LOG_REPLICA"  # the name of the replica that a program belongs to

_OURS = re.compile(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ |\{"time":"')


class LogOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a program's log; None: what the environment says, else info and text."""

    log_level: LogLevel | None = None
    log_format: LogFormat | None = None


NO_LOG_OPTIONS = LogOptions()

LOG_HELP: Mapping[str, str] = {
    "log_level": f"Least level of lines in the log (default: {LEVEL_VARIABLE} or info).",
    "log_format": f"text, or json for one object a line (default: {FORMAT_VARIABLE} or text).",
}


def set_up_logs(source: str, options: LogOptions = NO_LOG_OPTIONS) -> None:
    """Send the records of all loggers of this process to stderr, in the one format.

    Level and format are handed on to child processes. Call it after safe_log has protected stderr.
    Raises ConfigError for a variable of the environment that names no level or format.
    """
    level = _choice(options.log_level, LEVEL_VARIABLE, LogLevel, "info")
    style = _choice(options.log_format, FORMAT_VARIABLE, LogFormat, "text")
    os.environ[LEVEL_VARIABLE], os.environ[FORMAT_VARIABLE] = level, style
    name = " ".join(filter(None, (os.environ.get(REPLICA_VARIABLE), source)))
    handler = _StderrHandler()
    formatter = _JsonFormatter(name) if style == "json" else _TextFormatter(name)
    handler.setFormatter(formatter)
    if isinstance(sys.stderr, ProtectedStream):
        sys.stderr.writer.notice = partial(_lost_lines, formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.INFO, _number(level)))  # other packages' details help nobody
    logging.getLogger("millrace").setLevel(_number(level))


def in_replica() -> bool:
    """Whether this program is part of a replica that a gateway on this host runs."""
    return REPLICA_VARIABLE in os.environ


def relay_line(source: str, line: str) -> None:
    """Log what a child process wrote: one of our lines as it is, any other as a record."""
    if _OURS.match(line):
        stderr_line(line)
    else:
        logging.getLogger("millrace.child").info("%s", line, extra={"source": source})


def _choice(given: str | None, variable: str, kind: Any, default: str) -> str:
    value = given or os.environ.get(variable, "").lower() or default
    choices: tuple[str, ...] = kind.__args__
    if value not in choices:
        raise ConfigError(f"{variable} {value!r}: use {', '.join(choices)}")
    return value


def _lost_lines(formatter: logging.Formatter, lost: int, reason: str) -> bytes:
    """The line that says how many lines were lost."""
    text = f"{lost} log lines were lost ({reason})"
    record = logging.LogRecord("millrace.log", logging.ERROR, "", 0, text, None, None)
    return f"{formatter.format(record)}\n".encode()


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


class _StderrHandler(logging.StreamHandler[Any]):
    """Writes to whatever sys.stderr is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, _: Any) -> None:
        """It always is stderr."""


class _TextFormatter(logging.Formatter):
    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        source = getattr(record, "source", self._source)
        return f"{_moment(record, ' ')} {record.levelname} {source}: {super().format(record)}"


class _JsonFormatter(logging.Formatter):
    """fields: a record's further figures, under their own names."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _moment(record, "T") + time.strftime("%z", time.localtime(record.created)),
            "level": record.levelname.lower(),
            "source": getattr(record, "source", self._source),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line |= cast(Mapping[str, object], getattr(record, "fields", {}))
        return msgspec.json.encode(line, enc_hook=str).decode()


def _moment(record: logging.LogRecord, between: str) -> str:
    """Local time with milliseconds."""
    seconds = time.strftime(f"%Y-%m-%d{between}%H:%M:%S", time.localtime(record.created))
    return f"{seconds}.{int(record.created * 1000) % 1000:03d}"
