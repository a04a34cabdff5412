"""The cost of a relayed chunk of several proxies at the same time: disturbances affect them all.

On a shared machine, consecutive runs differ by more than the proxies do. Here all proxies run at
once on core 1, each with its own client; mock and clients are on core 0. CPU times are those of the
scheduler (ns), read every two seconds. Ratios to the first proxy are taken of each reading, so that
a slow moment counts for all.

    python benchmarks/relay_cost_side_by_side.py nginx millrace before=/path/to/checkout/src
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from relay_cost import build, command, family, free_port, on_core, running, wait_until_up

PROXIES, REST = 1, 0  # cores
READ_EVERY = 2.0  # seconds


def scheduled_seconds(pid: int) -> float:
    """CPU seconds of a process and its children, to the nanosecond."""
    total = 0
    for process in family(pid):
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def measure(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Start everything, read CPU times while streams run, stop everything."""
    answer_s = (options.first + (options.chunks - 1) * options.gap) / 1000
    rate = options.streams * options.chunks / answer_s
    with contextlib.ExitStack() as stack:

        def start(core: int, words: list[str], log: str) -> int:
            niced = ["nice", "-n", str(options.nice), *on_core(core, words)]
            return stack.enter_context(running(niced, work / log)).pid

        replicas = [free_port(), free_port()]
        beat = [options.first, options.gap, options.chunks]
        mock = [str(work / "mock"), *map(str, [*replicas, *beat]), "millrace"]
        start(REST, mock, "mock.log")
        pids, clients = {}, {}
        for name in options.proxies:
            port = free_port()
            known, _, options.before = name.partition("=")
            words = command(
                "millrace before" if options.before else known, port, replicas, work, options
            )
            if not words:
                raise SystemExit(f"{name}: not installed here")
            pids[known] = start(PROXIES, words, f"{known}.log")
            wait_until_up(port)
            clients[known] = port
        for name, port in clients.items():
            seconds = options.seconds + 1.0
            asked = [port, options.streams, seconds, options.prompt, 0, answer_s, 1.0]
            start(REST, [str(work / "client"), *map(str, asked)], f"{name}.out")
        time.sleep(answer_s + 2.0)
        readings = _readings(pids, rate, options.seconds)
        time.sleep(3.0)
        said = {name: (work / f"{name}.out").read_text().splitlines()[-1] for name in pids}
    return {"readings": readings, "clients": {n: json.loads(text) for n, text in said.items()}}


def _readings(pids: dict[str, int], rate: float, seconds: float) -> list[dict[str, float]]:
    """us a chunk of each proxy, again and again."""
    found = []
    for _ in range(int(seconds / READ_EVERY)):
        before, began = {n: scheduled_seconds(pid) for n, pid in pids.items()}, time.monotonic()
        time.sleep(READ_EVERY)
        chunks = rate * (time.monotonic() - began)
        found.append(
            {n: 1e6 * (scheduled_seconds(p) - before[n]) / chunks for n, p in pids.items()}
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("proxies", nargs="+", help="as of relay_cost.py, or NAME=SRC of a checkout")
    parser.add_argument("--streams", type=int, default=128, help="of each proxy")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--first", type=int, default=50, help="ms to the first chunk")
    parser.add_argument("--gap", type=int, default=50, help="ms between chunks")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=4096, help="bytes")
    parser.add_argument("--nice", type=int, default=0, help="of all; below 0 needs root")
    parser.add_argument("--peers", type=Path, default=Path(sys.executable).parent)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        build(Path(directory))
        runs = [measure(Path(directory), options) for _ in range(options.rounds)]
    first, rows = options.proxies[0].partition("=")[0], {}
    readings = [reading for run in runs for reading in run["readings"]]
    for name in readings[0]:
        costs = [reading[name] for reading in readings]
        ratios = [reading[name] / reading[first] for reading in readings]
        rows[name] = {
            "us_per_chunk": round(statistics.median(costs), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            "errors": sum(run["clients"][name]["errors"] for run in runs),
        }
        print(f"{name:16}", json.dumps(rows[name]))
    if options.json:
        about = {"cores": os.cpu_count(), "load": os.getloadavg(), "options": vars(options)}
        text = json.dumps({"about": about, "table": rows, "runs": runs}, indent=1, default=str)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
