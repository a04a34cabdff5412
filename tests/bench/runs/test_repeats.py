"""Repeats and sweep points: each has prompts of its own, and what prefix caches had is shown."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from millrace.bench.load.arrivals import Schedule, due_times
from millrace.bench.load.options import BenchOptions
from millrace.bench.report.compare import compare, comparison_table
from millrace.bench.report.results import ResultFile, hit_rate, unexpected_hits
from millrace.bench.report.run_report import table
from millrace.bench.report.sweep_table import sweep_table
from millrace.bench.runs.options_from_flags import with_run_seed
from millrace.bench.runs.parallelism import ParallelRow, parallelism_table
from millrace.bench.runs.scaling import ScalingRow, scaling_table
from millrace.bench.runs.serve import reset_prefix_caches
from millrace.bench.runs.serve import run as run_bench
from millrace.bench.workload.prompts import (
    PolicySpec,
    PrefixSpec,
    RandomSpec,
    TraceRow,
    TraceSpec,
    Workload,
    prompt_maker,
)
from millrace.common.http_client import parse_url
from millrace.errors import UserError
from tests.bench.report.test_html_report import fields
from tests.support.mock_replica import MockReplica
from tests.support.running import run


def prompts_of(options: BenchOptions) -> list[Any]:
    make = prompt_maker(options.workload, as_text=options.as_text)
    return [make(index).content for index in range(4)]


@pytest.mark.parametrize(
    "workload",
    [
        RandomSpec(count=4, input_len=9, output_len=2),
        RandomSpec(count=4, input_len=9, output_len=2, turns=2),
        PrefixSpec(count=4, prefix_len=8, suffix_len=4),
        PolicySpec(count=4),
        TraceSpec(count=4, rows=(TraceRow(9, 2, (1,)), TraceRow(20, 2)), block_tokens=4),
    ],
)
def test_no_run_and_no_point_shares_a_prompt_with_another(workload: Workload) -> None:
    options = BenchOptions(target=parse_url("http://a"), workload=workload)
    settings = [(number, point) for number in range(3) for point in range(3)]
    sent = [prompts_of(with_run_seed(options, *setting)) for setting in settings]
    every = [json.dumps(content) for prompts in sent for content in prompts]
    assert len(set(every)) == len(every)
    again = [prompts_of(with_run_seed(options, *setting)) for setting in settings]
    assert again == sent  # another server gets the same work
    assert sent[0] == prompts_of(options)  # one run alone is what --seed says


def test_arrival_times_are_drawn_anew_for_each_run() -> None:
    options = BenchOptions(
        target=parse_url("http://a"),
        workload=RandomSpec(count=4, input_len=9, output_len=2),
        schedule=Schedule(rate=3.0),
    )
    first, second = (due_times(with_run_seed(options, number).schedule) for number in range(2))
    assert [next(first) for _ in range(5)] != [next(second) for _ in range(5)]


def test_a_sweep_sends_no_prompt_twice(tmp_path: Path) -> None:
    async def scenario() -> tuple[int | None, list[dict[str, Any]]]:
        replica = await MockReplica().start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.cli", "bench", "sweep", "--base-url", replica.url),
            *("--over", "max-concurrency=1,2", "--num-runs", "2", "--num-prompts", "4"),
            *("--random-input-len", "12", "--random-output-len", "2", "--save-result"),
            *("--result-dir", str(tmp_path), "--raw", "none"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        status = await process.wait()
        await replica.stop()
        return status, replica.bodies

    status, bodies = run(scenario())
    assert status == 0
    assert len(bodies) == 4 * (1 + 4)
    prompts = {json.dumps(body["prompt"]) for body in bodies}
    assert len(prompts) == len(bodies)
    seeds = {json.loads(path.read_text())["seed"] for path in tmp_path.glob("*.json")}
    assert len(seeds) == 4


# --- what prefix caches had --------------------------------------------------------------------


def with_hits(rate: float | None, **changes: Any) -> dict[str, Any]:
    known = None if rate is None else {"queries": 1000, "hits": 1000 * rate, "hit_rate": rate}
    server = {**fields()["server"], "prefix_cache": known}
    common = {"dataset_name": "random", "multi_turn_turns": 1, "seed": 3, "server": server}
    return {**fields(), **common, "prefix_cache_hit_rate": rate, **changes}


@pytest.mark.parametrize(
    ("made", "warned"),
    [
        (with_hits(0.875), True),
        (with_hits(0.0), False),
        (with_hits(None), False),
        (with_hits(0.05), False),
        (with_hits(0.5, random_prefix_len=50), False),  # half of 100 tokens are shared
        (with_hits(0.9, random_prefix_len=50), True),
        (with_hits(0.6, backend="openai-chat"), False),  # perhaps the chat template
        (with_hits(0.95, backend="openai-chat"), True),
        (with_hits(0.9, dataset_name="prefix_repetition"), False),
        (with_hits(0.9, multi_turn_turns=3), False),
    ],
)
def test_random_prompts_that_were_cached_are_warned_about(
    made: dict[str, Any], warned: bool
) -> None:
    assert (unexpected_hits(made) is not None) == warned
    if warned:
        assert "--seed (this one was 3), or use --reset-prefix-cache" in str(unexpected_hits(made))


def test_hits_are_in_every_table() -> None:
    made = with_hits(0.875)
    assert "Prefix cache hit rate (%):" in table(made, ["ttft"], [99.0])
    assert "| prefix hits |" in sweep_table([made])
    assert "|       87.5% |" in sweep_table([made, with_hits(None)])
    assert "prefix hits" not in sweep_table([with_hits(None)])
    row = ScalingRow(replicas=1, runs=[made, with_hits(0.0), with_hits(0.1)])
    assert "10.0%" in scaling_table([row])
    assert "10.0%" in parallelism_table([ParallelRow(ranks=1, replicas=1, runs=row.runs)])


def test_a_comparison_of_cold_with_warm_runs_is_warned_about() -> None:
    def file(rate: float | None, number: int) -> ResultFile:
        return ResultFile(Path(f"{number}.json"), with_hits(rate))

    (mixed,) = compare([file(0.0, 0), file(0.875, 1)], [file(0.0, 2), file(0.0, 3)])
    text = comparison_table(mixed)
    assert "prefix hits of A: 0.0% to 87.5%" in text
    assert "not repeats of the same work" in text
    (equal,) = compare([file(0.0, 0)], [file(0.01, 2)])
    assert equal.warning is None
    (unknown,) = compare([file(None, 0)], [file(None, 2)])
    assert "prefix hits" not in comparison_table(unknown)


def test_hits_are_read_from_the_answers_where_the_server_has_no_counters() -> None:
    class Caching(MockReplica):
        def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
            if "usage" in event:
                event["usage"]["prompt_tokens_details"] = {"cached_tokens": 4}
            super()._event(writer, event)

    async def scenario() -> dict[str, Any]:
        replica = await Caching().start()
        workload = RandomSpec(count=3, input_len=16, output_len=2)
        options = BenchOptions(target=parse_url(replica.url), workload=workload)
        found = (await run_bench(options)).fields
        await replica.stop()
        return found

    assert hit_rate(run(scenario())) == pytest.approx(0.25)


# --- resetting ---------------------------------------------------------------------------------


@asynccontextmanager
async def server(statuses: dict[str, int]) -> AsyncIterator[tuple[str, list[str]]]:
    """Answers by path, else with 404; gives its address and what it was asked."""
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, path, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
        asked.append(f"{method} {path}")
        status = statuses.get(path, 404)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", asked
    finally:
        listening.close()


@pytest.mark.parametrize("path", ["/reset_prefix_cache", "/flush_cache"])
def test_the_cache_of_every_replica_is_reset(path: str) -> None:
    async def scenario() -> None:
        async with server({path: 200}) as (one, asked_one), server({path: 200}) as (two, asked_two):
            options = BenchOptions(
                target=parse_url(one),
                workload=RandomSpec(count=1, input_len=1, output_len=1),
                metrics_urls=(one, two),
            )
            await reset_prefix_caches(options)
        assert f"POST {path}" in asked_one
        assert f"POST {path}" in asked_two

    run(scenario())


def test_a_server_that_cannot_reset_its_cache_is_named() -> None:
    async def scenario() -> None:
        async with server({}) as (url, _):
            workload = RandomSpec(count=1, input_len=1, output_len=1)
            await reset_prefix_caches(BenchOptions(target=parse_url(url), workload=workload))

    with pytest.raises(UserError, match=r"--reset-prefix-cache: http.* --seed"):
        run(scenario())
