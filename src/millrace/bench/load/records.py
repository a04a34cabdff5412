"""The record of one request, and records packed for pipes and files.

Times are ns of the host's monotonic clock (`perf_counter_ns`). All processes of a host share it, so
the records of several load processes can be pooled. Formulas are in `measure.metrics`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import msgspec


class RequestTiming(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of one request.

    index: its number in the workload; turn: its number in its conversation. scheduled_ns: when it
    was due; start_ns: just before it was written to its connection; chunk_ns: when each chunk with
    a token arrived; end_ns: when the stream had ended. input_tokens and output_tokens: as the
    server counted them (`usage`); where it sends no count, the tokens that were sent and the chunks
    with text that arrived (`counted` is False then). cached_tokens: of the input, -1 where unknown.
    error: None for a success. connect_ns: what opening a connection took before the start, 0 where
    one was open.

    base: the turn of the same conversation whose prompt and answer this prompt begins with; -1:
    none. fresh: permille of the prompt that no earlier request has, where there is no base. kind:
    what it is in an agent's session, by its place in `workload.agent.KINDS`.

    received_ns and sent_ns: when the server read the request and sent each chunk. Only the
    benchmark's own mock servers, on the same host, send these stamps.
    """

    index: int
    scheduled_ns: int
    start_ns: int
    end_ns: int
    chunk_ns: Sequence[int]
    input_tokens: int
    output_tokens: int
    turn: int = 0
    kind: int = 0
    base: int = -1
    fresh: int = 1000
    counted: bool = True
    cached_tokens: int = -1
    error: str | None = None
    received_ns: int = 0
    sent_ns: Sequence[int] = ()
    connect_ns: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from the start to the first chunk with a token."""
        return (self.chunk_ns[0] - self.start_ns) / 1e9

    @property
    def e2el(self) -> float:
        """Seconds from the start to the last chunk with a token."""
        return (self.chunk_ns[-1] - self.start_ns) / 1e9

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for fewer than two tokens."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        """Seconds between neighbouring chunks."""
        return [(b - a) / 1e9 for a, b in pairwise(self.chunk_ns)]

    @property
    def send_delay(self) -> float:
        """Seconds from when it was due to its start. The event loop's timers may fire up to 1 ms
        early, which counts as no delay."""
        return max(0, self.start_ns - self.scheduled_ns) / 1e9


class PackedRecords(msgspec.Struct, frozen=True):
    """Records by column: a few flat arrays instead of many small objects.

    numbers: one list for each of `INT_FIELDS`. chunks and stamps: the number of times of each
    record; chunk_ns and sent_ns: these times of all records, concatenated, as int64 bytes.
    """

    numbers: dict[str, list[int]]
    errors: list[str | None]
    chunks: list[int]
    chunk_ns: bytes
    stamps: list[int]
    sent_ns: bytes


INT_FIELDS = (
    "index",
    "turn",
    "scheduled_ns",
    "start_ns",
    "end_ns",
    "input_tokens",
    "output_tokens",
    "counted",
    "cached_tokens",
    "received_ns",
    "connect_ns",
    "kind",
    "base",
    "fresh",
)


def pack(records: Sequence[RequestTiming]) -> PackedRecords:
    """The columns of these records, in their order."""
    return PackedRecords(
        numbers={name: [int(getattr(r, name)) for r in records] for name in INT_FIELDS},
        errors=[r.error for r in records],
        chunks=[len(r.chunk_ns) for r in records],
        chunk_ns=_flat(r.chunk_ns for r in records),
        stamps=[len(r.sent_ns) for r in records],
        sent_ns=_flat(r.sent_ns for r in records),
    )


def unpack(batch: PackedRecords) -> list[RequestTiming]:
    """The records that were packed; their times are arrays."""
    chunks = _parts(batch.chunk_ns, batch.chunks)
    stamps = _parts(batch.sent_ns, batch.stamps)
    rows = zip(*(batch.numbers[name] for name in INT_FIELDS), strict=True)
    return [
        RequestTiming(
            **{**dict(zip(INT_FIELDS, row, strict=True)), "counted": bool(row[7])},
            error=error,
            chunk_ns=chunk_ns,
            sent_ns=sent_ns,
        )
        for row, error, chunk_ns, sent_ns in zip(rows, batch.errors, chunks, stamps, strict=True)
    ]


def _flat(parts: Iterable[Sequence[int]]) -> bytes:
    whole = array("q")
    for part in parts:
        whole.extend(part)
    return whole.tobytes()


def _parts(flat: bytes, lengths: Sequence[int]) -> list[array[int]]:
    whole = array("q")
    whole.frombytes(flat)
    edges = accumulate(lengths, initial=0)
    return [whole[begin:end] for begin, end in pairwise(edges)]
