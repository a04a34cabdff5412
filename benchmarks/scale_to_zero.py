"""From zero replicas to three and back under load, by a controller that obeys /gateway/scale.

    python benchmarks/scale_to_zero.py [--seconds 25] [--out scale.json]

A gateway without replicas gets a few streams, then many, then none. Every half second the
controller reads how many replicas are wanted; it starts `millrace serve` processes and joins those
that are healthy, or drains the newest one, removes it and stops it. The table shows what was
wanted and what there was. Exit status 1 if a request was lost, if fewer than the most replicas
came, if one was left at the end, or if the number that was wanted rose and fell more than once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from streams import stream_while

from millrace.common.http_client import Target, fetch
from millrace.common.sockets import free_port
from millrace.fleet.replica_process import ReplicaProcess, start_and_wait_healthy
from millrace.gateway.app import Gateway
from millrace.gateway.common.limits import GatewayLimits, ScalePolicy
from millrace.gateway.processes.options import GatewayOptions

HOST = "127.0.0.1"
PER_REPLICA = 4
MOST = 3
START_SECONDS = 120.0


@dataclass
class Run:
    """What was seen: (seconds, wanted, up, starting), and how requests ended."""

    began: float = field(default_factory=time.monotonic)
    rows: list[tuple[float, int, int, int]] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)

    def note(self, wanted: int, up: int, starting: int) -> None:
        row = (wanted, up, starting)
        if not self.rows or self.rows[-1][1:] != row:
            self.rows.append((round(time.monotonic() - self.began, 1), *row))

    def turns(self) -> int:
        """How often the number that was wanted turned from rising to falling."""
        wanted = [row[1] for row in self.rows]
        steps = [b - a for a, b in pairwise(wanted) if a != b]
        return sum(a > 0 > b for a, b in pairwise(steps))


class Controller:
    """Starts and stops replicas as the gateway asks; gateway: where it listens, and for changes."""

    def __init__(self, gateway: Target, admin: Target, model: str, run: Run) -> None:
        self._gateway = gateway
        self._admin = admin
        self._model = model
        self._run = run
        self._replicas: dict[int, ReplicaProcess] = {}  # by port
        self._starting: set[asyncio.Task[None]] = set()

    async def obey(self) -> None:
        while True:
            state = json.loads((await fetch(self._gateway, "/gateway/scale")).body)
            self._run.note(state["wanted"], state["up"], len(self._starting))
            there = len(self._replicas) + len(self._starting)
            for _ in range(state["wanted"] - there):
                task = asyncio.create_task(self._start())
                self._starting.add(task)
                task.add_done_callback(self._started)
            if state["wanted"] < len(self._replicas):
                await self._stop_newest()
            await asyncio.sleep(0.5)

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._run.ends[f"lost: {error}"] += 1  # a replica that does not start is a failure, too

    async def _start(self) -> None:
        target = Target(HOST, free_port(HOST))
        command = [sys.executable, "-m", "millrace", "serve", self._model, "--device", "cpu"]
        command += ["--max-model-len", "1024", "--kv-cache-memory-bytes", str(100 << 20)]
        command += ["--max-num-seqs", "16"]
        command += ["--host", HOST, "--port", str(target.port)]
        process = ReplicaProcess(command, {"OMP_NUM_THREADS": "1"}, lambda line: None)
        await start_and_wait_healthy(process, target, "a replica", START_SECONDS)
        body = json.dumps({"url": f"http://{HOST}:{target.port}"}).encode()
        await fetch(self._admin, "/gateway/replicas", method="POST", body=body)
        self._replicas[target.port] = process

    async def _stop_newest(self) -> None:
        port, process = self._replicas.popitem()
        rows = json.loads((await fetch(self._gateway, "/gateway/replicas")).body)["replicas"]
        (row,) = (row for row in rows if row["url"].endswith(f":{port}"))
        await fetch(self._admin, f"/gateway/replicas/{row['id']}", method="DELETE")
        await process.stop(30.0)  # SIGTERM: what still runs there ends, or goes on elsewhere

    async def close(self) -> None:
        await asyncio.gather(*self._starting, return_exceptions=True)
        await asyncio.gather(*(process.stop(10.0) for process in self._replicas.values()))

    @property
    def left(self) -> int:
        return len(self._replicas)


async def load(gateway: Target, count: int, seconds: float, run: Run) -> None:
    until = time.monotonic() + seconds
    clients = (
        stream_while(gateway, number, lambda: time.monotonic() < until, run.ends)
        for number in range(count)
    )
    await asyncio.gather(*clients)


async def scenario(options: argparse.Namespace) -> Run:
    run = Run()
    made = Gateway(
        GatewayOptions(
            port=0,
            admin_port=0,
            limits=GatewayLimits(hold_timeout=120.0),
            scale=ScalePolicy(
                scale_requests=PER_REPLICA, scale_max=MOST,
                scale_down_after=10.0, scale_zero_after=10.0,
            ),
        )
    )  # fmt: skip
    await made.start()
    gateway, admin = Target(HOST, made.port), Target(HOST, made.admin_port)
    controller = Controller(gateway, admin, options.model, run)
    obeying = asyncio.create_task(controller.obey())
    try:
        await load(gateway, 2, options.seconds, run)
        await load(gateway, PER_REPLICA * MOST, 2 * options.seconds, run)
        end = time.monotonic() + 60
        while controller.left and time.monotonic() < end:
            await asyncio.sleep(0.5)
        await asyncio.sleep(1.0)
    finally:
        obeying.cancel()
        await asyncio.gather(obeying, return_exceptions=True)
        await controller.close()
        await made.stop()
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--seconds", type=float, default=25.0, help="of each load; the large twice")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run = asyncio.run(scenario(options))
    print("seconds  wanted  up  starting")
    for seconds, wanted, up, starting in run.rows:
        print(f"{seconds:7.1f}  {wanted:6}  {up:2}  {starting:8}")
    print(dict(run.ends), f"turns from rising to falling: {run.turns()}")
    if options.out:
        options.out.write_text(json.dumps({"rows": run.rows, "ends": run.ends}, indent=1))
    most, last = max(row[2] for row in run.rows), run.rows[-1]
    right = set(run.ends) == {"whole"} and most == MOST and last[1:3] == (0, 0) and run.turns() == 1
    raise SystemExit(0 if right else 1)


if __name__ == "__main__":
    main()
