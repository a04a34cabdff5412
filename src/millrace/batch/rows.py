"""Requests that stand in a table's rows, answered by the same dispatcher as those of a file.

A block of rows is in memory as a whole, and so are its results. Where rows come from, and what
keeps results, is for others: Ray Data (`millrace.offline.ray_data`) is one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw

from millrace.batch.dispatcher import Dispatcher
from millrace.batch.endpoint import Endpoint
from millrace.batch.input_file import Place
from millrace.batch.journal import Counts, Pending, Result
from millrace.batch.lines import LineError, RequestLine, error_line, read_line
from millrace.batch.options import DispatchOptions
from millrace.batch.window import Window

COLUMNS = ("custom_id", "url", "body")  # of a request; url may be absent
RESULT_COLUMNS = (
    "status_code", "response", "error", "prompt_tokens", "output_tokens", "cached_tokens",
)  # fmt: skip
DEFAULT_URL = "/v1/chat/completions"

_encode = msgspec.json.Encoder().encode


class Block:
    """The requests of some rows, and their results once they are there. It takes the place of both
    journal and input file of a dispatcher. model: in place of the rows' own."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], model: str | None = None) -> None:
        self._requests: dict[int, RequestLine] = {}
        self._lines: dict[int, bytes] = {}
        self._results: dict[int, Result] = {}
        for number, row in enumerate(rows):
            try:
                self._requests[number] = _request(row, model)
            except LineError as error:
                line = error_line(str(row.get("custom_id", "")), "invalid_request", str(error))
                self._results[number] = Result(number, line, True)
        self.counts = Counts(total=len(rows), done=len(self._results))

    def pending(self) -> Iterator[Pending]:
        """Requests whose prompts begin alike stand together."""
        order = sorted(self._requests, key=lambda number: (self._requests[number].group(), number))
        for number in order:
            custom_id = self._requests[number].custom_id
            yield Pending(Place(number, 0, 0), custom_id, f"row-{custom_id}")

    def request(self, place: Place) -> RequestLine:
        """The request of a place that `pending` told."""
        return self._requests[place.number]

    def record(self, results: Sequence[Result], seconds: float) -> None:
        """Keep results."""
        self._results |= {result.number: result for result in results}
        done = self.counts.done + len(results)
        self.counts = msgspec.structs.replace(self.counts, done=done)

    def finish(self) -> None:
        """Nothing is left to write."""

    def columns(self) -> dict[str, list[Any]]:
        """RESULT_COLUMNS, in the order of the rows. status_code: 0 without an answer. response: the
        JSON of an answer. error: why there is none."""
        found: dict[str, list[Any]] = {name: [] for name in RESULT_COLUMNS}
        for number in range(self.counts.total):
            for name, value in _columns_of(self._results[number]).items():
                found[name].append(value)
        return found


class _Quiet:
    """An observer that says nothing: who runs blocks has progress of its own."""

    def progressed(self) -> None:
        """As `Observer.progressed`."""

    def set_aside(self, window: Window) -> None:
        """As `Observer.set_aside`."""


async def answer_rows(
    rows: Sequence[Mapping[str, Any]],
    endpoints: Sequence[Endpoint],
    options: DispatchOptions,
    model: str | None = None,
) -> dict[str, list[Any]]:
    """RESULT_COLUMNS of the rows. Raises StopError if no endpoint works for long."""
    block = Block(rows, model)
    await Dispatcher(block, block, endpoints, options, _Quiet()).run()
    return block.columns()


def _request(row: Mapping[str, Any], model: str | None) -> RequestLine:
    """A row's request. Its body is a mapping, or the JSON of one. Raises LineError."""
    missing = [name for name in ("custom_id", "body") if row.get(name) is None]
    if missing:
        raise LineError(f"column {missing[0]} is missing; a request has {', '.join(COLUMNS)}")
    body = row["body"]
    raw = body.encode() if isinstance(body, str) else _encode(body)
    line = {
        "custom_id": str(row["custom_id"]), "url": str(row.get("url") or DEFAULT_URL),
        "body": Raw(raw),
    }  # fmt: skip
    return read_line(_encode(line), model)


def _columns_of(result: Result) -> dict[str, Any]:
    line = msgspec.json.decode(result.line, type=_Line)
    response, usage = line.response, result.usage
    error = "" if line.error is None else f"{line.error.code}: {line.error.message}"
    if response is not None and result.failed:
        error = bytes(response.body).decode(errors="replace")
    return {
        "status_code": 0 if response is None else response.status_code,
        "response": "" if response is None or result.failed else bytes(response.body).decode(),
        "error": error,
        "prompt_tokens": usage.prompt,
        "output_tokens": usage.output,
        "cached_tokens": usage.cached,
    }


class _Response(msgspec.Struct):
    status_code: int
    body: Raw


class _Error(msgspec.Struct):
    code: str
    message: str


class _Line(msgspec.Struct):
    response: _Response | None
    error: _Error | None
