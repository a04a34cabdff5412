"""The plan log: every step's plan, result and grammar masks, to inspect a run or to replay it.

The file is a series of length-prefixed msgpack messages, in the order in which they were made. A
plan holds everything that the device did, including tokens, seeds and pages. So replaying the plans
on a fresh worker of the same configuration must bring the same results.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from millrace.common.framing import Framing, FramingError
from millrace.engine.worker_protocol import Worker
from millrace.errors import ConfigError, UserError
from millrace.protocol import Masks, StepPlan, StepResult

logger = logging.getLogger(__name__)

Entry = StepPlan | Masks | StepResult

_FRAMING: Framing[Entry] = Framing(Entry, longest=1 << 30)


class PlanLog:
    """Appends plans and results to a file. Raises UserError if the file cannot be made.

    A file that cannot be written any more, on a full disk, ends the log and not the engine.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: BinaryIO | None = path.open("wb")
        except OSError as error:
            raise ConfigError(f"--plan-log {path}: {error.strerror}") from None

    def write(self, entry: Entry) -> None:
        if self._file is None:
            return
        try:
            self._file.write(_FRAMING.encode(entry))
        except OSError as error:
            logger.error("plan log %s: %s; it ends here", self._path, error.strerror)
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # what is still buffered has no room either
                file.close()


def read(path: Path) -> Iterator[Entry]:
    """The entries of a log. Raises UserError if the file is truncated or is no plan log."""
    with path.open("rb") as file:
        try:
            yield from _FRAMING.read_file(file)
        except FramingError as error:
            raise UserError(f"{path}: truncated, or no plan log ({error})") from None


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
