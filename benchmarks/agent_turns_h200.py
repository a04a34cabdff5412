"""Sessions of an agent on one GPU: time to first token by turn, with and without cached prefixes.

Qwen3.5-27B-FP8 shapes. 32 sessions of some 60,000 tokens send turn after turn: the prompt and the
answer before it, and `--new` tokens (log-uniform) behind; a session pauses `--pause` seconds in the
mean (exponential) between an answer and its next turn, as tools and people do. In process: TTFT is
from the moment at which a request is due to its first token.

    python benchmarks/agent_turns_h200.py
    python benchmarks/agent_turns_h200.py --phases device --new 200,8000
    python benchmarks/agent_turns_h200.py --tiny        # small, on any machine

cold: without a prefix cache, one prompt alone and `--cold` at once. device: every session has its
prefix on the device. host: the device has pages and snapshots for half of them; all are in the
host's memory. One prompt of each phase is computed; the other sessions' first prefixes are copies
of its keys, values and states under tokens of their own, so that a phase begins within seconds.
Times are those of real prefixes; the answers mean nothing, for weights are random anyway.
"""

from __future__ import annotations

import argparse
import heapq
import json
import logging
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_runs import commit
from h200_throughput import BASE, TINY_ARGS
from model_shapes import write_config

from millrace.config import engine_args
from millrace.engine.cache.policy import Kind, Match
from millrace.engine.engine import Engine
from millrace.engine.scheduler import Scheduler
from millrace.model.tiny import TinyShape, config_json
from millrace.protocol import AddRequest, Admission, PageCopy, SamplingParams, Save, StepPlan
from millrace.replica.build import build_engine

TEMPLATE_END = 8  # tokens behind the last turn's end, as templates write before an answer
COPIED = 64  # pages of a copied prefix that one plan copies
PLAN = 1 << 30  # numbers of our own plans; results are not committed
TINY: dict[str, Any] = {
    "sessions": 6, "context": 200, "turns": 4, "new": (8, 40), "output": (4, 8), "pause": 0.05,
    "cold": 2, "host_gb": 0.2, "snapshots": 12,
}  # fmt: skip
SIZES = (512, 1024, 2048, 1 << 30)  # TTFT is shown by new tokens up to so many


@dataclass
class Turn:
    """One answered request: seconds to its first token, and its tokens; tier: the lowest one that
    a part of its prompt came from."""

    number: int
    ttft: float
    prompt: int
    new: int
    cached: int
    tier: str


@dataclass
class Session:
    """A conversation: what it has so far, and its request under way."""

    number: int
    options: argparse.Namespace
    tokens: list[int] = field(default_factory=list)
    turn: int = 0
    new: int = 0
    due: float = 0.0
    first: Turn | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.options.seed} {self.number}")

    def more(self, count: int) -> list[int]:
        return [self.random.randrange(3, self.options.vocab) for _ in range(count)]

    def request(self) -> AddRequest:
        """The next turn's."""
        low, high = self.options.new
        self.new = round(math.exp(self.random.uniform(math.log(low), math.log(high))))
        self.tokens += self.more(self.new)
        output = self.random.randint(*self.options.output)
        return make_request(f"{self.number}-{self.turn}", self.tokens, output)

    def pause(self) -> float:
        return self.random.expovariate(1 / self.options.pause)


def make_request(name: str, tokens: list[int], output: int) -> AddRequest:
    params = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True, seed=1)
    ends = [len(tokens) - TEMPLATE_END]
    return AddRequest(name, list(tokens), params, boundaries=ends, arrival=time.monotonic())


# --- running ------------------------------------------------------------------------------------


def run_sessions(
    engine: Engine, sessions: list[Session], options: argparse.Namespace
) -> list[Turn]:
    """All turns, or those that begin within `--seconds`."""
    began = time.monotonic()
    for session in sessions:
        session.due = began + session.random.uniform(0, options.pause)
    waiting = [(session.due, session.number) for session in sessions]
    heapq.heapify(waiting)
    open_requests: dict[str, Session] = {}
    found: list[Turn] = []
    while waiting or open_requests:
        now = time.monotonic()
        if now - began > options.seconds:
            waiting.clear()
        while waiting and waiting[0][0] <= now:
            session = sessions[heapq.heappop(waiting)[1]]
            request = session.request()
            open_requests[request.id] = session
            engine.add(request)
        if not engine.has_work():
            if waiting:
                time.sleep(max(0.0, min(waiting[0][0] - now, 0.05)))
            continue
        for delta in engine.step():
            session = open_requests[delta.id]
            if session.first is None:
                session.first = turn_of(session, delta)
            session.tokens += delta.token_ids
            if delta.finish_reason:
                found.append(session.first)
                session.first, session.turn = None, session.turn + 1
                del open_requests[delta.id]
                if session.turn < options.turns:
                    session.due = time.monotonic() + session.pause()
                    heapq.heappush(waiting, (session.due, session.number))
    finish(engine)
    return found


def turn_of(session: Session, delta: Any) -> Turn:
    loaded = delta.cache.loaded if delta.cache else {}
    tier = next((name for name in ("disk", "host") if name in loaded), "device")
    ttft = time.monotonic() - session.due
    prompt = len(session.tokens)
    return Turn(session.turn, ttft, prompt, session.new, delta.cached_tokens, tier)


def run_alone(engine: Engine, requests: Iterable[AddRequest]) -> tuple[list[float], list[int]]:
    """(seconds to each first token, the tokens of the answers) of requests that come at once."""
    began, first, tokens = time.monotonic(), dict[str, float](), list[int]()
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for delta in engine.step():
            first.setdefault(delta.id, time.monotonic() - began)
            tokens += delta.token_ids
    return sorted(first.values()), tokens


def finish(engine: Engine) -> None:
    while engine.has_work():
        engine.step()


# --- prefixes that are not computed -------------------------------------------------------------


class Seeds:
    """Gives sessions their first prefixes: one is computed, the others are copies of it."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self._engine, self._options = engine, options
        self._plans = PLAN
        self._kv = engine.scheduler.kv_manager

    def fill(self, sessions: list[Session]) -> None:
        """The last one is computed, so that it is not the first to be evicted."""
        *copies, computed = sessions
        computed.tokens = computed.more(self._options.context)
        request = make_request("seed", computed.tokens, TEMPLATE_END)
        _, answer = run_alone(self._engine, [request])
        computed.tokens += answer
        source = self._kv.policy.locate(computed.tokens[:-1])
        assert source is not None, "the computed session is cached"
        self._kv.policy.retain(source.snapshot)
        for page in source.pages:
            self._kv.pages.retain(page)
        for session in copies:
            session.tokens = session.more(len(computed.tokens))
            self._copy(source, session.tokens[:-1])
            finish(self._engine)  # what goes to lower tiers
        self._kv.policy.release(source.snapshot)
        for page in source.pages:
            self._kv.pages.release(page)

    def _copy(self, source: Match, tokens: list[int]) -> None:
        """Cache tokens with the keys, values and state of a cached prefix of the same length."""
        kv = self._kv
        assert kv.ensure_free_pages(len(source.pages)), "pages for one more session"
        pages = kv.pages.allocate(len(source.pages))
        snapshot = kv.policy.begin_save(tokens, kind=Kind.ANSWER)
        assert snapshot is not None, "a snapshot for one more session"
        for start in range(0, len(pages), COPIED):
            some = slice(start, start + COPIED)
            pairs = zip(source.pages[some], pages[some], strict=True)
            self._run(copies=[PageCopy(*pair) for pair in pairs])
        self._run(admissions=[_admission(tokens, source.snapshot)])
        self._run(ends=[Save(1, snapshot)])
        kv.policy.publish(tokens, pages, snapshot, kind=Kind.ANSWER)
        for page in pages:
            kv.pages.release(page)
        if kv.tiers is not None:
            kv.tiers.cached(tokens, "", Kind.ANSWER)

    def _run(self, **parts: Any) -> None:
        self._plans += 1
        empty: dict[str, Any] = {
            "admissions": [], "grants": [], "decode": [], "chunks": [], "saves": [],
        }  # fmt: skip
        plan = StepPlan(step=self._plans, context=0, **{**empty, **parts})
        self._engine.worker.launch(plan).result()


def _admission(tokens: list[int], snapshot: int) -> Admission:
    return Admission(
        slot=1, tokens=tokens, start=len(tokens), snapshot=snapshot, max_total=len(tokens) + 1,
        temperature=1.0, top_p=1.0, top_k=0, seed=1, stop_token_ids=[],
    )  # fmt: skip


# --- phases -------------------------------------------------------------------------------------


def cold(engine: Engine, options: argparse.Namespace) -> dict[str, Any]:
    """Prompts without a cache."""
    limits = engine.scheduler.limits
    off = {"prefix_caching": False, "host_cache": 0, "disk_cache": 0}
    engine.scheduler = Scheduler(msgspec.structs.replace(limits, **off))
    length = options.context + options.turns // 2 * growth(options)
    found: dict[str, Any] = {"tokens": length}
    for count in (1, options.cold):
        sessions = [Session(1000 * count + i, options) for i in range(count)]
        todo = [make_request(f"cold-{s.number}", s.more(length), 1) for s in sessions]
        times, _ = run_alone(engine, todo)
        found[f"{count} at once"] = percentiles(times)
        found["seconds_a_prompt"] = times[-1] / count
    each = found["seconds_a_prompt"]
    found["of all sessions at once, at this rate"] = percentiles(
        [each * (i + 1) for i in range(options.sessions)]
    )
    engine.scheduler = Scheduler(limits)
    return found


def turns_phase(engine: Engine, options: argparse.Namespace, **limits: Any) -> dict[str, Any]:
    """All sessions' turns under a scheduler with other limits than the engine was built with."""
    given = engine.scheduler.limits
    engine.scheduler = Scheduler(msgspec.structs.replace(given, **limits))
    sessions = [Session(number, options) for number in range(options.sessions)]
    began = time.monotonic()
    Seeds(engine, options).fill(sessions)
    filled, before, began = time.monotonic() - began, engine.stats(), time.monotonic()
    turns = run_sessions(engine, sessions, options)
    seconds, after = time.monotonic() - began, engine.stats()
    engine.scheduler.check_integrity()
    found = report(turns, after, options) | {
        "seconds": seconds, "seconds_to_fill": filled, "turns_a_second": len(turns) / seconds,
        "host_hits": after.host_hits - before.host_hits, "pages": after.total_pages,
        "snapshots": after.snapshots_total, "preemptions": after.preemptions - before.preemptions,
        "host_gib_used": after.host_cache_used / 2**30,
    }  # fmt: skip
    engine.scheduler = Scheduler(given)
    return found


def report(turns: list[Turn], stats: Any, options: argparse.Namespace) -> dict[str, Any]:
    computed = sum(turn.prompt - turn.cached for turn in turns)
    new = sum(turn.new for turn in turns)
    found: dict[str, Any] = {
        "requests": len(turns),
        "ttft": percentiles([turn.ttft for turn in turns]),
        "computed_over_new": computed / new if new else 0.0,
        "tokens_cached": sum(turn.cached for turn in turns),
    }
    found["by_tier"] = grouped(turns, lambda turn: turn.tier)
    found["by_new"] = grouped(turns, lambda turn: next(size for size in SIZES if turn.new <= size))
    found["by_turn"] = grouped(turns, lambda turn: turn.number)
    return found


def grouped(turns: list[Turn], key: Callable[[Turn], Any]) -> dict[str, Any]:
    found = {}
    for name in sorted({key(turn) for turn in turns}):
        found[str(name)] = percentiles([turn.ttft for turn in turns if key(turn) == name])
    return found


def percentiles(seconds: list[float]) -> dict[str, Any]:
    p50, p95 = np.percentile(seconds, (50, 95))
    return {"n": len(seconds), "p50_ms": round(1e3 * p50, 1), "p95_ms": round(1e3 * p95, 1)}


def growth(options: argparse.Namespace) -> int:
    """Tokens that a turn adds in the mean."""
    low, high = options.new
    new = (high - low) / math.log(high / low) if high > low else low
    return int(new + sum(options.output) / 2)


def half_of(options: argparse.Namespace, page: int) -> dict[str, Any]:
    """Limits of a device that has room for half of the sessions, at half of their turns."""
    tokens = options.context + options.turns // 2 * growth(options)
    pages = options.sessions // 2 * -(-tokens // page)
    return {"num_pages": pages + 1, "num_snapshots": max(4, options.snapshots // 2)}


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n== {name}")
    for key, value in found.items():
        if isinstance(value, dict) and "p50_ms" not in value:
            for part, figures in value.items():
                print(f"  {key} {part}: {json.dumps(figures)}")
        else:
            print(f"  {key}: {json.dumps(value)}", flush=True)


# --- command ------------------------------------------------------------------------------------


def pair(text: str) -> tuple[int, int]:
    low, high = map(int, text.split(","))
    return low, high


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phases", default="cold,device,host")
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--context", type=int, default=52_000, help="tokens before the first turn")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--new", type=pair, default=(200, 2000))
    parser.add_argument("--output", type=pair, default=(32, 96))
    parser.add_argument("--pause", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=60.0, help="most for the turns of a phase")
    parser.add_argument("--cold", type=int, default=4, help="prompts at once without a cache")
    parser.add_argument("--host-gb", type=float, default=84.0)
    parser.add_argument("--snapshots", type=int, default=96)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few tokens")
    if "--tiny" in sys.argv:
        parser.set_defaults(**TINY)
    options = parser.parse_args()
    options.vocab = 2000 if options.tiny else 248_000
    return options


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The engine's."""
    longest = options.context + (options.turns + 6) * max(options.new[1], growth(options))
    tokens = min(longest, 2 * options.context + 8192)
    found = {
        **BASE,
        "enable_prefix_caching": True,
        "max_num_seqs": options.sessions,
        "max_num_batched_tokens": 8192,
        "max_model_len": tokens,
        "gpu_memory_utilization": 0.95,
        "num_snapshots": options.snapshots,
        **(TINY_ARGS | {"max_num_seqs": options.sessions} if options.tiny else {}),
    }
    found["host_cache_gb"] = options.host_gb if "host" in options.phases else 0.0
    return found


def main() -> None:
    options = parse_options()
    logging.basicConfig(format="%(name)s %(message)s")
    logging.getLogger("millrace").setLevel(logging.INFO)
    with tempfile.TemporaryDirectory() as parent:
        model = Path(parent)
        if options.tiny:
            (model / "config.json").write_text(json.dumps(config_json(TinyShape())))
        else:
            model = write_config(model / "model", options.layers)
        began = time.monotonic()
        engine = build_engine(engine_args(model=str(model), **arguments(options)))
        print(f"ready after {time.monotonic() - began:.1f} s", flush=True)
        out: dict[str, Any] = {"commit": commit(), "options": vars(options).copy()}
        for name in options.phases.split(","):
            if name == "cold":
                found = cold(engine, options)
            elif name == "device":
                found = turns_phase(engine, options, host_cache=0)
            else:
                half = half_of(options, engine.scheduler.limits.page_size)
                found = turns_phase(engine, options, **half)
            out[name] = found
            show(name, found)
            if options.out:
                options.out.write_text(json.dumps(out, indent=1, default=str) + "\n")
        engine.close()


if __name__ == "__main__":
    main()
