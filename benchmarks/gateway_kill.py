"""Replicas are killed under load, again and again: no request may fail, no token may be wrong.

Three real engines in fp32, or --dtype, run behind `millrace serve --replicas 3`. Greedy answers are
recorded once without disturbance. Then, while requests stream, a replica gets SIGKILL (or SIGSTOP,
or a gateway process gets SIGKILL) every few seconds, and every answer is compared with the recorded
one.
`--what notice` is what a spot machine does: SIGTERM, and SIGKILL for what is left 30 seconds later.
A gateway process that is killed loses the connections that it has accepted: it is stopped first and
these are listed, so that failures on other connections can be told from those.

    python benchmarks/gateway_kill.py --seconds 120 --every 6 --what replica
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import uvloop

from millrace.common.http_client import Connection, Target, connect, encode_request, fetch

NOTICE = 30.0  # seconds that a spot machine gives
_COUNTED = ("answered", "failed", "failed_with_process", "different")
ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = [
    "a fox",
    "the sea",
    "an old mill",
    "two friends",
    "a lost key",
    "winter",
    "the moon",
    "a small boat",
]


def request(index: int, model: str, tokens: int) -> tuple[str, bytes]:
    """(path, body) of the request with this number; there are 16 different ones."""
    subject = SUBJECTS[index % 8]
    body: dict[str, Any] = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
    if index % 16 < 8:
        return "/v1/completions", json.dumps(
            {**body, "prompt": f"Once there was {subject}"}
        ).encode()
    messages = [{"role": "user", "content": f"Tell me about {subject}."}]
    return "/v1/chat/completions", json.dumps({**body, "messages": messages}).encode()


def read(body: bytes) -> tuple[str, int]:
    """(text, completion tokens) of a stream. Raises ValueError for one that has no end."""
    text, count, done = "", -1, False
    for line in body.split(b"\n\n"):
        data = line.removeprefix(b"data: ")
        if data == b"[DONE]":
            done = True
        elif data:
            event = json.loads(data)
            if "error" in event:
                raise ValueError(str(event["error"]))
            for choice in event["choices"]:
                delta = choice.get("delta", {})
                text += choice.get("text") or delta.get("reasoning_content") or ""
                text += delta.get("content") or ""
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
    if not done:
        raise ValueError("no [DONE]")
    return text, count


async def answer(
    connection: Connection, target: Target, index: int, model: str, tokens: int
) -> tuple[str, int]:
    path, body = request(index, model, tokens)
    async with asyncio.timeout(120):
        response = await connection.send(encode_request(target, "POST", path, body))
    if response.error is not None:
        raise ValueError(response.error)
    if response.status != 200:
        raise ValueError(f"status {response.status}: {response.body[:200]!r}")
    return read(response.body)


async def asked_alone(target: Target, index: int, model: str, tokens: int) -> tuple[str, int]:
    connection = await connect(target)
    try:
        return await answer(connection, target, index, model, tokens)
    finally:
        connection.close()


async def clients(
    target: Target,
    options: argparse.Namespace,
    truth: list[tuple[str, int]],
    end: float,
    doomed: set[int],
) -> Counter[str]:
    """Keep `streams` requests running until `end`, each on a connection of its own. doomed: ports
    of connections that a killed gateway process held."""
    results: Counter[str] = Counter()

    async def one(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            index, port = draw.randrange(16), 0
            try:
                connection = await connect(target)
                port = connection.local_port
                got = await answer(connection, target, index, options.model, options.tokens)
                connection.close()
            except (OSError, ValueError) as error:
                results["failed_with_process" if port in doomed else "failed"] += 1
                print(f"failed: {error}{', on a doomed connection' * (port in doomed)}", flush=True)
                continue
            results["answered"] += 1
            if got != truth[index]:
                results["different"] += 1
                print(f"different: {got!r}\n     from: {truth[index]!r}", flush=True)

    await asyncio.gather(*(one(seed) for seed in range(options.streams)))
    return results


async def murders(
    target: Target, options: argparse.Namespace, supervisor: int, end: float, doomed: set[int]
) -> int:
    """Kill one every `every` seconds; the next only when all are healthy again."""
    draw, count = random.Random(1), 0
    await asyncio.sleep(options.every / 2)
    while time.monotonic() < end - options.every:
        state = json.loads((await fetch(target, "/gateway/status")).body)
        if all(row["healthy"] for row in state["replicas"]):
            count += 1
            victim = draw.choice(victims(supervisor, state["workers"], options.what))
            if options.what == "stop":
                os.kill(victim, signal.SIGSTOP)
                asyncio.get_running_loop().call_later(15, _continue, victim)
            elif options.what == "notice":
                _notice(victim)
            else:
                if options.what == "gateway":
                    doomed |= stopped_clients(victim, target.port)
                os.kill(victim, signal.SIGKILL)
        await asyncio.sleep(options.every)
    return count


def stopped_clients(pid: int, port: int) -> set[int]:
    """Stop a process, so that it accepts no more, and list the ports of its clients at `port`."""
    process = psutil.Process(pid)
    process.suspend()
    deadline = time.monotonic() + 5.0
    while process.status() != psutil.STATUS_STOPPED:  # on a busy machine the stop takes a while
        if time.monotonic() > deadline:
            raise SystemExit(f"process {pid} did not stop within 5 s")
    held = process.net_connections("tcp")
    return {one.raddr.port for one in held if one.raddr and one.laddr.port == port}


def _notice(pid: int) -> None:
    """SIGTERM to a server; in 30 seconds it and its engine are gone, whatever they do."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    family[0].terminate()
    asyncio.get_running_loop().call_later(NOTICE, _reclaim, family)


def _reclaim(family: list[psutil.Process]) -> None:
    for process in family:
        if process.is_running():
            print(f"{process.pid} was still there after {NOTICE:g} s", flush=True)
            process.kill()


def _continue(pid: int) -> None:
    if psutil.pid_exists(pid):
        os.kill(pid, signal.SIGCONT)


def victims(supervisor: int, workers: list[int], what: str) -> list[int]:
    """Process ids to choose from: gateway processes, servers, or the engines behind them."""
    if what == "gateway":
        return workers
    servers = [
        child
        for child in psutil.Process(supervisor).children()
        if child.pid not in workers and "serve" in child.cmdline()
    ]
    if what == "engine":
        return [child.pid for server in servers for child in server.children()]
    return [server.pid for server in servers]


async def run(options: argparse.Namespace) -> dict[str, Any]:
    processes = 2 if options.what == "gateway" else 1
    command = [
        *(sys.executable, "-m", "millrace.cli", "serve", options.model, "--port", "0"),
        *(
            "--replicas",
            "3",
            "--dtype",
            options.dtype,
            "--max-model-len",
            "1024",
            "--device",
            "cpu",
        ),
        *(["--batch-invariant"] if options.batch_invariant else []),
        *("--gateway-processes", str(processes), "--kv-cache-memory-bytes", str(200 << 20)),
        "--disable-uvicorn-access-log",
    ]
    supervisor = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        target = await _port(supervisor)
        truth = [await asked_alone(target, i, options.model, options.tokens) for i in range(16)]
        doomed: set[int] = set()
        end = time.monotonic() + options.seconds
        results, killed = await asyncio.gather(
            clients(target, options, truth, end, doomed),
            murders(target, options, supervisor.pid, end, doomed),
        )
        state = json.loads((await fetch(target, "/gateway/status")).body)
    finally:
        supervisor.send_signal(signal.SIGTERM)
        await supervisor.wait()
    events = {name: state["events"][name] for name in ("retries", "resumed", "cut_off")}
    return {
        "what": options.what,
        "seconds": options.seconds,
        "streams": options.streams,
        "killed": killed,
        **{name: results[name] for name in _COUNTED},
        **events,
        "worker_restarts": state["worker_restarts"],
        "left": {r["url"]: r["in_flight"] + r["resident_tokens"] for r in state["replicas"]},
    }


async def _port(supervisor: asyncio.subprocess.Process) -> Target:
    assert supervisor.stderr is not None
    while line := (await supervisor.stderr.readline()).decode():
        if ready := re.search(r"\d replicas on https?://[^:]*:(\d+)", line):
            asyncio.create_task(_drain(supervisor.stderr))  # noqa: RUF006
            return Target("127.0.0.1", int(ready[1]))
    raise SystemExit("the replicas did not come up")


async def _drain(lines: asyncio.StreamReader) -> None:
    while line := await lines.readline():
        if b"ended" in line or b"Traceback" in line:
            print(line.decode().rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument(
        "--what", choices=["replica", "engine", "stop", "gateway", "notice"], default="replica"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=6.0)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = uvloop.run(run(options))
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    raise SystemExit(bool(result["failed"] or result["different"]))


if __name__ == "__main__":
    main()
