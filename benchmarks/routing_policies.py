"""The benefit of routing policies: prefix_aware on shared prefixes, least_loaded on uneven lengths.

Real engines run behind `millrace serve --replicas` and get the same seeded requests under each
policy; policies are interleaved and repeated. Shared prefixes: each request begins with one of
several long texts, and the cache of one replica cannot hold them all. Uneven lengths: every fifth
answer is 25 times as long.

    python benchmarks/routing_policies.py --workload prefixes --policies prefix_aware round_robin
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from millrace.common.http_client import Target, fetch

WORDS = [
    "the",
    "old",
    "man",
    "and",
    "his",
    "dog",
    "went",
    "down",
    "to",
    "a",
    "river",
    "where",
    "they",
    "saw",
    "many",
    "small",
    "fish",
    "in",
    "it",
]


def requests(workload: str, count: int) -> list[bytes]:
    """Bodies of the seeded requests."""
    draw = random.Random(5)
    prefixes = [" ".join(draw.choices(WORDS, k=500)) for _ in range(8)]
    bodies = []
    for number in range(count):
        if workload == "prefixes":
            prompt, tokens = f"{draw.choice(prefixes)} {number}", 4
        else:
            prompt, tokens = " ".join(draw.choices(WORDS, k=20)), 8 if draw.random() < 0.8 else 200
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        bodies.append(json.dumps({**body, "stream": True}).encode())
    return bodies


async def drive(target: Target, bodies: list[bytes], concurrency: int) -> dict[str, Any]:
    """Send all, `concurrency` at a time."""
    left, firsts, wholes = iter(bodies), [], []

    async def one() -> None:
        for body in left:
            began = time.perf_counter_ns()
            answer = await fetch(target, "/v1/completions", method="POST", body=body, timeout=300)
            assert answer.status == 200, answer.body
            firsts.append((answer.pieces[0][0] - began) / 1e6)
            wholes.append((answer.end_ns - began) / 1e6)

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(concurrency)))
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, "requests_per_s": len(bodies) / seconds}
    for name, values in (("ttft", firsts), ("e2e", wholes)):
        values.sort()
        result[f"{name}_p50_ms"] = values[len(values) // 2]
        result[f"{name}_p95_ms"] = values[len(values) * 95 // 100]
    return result


async def run(policy: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "millrace.cli", "serve", options.model, "--port", "0"),
        *("--replicas", str(options.replicas), "--policy", policy, "--max-model-len", "1024"),
        *("--device", "cpu", "--max-num-seqs", "8"),
    ]
    if options.workload == "prefixes":
        command += ["--num-snapshots", str(options.snapshots)]
    supervisor = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        assert supervisor.stderr is not None
        ready = None
        while ready is None:
            line = (await supervisor.stderr.readline()).decode()
            if not line:
                raise SystemExit("the replicas did not come up")
            ready = re.search(r"\d replicas on https?://[^:]*:(\d+)", line)
        drain = asyncio.create_task(_drain(supervisor.stderr))
        target = Target("127.0.0.1", int(ready[1]))
        bodies = requests(options.workload, options.requests)
        result = await drive(target, bodies, options.concurrency)
        page = (await fetch(target, "/metrics")).body.decode()
        hits, queries = (
            _sum(page, f"millrace:prefix_cache_{n}_total") for n in ("hits", "queries")
        )
        made = _values(page, "millrace:generation_tokens_total")
        taken = _values(page, "millrace:prompt_tokens_total")
        tokens = [a + b for a, b in zip(made, taken, strict=True)]
        result["hit_rate"] = hits / queries if queries else 0.0
        result["token_imbalance"] = max(tokens) / statistics.mean(tokens) - 1
        drain.cancel()
    finally:
        supervisor.send_signal(signal.SIGTERM)
        await supervisor.wait()
    return {key: round(value, 3) for key, value in result.items()}


async def _drain(lines: asyncio.StreamReader) -> None:
    while await lines.readline():
        pass


def _values(page: str, name: str) -> list[float]:
    return [float(v) for v in re.findall(rf"^{re.escape(name)}\{{.*\}} (\S+)$", page, re.M)]


def _sum(page: str, name: str) -> float:
    return sum(_values(page, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=["prefixes", "lengths"], required=True)
    parser.add_argument("--policies", nargs="+", default=["round_robin", "least_loaded"])
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--snapshots", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for policy in options.policies[:: 1 if number % 2 == 0 else -1]:
            result = uvloop.run(run(policy, options))
            results.setdefault(policy, []).append(result)
            print(options.workload, policy, json.dumps(result), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
