"""Whole runs against a mock whose truth is known, through the command as a user calls it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from millrace.bench.command import bench
from millrace.bench.load.load_driver import Job, Load
from millrace.bench.load.options import BenchOptions
from millrace.bench.load.records import RequestTiming
from millrace.bench.runs.serve import run as run_bench
from millrace.bench.workload.prompts import RandomSpec
from millrace.common.http_client import encode_request, parse_url
from millrace.errors import UserError
from millrace.observe.samples.store import read_events, read_meta
from tests.support.mock_replica import MockReplica, ScriptedServer
from tests.support.running import run

MOCK = Path(__file__).parents[2] / "support" / "mock_replica.py"


@contextmanager
def mock(*options: str) -> Iterator[int]:
    """A mock replica in a process of its own; gives its port."""
    process = subprocess.Popen(
        [sys.executable, str(MOCK), *options], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rsplit(" ", 1)[1])
    finally:
        process.kill()
        process.wait()


def call(*arguments: object) -> Result:
    return CliRunner().invoke(bench, ["serve", *map(str, arguments)])


SMALL = ("--num-prompts", 12, "--random-input-len", 8, "--random-output-len", 6)


def saved(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(path.read_text())
    return fields


# --- figures against the truth -----------------------------------------------------------------


async def driven(replica: MockReplica, tokens: int, count: int, limit: int) -> list[RequestTiming]:
    target = parse_url(replica.url)
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": tokens}).encode()
    job = Job(encode_request(target, "POST", "/v1/completions", body), 3)
    return await Load([target], [job] * count, [None] * count, limit=limit).run()


def test_chunk_times_follow_the_stamps_that_the_server_put_into_them() -> None:
    """Against send times stamped by the mock: none before it, and half of them within 20 ms."""
    stamps: list[list[int]] = []

    class Stamped(MockReplica):
        def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
            if event.get("choices"):
                stamps[-1].append(time.perf_counter_ns())
            super()._event(writer, event)

        async def _stream(self, *arguments: Any) -> None:
            stamps.append([])
            await super()._stream(*arguments)

    async def scenario() -> list[RequestTiming]:
        replica = await Stamped(first_s=0.03, gap_s=0.01).start()
        records = await driven(replica, tokens=10, count=8, limit=1)
        await replica.stop()
        return records

    records = run(scenario())
    late = [
        got - sent
        for record, sends in zip(records, stamps, strict=True)
        for got, sent in zip(record.chunk_ns, sends, strict=True)
    ]
    assert len(late) == 80
    assert min(late) >= 0
    assert statistics.median(late) < 20_000_000


def test_the_figures_are_those_of_the_servers_beat(tmp_path: Path) -> None:
    with mock("--first", "0.06", "--gap", "0.02") as port:
        result = call(
            *("--port", port, "--num-prompts", 16, "--max-concurrency", 4, "--num-warmups", 4),
            *("--random-input-len", 20, "--random-output-len", 11, "--save-detailed"),
            *("--goodput", "e2el:10000", "--result-dir", tmp_path, "--result-filename", "r.json"),
        )
    assert result.exit_code == 0, result.output
    got = saved(tmp_path / "r.json")
    assert (got["completed"], got["failed"], got["cancelled"]) == (16, 0, 0)
    assert (got["total_input_tokens"], got["total_output_tokens"]) == (320, 176)
    # Sleeps only ever last longer than asked; on a busy machine by some ms.
    assert 60 <= got["median_ttft_ms"] < 110
    assert 20 <= got["median_itl_ms"] < 30
    assert 20 <= got["median_tpot_ms"] < 35
    assert 260 <= got["median_e2el_ms"] < 450
    assert got["max_concurrent_requests"] == 4
    assert got["duration"] == pytest.approx(4 * got["mean_e2el_ms"] / 1e3, rel=0.3)
    assert got["output_throughput"] == pytest.approx(176 / got["duration"])
    assert got["request_goodput"] == pytest.approx(got["request_throughput"])
    assert got["steady_state"]["output_throughput"] >= 0.9 * got["output_throughput"]
    assert [len(itls) for itls in got["itls"]] == [10] * 16
    assert re.search(r"Mean TTFT \(ms\): +\d+\.\d\d\n", result.output)
    assert "input 20..20, mean 20.0 tokens; output 11..11, mean 11.0 tokens" in result.output


def test_several_tokens_a_chunk_make_itl_a_multiple_of_tpot() -> None:
    async def scenario() -> list[RequestTiming]:
        replica = await MockReplica(gap_s=0.02, tokens_per_chunk=2).start()
        records = await driven(replica, tokens=21, count=2, limit=2)
        await replica.stop()
        return records

    for record in run(scenario()):
        assert (record.output_tokens, len(record.chunk_ns)) == (21, 11)
        assert record.tpot is not None
        assert statistics.fmean(record.itls) == pytest.approx(2 * record.tpot)


def test_a_closed_loop_keeps_its_concurrency_and_its_connections() -> None:
    async def scenario() -> None:
        replica = await MockReplica(first_s=0.01).start()
        records = await driven(replica, tokens=3, count=30, limit=5)
        edges = sorted([(r.start_ns, 1) for r in records] + [(r.end_ns, -1) for r in records])
        levels = [sum(change for _, change in edges[: i + 1]) for i in range(len(edges))]
        assert max(levels) == 5
        assert replica.connections == 5
        await replica.stop()

    run(scenario())


def test_an_open_loop_sends_when_it_is_time_however_slow_the_answers(tmp_path: Path) -> None:
    with mock("--first", "2.0") as port:
        result = call(
            *("--port", port, "--num-prompts", 20, "--request-rate", 50, "--burstiness", 100),
            *("--random-input-len", 4, "--random-output-len", 2, "--save-detailed"),
            *("--result-dir", tmp_path, "--result-filename", "r.json"),
        )
    assert result.exit_code == 0, result.output
    got = saved(tmp_path / "r.json")
    gaps = [b - a for a, b in zip(got["start_times"], got["start_times"][1:], strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.6)
    assert got["max_concurrent_requests"] == 20  # nobody waited for an answer
    assert got["steady_state"] is None


def test_chat_and_words(tmp_path: Path) -> None:
    with mock() as port:
        result = call(
            *("--port", port, *SMALL, "--backend", "openai-chat"),
            *("--result-dir", tmp_path, "--result-filename", "r.json"),
        )
    assert result.exit_code == 0, result.output
    got = saved(tmp_path / "r.json")
    assert (got["completed"], got["total_input_tokens"]) == (12, 96)
    assert "mean 8.0 words" in result.output


def test_the_request_is_what_the_flags_say() -> None:
    async def scenario() -> list[dict[str, Any]]:
        replica = await MockReplica().start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--base-url", replica.url),
            *("--num-prompts", "2", "--random-input-len", "5", "--random-output-len", "3"),
            *("--ignore-eos", "--temperature", "0.5", "--extra-body", '{"top_k": 7}'),
            *("--header", "X-Mine=yes"),
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OPENAI_API_KEY": "secret"},
        )
        assert await process.wait() == 0
        assert all(h["x-mine"] == "yes" for h in replica.headers)
        assert all(h["authorization"] == "Bearer secret" for h in replica.headers)
        await replica.stop()
        return replica.bodies

    bodies = run(scenario())
    assert len(bodies) == 3  # one to see that it answers, and two
    for body in bodies:
        assert all(0 <= token < 500 for token in body.pop("prompt"))  # the server's vocabulary
        assert body == {
            "model": "mock",
            "max_tokens": 3,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "top_k": 7,
        }


# --- what goes wrong ---------------------------------------------------------------------------


def failure(result: Result) -> str:
    assert result.exception is not None
    return str(result.exception)


def test_an_unreachable_server_is_named() -> None:
    message = failure(call("--port", 9, *SMALL))
    assert "no answer from http://127.0.0.1:9" in message
    assert "start the server first" in message


def test_a_server_that_is_not_ready_is_waited_for_only_when_asked() -> None:
    async def scenario(wait: float) -> Any:
        replica = await MockReplica(healthy=False).start()
        options = BenchOptions(
            target=parse_url(replica.url),
            workload=RandomSpec(count=2, input_len=3, output_len=2),
            ready_timeout=wait,
        )
        asyncio.get_running_loop().call_later(0.3, setattr, replica, "healthy", True)
        try:
            return (await run_bench(options)).fields["completed"]
        finally:
            await replica.stop()

    assert run(scenario(10.0)) == 2
    with pytest.raises(UserError, match=r"is not ready \(warming\)"):
        run(scenario(0.0))


def test_a_wrong_model_name_lists_the_right_ones() -> None:
    with mock() as port:
        message = failure(call("--port", port, "--model", "gpt", *SMALL))
    assert message.endswith("it serves: mock")


def test_a_server_that_fails_every_request_fails_before_the_run() -> None:
    with mock("--behaviour", "error") as port:
        message = failure(call("--port", port, *SMALL))
    assert "before the run: status 500: the model fell over" in message


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ("error", "12 failed: status 500: the model fell over"),
        ("cut", "12 failed: the server closed the connection before the response was complete"),
        ("silent", "12 failed: the server closed the connection without an answer"),
        ("garbage", "12 failed: the server answered something that is not HTTP/1.1"),
        ("bad_json", "12 failed: a chunk that is not the JSON of a completion"),
        ("error_chunk", "12 failed: an error in the stream: out of memory"),
        ("hang", "12 failed: no complete answer within 0.3 s"),
    ],
)
def test_failures_in_the_run_are_counted_and_said_in_a_line(
    behaviour: str, expected: str, tmp_path: Path
) -> None:
    """The mock turns bad after the first request, which only shows that it answers."""

    class Turning(MockReplica):
        async def _complete(self, *arguments: Any) -> None:
            await super()._complete(*arguments)
            self.behaviour = behaviour

    async def scenario() -> tuple[int | None, str]:
        replica = await Turning().start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--base-url", replica.url),
            *(map(str, SMALL)),
            *("--request-timeout", "0.3" if behaviour == "hang" else "30"),
            *("--result-dir", str(tmp_path), "--result-filename", "r.json"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        _, errors = await process.communicate()
        await replica.stop()
        return process.returncode, errors.decode()

    status, errors = run(scenario())
    assert status == 1
    assert expected in errors
    got = saved(tmp_path / "r.json")
    assert (got["completed"], got["failed"]) == (0, 12)


def test_a_server_without_usage_has_its_chunks_counted_and_says_so() -> None:
    with mock("--behaviour", "no_usage") as port:
        result = call("--port", port, *SMALL)
    assert result.exit_code == 0
    assert "12 answers had no usage" in result.output
    assert re.search(r"Total generated tokens: +72\n", result.output)


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    async def scenario() -> tuple[int | None, str]:
        replica = await MockReplica(first_s=0.1).start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--base-url", replica.url),
            *("--num-prompts", "500", "--max-concurrency", "2", "--random-input-len", "4"),
            *("--random-output-len", "4", "--processes", "2", "--result-dir", str(tmp_path)),
            *("--result-filename", "r.json"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        while len(replica.bodies) < 10:  # two of them in flight, one to see that it answers
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, _ = await process.communicate()
        await replica.stop()
        return process.returncode, output.decode()

    status, output = run(scenario())
    assert status == 130
    got = saved(tmp_path / "r.json")
    assert 5 <= got["completed"] < 100
    assert got["failed"] == 0
    assert got["cancelled"] == 500 - got["completed"]
    assert "Cancelled requests:" in output


def test_a_connection_that_the_server_closed_while_idle_costs_no_request() -> None:
    async def scenario() -> None:
        body = b'{"choices": [{"text": "a", "finish_reason": "stop"}]}'
        stream = b"data: " + body + b"\n\n"
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(stream)}\r\n\r\n".encode()
        # The server promises to keep the connection and closes it all the same.
        server = await ScriptedServer([head + stream], close=True).start()
        target = parse_url(server.url)
        job = Job(encode_request(target, "POST", "/v1/completions", b"{}"), 1)
        records = await Load([target], [job] * 10, [None] * 10, limit=1).run()
        assert [r.error for r in records] == [None] * 10
        await server.stop()

    run(scenario())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--random-range-ratio", 1.5), "--random-range-ratio 1.5"),
        (("--metric-percentiles", "99,x"), "numbers from 0 to 100"),
        (("--percentile-metrics", "ttft,speed"), "ttft,tpot,itl,e2el"),
        (("--goodput", "ttft=5"), "ttft:MS"),
        (("--extra-body", "[1]"), "JSON object"),
        (("--header", "nothing"), "Name=Value"),
        (("--base-url", "ftp://x"), "http://127.0.0.1:8000"),
        (("--base-url", "http://x:port"), "http://127.0.0.1:8000"),
        (("--max-concurrency", 0), "use 1 or more"),
    ],
)
def test_a_bad_flag_gets_a_line_that_says_what_works(flags: tuple[Any, ...], expected: str) -> None:
    message = failure(call(*flags))
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("location", "refused"),
    [
        ("https://127.0.0.1:{port}/health", True),
        ("http://other.example/health", True),
        ("//other.example/", True),
        ("/health/", False),
        ("http://127.0.0.1:{port}/health/", False),
    ],
)
def test_a_redirect_to_another_server_is_named(location: str, refused: bool) -> None:
    class Redirecting(MockReplica):
        def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
            if path != "/health":
                super()._get(path, writer)
                return
            where = location.format(port=self.port)
            head = f"HTTP/1.1 307 X\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n"
            writer.write(head.encode())

    async def scenario() -> int:
        replica = await Redirecting().start()
        workload = RandomSpec(count=2, input_len=3, output_len=2)
        try:
            options = BenchOptions(target=parse_url(replica.url), workload=workload)
            return int((await run_bench(options)).fields["completed"])
        finally:
            await replica.stop()

    if refused:
        with pytest.raises(UserError, match=r"redirects to .*; give that server as --base-url"):
            run(scenario())
    else:
        assert run(scenario()) == 2


def test_a_run_is_observed_by_a_process_of_its_own(tmp_path: Path) -> None:
    """Samples are kept with the run's phases marked, and the report is there behind it."""
    out = tmp_path / "seen"
    with mock("--kind", "millrace") as port:
        done = call("--port", port, *SMALL, "--num-warmups", 1, "--observe", out)
    assert done.exit_code == 0, done.output
    assert [phase for _, phase in read_events(out)] == ["warm-up", "measured", "after"]
    assert "report: " in (out / "observe.log").read_text()
    assert (out / "report.html").exists()
    assert f"127.0.0.1:{port}" in read_meta(out)["targets"]
    assert f"Observed: {out / 'report.html'}" in done.output
