"""Hand-overs between real servers behind a real gateway, while engines are killed at every phase.

Two servers compute prompts, two answer them, one gateway is in front, each a process of its own.
Before any of it every answer is asked of one server alone. Then `--hand-overs` prompts go through
the gateway, half of them seeded. Before every `--every`th one a phase and a side are chosen:

- computing: some milliseconds after the request was sent;
- offered: the prompt's record is offered, and nobody has taken it;
- moving: it is on its way;
- answering: the answer streams.

Phases are seen from outside, by the counters of `/metrics` and by the stream, so a kill now and
then comes a little late; each is counted for the phase that it was meant for. At the end nothing
may be lost, wrong or left behind: no open records, no pages, no requests. In a last, quiet round
bytes and pages sent must be those received.

    python benchmarks/hand_over_kills.py --transport tcp
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import commit

from millrace.common.http_client import Target, fetch, parse_url
from millrace.common.sockets import free_port
from millrace.model.tiny import UNIT_TEST, write_checkpoint
from tests.support.live_server import LiveServer, started

PHASES = ("computing", "offered", "moving", "answering")
SIDES = ("prefill", "decode")
EVENTS = ("handed_over", "hand_over_failed", "resumed", "retries")
TOKENS = 24
LEASE = 3.0
LIMIT = 90.0  # seconds of one request


class Fleet:
    """The servers by role, and the gateway in front of them."""

    def __init__(self, servers: dict[str, list[LiveServer]], gateway: Target) -> None:
        self.servers, self.gateway = servers, gateway

    @property
    def all(self) -> list[LiveServer]:
        return [one for side in SIDES for one in self.servers[side]]

    async def figure(self, side: str, name: str) -> float:
        """The sum of a counter over one side; servers without an engine have none now."""
        total = 0.0
        for one in self.servers[side]:
            with contextlib.suppress(OSError, ValueError):
                total += await figure_of(one, f"millrace:kv_transfer_{name}")
        return total

    async def wait_healthy(self) -> None:
        end, rows = time.monotonic() + LIMIT, []
        while time.monotonic() < end:
            with contextlib.suppress(OSError):  # it starts
                rows = json.loads((await fetch(self.gateway, "/gateway/status")).body)["replicas"]
            if len(rows) == 4 and all(row["healthy"] for row in rows):
                return
            await asyncio.sleep(0.05)
        raise SystemExit(f"not all servers came back: {rows}")


async def figure_of(server: LiveServer, name: str) -> float:
    """The sum over all labels of one metric. Raises OSError, or ValueError without the metric."""
    page = await fetch(parse_url(server.url), "/metrics", timeout=5.0)
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in page.body.decode().splitlines()
        if line.startswith((f"{name}{{", f"{name} "))
    ]
    if not found:
        raise ValueError(name)
    return sum(found)


@contextlib.contextmanager
def fleet(folder: Path, transport: str) -> Any:
    with contextlib.ExitStack() as stack:
        model = write_checkpoint(folder / "model", UNIT_TEST, seed=3)
        serve = [
            *(sys.executable, "-m", "millrace.cli", "serve", str(model), "--port", "0"),
            *("--kv-transport", transport, "--kv-lease", str(LEASE), "--dtype", "float32"),
            *("--max-model-len", "512", "--device", "cpu", "--served-model-name", "m"),
            *("--kv-cache-memory-bytes", str(64 << 20), "--host-cache-gb", "0.1"),
            *("--max-engine-restarts", "1000", "--snapshot-distance", "0"),
            *("--num-snapshots", "16"),
        ]
        servers = {
            side: [
                stack.enter_context(started([*serve, "--role", side], folder / f"{side}-{n}.log"))
                for n in range(2)
            ]
            for side in SIDES
        }
        for one in [*servers["prefill"], *servers["decode"]]:
            one.wait_ready(240)
        port = free_port("127.0.0.1")
        command = [sys.executable, "-m", "millrace.cli", "gateway", "--port", str(port)]
        for one in [*servers["prefill"], *servers["decode"]]:
            command += ["--worker-urls", one.url]
        command += ["--hand-over-prompt", "32", "--hand-over-ratio", "1"]
        stack.enter_context(started(command, folder / "gateway.log"))
        target = Target("127.0.0.1", port)
        yield Fleet(servers, target)


class Killer:
    """Kills the engine of one side in one phase of a request. kills: by phase and side."""

    def __init__(self, of: Fleet, rng: random.Random) -> None:
        self._fleet, self._rng = of, rng
        self.kills: Counter[str] = Counter()

    async def watch(self, phase: str, side: str, first: asyncio.Event) -> None:
        """first: the first token of the answer has come."""
        before = await self._counts()
        if phase == "computing":
            await asyncio.sleep(self._rng.uniform(0.0, 0.02))
        elif phase == "answering":
            await asyncio.wait_for(first.wait(), LIMIT)
        else:
            await self._until(phase, before)
        self._kill(phase, side)

    async def _counts(self) -> tuple[float, float]:
        opened = await self._fleet.figure("prefill", "open")
        return opened, await self._fleet.figure("prefill", "sent_total")

    async def _until(self, phase: str, before: tuple[float, float]) -> None:
        """Until a record is offered; for `moving` some milliseconds more, in which it is asked
        for."""
        end = time.monotonic() + 2.0
        while time.monotonic() < end and await self._counts() == before:
            await asyncio.sleep(0.0)
        if phase == "moving":
            await asyncio.sleep(self._rng.uniform(0.0, 0.006))

    def _kill(self, phase: str, side: str) -> None:
        victim = self._rng.choice(self._fleet.servers[side])
        with contextlib.suppress(psutil.Error, ValueError):
            os.kill(victim.engine().pid, signal.SIGKILL)
            self.kills[f"{phase} {side}"] += 1


async def answer(
    target: Target, prompt: list[int], number: int, first: asyncio.Event | None = None
) -> list[int]:
    """The tokens; every other prompt is seeded, the rest are greedy. Raises ValueError."""
    sampling: dict[str, Any] = {"temperature": 0.8, "seed": 7} if number % 2 else {"temperature": 0}
    body = {
        "model": "m", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True,
        "stream": True, "return_token_ids": True, **sampling,
    }  # fmt: skip
    url = f"http://{target.host}:{target.port}/v1/completions"
    tokens: list[int] = []
    async with (
        httpx.AsyncClient(timeout=LIMIT) as client,
        client.stream("POST", url, json=body) as response,
    ):
        if response.status_code != 200:
            raise ValueError(f"{response.status_code}: {(await response.aread())[:200]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return tokens
            if line.startswith("data: "):
                found = json.loads(line[6:])
                if "error" in found:
                    raise ValueError(str(found["error"]))
                tokens += [token for one in found["choices"] for token in one["token_ids"]]
            if first is not None and tokens:
                first.set()
    raise ValueError("the stream broke off")


async def disturbed(
    of: Fleet, prompts: list[list[int]], truth: list[list[int]], options: argparse.Namespace
) -> tuple[Counter[str], Counter[str]]:
    """The hand-overs, one after another. Returns how they ended, and the kills."""
    rng, outcome = random.Random(options.seed), Counter[str]()
    killer = Killer(of, rng)
    for number in range(options.hand_overs):
        watching, first = None, asyncio.Event()
        if number % options.every == 0:
            await of.wait_healthy()
            turn = number // options.every
            phase, side = PHASES[turn % 4], SIDES[turn // 4 % 2]
            watching = asyncio.create_task(killer.watch(phase, side, first))
            await asyncio.sleep(0)
        which = number % len(prompts)
        try:
            right = await answer(of.gateway, prompts[which], which, first) == truth[which]
            outcome["right" if right else "wrong"] += 1
        except (httpx.HTTPError, ValueError) as error:
            outcome["lost"] += 1
            print(f"lost: {error!r}", flush=True)
        first.set()
        if watching is not None:
            await watching
    return outcome, killer.kills


async def quiet(of: Fleet, rng: random.Random, count: int) -> dict[str, list[float]]:
    """Some hand-overs without kills. Returns bytes and pages, sent and received."""
    await of.wait_healthy()
    await asyncio.sleep(LEASE + 2.0)  # figures of what was before are complete then
    names = ("bytes_total", "pages_total")
    before = await _moved(of, names)
    for number in range(count):
        await answer(of.gateway, new_prompt(rng), number)
    end, sent, received = time.monotonic() + 10.0, [0.0], [1.0]
    while sent != received and time.monotonic() < end:
        await asyncio.sleep(0.2)
        after = await _moved(of, names)
        sent, received = (
            [a - b for a, b in zip(now, then, strict=True)]
            for now, then in zip(after, before, strict=True)
        )
    return {"sent": sent, "received": received}


async def _moved(of: Fleet, names: tuple[str, ...]) -> list[list[float]]:
    pairs = (("prefill", "sent"), ("decode", "received"))
    return [[await of.figure(side, f"{word}_{name}") for name in names] for side, word in pairs]


async def left_behind(of: Fleet) -> dict[str, float]:
    """What servers hold once all leases have ended."""
    await of.wait_healthy()
    end = time.monotonic() + LEASE + 30.0
    while time.monotonic() < end:
        found: Counter[str] = Counter()
        for one in of.all:
            found["records"] += await figure_of(one, "millrace:kv_transfer_open")
            parts = [
                await figure_of(one, f"millrace:kv_pages_{name}")
                for name in ("capacity", "free", "evictable")
            ]
            found["pages"] += parts[0] - parts[1] - parts[2]
            found["requests"] += one.open_in_engine()
        if not any(found.values()):
            break
        await asyncio.sleep(0.5)
    return dict(found)


def new_prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(3, 300) for _ in range(rng.randrange(60, 400))]


async def run(of: Fleet, options: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(4)
    prompts = [new_prompt(rng) for _ in range(options.hand_overs)]
    alone = parse_url(of.servers["prefill"][0].url)
    truth = [await answer(alone, prompt, number) for number, prompt in enumerate(prompts)]
    # Its cache would have every prompt: the others compute them.
    of.servers["prefill"][0].engine().kill()
    await of.wait_healthy()
    began = time.monotonic()
    outcome, kills = await disturbed(of, prompts, truth, options)
    seconds = time.monotonic() - began
    moved = await quiet(of, rng, 8)
    events = json.loads((await fetch(of.gateway, "/gateway/status")).body)["events"]
    return {
        "commit": commit(), "transport": options.transport, "hand_overs": options.hand_overs,
        "kills": sum(kills.values()), "by phase and side": dict(kills),
        **{name: outcome[name] for name in ("right", "wrong", "lost")},
        "left": await left_behind(of), "bytes and pages, sent and received": moved,
        **{name: events[name] for name in EVENTS},
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hand-overs", type=int, default=200)
    parser.add_argument("--every", type=int, default=4, help="a kill at every so many")
    parser.add_argument("--transport", default="tcp", choices=("shm", "tcp", "nixl"))
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, fleet(Path(name), options.transport) as made:
        result = asyncio.run(run(made, options))
    print(json.dumps(result, indent=1))
    sent, received = result["bytes and pages, sent and received"].values()
    good = result["right"] == options.hand_overs and sent == received and min(sent) > 0
    return 0 if good and not any(result["left"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
