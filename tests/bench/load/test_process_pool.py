"""Several load processes: one workload, one clock, everything pooled, nobody left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.load.arrivals import Schedule
from millrace.bench.load.messages import Progress
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.process_pool import open_pool, split_limit
from millrace.bench.load.request_builder import indices
from millrace.bench.runs.serve import run as run_bench
from millrace.bench.workload.prompts import RandomSpec
from millrace.common.http_client import parse_url
from tests.support.mock_replica import MockReplica
from tests.support.running import run

SPEC = RandomSpec(count=40, input_len=6, output_len=5, range_ratio=0.5, vocab_size=500)


@given(limit=st.integers(1, 500), processes=st.integers(1, 32))
def test_a_limit_is_divided_evenly_over_processes(limit: int, processes: int) -> None:
    parts = [part or 0 for part in split_limit(limit, processes)]
    assert sum(parts) == limit
    assert max(parts) - min(parts) <= 1
    assert split_limit(None, processes) == [None] * processes


@given(count=st.integers(1, 200), processes=st.integers(1, 16))
def test_every_item_belongs_to_one_process(count: int, processes: int) -> None:
    taken = [list(indices(count, number, processes)) for number in range(processes)]
    assert sorted(index for part in taken for index in part) == list(range(count))


def measured(replica: MockReplica, **changes: Any) -> Any:
    options = BenchOptions(
        **{"target": parse_url(replica.url), "workload": SPEC, "max_concurrency": 6, **changes}
    )
    return run_bench(options)


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if "millrace.bench.load.load_process" in " ".join(child.cmdline())
    ]


def test_three_processes_send_the_workload_of_one() -> None:
    async def scenario(processes: int) -> tuple[Any, list[str]]:
        replica = await MockReplica(first_s=0.02, gap_s=0.005).start()
        found = await measured(replica, processes=processes)
        await replica.stop()
        return found, sorted(str(body["prompt"]) for body in replica.bodies)

    one, asked_by_one = run(scenario(1))
    three, asked_by_three = run(scenario(3))
    assert asked_by_three == asked_by_one
    assert len(set(asked_by_one)) == len(asked_by_one)  # nobody sends another's prompt
    for found, processes in ((one, 1), (three, 3)):
        fields = found.fields
        assert (fields["completed"], fields["failed"], fields["cancelled"]) == (40, 0, 0)
        assert sorted(r.index for r in found.records) == list(range(40))
        assert fields["max_concurrent_requests"] <= 6
        assert fields["client"]["processes"] == processes
        # All began at one moment, so the first dispatches lie close together.
        starts = sorted(r.start_ns for r in found.records)
        assert starts[5] - starts[0] < 5_000_000_000
    assert one.fields["total_output_tokens"] == three.fields["total_output_tokens"]
    assert one.fields["mean_output_len"] == three.fields["mean_output_len"]
    assert not children()


def test_an_open_loop_is_one_process_of_arrivals_however_many_send() -> None:
    async def scenario(processes: int) -> list[int]:
        replica = await MockReplica().start()
        found = await measured(
            replica,
            processes=processes,
            max_concurrency=None,
            schedule=Schedule(rate=100.0, burstiness=1.0, seed=5),
        )
        await replica.stop()
        due = sorted((r.scheduled_ns, r.index) for r in found.records)
        first = due[0][0]
        assert [index for _, index in due] == sorted(index for _, index in due)
        return [round((at - first) / 1e6) for at, _ in due[1:]]

    assert run(scenario(1)) == pytest.approx(run(scenario(2)), abs=60)  # ms; item 0 is due at once


def test_a_time_limit_sends_no_more_and_awaits_what_is_in_flight() -> None:
    async def scenario() -> Any:
        replica = await MockReplica(first_s=0.3).start()
        endless = RandomSpec(count=None, input_len=4, output_len=2, vocab_size=500)
        found = await measured(replica, workload=endless, duration=1.0, processes=2)
        await replica.stop()
        return found

    found = run(scenario())
    starts = [r.start_ns for r in found.records]
    assert max(starts) - min(starts) < 5_000_000_000  # one second, and patience
    assert found.fields["completed"] == found.fields["num_prompts"] >= 6
    assert (found.fields["failed"], found.fields["cancelled"]) == (0, 0)


def test_conversations_send_what_was_answered_and_keep_their_place() -> None:
    async def scenario() -> tuple[Any, list[Any]]:
        replica = await MockReplica(first_s=0.01).start()
        spec = RandomSpec(count=4, input_len=3, output_len=2, turns=3)
        found = await measured(replica, workload=spec, backend="openai-chat", max_concurrency=2)
        await replica.stop()
        return found, [body["messages"] for body in replica.bodies]

    found, asked = run(scenario())
    assert sorted((r.index, r.turn) for r in found.records) == [
        (index, turn) for index in range(4) for turn in range(3)
    ]
    assert found.fields["cancelled"] == 0
    longest = [messages for messages in asked if len(messages) == 5]
    assert len(longest) == 5  # one of the warm-up too
    for messages in longest:
        assert [m["role"] for m in messages] == ["user", "assistant"] * 2 + ["user"]
        assert messages[1]["content"] == messages[3]["content"] == "x x "
        assert messages[:3] in asked
    assert found.fields["max_concurrent_requests"] <= 2


def test_a_load_process_that_dies_ends_the_run_with_its_status() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=30.0).start()
        options = BenchOptions(target=parse_url(replica.url), workload=SPEC, processes=2)
        try:
            async with open_pool(options, "mock") as pool:
                await pool.prepare()
                running = asyncio.create_task(pool.run())
                while replica.connections < 40:
                    await asyncio.sleep(0.01)
                children()[0].kill()
                with pytest.raises(RuntimeError, match="ended with -9"):
                    await running
        finally:
            await replica.stop()

    run(scenario())
    assert not children()


def test_a_killed_parent_leaves_no_load_process_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.1).start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--base-url", replica.url),
            *("--duration", "120", "--max-concurrency", "4", "--processes", "2"),
            *("--random-input-len", "4", "--random-output-len", "2"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while len(replica.bodies) < 6:
            await asyncio.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == 2
        os.kill(process.pid, signal.SIGKILL)
        await process.wait()
        until = time.monotonic() + 20
        while any(w.is_running() and w.status() != "zombie" for w in workers):
            assert time.monotonic() < until, "a load process outlived its parent"
            await asyncio.sleep(0.05)
        await replica.stop()

    run(scenario())


def test_the_progress_says_the_rate_that_is_measured() -> None:
    """Answers that arrive and end together: the rate so far is near the pace of the server at
    every moment, two tokens a chunk included, and at the end it is the run's own figure."""

    async def scenario() -> tuple[Any, list[Progress]]:
        replica = await MockReplica(gap_s=0.1, tokens_per_chunk=2).start()
        seen: list[Progress] = []
        spec = RandomSpec(count=12, input_len=6, output_len=16, vocab_size=500)
        options = BenchOptions(
            target=parse_url(replica.url), workload=spec, max_concurrency=6, processes=2
        )
        found = await run_bench(options, on_progress=seen.append)
        await replica.stop()
        return found, seen

    found, seen = run(scenario())
    rates = [one.tokens / one.seconds for one in seen if one.seconds > 0.3]
    truth = found.fields["output_throughput"]
    assert len(rates) >= 2
    assert max(rates) < 1.5 * truth
    assert min(rates) > 0.3 * truth  # before the first end, a chunk is taken for a token
    assert seen[-1].tokens == found.fields["total_output_tokens"] == 12 * 16
    assert rates[-1] == pytest.approx(truth, rel=0.15)
