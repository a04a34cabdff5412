"""The plan log: every step's plan, result and grammar masks, to inspect a run or to replay it.

The file is a series of length-prefixed msgpack messages, in the order in which they were made. A
plan holds everything that the device did, including tokens, seeds and pages. So replaying the plans
on a fresh worker of the same configuration must bring the same results.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec

from millrace.engine.worker_protocol import Worker
from millrace.errors import UserError
from millrace.protocol import Masks, StepPlan, StepResult

Entry = StepPlan | Masks | StepResult

_LENGTH = struct.Struct("<I")
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


class PlanLog:
    """Appends plans and results to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, entry: Entry) -> None:
        data = _encode(entry)
        self._file.write(_LENGTH.pack(len(data)))
        self._file.write(data)

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[Entry]:
    """The entries of a log. Raises UserError if the file is truncated or is no plan log."""
    data = path.read_bytes()
    at = 0
    while at < len(data):
        try:
            (length,) = _LENGTH.unpack_from(data, at)
            at += _LENGTH.size
            yield _decode(data[at : at + length])
        except (struct.error, msgspec.DecodeError) as error:
            raise UserError(f"{path}: truncated, or no plan log (byte {at}: {error})") from None
        at += length


def replay(path: Path, worker: Worker) -> list[tuple[StepResult, StepResult]]:
    """Run a log's plans on a fresh worker; the pairs (logged, replayed) that differ."""
    masks = {entry.step: entry for entry in read(path) if isinstance(entry, Masks)}
    results = {}
    differing = []
    for entry in read(path):
        if isinstance(entry, StepPlan):
            given = masks.get(entry.step)
            pending = worker.launch(entry, None if given is None else partial(_same, given))
            results[entry.step] = pending.result()
        elif isinstance(entry, StepResult) and (again := results.pop(entry.step)) != entry:
            differing.append((entry, again))
    return differing


def _same(masks: Masks) -> Masks:
    return masks
