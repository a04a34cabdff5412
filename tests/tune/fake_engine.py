"""A fake engine with a hidden surface: an OOM wall, a crash on the second run, drift, a hang.

The tuner sees it as it sees any server. Every visit is written to a file before it answers, so that
tests can count what was really tried.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from itertools import product, zip_longest
from pathlib import Path

from millrace.tune.space.knobs import Knob, Settings, Space, Value
from millrace.tune.trials.failures import Failure, LogReader
from millrace.tune.trials.outcome import Outcome, Run, Visit

SPACE = Space(
    engine="fake",
    devices=8,
    knobs=(
        Knob(
            name="tensor_parallel_size",
            values=(1, 2, 4, 8),
            default=8,
            devices=True,
            riskier={"memory": "down"},
        ),
        Knob(name="replicas", values=(1, 2, 4, 8), default=1, devices=True, neutral=("memory",)),
        Knob(
            name="max_num_seqs",
            values=(32, 64, 128, 256, 512, 1024),
            like=256,
            riskier={"memory": "up"},
            helps={"slots_full": "up"},
        ),
        Knob(
            name="max_num_batched_tokens",
            values=(2048, 4096, 8192, 16384),
            default=8192,
            riskier={"memory": "up"},
            neutral=("stability",),
        ),
        Knob(
            name="kv_cache_dtype",
            values=("fp8", "bf16"),
            default="bf16",
            riskier={"memory": "up"},
            neutral=("stability",),
            helps={"kv_full": "down"},
        ),
        Knob(
            name="drafts",
            values=(0, 1, 2, 3, 5),
            default=0,
            flag="--speculative-config",
            key="num_speculative_tokens",
            by_batch="num_speculative_tokens_per_batch_size",
            omit=0,
            riskier={"memory": "up", "stability": "up"},
        ),
        Knob(
            name="gpu_memory_utilization",
            values=(0.8, 0.85, 0.9, 0.92, 0.95, 0.98),
            default=0.9,
            riskier={"memory": "up", "stability": "up"},
            helps={"kv_full": "up"},
        ),
        Knob(
            name="policy",
            values=("round_robin", "least_loaded", "prefix_aware"),
            default="round_robin",
            ordered=False,
            neutral=("memory", "stability"),
        ),
    ),
)

_WANTED = {"max_num_seqs": 3.4, "max_num_batched_tokens": 2.6, "gpu_memory_utilization": 3.2}


def surface(settings: Settings, tempting: bool = False) -> float:
    """The hidden throughput, without noise, drift or failures. tempting: five drafts are fastest,
    as long as the engine lives."""
    place = {knob.name: knob.index(settings[knob.name]) for knob in SPACE.knobs}
    devices = SPACE.devices_of(settings)
    value = 1000.0 * devices
    value *= (1.0, 0.93, 0.8, 0.55)[place["tensor_parallel_size"]]
    for name, best in _WANTED.items():
        value *= 1.0 / (1.0 + 0.04 * (place[name] - best) ** 2)
    value *= 1.12 if settings["kv_cache_dtype"] == "fp8" else 1.0
    value *= (1.0, 1.4, 1.36, 1.2, 1.7 if tempting else 1.05)[place["drafts"]]
    return (
        value
        * {"round_robin": 1.0, "least_loaded": 1.05, "prefix_aware": 1.03}[str(settings["policy"])]
    )


def gain_of_drafts(drafts: int, streams: int) -> float:
    """With so many requests in flight on one engine: drafts pay while there are few."""
    return (1.0 + 0.9 * (1.0 - 0.6**drafts)) / (1.0 + 0.02 * drafts * streams)


def wall(settings: Settings, room: float = 1.1) -> str:
    """The failure that a setting runs into, however often; empty if none. room: memory."""
    place = {knob.name: knob.index(settings[knob.name]) for knob in SPACE.knobs}
    taken = 0.1 * place["max_num_seqs"] + 0.08 * place["max_num_batched_tokens"]
    taken += 0.1 * (settings["kv_cache_dtype"] == "bf16") + 0.06 * place["drafts"]
    taken += 0.08 * place["gpu_memory_utilization"] - 0.1 * place["tensor_parallel_size"]
    if taken > room + 0.1:
        return "startup_oom"
    if taken > room:
        return "runtime_oom"
    if settings["gpu_memory_utilization"] == 0.98:
        return "hang"
    return "second_run" if int(settings["drafts"] or 0) >= 5 else ""


def everything() -> Iterator[Settings]:
    """Every setting of the space."""
    for values in product(*(knob.values for knob in SPACE.knobs)):
        found: dict[str, Value] = dict(
            zip((knob.name for knob in SPACE.knobs), values, strict=True)
        )
        if not SPACE.problem(found):
            yield found


def best(room: float = 1.1) -> float:
    return max(surface(settings) for settings in everything() if not wall(settings, room))


class FakeEngine:
    """The tuner's target. log: file of all visits. drift: share of the speed that a visit costs."""

    def __init__(
        self,
        log: Path | None = None,
        *,
        noise: float = 0.01,
        drift: float = 0.003,
        room: float = 1.1,
        tempting: bool = False,
        seed: int = 0,
    ) -> None:
        self._log = log
        self._noise = noise
        self._drift = drift
        self._room = room
        self._tempting = tempting
        self._seed = seed

    async def visit(self, visit: Visit) -> Outcome:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(
                    json.dumps([visit.number, visit.trial, visit.settings, visit.purpose]) + "\n"
                )
        kind = wall(visit.settings, self._room)
        if kind == "startup_oom":
            return Outcome(failure=_of_log("start", "CUDA out of memory. Tried to allocate 2 GiB"))
        if kind == "hang":
            return Outcome(failure=Failure("hang", "run", "no token came for 120 s"), seconds=120.0)
        runs = []
        for number, (seed, streams) in enumerate(zip_longest(visit.seeds, visit.streams)):
            if kind == "runtime_oom":
                failure = _of_log("run", "torch.OutOfMemoryError: CUDA out of memory")
                return Outcome(runs=tuple(runs), failure=failure, seconds=60.0)
            if kind == "second_run" and (number or visit.purpose in ("full", "drafts")):
                failure = _of_log("run", "CUDA error: an illegal memory access was encountered")
                return Outcome(runs=tuple(runs), failure=failure, seconds=60.0)
            runs.append(self._run(visit, seed, streams or 0))
        return Outcome(runs=tuple(runs), seconds=60.0)

    def _run(self, visit: Visit, seed: int, streams: int) -> Run:
        rng = random.Random(f"{self._seed}/{visit.number}/{seed}")
        value = surface(visit.settings, self._tempting)
        if streams:
            value = 100.0 * streams * gain_of_drafts(int(visit.settings["drafts"] or 0), streams)
        value *= math.exp(rng.gauss(0.0, self._noise))
        value *= 1.0 - self._drift * visit.number
        seqs = SPACE["max_num_seqs"].index(visit.settings["max_num_seqs"])
        bottleneck = "slots_full" if seqs < 3 else "kv_full"
        return Run(
            seed=seed, total=value, output=value / 3, completed=100, bottleneck=bottleneck,
            why="requests wait",
        )  # fmt: skip


def _of_log(phase: str, line: str) -> Failure:
    reader = LogReader()
    reader.feed(f"(EngineCore) ERROR {line}")
    return reader.failure("start" if phase == "start" else "run", 1)
