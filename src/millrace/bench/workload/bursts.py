"""Streams with bursts of long prompts beside them: what the prompts do to the streams.

The streams begin together. Every some seconds a burst of prompts comes, whose answers are short.
This module knows lengths and times.
"""

from __future__ import annotations

import msgspec

from millrace.bench.workload.prompts import TraceRow, TraceSpec
from millrace.errors import UserError


class Bursts(msgspec.Struct, frozen=True):
    """streams: of stream_input tokens, with answers of stream_output. count: bursts of `size`
    prompts of `input` tokens each, with answers of `output`, one every `every` seconds."""

    streams: int = 32
    stream_input: int = 128
    stream_output: int = 400
    count: int = 8
    size: int = 2
    every: float = 2.0
    input: int = 4096
    output: int = 4

    def check(self) -> None:
        """Raises UserError that names the flag."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            least = 2 if name == "stream_output" else 1
            if value < least and not (name == "every" and value > 0):
                raise UserError(f"--burst-{name.replace('_', '-')} {value:g}: use {least} or more")


def burst_workload(bursts: Bursts, seed: int) -> tuple[TraceSpec, tuple[float, ...]]:
    """The requests, streams first, and when each is due. Raises UserError."""
    bursts.check()
    streams = [TraceRow(bursts.stream_input, bursts.stream_output)] * bursts.streams
    prompts = [TraceRow(bursts.input, bursts.output)] * (bursts.count * bursts.size)
    times = [bursts.every * (1 + n // bursts.size) for n in range(len(prompts))]
    rows = (*streams, *prompts)
    spec = TraceSpec(
        rows=rows,
        count=len(rows),
        seed=seed,
        source=f"{bursts.streams} streams and {bursts.count} bursts",
        streams=bursts.streams,
    )
    return spec, (*[0.0] * bursts.streams, *times)
