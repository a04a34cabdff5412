"""A short prompt behind long ones: time to first token, and what it costs in throughput.

Two servers take turns, round by round, with the same prompts: one with the code of this tree, one
with the code in BEFORE (the `src` folder of another commit). In each round: a prompt of 64 tokens
alone; four of 4,000 tokens alone; the four with eight short ones that arrive meanwhile; and a mix
of 24 prompts of 64 to 1,024 tokens with 32 out. It prints medians over the rounds, and the medians
of the rounds' ratios.

    git archive COMMIT src | tar -x -C /tmp/before
    python benchmarks/short_behind_long.py models/millrace-mini --before /tmp/before/src --rounds 5

Arguments after -- are passed to both servers; --ours and --theirs take arguments for one of them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SRC = Path(__file__).resolve().parents[1] / "src"
VOCABULARY = 3000  # token ids below are plain ones in every model that ships
SHORT, LONG, SEVERAL = 64, 4000, 4
SHORTS, EVERY = 8, 0.15  # short ones behind the long ones, one in so many seconds
MIX = 24  # requests


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token and to the end; tokens in and out."""

    first: float
    whole: float
    tokens: int


@dataclass(frozen=True)
class Server:
    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """What its processes have used so far; other work on the machine disturbs it little."""
        times = [p.cpu_times() for p in (self.process, *self.process.children(recursive=True))]
        return sum(one.user + one.system for one in times)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(model: str, src: Path, words: Sequence[str]) -> Iterator[Server]:
    """A server with the code in `src`. It is ended with the block."""
    port = free_port()
    command = [sys.executable, "-m", "millrace.cli", "serve", model, "--port", str(port), *words]
    env = os.environ | {"PYTHONPATH": str(src)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        await_ready(port, process)
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def await_ready(port: int, process: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"the server on port {port} did not get ready")


def send(port: int, model: str, prompt: list[int], outputs: int) -> Answer:
    """One streamed completion."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": outputs, "stream": True,
        "temperature": 0.0, "ignore_eos": True,
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"status {response.status}: {response.read().decode()}")
    first = 0.0
    for line in response:
        if not first and line.startswith(b"data:"):
            first = time.perf_counter() - start
    connection.close()
    return Answer(first, time.perf_counter() - start, len(prompt) + outputs)


@dataclass
class Measured:
    tokens: int = 0
    rates: dict[str, float] = field(default_factory=dict)


class Client:
    """Asks one server. Every prompt is new, so that no prefix is cached."""

    def __init__(self, server: Server, model: str, seed: int) -> None:
        self._server, self._model = server, model
        self._rng = random.Random(seed)
        self._pool = ThreadPoolExecutor(MIX)

    def prompt(self, length: int) -> list[int]:
        return [self._rng.randrange(3, VOCABULARY) for _ in range(length)]

    def send(self, length: int, outputs: int) -> Future[Answer]:
        return self._pool.submit(send, self._server.port, self._model, self.prompt(length), outputs)

    def alone(self) -> dict[str, float]:
        answer = self.send(SHORT, 8).result()
        return {"64 alone, TTFT ms": 1e3 * answer.first}

    def long(self) -> dict[str, float]:
        with self._measured("4 x 4,000") as found:
            answers = [future.result() for future in self._send_long()]
            found.tokens = sum(answer.tokens for answer in answers)
        return found.rates | {"4 x 4,000, mean TTFT ms": mean_first(answers)}

    def behind(self) -> dict[str, float]:
        start = time.perf_counter()
        with self._measured("4 x 4,000 and 8 x 64") as found:
            longs = self._send_long()
            shorts = []
            for number in range(SHORTS):
                due = start + 0.1 + EVERY * (number + self._rng.random())
                time.sleep(max(0.0, due - time.perf_counter()))
                shorts.append(self.send(SHORT, 8))
            first = [future.result().first for future in shorts]
            answers = [future.result() for future in longs]
            found.tokens = sum(future.result().tokens for future in longs + shorts)
        return {
            "64 behind 4 x 4,000, the first one's TTFT ms": 1e3 * first[0],
            "64 behind 4 x 4,000, median TTFT ms": 1e3 * statistics.median(first),
            "4 x 4,000 and 8 x 64, the long ones' mean TTFT ms": mean_first(answers),
            **found.rates,
        }

    def mix(self) -> dict[str, float]:
        lengths = [self._rng.randint(64, 1024) for _ in range(MIX)]
        with self._measured("mix") as found:
            answers = [future.result() for future in [self.send(n, 32) for n in lengths]]
            found.tokens = sum(answer.tokens for answer in answers)
        return found.rates | {"mix, mean TTFT ms": mean_first(answers)}

    def round(self) -> dict[str, float]:
        return self.alone() | self.long() | self.behind() | self.mix()

    def _send_long(self) -> list[Future[Answer]]:
        return [self.send(LONG, 8) for _ in range(SEVERAL)]

    @contextlib.contextmanager
    def _measured(self, name: str) -> Iterator[Measured]:
        """Rates of the block, which says how many tokens it had served."""
        found, cpu, start = Measured(), self._server.cpu_seconds(), time.perf_counter()
        yield found
        spent, cpu = time.perf_counter() - start, self._server.cpu_seconds() - cpu
        found.rates = {
            f"{name}, total tok/s": found.tokens / spent,
            f"{name}, total tok a CPU second": found.tokens / cpu,
        }


def mean_first(answers: Sequence[Answer]) -> float:
    """Milliseconds."""
    return 1e3 * statistics.mean(answer.first for answer in answers)


def report(before: list[dict[str, float]], now: list[dict[str, float]]) -> None:
    print("| | before | now | now / before |")
    print("|---|---|---|---|")
    for name in now[0]:
        old, new = (statistics.median(one[name] for one in rounds) for rounds in (before, now))
        ratio = statistics.median(n[name] / o[name] for o, n in zip(before, now, strict=True))
        print(f"| {name} | {old:,.0f} | {new:,.0f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--before", type=Path, required=True, help="src folder of another commit")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ours", type=shlex.split, default=[], help="words for this tree's server")
    parser.add_argument("--theirs", type=shlex.split, default=[], help="words for the other")
    options, words = parser.parse_known_args()
    words = [word for word in words if word != "--"]
    before: list[dict[str, float]] = []
    now: list[dict[str, float]] = []
    with (
        server(options.model, options.before, [*words, *options.theirs]) as old,
        server(options.model, SRC, [*words, *options.ours]) as new,
    ):
        for number in range(options.rounds + 1):
            sides = [(before, old), (now, new)]
            for rounds, side in sides if number % 2 else reversed(sides):
                found = Client(side, options.model, seed=number).round()
                rounds += [found] if number else []  # the first round warms up
    report(before, now)


if __name__ == "__main__":
    main()
