"""The plan log: every step's plan, result, grammar masks and times, to inspect a run, to replay it,
or to fit a model of the steps' times to it.

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
from statistics import pvariance
from typing import BinaryIO

from millrace.common.framing import Framing, FramingError
from millrace.engine.worker_protocol import Worker
from millrace.errors import ConfigError, UserError
from millrace.protocol import Masks, StepPlan, StepResult, StepTiming

logger = logging.getLogger(__name__)

Entry = StepPlan | Masks | StepResult | StepTiming

_FRAMING: Framing[Entry] = Framing(Entry, longest=1 << 30)


class StepSizes:
    """Knows how long the sequences of all slots are, from plans and results; so it counts tokens.

    drafts: of an engine, at most. With a pipeline, lengths are those that the host knew.
    """

    def __init__(self, drafts: int) -> None:
        self._drafts = drafts
        self._lengths: dict[int, int] = {}
        self._ended = 0.0

    def timing(
        self,
        plan: StepPlan,
        result: StepResult,
        times: tuple[float, float, float, float],
        planning: float,
    ) -> StepTiming:
        """times: planned, launched, ended, committed. Called in the order of the steps."""
        planned, launched, ended, committed = times
        contexts = [self._lengths.get(slot, 0) for slot in plan.decode]
        counts = [chunk.count for chunk in plan.chunks]
        width = 1 + (self._drafts if plan.drafts < 0 else plan.drafts)
        tokens = dict(zip(result.slots, map(len, result.tokens), strict=True))
        found = StepTiming(
            step=plan.step,
            planned=planned,
            launched=launched,
            ended=ended,
            committed=committed,
            planning=planning,
            wall=ended - max(planned, self._ended),
            num_prefill_requests=len(counts),
            sum_prefill_tokens=sum(counts),
            var_prefill_length=pvariance(counts) if counts else 0.0,
            sum_prefill_kv_tokens=sum(chunk.start for chunk in plan.chunks),
            num_decode_requests=len(contexts),
            sum_decode_kv_tokens=sum(contexts),
            var_decode_kv_tokens=pvariance(contexts) if contexts else 0.0,
            num_sampled=len(plan.sampled_slots),
            decode_tokens=width * len(contexts),
            accepted_tokens=sum(tokens.get(slot, 0) for slot in plan.decode),
        )
        self._ended = ended
        for chunk in plan.chunks:
            self._lengths[chunk.slot] = chunk.start + chunk.count
        for slot, count in tokens.items():
            self._lengths[slot] = self._lengths.get(slot, 0) + count
        return found


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
