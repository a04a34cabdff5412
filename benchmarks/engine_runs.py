"""Runs of an engine in this process, recorded step by step and request by request.

Shared by the benchmarks of whole engines. It has no workload of its own and needs no GPU.
"""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from energy import Energy

from millrace.engine.engine import Engine
from millrace.protocol import AddRequest, Masks, SamplingParams, StepPlan, StepResult


def commit() -> str:
    """The commit of this tree; a copy without history names it in a file COMMIT."""
    root = Path(__file__).resolve().parents[1]
    if (note := root / "COMMIT").exists():
        return note.read_text().strip()
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- steps -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step: decoding rows, prompt tokens, and when its result was read (seconds)."""

    rows: int
    prompt_tokens: int
    done: float


class Watched:
    """A worker that notes each step's shape and the moment its result is there."""

    def __init__(self, worker: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._worker, self._clock = worker, clock
        self.steps: list[Step] = []

    def launch(self, plan: StepPlan, masks: Callable[[], Masks] | None = None) -> Any:
        return _WatchedStep(self, plan, self._worker.launch(plan, masks))

    def close(self) -> None:
        self._worker.close()

    def note(self, plan: StepPlan) -> None:
        tokens = sum(chunk.count for chunk in plan.chunks)
        self.steps.append(Step(len(plan.decode), tokens, self._clock()))


class _WatchedStep:
    def __init__(self, watched: Watched, plan: StepPlan, pending: Any) -> None:
        self._watched, self._plan, self._pending = watched, plan, pending

    def result(self) -> StepResult:
        result: StepResult = self._pending.result()
        self._watched.note(self._plan)
        return result


def watch(engine: Engine) -> Watched:
    """Have an engine's steps noted from here on."""
    if not isinstance(engine.worker, Watched):
        engine.worker = Watched(engine.worker)  # type: ignore[assignment]
    found: Any = engine.worker
    return found  # type: ignore[no-any-return]


def by_kind(steps: list[Step], start: float) -> dict[str, dict[str, float]]:
    """Steps of decoding rows alone, of prompt tokens alone, and mixed: how many, how long."""
    kinds: dict[str, list[tuple[float, Step]]] = {"decode": [], "prefill": [], "mixed": []}
    last = start
    for step in steps:
        kind = "mixed" if step.rows and step.prompt_tokens else "decode"
        kinds[kind if step.rows else "prefill"].append((step.done - last, step))
        last = step.done
    return {
        kind: {
            "steps": len(found),
            "seconds": sum(duration for duration, _ in found),
            "mean_ms": 1e3 * statistics.mean(duration for duration, _ in found),
            "mean_rows": statistics.mean(step.rows for _, step in found),
            "mean_prompt_tokens": statistics.mean(step.prompt_tokens for _, step in found),
        }
        for kind, found in kinds.items()
        if found
    }


# --- runs --------------------------------------------------------------------------------------


@dataclass
class Trace:
    """What a closed run showed. Times are seconds on one clock; `drained`: when none waited."""

    concurrency: int
    start: float
    added: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, int] = field(default_factory=dict)
    arrivals: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    finished: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    drained: float = 0.0
    end: float = 0.0
    joules: float = math.nan  # of the GPU, from start to end

    def summary(self) -> dict[str, Any]:
        """The whole run, ragged end included, and its steady part."""
        found = self._window(self.start, self.end)
        return {
            **found,
            "steady": self._steady(),
            "by_kind": by_kind(self.steps, self.start),
            "duration_s": self.end - self.start,
            "watts": self.joules / (self.end - self.start),
            "tok_per_joule": found["total_tok_s"] * (self.end - self.start) / self.joules,
        }

    def while_full(self, rows: int) -> dict[str, float]:
        """Between the end of as many requests as there are rows, and that of the last but so many:
        however many wait, every row is taken."""
        return self._window(self.finished[rows - 1], self.finished[-rows])

    def _steady(self) -> dict[str, Any] | None:
        """From the end of a first wave of requests until none waits: every row is taken, and
        prompts come as requests end. None where the run is too short to have such a part."""
        if len(self.finished) < 2 * self.concurrency:
            return None
        begin = self.finished[self.concurrency - 1]
        if self.drained <= begin:
            return None
        return {**self._window(begin, self.drained), "seconds": self.drained - begin}

    def _window(self, begin: float, end: float) -> dict[str, float]:
        """Tokens and latencies between two moments. A prompt counts when its first token comes."""
        tokens_in = tokens_out = 0
        ttft, gaps = [], []
        for name, arrivals in self.arrivals.items():
            first = arrivals[0][0]
            if begin < first <= end:
                tokens_in += self.prompts[name]
                ttft.append(first - self.added[name])
            tokens_out += sum(count for at, count in arrivals if begin < at <= end)
            gaps += [b - a for (a, _), (b, _) in pairwise(arrivals) if begin < b <= end]
        seconds = end - begin
        return {
            "total_tok_s": (tokens_in + tokens_out) / seconds,
            "output_tok_s": tokens_out / seconds,
            "prompt_tok_s": tokens_in / seconds,
            **percentiles("ttft", ttft),
            **percentiles("itl", gaps),
        }


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds; nothing for no values."""
    if not values:
        return {}
    at = torch.tensor([0.5, 0.99], dtype=torch.float64)
    p50, p99 = torch.tensor(values, dtype=torch.float64).quantile(at).tolist()
    return {f"{name}_p50_ms": 1e3 * p50, f"{name}_p99_ms": 1e3 * p99}


def requests(
    count: int,
    seed: int,
    inputs: tuple[int, int],
    outputs: tuple[int, int],
    vocab: int,
    **sampling: Any,
) -> list[AddRequest]:
    """Token-id prompts of random tokens, lengths uniform in [low, high], temperature 1.

    sampling: what else `SamplingParams` are to have.
    """
    rng = random.Random(seed)
    found = []
    for number in range(count):
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(*inputs))]
        params = SamplingParams(
            temperature=1.0,
            max_tokens=rng.randint(*outputs),
            ignore_eos=True,
            seed=number,
            **sampling,
        )
        found.append(AddRequest(f"{seed}-{number}", prompt, params))
    return found


def closed_run(engine: Engine, todo: Iterable[AddRequest], concurrency: int) -> Trace:
    """Keep `concurrency` requests under way until all are done."""
    waiting, watched = deque(todo), watch(engine)
    watched.steps = []
    synchronize()
    energy = Energy()
    before = energy.joules()
    trace = Trace(concurrency, time.perf_counter())

    def add() -> None:
        request = waiting.popleft()
        trace.added[request.id] = time.perf_counter()
        trace.prompts[request.id] = len(request.prompt)
        engine.add(request)
        if not waiting:
            trace.drained = time.perf_counter()

    for _ in range(min(concurrency, len(waiting))):
        add()
    while engine.has_work():
        deltas = engine.step()
        now = time.perf_counter()
        for delta in deltas:
            if delta.token_ids:
                trace.arrivals.setdefault(delta.id, []).append((now, len(delta.token_ids)))
            if delta.finish_reason:
                trace.finished.append(now)
                if waiting:
                    add()
    trace.end, trace.steps = time.perf_counter(), watched.steps
    trace.joules = energy.joules() - before
    return trace


# --- where a step's time goes ------------------------------------------------------------------


def all_decoding(
    engine: Engine, rows: int, vocab: int, length: int, steps: int, seed: int
) -> list[AddRequest]:
    """Requests that all decode by now, on `rows` rows, and will for `steps` steps.

    Raises RuntimeError where the engine cannot hold them so long, which would never end else.
    """
    limits = engine.scheduler.limits
    ramp = -(-rows * length // limits.mixed_prefill_tokens) + rows // 8 + 8  # steps until all run
    output = (limits.drafts + 1) * (ramp + steps)
    todo = requests(rows, seed, (length, length), (output, output), vocab)
    if length + output > limits.max_model_len:
        raise RuntimeError(f"{rows} rows need {length + output} tokens of max_model_len")
    for request in todo:
        engine.add(request)
    for _ in range(ramp):
        engine.step()
    if engine.stats().waiting or engine.stats().running < rows:
        raise RuntimeError(f"{rows} rows of {length} tokens do not decode after {ramp} steps")
    return todo


def abort_all(engine: Engine, todo: list[AddRequest]) -> None:
    engine.abort([request.id for request in todo])
    while engine.has_work():
        engine.step()


def decode_profile(engine: Engine, rows: int, vocab: int, length: int, steps: int) -> Any:
    """Steady decode steps at `rows` rows: wall time a step, device time by kernel, idle share."""
    todo = all_decoding(engine, rows, vocab, length, 3 * steps + 2, 77)
    synchronize()
    start = time.perf_counter()
    for _ in range(2 * steps):
        engine.step()
    synchronize()
    wall = (time.perf_counter() - start) / (2 * steps)
    found = profiled(engine, steps)
    abort_all(engine, todo)
    return {"rows": rows, "step_ms": wall * 1e3, **found}


def mixed_profile(engine: Engine, rows: int, vocab: int, length: int, steps: int) -> Any:
    """Steps in which `rows` rows decode beside one prompt of `length` tokens each: device time by
    kernel. Their wall time is that of steps with the profiler on."""
    todo = all_decoding(engine, rows, vocab, length, steps + 6, 79)
    prompts = iter(requests(steps + 4, 80, (length, length), (1, 1), vocab))

    def step() -> None:
        engine.add(next(prompts))
        engine.step()

    for _ in range(4):
        step()
    found = profiled(engine, steps, step)
    abort_all(engine, todo)
    return {"rows": rows, "prompt_tokens": length, **found}


def prefill_profile(engine: Engine, count: int, length: int, vocab: int, steps: int) -> Any:
    """Full steps of prompt tokens alone: device time by kernel."""
    for request in requests(count, 78, (length, length), (1, 1), vocab):
        engine.add(request)
    for _ in range(2):
        engine.step()
    found = profiled(engine, steps)
    while engine.has_work():
        engine.step()
    return found


def profiled(
    engine: Engine, steps: int, step: Callable[[], object] | None = None
) -> dict[str, Any]:
    """Milliseconds a step by kernel (names cut short), their sum, and the device's idle share.

    The sum is larger than a step where kernels run side by side.
    """
    step = step or engine.step
    cuda = torch.cuda.is_available()
    kind = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    synchronize()
    with torch.profiler.profile(activities=[kind]) as profile:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize()
        wall = time.perf_counter() - began
    kernels: dict[str, float] = {}
    for event in profile.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            name = event.key[:72]
            kernels[name] = round(kernels.get(name, 0.0) + spent / steps / 1e3, 3)
    busy = sum(kernels.values())
    top = dict(sorted(kernels.items(), key=lambda item: -item[1])[:24])
    idle = max(0.0, 1.0 - busy * steps / (wall * 1e3))
    return {"busy_ms": busy, "idle_share": idle, "wall_ms": wall / steps * 1e3, "kernels_ms": top}
