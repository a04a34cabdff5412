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

import msgspec

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
_POLICY = {"round_robin": 1.0, "least_loaded": 1.05, "prefix_aware": 1.03}
_COSTS = {
    "max_num_seqs": 0.1, "max_num_batched_tokens": 0.08, "kv_cache_dtype": 0.1, "drafts": 0.06,
    "gpu_memory_utilization": 0.08, "tensor_parallel_size": -0.1,
}  # fmt: skip


class Hidden(msgspec.Struct, frozen=True, kw_only=True):
    """What the tuner does not know. wanted: the best place of a knob; steep: how fast it falls off
    from there. ranks, drafts: factors by place. costs: memory by place; room: how much there is.
    hang: the share of memory at which it hangs. dying: drafts from which it dies in its second run.
    """

    wanted: dict[str, float] = msgspec.field(default_factory=_WANTED.copy)
    steep: float = 0.04
    ranks: tuple[float, ...] = (1.0, 0.93, 0.8, 0.55)
    fp8: float = 1.12
    drafts: tuple[float, ...] = (1.0, 1.4, 1.36, 1.2, 1.05)
    policy: dict[str, float] = msgspec.field(default_factory=_POLICY.copy)
    costs: dict[str, float] = msgspec.field(default_factory=_COSTS.copy)
    room: float = 1.1
    hang: float = 0.98
    dying: int = 5

    def place(self, settings: Settings) -> dict[str, int]:
        return {knob.name: knob.index(settings[knob.name]) for knob in SPACE.knobs}

    def surface(self, settings: Settings) -> float:
        """The throughput, without noise, drift or failures."""
        place = self.place(settings)
        value = 1000.0 * SPACE.devices_of(settings) * self.ranks[place["tensor_parallel_size"]]
        for name, best in self.wanted.items():
            value /= 1.0 + self.steep * (place[name] - best) ** 2
        value *= self.fp8 if settings["kv_cache_dtype"] == "fp8" else 1.0
        return value * self.drafts[place["drafts"]] * self.policy[str(settings["policy"])]

    def wall(self, settings: Settings) -> str:
        """The failure that a setting runs into, however often; empty if none."""
        place = self.place(settings)
        taken = sum(cost * place[name] for name, cost in self.costs.items())
        if taken > self.room + 0.1:
            return "startup_oom"
        if taken > self.room:
            return "runtime_oom"
        if float(settings["gpu_memory_utilization"] or 0) >= self.hang:
            return "hang"
        return "second_run" if int(settings["drafts"] or 0) >= self.dying else ""

    def best(self) -> float:
        """Of the settings that work."""
        return max(self.surface(one) for one in everything() if not self.wall(one))


TEMPTING = Hidden(drafts=(1.0, 1.4, 1.36, 1.2, 1.7))  # five drafts are fastest while it lives


def drawn(seed: int, working: float = 0.5) -> Hidden:
    """Another engine. working: the share of its settings that its memory is enough for."""
    rng = random.Random(f"hidden {seed}")
    most = {"max_num_seqs": 5, "max_num_batched_tokens": 3, "gpu_memory_utilization": 4}
    ranks = [1.0]
    for _ in range(3):
        ranks.append(ranks[-1] * rng.uniform(0.6, 1.05))
    drafts = [1.0, rng.uniform(0.9, 1.5)]
    for _ in range(3):
        drafts.append(drafts[-1] * rng.uniform(0.8, 1.15))
    costs = {name: rng.uniform(0.03, 0.12) for name in Hidden().costs}
    costs["tensor_parallel_size"] *= -1
    hidden = Hidden(
        wanted={name: rng.uniform(0.5, high) for name, high in most.items()},
        steep=rng.uniform(0.02, 0.06),
        ranks=tuple(ranks),
        fp8=rng.uniform(1.0, 1.2),
        drafts=tuple(drafts),
        policy={name: rng.uniform(0.95, 1.1) for name in Hidden().policy},
        costs=costs,
        dying=rng.choice((3, 5)),
    )
    taken = sorted(
        sum(cost * place[name] for name, cost in costs.items())
        for place in map(hidden.place, everything())
    )
    return msgspec.structs.replace(hidden, room=taken[int(working * (len(taken) - 1))])


def gain_of_drafts(drafts: int, streams: int) -> float:
    """With so many requests in flight on one engine: drafts pay while there are few."""
    return (1.0 + 0.9 * (1.0 - 0.6**drafts)) / (1.0 + 0.02 * drafts * streams)


def everything() -> Iterator[Settings]:
    """Every setting of the space."""
    for values in product(*(knob.values for knob in SPACE.knobs)):
        found: dict[str, Value] = dict(
            zip((knob.name for knob in SPACE.knobs), values, strict=True)
        )
        if not SPACE.problem(found):
            yield found


class FakeEngine:
    """The tuner's target. log: file of all visits. drift: share of the speed that a visit costs."""

    def __init__(
        self,
        log: Path | None = None,
        *,
        hidden: Hidden = Hidden(),  # noqa: B008, it is frozen
        noise: float = 0.01,
        drift: float = 0.003,
        seed: int = 0,
    ) -> None:
        self._log = log
        self._noise = noise
        self._drift = drift
        self._hidden = hidden
        self._seed = seed

    async def visit(self, visit: Visit) -> Outcome:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(
                    json.dumps([visit.number, visit.trial, visit.settings, visit.purpose]) + "\n"
                )
        kind = self._hidden.wall(visit.settings)
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
        value = self._hidden.surface(visit.settings)
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
