"""Endurance: a served model under thousands of mixed, aborted and hostile requests.

Starts `millrace serve MODEL --debug` with MTP and a small cache, so that every invariant is checked
after every step and requests are preempted; sends the mix of `tests/support/soak.py`; and compares
what front and engine hold before and after. Exit status 1 if anything stayed or any answer was
wrong. Run from the checkout: `python benchmarks/soak.py --requests 5000`.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.live_server import LiveServer, started
from tests.support.soak import HeldResources, holdings, soak

FLAGS = (
    "--debug", "--port=0", "--max-server-restarts=0", "--max-model-len=512", "--max-num-seqs=8",
    "--read-timeout=1",
    "--max-num-batched-tokens=128", "--kv-cache-memory-bytes=24500000", "--num-snapshots=2",
)  # fmt: skip


def settled(
    server: LiveServer, wanted: HeldResources | None = None, limit: float = 30.0
) -> HeldResources:
    """What the server holds once nothing is open, or once it is as `wanted`."""
    deadline = time.monotonic() + limit
    while True:
        now = holdings(server.url, server.process.pid)
        done = now == wanted if wanted else now.running + now.waiting + now.pages == 0
        if done or time.monotonic() > deadline:
            return now
        time.sleep(0.3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drafts", type=int, default=1, help="MTP draft tokens; 0 for none")
    options = parser.parse_args()
    command = [sys.executable, "-m", "millrace.cli", "serve", options.model, *FLAGS]
    if options.drafts:
        command.append(
            f'--speculative-config={{"method": "mtp", "num_speculative_tokens": {options.drafts}}}'
        )
    with (
        tempfile.TemporaryDirectory() as directory,
        started(command, Path(directory) / "log") as server,
    ):
        server.wait_ready(120)
        return run(server, options)


def run(server: LiveServer, options: argparse.Namespace) -> int:
    asyncio.run(soak(server.url, 300, seed=options.seed + 1, at_once=options.at_once))  # warm
    before, memory = settled(server), resident(server)
    report = asyncio.run(soak(server.url, options.requests, options.seed, options.at_once))
    after = settled(server, before)
    print(f"{options.requests} requests in {report.seconds:.1f} s, kind, status and number:")
    print(report.table())
    print(f"steps {server.metric('millrace:steps_total'):.0f}, preemptions "
          f"{server.metric('millrace:num_preemptions_total'):.0f}, resident MB before and after: "
          f"{memory} {resident(server)}")  # fmt: skip
    print(f"before: {before}\nafter:  {after}")
    traces = server.log.count("Traceback")
    for problem in report.problems[:20]:
        print(f"PROBLEM {problem}")
    if traces:
        print(f"PROBLEM {traces} tracebacks in the log:\n{server.log[-6000:]}")
    if after != before:
        print("PROBLEM something stayed")
    return int(bool(report.problems or traces or after != before))


def resident(server: LiveServer) -> dict[str, int]:
    front = psutil.Process(server.process.pid)
    (engine,) = front.children()
    return {name: p.memory_info().rss >> 20 for name, p in (("front", front), ("engine", engine))}


if __name__ == "__main__":
    sys.exit(main())
