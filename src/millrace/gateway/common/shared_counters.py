"""Counters that the gateway processes share: a block of memory, one part for each writer.

Every cell has one writer and many readers, so nothing is locked: a reader may see an old value,
never a torn one. A process that dies leaves its totals behind; its gauges are cleared before the
next one takes over its part. The prefix table at the end is the exception: every process writes
there, and a lost entry costs a missed hint.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left

import numpy as np

MAX_REPLICAS = 256
MAX_SERIES = 16  # buckets of the time to first byte

# Per process and replica. The first three are gauges, the others only grow.
LOAD, RESIDENT, IN_FLIGHT, PICKS, FAILURES, BYTES, CHUNKS, PROMPT_TOKENS, ENDED = range(9)
_REPLICA_CELLS = 9
_REPLICA_GAUGES = 3

STATUSES = (200, 400, 401, 403, 404, 405, 413, 415, 429, 431, 499, 500, 502, 503, 504)
EVENTS = (
    "retries",
    "resumed",
    "resume_failed",
    "unprotected",
    "cut_off",
    "disconnects",
    "queue_refused",
    "body_refused",
    "relay_ns",
    "relayed_requests",
    "first_byte_ns",
    "cpu_ns",
    "log_lines_dropped",
    "task_failures",
    "handed_over",
    "hand_over_failed",
    "hand_over_unproven",
    "prefix_moved",
    "stream_moved",
    "stream_rebalanced",
)
PROCESS_GAUGES = (
    "interactive",
    "batch",
    "queued_interactive",
    "queued_batch",
    "held",
    "clients",
    "kept_bytes",
    "body_bytes",
)
FIRST_BYTE_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # s

_STATUS_AT = {status: at for at, status in enumerate(STATUSES)}
_OTHER_STATUS = len(STATUSES)
_EVENT_AT = {name: len(STATUSES) + 1 + at for at, name in enumerate(EVENTS)}
_BUCKETS_AT = len(STATUSES) + 1 + len(EVENTS)
_GAUGE_AT = {name: _BUCKETS_AT + MAX_SERIES + at for at, name in enumerate(PROCESS_GAUGES)}
_PROCESS_CELLS = _BUCKETS_AT + MAX_SERIES + len(PROCESS_GAUGES)

PREFIX_SLOTS = 1 << 16


class SharedCounters:
    """The memory of `processes` writers. fd: descriptor of a block that another process made.
    replicas: the most that are counted; only a simulated fleet has more than MAX_REPLICAS."""

    def __init__(self, processes: int, fd: int | None = None, replicas: int = MAX_REPLICAS) -> None:
        self.processes = processes
        self._process_stride = replicas * _REPLICA_CELLS
        per_process = replicas * _REPLICA_CELLS + _PROCESS_CELLS
        cells = processes * per_process + replicas + 2 * PREFIX_SLOTS
        if fd is None:
            fd = os.memfd_create("millrace-gateway")
            os.ftruncate(fd, cells * 8)
        self.fd = fd
        block = mmap.mmap(fd, cells * 8)
        everything = np.frombuffer(block, dtype=np.int64)
        ends = np.cumsum([processes * replicas * _REPLICA_CELLS, processes * _PROCESS_CELLS])
        self._replicas = everything[: ends[0]].reshape(processes, replicas, _REPLICA_CELLS)
        self._processes = everything[ends[0] : ends[1]].reshape(processes, _PROCESS_CELLS)
        self._load_corrections = everything[ends[1] : ends[1] + replicas]
        # The same memory as plain views: for a few cells they are much quicker than arrays.
        self._replica_cells = everything[: ends[0]].data.cast("B").cast("q")
        self._process_cells = everything[ends[0] : ends[1]].data.cast("B").cast("q")
        self._load_correction_cells = self._load_corrections.data.cast("B").cast("q")
        # (hash, replicas as bits): see prefix_index.py
        self.prefixes = everything[ends[1] + replicas :].view(np.uint64).reshape(-1, 2)

    def process_counters(self, process: int) -> ProcessCounters:
        """The cells that this process writes."""
        return ProcessCounters(self._replicas[process], self._processes[process])

    def close(self) -> None:
        """Close the descriptor; the memory is freed with its last mapping."""
        os.close(self.fd)

    # --- reading ---------------------------------------------------------------------------------

    def replica_sums(self, count: int) -> list[list[int]]:
        """The cells of the first `count` replicas, summed over processes; their load includes the
        correction from load reports."""
        sums = self._replicas[:, :count].sum(axis=0)
        sums[:, LOAD] = np.maximum(sums[:, LOAD] + self._load_corrections[:count], 0)
        rows: list[list[int]] = sums.tolist()
        return rows

    def loads(self, count: int) -> np.ndarray:
        """The load of the first `count` replicas, as `replica_sums` has it."""
        sums = self._replicas[:, :count, LOAD].sum(axis=0) + self._load_corrections[:count]
        found: np.ndarray = np.maximum(sums, 0)
        return found

    def events(self) -> dict[str, int]:
        """Totals of EVENTS over processes."""
        sums = self._processes.sum(axis=0)
        return {name: int(sums[at]) for name, at in _EVENT_AT.items()}

    def statuses(self) -> dict[str, int]:
        """Responses by status, summed over processes."""
        sums = self._processes.sum(axis=0)
        named = {str(status): int(sums[at]) for status, at in _STATUS_AT.items()}
        return {**named, "other": int(sums[_OTHER_STATUS])}

    def first_byte_counts(self) -> list[int]:
        """Requests by time to the first byte, one count per bound and one beyond the last."""
        sums = self._processes.sum(axis=0)
        return [int(sums[_BUCKETS_AT + at]) for at in range(len(FIRST_BYTE_BOUNDS) + 1)]

    def gauge(self, name: str) -> int:
        """One of PROCESS_GAUGES, summed over processes."""
        return sum(self._process_cells[_GAUGE_AT[name] :: _PROCESS_CELLS])

    def load_and_in_flight(self, slot: int) -> tuple[int, int]:
        """(load, requests in flight) of one replica, as `replica_sums` has them."""
        load = self.replica_total(slot, LOAD) + self._load_correction_cells[slot]
        return max(0, load), self.replica_total(slot, IN_FLIGHT)

    def replica_total(self, slot: int, cell: int) -> int:
        """One replica's cell, summed over processes."""
        cells = self._replica_cells
        if self.processes == 1:
            return cells[slot * _REPLICA_CELLS + cell]
        return sum(cells[slot * _REPLICA_CELLS + cell :: self._process_stride])

    # --- written by the health monitor -----------------------------------------------------------

    def set_load_correction(self, slot: int, tokens: int) -> None:
        """Set the tokens that load reports add to a replica's counted load; may be negative."""
        self._load_corrections[slot] = tokens

    def load_correction(self, slot: int) -> int:
        """What `set_load_correction` set."""
        return int(self._load_corrections[slot])

    def clear_replica(self, slot: int) -> None:
        """Forget a removed replica, so that its slot can be given again."""
        self._replicas[:, slot] = 0
        self._load_corrections[slot] = 0
        self.forget_prefixes(slot)

    def forget_prefixes(self, slot: int) -> None:
        """Remove a replica from the prefix table: it has lost its cache."""
        self.prefixes[:, 1] &= np.uint64(~(1 << (slot % 64)) & (2**64 - 1))

    def clear_gauges(self, process: int) -> None:
        """Clear the gauges of a process that has died."""
        self._replicas[process, :, :_REPLICA_GAUGES] = 0
        for at in _GAUGE_AT.values():
            self._processes[process, at] = 0


class ProcessCounters:
    """The cells that one process writes, as plain memory views: a write costs below 0.1 us."""

    def __init__(self, replicas: np.ndarray, process: np.ndarray) -> None:
        self._replicas = replicas.reshape(-1).data.cast("B").cast("q")
        self._process = process.data.cast("B").cast("q")

    def add(self, slot: int, cell: int, value: int) -> None:
        """Add to a replica's cell."""
        self._replicas[slot * _REPLICA_CELLS + cell] += value

    def get(self, slot: int, cell: int) -> int:
        """This process's value of a replica's cell."""
        return self._replicas[slot * _REPLICA_CELLS + cell]

    def count_status(self, status: int) -> None:
        """Count a response."""
        self._process[_STATUS_AT.get(status, _OTHER_STATUS)] += 1

    def count_event(self, name: str, value: int = 1) -> None:
        """Count an event of EVENTS."""
        self._process[_EVENT_AT[name]] += value

    def observe_first_byte(self, seconds: float) -> None:
        """Count a request by the time to its first byte."""
        at = bisect_left(FIRST_BYTE_BOUNDS, seconds)
        self._process[_BUCKETS_AT + at] += 1
        self.count_event("first_byte_ns", int(seconds * 1e9))

    def add_gauge(self, name: str, change: int) -> None:
        """Change one of PROCESS_GAUGES."""
        self._process[_GAUGE_AT[name]] += change

    def set_event(self, name: str, value: int) -> None:
        """Set a total that is measured elsewhere, such as the CPU time."""
        self._process[_EVENT_AT[name]] = value
