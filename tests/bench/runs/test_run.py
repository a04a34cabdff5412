"""What belongs to a run besides its figures: its verdict, accuracy, the servers' own metrics."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from millrace.bench.command import bench
from millrace.bench.flags.presets import PRESETS
from millrace.bench.flags.structs import ServeFlags
from millrace.bench.load.messages import Progress
from millrace.bench.load.options import BenchOptions
from millrace.bench.report.live import progress_line, remarks
from millrace.bench.runs.accuracy import Accuracy, accuracy_fields, accuracy_under_load
from millrace.bench.runs.reported_run import verdict
from millrace.bench.runs.serve import run as run_bench
from millrace.bench.workload.prompts import RandomSpec
from millrace.common.http_client import parse_url
from tests.support.mock_replica import MockReplica
from tests.support.running import run

SPEC = RandomSpec(count=6, input_len=3, output_len=2, vocab_size=500)

# An evaluation that answers when a file is there, or after a minute.
EVALUATION = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
until = time.monotonic() + 60
while not os.path.exists({file!r}) and time.monotonic() < until:
    time.sleep(0.02)
task = dict(items=dict(total=int(options["--num-items"]), accuracy=0.75), errors=0)
report = dict(summary={{options["--tasks"]: task}})
open(options["--json"], "w").write(json.dumps(report))
"""


def problems(failed: int, completed: int = 100, accuracy: float | None = None, **flags: Any) -> int:
    """How many reasons fail a run of such counts."""
    fields = {"failed": failed, "completed": completed, "client": {"client_bound": True}}
    found = {"math": Accuracy(accuracy, 10)} if accuracy is not None else {}
    return len(verdict(fields, found, ServeFlags(**flags)))


def test_more_than_one_in_twenty_fails_a_run() -> None:
    assert problems(5, 95) == 0
    assert problems(6, 94) == 1
    assert problems(0, 0) == 1  # nothing was measured
    assert problems(1, 99, max_failed=0.0) == 1


def test_too_little_accuracy_fails_a_run() -> None:
    assert problems(0, accuracy=0.8, min_accuracy=0.75) == 0
    assert problems(0, accuracy=0.7, min_accuracy=0.75) == 1
    none = {"math": Accuracy(None, reason="it broke")}
    fields = {"failed": 0, "completed": 9, "client": {"client_bound": False}}
    (problem,) = verdict(fields, none, ServeFlags(min_accuracy=0.1))
    assert problem == "accuracy on math: n/a < --min-accuracy 0.1"


def test_a_run_that_the_client_bounds_is_refused_where_that_is_asked() -> None:
    assert problems(0, refuse_client_bound=False) == 0
    assert problems(0, refuse_client_bound=True) == 1


def test_accuracy_is_measured_while_the_load_goes_on(tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    program = EVALUATION.format(file=str(enough))

    async def scenario() -> dict[str, Accuracy]:
        replica = await MockReplica(first_s=0.01).start()
        options = BenchOptions(target=parse_url(replica.url), workload=SPEC, max_concurrency=8)
        evaluating = asyncio.create_task(
            accuracy_under_load(options, ["math"], 12, command=(sys.executable, "-c", program))
        )
        while len(replica.bodies) < 3 * (SPEC.count or 0) and not evaluating.done():
            await asyncio.sleep(0.01)
        assert not evaluating.done()  # the load came in before the evaluation had its answers
        enough.touch()
        found = await evaluating
        await replica.stop()
        return found

    found = run(scenario())
    assert found == {"math": Accuracy(0.75, 12)}
    assert accuracy_fields(found)["math"]["text"] == "75.0% of 12"


# --- the servers' own metrics --------------------------------------------------------------------


@asynccontextmanager
async def metrics_server(drafts: int) -> AsyncIterator[str]:
    """Counts on at every inspect_server, as a replica at work would."""
    looks = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal looks
        await reader.readuntil(b"\r\n\r\n")
        body = (
            f"vllm:spec_decode_num_drafts_total {100 + drafts * looks}\n"
            f"vllm:spec_decode_num_draft_tokens_total {100 + drafts * looks}\n"
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{position="0"}} {drafts * looks}\n'
            f"vllm:spec_decode_num_accepted_tokens_total {drafts * looks}\n"
            "vllm:num_requests_running 2\n"
        ).encode()
        looks += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def test_acceptance_is_that_of_every_replica() -> None:
    async def scenario() -> Any:
        replica = await MockReplica(first_s=0.05).start()
        async with metrics_server(10) as one, metrics_server(30) as two:
            options = BenchOptions(
                target=parse_url(replica.url), workload=SPEC, metrics_urls=(one, two)
            )
            found = await run_bench(options)
        await replica.stop()
        return found

    found = run(scenario())
    server = found.fields["server"]
    assert len(server["replicas"]) == 2
    assert server["speculation"]["acceptance_rate"] == 1.0
    assert server["speculation"]["acceptance_by_position"] == [1.0]
    assert server["speculation"]["drafts"] >= 10 + 30
    assert found.observation.samples[0].server["num_requests_running"] == 4


def test_a_server_without_metrics_is_measured_all_the_same() -> None:
    async def scenario() -> Any:
        replica = await MockReplica().start()
        found = await run_bench(BenchOptions(target=parse_url(replica.url), workload=SPEC))
        await replica.stop()
        return found

    server = run(scenario()).fields["server"]
    assert server["speculation"] is None
    assert any("--metrics-url" in note for note in server["notes"])


# --- presets and words -------------------------------------------------------------------------


def test_presets_fill_in_what_the_command_line_leaves_open() -> None:
    async def scenario(*flags: str) -> tuple[int | None, list[dict[str, Any]], str]:
        replica = await MockReplica().start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--base-url", replica.url),
            *("--preset", "inferencex", "--max-concurrency", "2", *flags),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        await replica.stop()
        return process.returncode, replica.bodies, errors.decode()

    status, bodies, words = run(scenario("--random-output-len", "10", "--random-input-len", "20"))
    assert status == 0
    assert len(bodies) == 1 + 2 * 2 + 10 * 2  # the first, warm-up, the run
    assert all(body["ignore_eos"] for body in bodies)
    assert {len(body["prompt"]) for body in bodies} <= set(range(16, 21))
    assert "inferencex [L*r, L]" in words


def test_the_write_ups_preset_counts_by_gpu() -> None:
    preset = PRESETS["write-up"]
    assert (preset.flags["random_input_len"], preset.flags["random_output_len"]) == (1024, 512)
    assert preset.flags["random_range_ratio"] == 0.5
    result = CliRunner().invoke(bench, ["serve", "--preset", "no-such"])
    assert result.exit_code == 2


def test_the_progress_line_says_how_far_it_is() -> None:
    line = progress_line(Progress(10, 6, 1, 4, 500, 5, 0.5, seconds=4.0), 20)
    assert line == "6/20 done, 4 in flight, 125 tok/s, TTFT mean 100 ms, 1 failed"


def test_what_a_reader_must_know_is_remarked() -> None:
    fields = {
        "usage_missing": 2,
        "from_due": {"median_ttft_ms": 10.0, "p99_ttft_ms": 20.0},
        "client": {
            "p99_send_delay_ms": 5.0,
            "client_bound": True,
            "advice": "client-bound: use --processes 8",
            "reasons": ["busy"],
        },
        "server": {"notes": ["power of GPUs is left out"]},
    }
    lines = remarks(fields)
    assert len(lines) == 4
    assert lines[2:] == ["client-bound: use --processes 8 (busy)", "power of GPUs is left out"]


def test_an_open_loop_counts_from_when_requests_were_due(tmp_path: Path) -> None:
    """One place and a slow server: requests wait for it, and only `from_due` shows that."""

    async def scenario() -> int | None:
        replica = await MockReplica(first_s=0.1).start()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--base-url", replica.url),
            *("--num-prompts", "8", "--request-rate", "100", "--max-concurrency", "1"),
            *("--random-input-len", "3", "--random-output-len", "1", "--burstiness", "inf"),
            *("--result-dir", str(tmp_path), "--result-filename", "r.json", "--raw", "none"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        status = await process.wait()
        await replica.stop()
        return status

    assert run(scenario()) == 0
    got = json.loads((tmp_path / "r.json").read_text())
    # The last of eight is due after 70 ms and leaves after 700: it waits for half a second.
    assert got["from_due"]["p99_ttft_ms"] > got["p99_ttft_ms"] + 400
    assert got["client"]["max_send_delay_ms"] > 400
    assert got["coordinated_omission"].startswith("open loop with a limit")
    assert got["provenance"]["command"][0]
    with pytest.raises(KeyError):
        got["start_times"]
