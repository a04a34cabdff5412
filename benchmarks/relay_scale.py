"""The relay on a machine with many cores: chunks/s through N processes, and the loss.

Several mocks (C, two replicas each) send streams at a fixed pace, and several clients (C) read
them: once directly, once through `millrace gateway --processes N`, in turn, at rising rates. A
stream has chunks / (first + (chunks - 1) * gap) chunks a second, so a rate is a number of streams;
the part of it that does not arrive through the gateway is the loss. A run in which a mock or a
client used most of a core does not measure the relay, and is marked.

    python benchmarks/relay_scale.py --processes 16 --rates 46000,92000,184000

It needs a C compiler, psutil, and the packages that the gateway needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from relay_cost import OURS, build, family, free_port, memory, running, wait_until_up

BUSY = 0.85  # of a core: a mock or a client that used more was itself the limit
HEAD = ("chunks/s asked", "streams", "by way of", "chunks/s", "loss", "TTFT p50 ms", "p99 ms")
HEAD += ("us/chunk", "busiest process", "KB/stream", "mock, client busiest", "runs")


@contextlib.contextmanager
def mocks(work: Path, options: argparse.Namespace) -> Iterator[tuple[list[int], list[int]]]:
    """Mocks of two replicas each: (their pids, all ports, the two of a mock side by side)."""
    with contextlib.ExitStack() as stack:
        pids, ports = [], []
        for number in range(options.mocks):
            pair = [free_port(), free_port()]
            beat = [str(options.first), str(options.gap), str(options.chunks)]
            words = [str(work / "mock"), *map(str, pair), *beat, "millrace"]
            pids.append(stack.enter_context(running(words, work / f"mock{number}.log")).pid)
            ports += pair
        for port in ports:
            wait_until_up(port)
        yield pids, ports


@contextlib.contextmanager
def gateway(work: Path, ports: Sequence[int], processes: int) -> Iterator[tuple[int, int]]:
    """The gateway before all replicas: (its port, its pid)."""
    port = free_port()
    urls = ",".join(f"http://127.0.0.1:{one}" for one in ports)
    words = [*OURS, "--port", str(port), "--worker-urls", urls, "--processes", str(processes)]
    with running(words, work / "gateway.log") as process:
        try:
            wait_until_up(port)
        except RuntimeError:
            print((work / "gateway.log").read_text()[-2000:], file=sys.stderr)
            raise
        yield port, process.pid


def answer_seconds(options: argparse.Namespace) -> float:
    """What one answer takes."""
    return float(options.first + (options.chunks - 1) * options.gap) / 1000


def cpu_by_process(pids: Sequence[int]) -> dict[int, float]:
    """CPU seconds of these processes and their children, each for itself."""
    times = {one.pid: one.cpu_times() for pid in pids for one in family(pid)}
    return {pid: one.user + one.system for pid, one in times.items()}


def measure(
    work: Path,
    ports: Sequence[int],
    streams: int,
    mock_pids: Sequence[int],
    gateway_pid: int | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One run: clients that share the streams, one for each of these ports in turn."""
    shares = [streams // options.clients + (i < streams % options.clients)
              for i in range(options.clients)]  # fmt: skip
    clients = []
    for number, share in enumerate(shares):
        port, seconds = ports[number % len(ports)], options.seconds
        asked = [port, share, seconds, options.prompt, 0, answer_seconds(options), options.warm]
        words = [str(work / "client"), *map(str, asked)]
        clients.append(subprocess.Popen(words, stdout=subprocess.PIPE))
    try:
        for client in clients:
            assert client.stdout is not None
            client.stdout.readline()
        watched = [*mock_pids, *([gateway_pid] if gateway_pid else [])]
        before, began = cpu_by_process(watched), time.monotonic()
        time.sleep(options.seconds * 0.8)
        after, seconds = cpu_by_process(watched), time.monotonic() - began
        held = memory(gateway_pid) if gateway_pid else 0
        said = [json.loads(client.communicate(timeout=60)[0]) for client in clients]
    finally:
        for client in clients:
            client.kill()
            client.wait()
    used = {pid: (value - before.get(pid, 0.0)) / seconds for pid, value in after.items()}
    relay = {pid: share for pid, share in used.items() if pid not in mock_pids}
    rate = sum(one["chunks"] / one["seconds"] for one in said)
    return {
        "rate": rate,
        "ttft_p50_ms": statistics.median(one["ttft_p50_ms"] for one in said),
        "ttft_p99_ms": max(one["ttft_p99_ms"] for one in said),
        "errors": sum(one["errors"] + one["silent"] for one in said),
        "longest_gap_ms": max(one["longest_gap_ms"] for one in said),
        "us_per_chunk": 1e6 * sum(relay.values()) / max(1.0, rate),
        "busiest": max(relay.values(), default=0.0),
        "mock_busiest": max(used[pid] for pid in mock_pids),
        "client_busiest": max(one["cpu_s"] / one["seconds"] for one in said),
        "held_bytes": held,
    }


def rounds(work: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every run, by "streams way"."""
    each = options.chunks / answer_seconds(options)
    runs: dict[str, list[dict[str, Any]]] = {}
    with mocks(work, options) as (mock_pids, ports), gateway(
        work, ports, options.processes
    ) as (port, pid):  # fmt: skip
        time.sleep(options.settle)
        idle = memory(pid)
        for turn in range(options.rounds):
            for rate in options.rates:
                streams = round(rate / each)
                ways = [("direct", ports[::2], None), ("millrace", [port], pid)]
                for way, to, watched in ways if turn % 2 == 0 else ways[::-1]:
                    run = measure(work, to, streams, mock_pids, watched, options)
                    run |= {"asked": rate, "streams": streams, "way": way, "idle_bytes": idle}
                    runs.setdefault(f"{streams} {way}", []).append(run)
                    print(json.dumps(run), flush=True)
    return runs


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each rate and way; medians over the rounds, of the good runs."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for of_one in runs.values():
        good = [run for run in of_one if not run["errors"]]
        first = of_one[0]
        cells = [f"{first['asked']:,.0f}", f"{first['streams']:,}", first["way"]]
        if not good:
            lines.append("| " + " | ".join(cells) + " | every run had errors |" + " |" * 8)
            continue
        got = {key: statistics.median(run[key] for run in good) for key in _FIGURES}
        direct = [r["rate"] for r in runs[f"{first['streams']} direct"] if not r["errors"]]
        relayed = first["way"] != "direct"
        loss = 1 - got["rate"] / statistics.median(direct) if relayed and direct else None
        per_stream = (got["held_bytes"] - first["idle_bytes"]) / first["streams"] / 1024
        bound = max(got["mock_busiest"], got["client_busiest"]) > BUSY
        cells += [f"{got['rate']:,.0f}", f"{loss:.1%}" if loss is not None else ""]
        cells += [f"{got['ttft_p50_ms']:.1f}", f"{got['ttft_p99_ms']:.1f}"]
        cells += [f"{got['us_per_chunk']:.1f}", f"{got['busiest']:.0%}", f"{per_stream:.0f}"] \
            if relayed else ["", "", ""]  # fmt: skip
        cells.append(f"{got['mock_busiest']:.0%}, {got['client_busiest']:.0%}{' BOUND' * bound}")
        cells.append(f"{len(good)} of {len(of_one)}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_FIGURES = ("rate", "ttft_p50_ms", "ttft_p99_ms", "us_per_chunk", "busiest", "mock_busiest",
            "client_busiest", "held_bytes")  # fmt: skip


def main() -> None:
    cores = os.cpu_count() or 1
    some = max(1, cores // 8)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=max(1, cores // 4), help="of the gateway")
    parser.add_argument("--mocks", type=int, default=some, help="each is two replicas")
    parser.add_argument("--clients", type=int, default=some)
    parser.add_argument("--rates", default="46000,92000,184000", help="chunks/s, with commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warm", type=float, default=1.0, help="seconds read and not counted")
    parser.add_argument("--first", type=int, default=50, help="ms to the first chunk")
    parser.add_argument("--gap", type=int, default=50, help="ms between chunks")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=4096, help="bytes")
    parser.add_argument("--settle", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.rates = [float(part) for part in options.rates.split(",")]
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        build(work)
        runs = rounds(work, options)
    print(table(runs))
    if options.json:
        about = {"cores": cores, "load": os.getloadavg(), "options": vars(options)}
        text = json.dumps({"about": about, "runs": runs}, indent=1, default=str)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
