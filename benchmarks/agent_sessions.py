"""Sessions of an agent against a server with memory for a few of them, killed in the middle.

    python benchmarks/agent_sessions.py --sessions 50 --room 10

Starts `millrace serve` with a prefix cache for `--room` sessions, a cache in the host's memory and
one on disk; runs all sessions turn by turn, with auxiliary calls between; kills the server (-9)
half way, starts it again and goes on. Prints, before and after the kill, the tokens computed over
the tokens that were new, by kind of request, and TTFT. New are the tokens of a prompt behind what
it has in common with any earlier prompt and its answer, token by token. `--no-tiers` leaves out the
lower tiers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from millrace.bench.load.records import RequestTiming
from millrace.bench.workload.agent import KINDS, AgentTurn, Exchange, Messages, continuation
from millrace.bench.workload.prompts import AgentSpec, Prompt, prompt_maker
from millrace.common.sockets import free_port

START_LIMIT = 180.0


class Server:
    """A server process of ours, in a process group of its own."""

    def __init__(self, options: argparse.Namespace, disk: str) -> None:
        self.port = free_port("127.0.0.1")
        self._log = Path(options.log or Path(disk).parent / "server.log")
        command = [
            sys.executable, "-m", "millrace", "serve", options.model, "--port", str(self.port),
            "--max-num-seqs", str(options.seqs), "--num-snapshots", str(options.room),
            *options.serve,
        ]  # fmt: skip
        if not options.no_tiers:
            command += ["--host-cache-gb", str(options.host_gb), "--disk-cache", disk]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_LIMIT
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise SystemExit(f"the server did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.3)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """kill -9 of the server and its engine."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Known:
    """Every prompt so far with its answer, as tokens."""

    def __init__(self) -> None:
        self._sequences: list[NDArray[np.int32]] = []
        self._lock = Lock()

    def new(self, prompt: list[int]) -> int:
        """Tokens of the prompt behind all that it has in common with one of these; at least 1."""
        mine, most = np.array(prompt, dtype=np.int32), 0
        with self._lock:
            listed = list(self._sequences)
        for other in listed:
            count = min(len(mine), len(other))
            if count > most:
                differ = np.flatnonzero(mine[:count] != other[:count])
                most = max(most, int(differ[0]) if len(differ) else count)
        return len(prompt) - min(most, len(prompt) - 1)

    def add(self, tokens: list[int]) -> None:
        with self._lock:
            self._sequences.append(np.array(tokens, dtype=np.int32))


class Session:
    """One session, which knows its next request."""

    def __init__(self, index: int, prompt: Prompt, known: Known) -> None:
        self.index, self._prompt, self._known = index, prompt, known
        self.new: list[int] = []
        self._line: tuple[Exchange, ...] = ()
        self.turn = 0
        self.records: list[RequestTiming] = []

    @property
    def left(self) -> int:
        return len(self._prompt.later_turns) + 1 - self.turn

    def send(self, port: int) -> None:
        """Its next request."""
        messages, kind = cast("Messages", self._prompt.content), "user"
        output = self._prompt.output_tokens
        if self.turn:
            turn = cast("AgentTurn", self._prompt.later_turns[self.turn - 1])
            found = continuation(self._line, messages[:1], turn)
            messages, kind = found.messages, turn.kind
            self._line, output = found.line, turn.output_tokens
        began = time.perf_counter_ns()
        answer, usage, first, prompt_ids, ids = _ask(port, messages, output)
        self.new.append(self._known.new(prompt_ids))
        self._known.add([*prompt_ids, *ids])
        details = usage.get("prompt_tokens_details") or {}
        self.records.append(
            RequestTiming(
                index=self.index,
                turn=self.turn,
                kind=KINDS.index(kind),
                scheduled_ns=began,
                start_ns=began,
                end_ns=time.perf_counter_ns(),
                chunk_ns=[first],
                input_tokens=usage["prompt_tokens"],
                output_tokens=usage["completion_tokens"],
                cached_tokens=details.get("cached_tokens", 0),
            )
        )
        if kind != "aux":
            self._line = (*self._line, Exchange(self.turn, messages, answer))
        self.turn += 1


def _ask(
    port: int, messages: Messages, output: int
) -> tuple[str, dict[str, Any], int, list[int], list[int]]:
    """(answer, usage, time of the first chunk, tokens of prompt and answer) of a streamed chat."""
    body = {
        "messages": messages, "max_tokens": output, "temperature": 0, "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"status {response.status}: {response.read()[:500]!r}")
    texts, usage, first, prompt_ids, ids = [], {}, 0, [], []
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        first = first or time.perf_counter_ns()
        event = json.loads(line[6:])
        usage = event.get("usage") or usage
        prompt_ids = event.get("prompt_token_ids") or prompt_ids
        for choice in event["choices"]:
            texts.append(choice["delta"].get("content") or "")
            ids += choice.get("token_ids") or []
    connection.close()
    return "".join(texts), usage, first, prompt_ids, ids


def run_rounds(sessions: list[Session], port: int, threads: int, until: int) -> None:
    """Each session sends its requests up to number `until`, a round of all sessions at a time."""
    with ThreadPoolExecutor(threads) as pool:
        while any(s.left and s.turn < until for s in sessions):
            ready = [s for s in sessions if s.left and s.turn < until]
            list(pool.map(lambda session: session.send(port), ready))


def show(title: str, sessions: list[Session], first: int, end: int = 1 << 30) -> None:
    """Figures of the requests number `first` to `end` of each session."""
    sums: dict[str, list[int]] = {}
    late: list[float] = []
    for session in sessions:
        for record, new in list(zip(session.records, session.new, strict=True))[first:end]:
            computed = record.input_tokens - record.cached_tokens
            late.append(1e3 * record.ttft)
            for name in ("all", KINDS[record.kind]):
                found = sums.setdefault(name, [0, 0, 0])
                for place, value in enumerate((1, new, computed)):
                    found[place] += value
    print(
        f"\n{title}: TTFT p50 {np.percentile(late, 50):.0f}, p95 {np.percentile(late, 95):.0f} ms"
    )
    for name, (count, new, computed) in sums.items():
        ratio = computed / new
        print(f"  {name:8}{count:6} requests{new:9} new{computed:9} computed  ratio {ratio:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="millrace-mini")
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--room", type=int, default=10, help="snapshots on the device")
    parser.add_argument("--seqs", type=int, default=4)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--host-gb", type=float, default=0.1)
    parser.add_argument("--no-tiers", action="store_true")
    parser.add_argument("--log", help="file for the server's log")
    parser.add_argument("--worst", type=int, default=0, help="requests to list")
    parser.add_argument("serve", nargs="*", help="further options of millrace serve, behind --")
    options = parser.parse_args()
    spec = AgentSpec(
        count=options.sessions, turns=options.turns, system_len=400, user_len=40, output_len=24,
        tool_min=60, tool_max=260, tools=0.85, aux=0.3, branch=0.05, compaction=0.1, pause=0.0,
    )  # fmt: skip
    make = prompt_maker(spec)
    known = Known()
    sessions = [Session(index, make(index), known) for index in range(options.sessions)]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        server = Server(options, f"{scratch}/cache")
        try:
            half = options.turns // 2
            run_rounds(sessions, server.port, options.threads, half)
            show("before the kill", sessions, 0, half)
            time.sleep(1.0)
            server.kill()
            server = Server(options, f"{scratch}/cache")
            run_rounds(sessions, server.port, options.threads, 1 << 30)
            show("after it", sessions, half)
            show("all", sessions, 0)
            rows = [
                (r.input_tokens - r.cached_tokens - new, r.index, r.turn, KINDS[r.kind],
                 r.input_tokens, r.cached_tokens, new)
                for s in sessions for r, new in zip(s.records, s.new, strict=True)
            ]  # fmt: skip
            for row in sorted(rows, reverse=True)[: options.worst]:
                print(
                    "  too many {} session {} request {} {}: {} in, {} cached, {} new".format(*row)
                )
        finally:
            server.kill()


if __name__ == "__main__":
    main()
