"""Prompts and answers in one engine, or apart in two: hand-over times, and gaps between tokens.

Two engine processes on one device, by the product's own links. First, prompts of each length are
computed by one and answered by the other: how long the record takes, and its bytes, which both
sides must count alike. Then `--streams` streams run while every `--every` seconds a burst of long
prompts comes: mixed (both engines do everything, each half) and split, in turn.

    python benchmarks/hand_over.py --out hand_over.json         # Qwen3.5-27B-FP8 shapes on a GPU
    python benchmarks/hand_over.py --tiny                       # small, on any machine

Weights are random, and the same in both. On one GPU without MPS the two processes' kernels take
turns, so a split there moves prompts out of the steps of streams, not out of their GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import commit
from h200_throughput import BASE, TINY_ARGS
from model_shapes import write_config

from millrace.config import EngineArgs, engine_args
from millrace.model.tiny import TinyShape, config_json
from millrace.protocol import AddRequest, RecordSource, SamplingParams, TransferStats
from millrace.runtime.transfer.client import KINDS
from millrace.server.engine_link.client import EngineClient
from millrace.server.telemetry.metrics import RequestMetrics

SETTLE = 60.0  # seconds for figures of the other side to arrive


@dataclass
class Gaps:
    """Seconds between two deliveries to one stream, and to first tokens of the burst's prompts."""

    gaps: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        found = {"deliveries": float(len(self.gaps)), "prompts": float(len(self.first))}
        for name, values in (("itl", sorted(self.gaps)), ("ttft", sorted(self.first))):
            for part in (50, 99) if values else ():
                found[f"{name}_p{part}_ms"] = 1e3 * values[int(part / 100 * (len(values) - 1))]
        return found


class Pair:
    """An engine for prompts and one for answers."""

    def __init__(self, seed: int) -> None:
        self.prefill, self.decode = (EngineClient(RequestMetrics()) for _ in range(2))
        self._rng = random.Random(seed)
        self._number = 0

    def prompt(self, tokens: int) -> list[int]:
        return [self._rng.randrange(3, 2000) for _ in range(tokens)]

    async def start(self, args: EngineArgs) -> None:
        for engine in (self.prefill, self.decode):  # one after the other: they share a device
            await engine.start(args)
            await engine.wait_ready()

    async def stop(self) -> None:
        for engine in (self.prefill, self.decode):
            await engine.stop()

    def request(self, prompt: list[int], most: int, **more: Any) -> AddRequest:
        self._number += 1
        params = SamplingParams(max_tokens=most, temperature=1.0, seed=1, ignore_eos=True)
        now = time.monotonic()
        return AddRequest(f"r{self._number}", prompt, params, arrival=now, **more)

    async def run(
        self, engine: EngineClient, request: AddRequest, gaps: list[float] | None = None
    ) -> int:
        """Run it to its end. Returns the tokens of its record, if it was to have one. gaps: gets
        the seconds between its deliveries."""
        stream, record, before = engine.open(request), 0, 0.0
        try:
            while True:
                delta = await stream.take()
                now, record = time.perf_counter(), record or delta.record
                if gaps is not None and before:
                    gaps.append(now - before)
                before = now
                if delta.finish_reason is not None:
                    return record
        finally:
            engine.close(stream)

    def record(self) -> RecordSource:
        """Where the record of a prompt will be that is to be computed."""
        self._number += 1
        ready = self.prefill.ready
        assert ready is not None
        address = ready.transfer_host, ready.transfer_port, ready.engine
        return RecordSource(*address, f"record-{self._number}", 0)

    async def compute(self, prompt: list[int], source: RecordSource | None = None) -> RecordSource:
        """Where the record of a prompt is, once it is computed."""
        source = source or self.record()
        record = await self.run(self.prefill, self.request(prompt, 1, hand_over=source.name))
        assert record == len(prompt) - 1, "nothing is handed over"
        return RecordSource(source.host, source.port, source.engine, source.name, record)


async def hand_over_times(pair: Pair, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """For each length, by turns: the record is asked for once the prompt is computed, or before it,
    so that it comes part by part. Medians of seconds of the prompt, from its end to the first token
    of the answer, and of the record alone; its bytes; and the second of these of each round."""
    found = []
    for length in lengths:
        rows: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for number in range(2 * (rounds + 1)):
            early = number % 2 == 1
            rows[early].append(await hand_over_time(pair, length, early))
        for early, some in rows.items():  # the first ones warm both up
            medians = {key: statistics.median(row[key] for row in some[1:]) for key in some[0]}
            each = sorted(round(row["to_first_token_ms"], 1) for row in some[1:])
            found.append({"tokens": length, "early": early, **medians, "rounds_ms": each})
            print(json.dumps(found[-1]), flush=True)
    return found


async def hand_over_time(pair: Pair, length: int, early: bool) -> dict[str, float]:
    """Of one prompt, as in `hand_over_times`."""
    prompt, before = pair.prompt(length), pair.decode.stats.transfers
    source = pair.record()
    began = time.perf_counter()
    answer = pair.run(pair.decode, pair.request(prompt, 1, source=source))
    beside = asyncio.create_task(answer) if early else None
    known = await pair.compute(prompt, source)
    computed = time.perf_counter()
    if beside is not None:
        await beside
    else:
        answer.close()
        await pair.run(pair.decode, pair.request(prompt, 1, source=known))
    answered = time.perf_counter()
    after = await changed(pair.decode, before.received)
    size, seconds = after.received_bytes - before.received_bytes, after.seconds - before.seconds
    return {
        "prompt_ms": 1e3 * (computed - began),
        "to_first_token_ms": 1e3 * (answered - computed),
        "record_ms": 1e3 * seconds, "bytes": size, "gb_per_s": size / seconds / 1e9,
    }  # fmt: skip


async def changed(engine: EngineClient, received: int) -> TransferStats:
    """The engine's figures once it has received another record."""
    end = time.monotonic() + SETTLE
    while engine.stats.transfers.received == received:
        assert time.monotonic() < end, "no record came"
        await asyncio.sleep(0.01)
    return engine.stats.transfers


async def gaps_of(pair: Pair, options: argparse.Namespace, split: bool) -> Gaps:
    """Streams with bursts of prompts beside them."""
    found, ends = Gaps(), asyncio.Event()

    async def one(number: int, length: int, most: int, gaps: list[float] | None) -> None:
        prompt, began = pair.prompt(length), time.perf_counter()
        if split:
            source = await pair.compute(prompt)
            if gaps is None:
                found.first.append(time.perf_counter() - began)
            await pair.run(pair.decode, pair.request(prompt, most, source=source), gaps)
            return
        engine = (pair.prefill, pair.decode)[number % 2]
        stream = engine.open(pair.request(prompt, most))
        first = True
        before = 0.0
        try:
            while True:
                delta = await stream.take()
                now = time.perf_counter()
                if first and gaps is None:
                    found.first.append(now - began)
                if gaps is not None and not first:
                    gaps.append(now - before)
                first, before = False, now
                if delta.finish_reason is not None:
                    return
        finally:
            engine.close(stream)

    async def bursts() -> None:
        running, number = [], 0
        while not ends.is_set():
            for _ in range(options.burst):
                running.append(asyncio.create_task(one(number, options.long, 4, None)))
                number += 1
            try:
                await asyncio.wait_for(ends.wait(), options.every)
            except TimeoutError:
                continue
        await asyncio.gather(*running)

    beside = asyncio.create_task(bursts())
    streams = (one(n, options.short, options.output, found.gaps) for n in range(options.streams))
    await asyncio.gather(*streams)
    ends.set()
    await beside
    return found


async def measure(
    directory: str, arguments: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    pair = Pair(seed=7)
    try:
        began = time.perf_counter()
        await pair.start(engine_args(model=directory, **arguments))
        print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
        result: dict[str, Any] = {
            "commit": commit(), "transport": arguments["kv_transport"],
            "hand_overs": await hand_over_times(pair, options.lengths, options.rounds), "gaps": [],
        }  # fmt: skip
        if options.turns:
            await gaps_of(pair, options, split=False)  # what a first time costs
        for number in range(options.turns):
            for split in (False, True):
                one = {
                    "turn": number,
                    "split": split,
                    **(await gaps_of(pair, options, split)).summary(),
                }
                result["gaps"].append(one)
                print(json.dumps(one), flush=True)
        await asyncio.sleep(2.0)  # for the last figures
        sent, received = pair.prefill.stats.transfers, pair.decode.stats.transfers
        result["sent_bytes"], result["received_bytes"] = sent.sent_bytes, received.received_bytes
        print(f"bytes sent {sent.sent_bytes}, received {received.received_bytes}; failed "
              f"{sent.sent_failed} and {received.received_failed}", flush=True)  # fmt: skip
        assert sent.sent_bytes == received.received_bytes, "bytes moved are bytes counted"
        return result
    finally:
        await pair.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", help="of prompts; the default is 1024,8192")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--short", type=int, default=128)
    parser.add_argument("--output", type=int, default=400)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--burst", type=int, default=2)
    parser.add_argument("--every", type=float, default=2.0)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--transport", default="auto", choices=KINDS)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--step-tokens", type=int, default=2048, help="of prompts in a step")
    parser.add_argument("--snapshots", type=int, default=32)
    parser.add_argument("--host-gb", type=float, default=12.0, help="of records; of the GPU by IPC")
    parser.add_argument("--only-times", action="store_true", help="no streams beside bursts")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.lengths = [int(n) for n in options.lengths.split(",")] if options.lengths else []
    arguments: dict[str, Any] = {
        **BASE, "max_num_seqs": 40, "max_model_len": 8448, "enable_prefix_caching": True,
        "max_num_batched_tokens": options.step_tokens, "kv_cache_memory_bytes": 28_000_000_000,
        "num_snapshots": options.snapshots, "role": "both", "host_cache_gb": options.host_gb,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent)
        if options.tiny:
            arguments |= {**TINY_ARGS, "host_cache_gb": 0.5, "max_num_seqs": 16}
            arguments["kv_cache_memory_bytes"] = 256 << 20
            arguments |= {"max_num_batched_tokens": options.step_tokens, "max_model_len": 8448}
            options.streams, options.short, options.output = 4, 16, 60
            options.long, options.every = 400, 0.5
            options.lengths, options.rounds = options.lengths or [64, 512], options.rounds or 2
            shape = config_json(TinyShape(fp8=True, max_positions=16384))
            (directory / "config.json").write_text(json.dumps(shape))
        else:
            write_config(directory, options.layers)
        options.lengths, options.rounds = options.lengths or [1024, 8192], options.rounds or 5
        options.turns *= not options.only_times
        arguments["kv_transport"] = options.transport
        result = asyncio.run(measure(str(directory), arguments, options))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
