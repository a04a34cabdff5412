"""Endurance of a fleet: kills, stops and hostile clients among honest ones, and a full log disk.

Two replicas in fp32 behind `millrace serve --replicas 2` with two gateway processes; everything
that the fleet would log goes to /dev/full. Honest clients stream greedy answers that are compared
with those taken in peace. Every few seconds an engine, a server or a gateway process gets SIGKILL,
or an engine gets SIGSTOP for a while. Hostile clients send deep grammars, huge texts, cache probes
and malformed HTTP all along. At the end nothing may be missing, wrong, hung or left behind.

    python benchmarks/soak_fleet.py --seconds 600            # or: make soak

Exit status 1 if an honest request failed on a connection whose gateway process lived, if an answer
differs, if a hostile request got no answer, none in time or a 500, or if something stayed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop
from gateway_kill import ROOT, answer, asked_alone, stopped_clients

from millrace.common.http_client import Target, connect, fetch
from millrace.common.sockets import free_port

sys.path.insert(0, str(ROOT))

from tests.support.soak import post

KINDS = ("engine", "server", "gateway", "stop")
STOPPED_SECONDS = 8.0
ANSWER_SECONDS = 90.0  # a hostile request must be answered or refused within so long


@dataclass
class Tally:
    """What came of everything that was sent."""

    honest: Counter[str] = field(default_factory=Counter)
    hostile: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    doomed: set[int] = field(default_factory=set)  # client ports of killed gateway processes


# --- the fleet ---------------------------------------------------------------------------------


def start(model: str, port: int, log: str) -> subprocess.Popen[bytes]:
    """The fleet; all that it prints goes to `log`."""
    command = [
        *(sys.executable, "-m", "millrace.cli", "serve", model, "--port", str(port)),
        *("--replicas", "2", "--gateway-processes", "2", "--dtype", "float32", "--device", "cpu"),
        *("--max-model-len", "1024", "--kv-cache-memory-bytes", str(200 << 20)),
    ]
    with Path(log).open("wb") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT
        )


async def status(target: Target) -> dict[str, Any]:
    return dict(json.loads((await fetch(target, "/gateway/status", timeout=10)).body))


async def wait_healthy(target: Target, limit: float) -> bool:
    """Whether both replicas are healthy within `limit` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            replicas = (await status(target))["replicas"]
            if len(replicas) == 2 and all(row["healthy"] for row in replicas):
                return True
        except (OSError, ValueError, KeyError, TimeoutError):
            pass
        await asyncio.sleep(0.5)
    return False


def processes(supervisor: int) -> dict[str, list[int]]:
    """Process ids by what they are."""
    found: dict[str, list[int]] = {"engine": [], "server": [], "gateway": []}
    for child in psutil.Process(supervisor).children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "millrace.replica.process" in command:
            found["engine"].append(child.pid)
        elif "gateway.processes" in command:
            found["gateway"].append(child.pid)
        elif "millrace.cli serve" in command:
            found["server"].append(child.pid)
    return found


async def kill_now_and_then(
    target: Target, supervisor: int, every: float, end: float, tally: Tally
) -> None:
    """The next kill waits until both replicas are healthy again."""
    draw, kinds = random.Random(1), itertools.cycle(KINDS)
    while time.monotonic() < end - every:
        await asyncio.sleep(every / 2)
        if not await wait_healthy(target, 90):
            tally.problems.append("a replica did not come back within 90 s")
            continue
        kind = next(kinds)
        found = processes(supervisor)["engine" if kind == "stop" else kind]
        if found:
            tally.kills[kind] += 1
            hit(kind, draw.choice(found), target.port, tally)
        await asyncio.sleep(every / 2)


def hit(kind: str, victim: int, port: int, tally: Tally) -> None:
    if kind == "stop":
        os.kill(victim, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(STOPPED_SECONDS, go_on, victim)
        return
    if kind == "gateway":
        tally.doomed |= stopped_clients(victim, port)
    os.kill(victim, signal.SIGKILL)


def go_on(pid: int) -> None:
    if psutil.pid_exists(pid):
        os.kill(pid, signal.SIGCONT)


# --- honest clients ----------------------------------------------------------------------------


async def honest(
    target: Target, model: str, tokens: int, truth: list[Any], seed: int, end: float, tally: Tally
) -> None:
    draw = random.Random(seed)
    while time.monotonic() < end:
        index, port = draw.randrange(16), 0
        try:
            connection = await connect(target)
            port = connection.local_port
            got = await answer(connection, target, index, model, tokens)
            connection.close()
        except (OSError, ValueError, TimeoutError) as error:
            doomed = port in tally.doomed
            tally.honest["failed with its gateway process" if doomed else "failed"] += 1
            if not doomed:
                tally.problems.append(f"honest request {index} failed: {str(error)[:300]}")
            continue
        tally.honest["answered"] += 1
        if got != truth[index]:
            tally.honest["different"] += 1
            tally.problems.append(f"honest request {index} got {got!r}")


# --- hostile clients ---------------------------------------------------------------------------


def chat(**fields: Any) -> bytes:
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "max_tokens": 3, **fields}
    return post("/v1/chat/completions", json.dumps(body).encode())


def completion(**fields: Any) -> bytes:
    return post("/v1/completions", json.dumps({"prompt": "a", "max_tokens": 1, **fields}).encode())


def deep_grammar(draw: random.Random) -> bytes:
    rules = draw.choice([500, 4000, 20_000])
    lines = ["start: r0", *(f"r{i}: r{i + 1}" for i in range(rules)), f'r{rules}: "a"']
    return chat(structured_outputs={"grammar": "\n".join(lines)})


def deep_schema(draw: random.Random) -> bytes:
    count = draw.choice([500, 4000])
    defs = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(count)}
    schema = {"$defs": {**defs, f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}
    if draw.random() < 0.5:
        wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        return chat(response_format=wanted)
    parameters = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a0"}}}
    function = {"name": "f", "parameters": {**parameters, "$defs": schema["$defs"]}}
    return chat(tools=[{"type": "function", "function": function}], tool_choice="required")


def long_text(draw: random.Random) -> bytes:
    size = draw.choice([100_000, 1_000_000, 10_000_000])
    text = "a" * size if draw.random() < 0.5 else "a b" * (size // 3)
    kind = draw.randrange(5)
    if kind == 0:
        return post("/tokenize", json.dumps({"prompt": text}).encode())
    if kind == 1:
        return chat(messages=[{"role": "user", "content": text}])
    if kind == 2:
        return completion(bad_words=[text])
    if kind == 3:
        return completion(stop=[text])
    return post("/detokenize", json.dumps({"tokens": [5] * (size // 2)}).encode())


def cache_probe(draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return b"GET /load?prefixes_since=0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    return completion(prompt="Once there was a fox", cache_salt=str(draw.randrange(4)))


def malformed(draw: random.Random) -> bytes:
    digits, close = "9" * 5000, b"Host: x\r\nConnection: close\r\n\r\n"
    return draw.choice(
        [
            post("/v1/completions", f'{{"prompt":"a","suffix":{digits}}}'.encode()),
            post("/v1/completions", b" " * (8 << 20)),
            chat(model="m" * 500_000),
            b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n" + close,
            b"POST /gateway/replicas/%C2%B2/drain HTTP/1.1\r\n" + close,
            b"POST /gateway/replicas/" + digits.encode() + b"/drain HTTP/1.1\r\n" + close,
            post("/gateway/replicas", b'{"url":"http://[::1"}'),
            b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n" + close + b"zz\r\n",
        ]
    )


HOSTILE: dict[str, Callable[[random.Random], bytes]] = {
    "deep grammar": deep_grammar,
    "deep schema": deep_schema,
    "long text": long_text,
    "cache probe": cache_probe,
    "malformed": malformed,
}


async def hostile(target: Target, seed: int, pause: float, end: float, tally: Tally) -> None:
    draw = random.Random(seed)
    names: Iterator[str] = itertools.cycle(HOSTILE)
    while time.monotonic() < end:
        name = next(names)
        data = HOSTILE[name](draw)
        began = time.monotonic()
        outcome, port = await send(target, data)
        took = time.monotonic() - began
        tally.slowest[name] = max(took, tally.slowest.get(name, 0.0))
        tally.hostile[name, outcome] += 1
        if port not in tally.doomed and outcome in ("no answer in time", "closed", "500"):
            tally.problems.append(f"{name}: {outcome} for {data[:200]!r}")
        await asyncio.sleep(pause)


async def send(target: Target, data: bytes) -> tuple[str, int]:
    """(the status or what came instead of one, the client's port)."""
    port = 0
    try:
        reader, writer = await asyncio.open_connection(target.host, target.port)
    except OSError:
        return "refused", port
    port = writer.get_extra_info("sockname")[1]
    sending = asyncio.create_task(write(writer, data))
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            line = await reader.readline()
        return line.split(b" ")[1].decode("latin-1") if line.count(b" ") > 1 else "closed", port
    except TimeoutError:
        return "no answer in time", port
    except (OSError, ValueError):
        return "closed", port
    finally:
        sending.cancel()
        writer.transport.abort()


async def write(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write what the other side takes; it may answer and close before the end."""
    try:
        writer.write(data)
        await writer.drain()
    except OSError:
        pass


# --- the run -----------------------------------------------------------------------------------


def memory(supervisor: int) -> int:
    """Resident MB of the fleet."""
    root = psutil.Process(supervisor)
    return sum(one.memory_info().rss for one in (root, *root.children(recursive=True))) >> 20


async def run(options: argparse.Namespace) -> int:
    target, tally = Target("127.0.0.1", free_port("127.0.0.1")), Tally()
    fleet = start(options.model, target.port, options.log)
    try:
        if not await wait_healthy(target, 180):
            raise SystemExit("the replicas did not come up")
        names = options.model, options.tokens
        truth = [await asked_alone(target, i, *names) for i in range(16)]
        before = {name: len(found) for name, found in processes(fleet.pid).items()}
        began = memory(fleet.pid)
        end = time.monotonic() + options.seconds
        await asyncio.gather(
            kill_now_and_then(target, fleet.pid, options.every, end, tally),
            *(honest(target, *names, truth, seed, end, tally) for seed in range(options.streams)),
            *(hostile(target, 100 + n, options.pause, end, tally) for n in range(options.hostile)),
        )
        left = await settled(target, fleet.pid, before, tally)
        print_tally(tally, left, began, memory(fleet.pid), options.seconds)
    finally:
        children = psutil.Process(fleet.pid).children(recursive=True)
        fleet.terminate()
        fleet.wait(60)
    _, alive = psutil.wait_procs(children, timeout=10)
    if alive:
        tally.problems.append(f"processes outlive the fleet: {[one.pid for one in alive]}")
    for problem in tally.problems[:30]:
        print(f"PROBLEM {problem}")
    return int(bool(tally.problems))


async def settled(
    target: Target, supervisor: int, before: dict[str, int], tally: Tally
) -> dict[str, Any]:
    """What is still held half a minute after the last request, at most."""
    left: dict[str, Any] = {}
    for _ in range(60):
        await asyncio.sleep(0.5)
        try:
            rows = (await status(target))["replicas"]
        except (OSError, ValueError, KeyError, TimeoutError):
            continue
        left = {
            "in flight": sum(row["in_flight"] for row in rows),
            "resident tokens": sum(row["resident_tokens"] for row in rows),
            "healthy": sum(bool(row["healthy"]) for row in rows),
            **{name: len(found) for name, found in processes(supervisor).items()},
        }
        if left == {"in flight": 0, "resident tokens": 0, "healthy": 2, **before}:
            return left
    tally.problems.append(f"something stayed or is missing: {left}, before: {before}")
    return left


def print_tally(tally: Tally, left: dict[str, Any], began: int, ended: int, seconds: float) -> None:
    print(f"{seconds:g} s; kills: {dict(tally.kills)}; at the end: {left}")
    print(f"resident MB before and after: {began} {ended}")
    print("| clients | outcome | number | slowest, s |\n|---|---|---|---|")
    for outcome, count in sorted(tally.honest.items()):
        print(f"| honest | {outcome} | {count} | |")
    for (name, outcome), count in sorted(tally.hostile.items()):
        print(f"| {name} | {outcome} | {count} | {tally.slowest[name]:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between kills")
    parser.add_argument("--streams", type=int, default=8, help="honest clients")
    parser.add_argument("--hostile", type=int, default=3, help="hostile clients")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between their requests")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--log", default="/dev/full", help="where the fleet's output goes")
    raise SystemExit(uvloop.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
