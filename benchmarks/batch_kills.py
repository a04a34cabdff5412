"""`millrace batch` over 50,000 documents, killed at random: what is lost, doubled, and sent twice.

The servers answer at once and count; so this measures the runner, with its journal on this disk.
Peak memory is that of the runner, read from /proc. With --seconds the kills are that far apart at
most. With --model two replicas of it answer, and their own metrics count:

    python benchmarks/batch_kills.py --model millrace-mini --documents 600 --seconds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.batch.counting_server import CountingServer, chat_line  # noqa: E402
from tests.support.live_server import started  # noqa: E402

RULES = "You read insurance policies, and give back the fields as JSON. " * 8


class Server(Protocol):
    """asked: how often, by request; keys: idempotency keys that it has seen."""

    @property
    def url(self) -> str: ...

    @property
    def asked(self) -> Counter[str]: ...

    @property
    def keys(self) -> Collection[str]: ...


class Replica:
    """A real one. It counts what it was asked itself, when a request ends in whatever way."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys: list[str] = []

    @property
    def asked(self) -> Counter[str]:
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        ends = (f for f in text_string_to_metric_families(text) if f.name == "vllm:request_success")
        total = sum(s.value for f in ends for s in f.samples if s.name.endswith("_total"))
        return Counter({"all": int(total)})


@contextlib.contextmanager
def servers_of(model: str | None, folder: Path) -> Iterator[tuple[Server, Server]]:
    if model is None:
        with CountingServer(0.05).running() as one, CountingServer(0.1).running() as two:
            yield one, two
        return
    command = [sys.executable, "-m", "millrace.cli", "serve", model, "--port=0"]
    with started(command, folder / "1.log") as first, started(command, folder / "2.log") as second:
        for server in (first, second):
            server.wait_ready(300)
        yield Replica(first.url), Replica(second.url)


def write_documents(path: Path, count: int) -> None:
    """Short documents behind four kinds of rules."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = f"{RULES}{number % 4} document {number}"
            file.write(json.dumps(chat_line(number, text, max_tokens=64)) + "\n")


def peak_mib(pid: int) -> float:
    """The largest memory of a process so far."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) / 1024 if lines else 0.0


def run_until(command: list[str], seconds: float) -> tuple[bool, float]:
    """Run for that long at most, then kill. (whether it ended by itself, its peak memory)"""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline, peak = time.monotonic() + seconds, 0.0
    while process.poll() is None and time.monotonic() < deadline:
        peak = max(peak, peak_mib(process.pid))
        time.sleep(0.1)
    ended = process.poll() == 0
    process.kill()
    process.wait()
    return ended, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="of two real replicas, in place of servers that count")
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--max-in-flight", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with (
        tempfile.TemporaryDirectory() as name,
        servers_of(options.model, Path(name)) as servers,
    ):
        folder, (one, two) = Path(name), servers
        write_documents(folder / "in.jsonl", options.documents)
        command = [
            *(sys.executable, "-m", "millrace.cli", "batch", "-i", str(folder / "in.jsonl")),
            *("-o", str(folder / "out.jsonl"), "--max-in-flight", str(options.max_in_flight)),
            *("--base-url", one.url, "--base-url", two.url),
            *(("--model", options.model) if options.model else ()),
        ]
        began, kills, peak = time.monotonic(), 0, 0.0
        for _ in range(options.kills):
            ended, memory = run_until(command, draw.uniform(0.5, options.seconds))
            peak = max(peak, memory)
            if ended:
                break
            kills += 1
        ended, memory = run_until(command, 3600)
        peak, seconds = max(peak, memory), time.monotonic() - began
        return report(folder / "out.jsonl", options, servers, kills, seconds, peak)


def report(
    output: Path,
    options: argparse.Namespace,
    servers: tuple[Server, ...],
    kills: int,
    seconds: float,
    peak: float,
) -> int:
    """Print what happened. 1 if a request was lost or doubled, or too many were sent twice."""
    content = output.read_bytes()
    found = Counter(json.loads(line)["custom_id"] for line in content.splitlines())
    wanted = {f"id-{number}" for number in range(options.documents)}
    asked = sum((server.asked for server in servers), Counter[str]())
    again = sum(asked.values()) - options.documents
    most = kills * options.max_in_flight * len(servers)
    result = {
        "documents": options.documents,
        "kills": kills,
        "lost": len(wanted - set(found)),
        "unknown": len(set(found) - wanted),
        "doubled": sum(count > 1 for count in found.values()),
        "last line whole": content.endswith(b"\n"),
        "sent again": again,
        "sent again at most": most,
        "keys": len(set(servers[0].keys) | set(servers[1].keys)),
        "answers of each server": [sum(server.asked.values()) for server in servers],
        "seconds": round(seconds, 1),
        "peak MiB": round(peak, 1),
    }
    print(json.dumps(result, indent=1))
    good = found == Counter(wanted) and content.endswith(b"\n") and again <= most
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
