"""What was measured, from three kinds of files: plan logs of this engine, vLLM's forward pass
metrics, and results of `millrace bench`.

A plan log has every step with its host time. Forward pass metrics have device times alone: they
are what ZMQ subscribers receive, one message after the other in a file, each with its length in
four bytes in front, or JSON lines with the same fields. A result has one closed run.
"""

from __future__ import annotations

import math
import statistics
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from millrace.engine import plan_log
from millrace.errors import ConfigError, UserError
from millrace.model.work import StepShape
from millrace.plan.model.step_model import StepModel
from millrace.plan.predict.load import Load, Settings
from millrace.plan.predict.loops import Replica
from millrace.protocol import StepTiming

Kind = Literal["step", "device", "closed"]
NOTHING = StepShape()
IDLE = 0.3  # a gap between two steps of more than this share of a step is no part of the next one
BIN = 2**0.5  # steps whose rows and prompt tokens differ by less than this factor are alike
FEWEST = 3  # steps of a bin
SKIPPED = 5  # first steps of a log: caches are cold, and kernels are loaded


@dataclass(frozen=True, slots=True)
class Observation:
    """One measured figure. seconds: of a step, or of an output token of a stream, with `load` and
    `settings`. count: of steps that it is the median of. spread: relative, between those."""

    kind: Kind
    seconds: float
    shape: StepShape = NOTHING
    load: Load | None = None
    settings: Settings | None = None
    count: int = 1
    spread: float = 0.0
    metric: str = ""

    def predicted(self, model: StepModel) -> float:
        """What a model says of it."""
        if self.kind == "step":
            return float(model.seconds(self.shape))
        if self.kind == "device":
            return float(model.times(self.shape).device)
        assert self.load is not None
        assert self.settings is not None
        steady = Replica(model, self.load, self.settings).closed(self.load.concurrency)
        return 1 / steady.total_tokens if self.metric == "total" else float(steady.tpot)


def shape_of(t: StepTiming) -> StepShape:
    """The shape of a logged step. Pairs of attention follow from means and variances of lengths, as
    if the start of a piece did not depend on its length."""
    n = t.num_prefill_requests
    mean = t.sum_prefill_tokens / n if n else 0.0
    squares = n * (t.var_prefill_length + mean**2)
    return StepShape(
        decode_rows=float(t.num_decode_requests),
        decode_tokens=float(t.decode_tokens),
        decode_context=float(t.sum_decode_kv_tokens),
        prompts=float(n),
        prompt_tokens=float(t.sum_prefill_tokens),
        prompt_context=float(t.sum_prefill_kv_tokens),
        prompt_attention=mean * t.sum_prefill_kv_tokens + (squares + t.sum_prefill_tokens) / 2,
        sampled_rows=float(t.num_sampled),
    )


def read(path: Path, text: str = "mixed") -> list[Observation]:
    """The observations of a file. text: of the runs of the benchmark, if it is a result.

    Raises ConfigError, with what would work, for other files.
    """
    try:
        head = path.open("rb").read(1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if head in (b"{", b"["):
        return _json(path, text)
    try:
        timings = [e for e in plan_log.read(path) if isinstance(e, StepTiming)]
    except UserError:
        found = list(_messages(path))
        if not found:
            raise ConfigError(
                f"{path}: neither a plan log (`--plan-log FILE`), nor forward pass metrics, nor a "
                "result of `millrace bench serve --save-result`"
            ) from None
        return from_metrics(found)
    return from_timings(timings)


# --- plan logs ----------------------------------------------------------------------------------


def from_timings(timings: Iterable[StepTiming]) -> list[Observation]:
    """Steps of about one shape, by their median period: from one commit to the next, or the whole
    of a step that nothing ran before."""
    listed = list(timings)
    if len(listed) <= SKIPPED + FEWEST:
        raise ConfigError(
            f"a plan log of {len(listed)} steps says too little; {SKIPPED + FEWEST + 1} and more do"
        )
    pairs = zip(listed[SKIPPED - 1 :], listed[SKIPPED:], strict=False)
    return _binned((shape_of(now), _period(before, now)) for before, now in pairs)


def _period(before: StepTiming, now: StepTiming) -> float:
    began = now.planned - now.planning
    whole = now.committed - began
    idle = began - before.committed
    return whole if idle > IDLE * whole else now.committed - before.committed


def _binned(steps: Iterable[tuple[StepShape, float]], kind: Kind = "step") -> list[Observation]:
    bins: dict[tuple[int, ...], list[tuple[StepShape, float]]] = defaultdict(list)
    for shape, seconds in steps:
        if seconds > 0 and shape.tokens > 0:
            bins[_key(shape)].append((shape, seconds))
    found = []
    for alike in bins.values():
        if len(alike) < FEWEST:
            continue
        times = sorted(seconds for _, seconds in alike)
        middle = statistics.median(times)
        quarter = len(times) // 4
        spread = (times[-1 - quarter] - times[quarter]) / 1.35 / middle
        shape = _mean([shape for shape, _ in alike])
        found.append(Observation(kind, middle, shape, count=len(alike), spread=spread))
    if not found:
        raise ConfigError("no shape of step occurs often enough; log a longer run")
    return found


def _key(shape: StepShape) -> tuple[int, ...]:
    def level(value: float) -> int:
        return 0 if value <= 0 else 1 + round(math.log(value, BIN))

    return level(shape.decode_rows), level(shape.decode_tokens), level(shape.prompt_tokens)


def _mean(shapes: list[StepShape]) -> StepShape:
    return StepShape(
        *(statistics.fmean(getattr(s, name) for s in shapes) for name in StepShape.__slots__)
    )


# --- forward pass metrics -----------------------------------------------------------------------


def _messages(path: Path) -> Iterator[dict[str, Any]]:
    """msgpack maps, each behind its length. A truncated last one is left out."""
    data, at = path.read_bytes(), 0
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("<I", data, at)
        body = data[at + 4 : at + 4 + size]
        at += 4 + size
        try:
            content = msgspec.msgpack.decode(body)
        except msgspec.DecodeError:
            return
        if isinstance(content, dict) and "wall_time" in content:
            yield content


def from_metrics(messages: Iterable[dict[str, Any]]) -> list[Observation]:
    """Device times; idle heartbeats have a wall time of 0 and are left out."""
    steps = []
    for message in messages:
        sizes = message.get("scheduled_requests") or {}
        names = {k: v for k, v in sizes.items() if k in StepTiming.__struct_fields__}
        drafts = message.get("decode_tokens", names.get("num_decode_requests", 0))
        sampled = names.get("num_decode_requests", 0) + names.get("num_prefill_requests", 0)
        timing = StepTiming(
            step=0, planned=0, launched=0, ended=0, committed=0, planning=0,
            wall=message["wall_time"], num_sampled=sampled, decode_tokens=drafts, **names,
        )  # fmt: skip
        steps.append((shape_of(timing), timing.wall))
    return _binned(steps, "device")


# --- results of the benchmark -------------------------------------------------------------------


def _json(path: Path, text: str) -> list[Observation]:
    from millrace.bench.report.results import load_results

    lines = path.read_bytes().splitlines()
    if b'"wall_time"' in lines[0] and b'"scheduled_requests"' in lines[0]:
        return from_metrics(msgspec.json.decode(line) for line in lines if line.strip())
    found = []
    for result in load_results(str(path)):
        if result.is_run:
            found += from_result(result.fields, text)
    if not found:
        raise ConfigError(f"{path}: a scaling table; give the results of single runs")
    return found


def from_result(fields: dict[str, Any], text: str) -> list[Observation]:
    """Throughput and TPOT of a closed run. Raises ConfigError for a run with a rate."""
    streams = fields.get("max_concurrency")
    done = fields.get("completed") or 0
    if not streams or not done:
        raise ConfigError(
            "a result of a run without --max-concurrency says nothing of a closed loop; run it "
            "with one"
        )
    load = Load(
        input=fields["total_input_tokens"] / done,
        output=fields["total_output_tokens"] / done,
        concurrency=float(streams),
        requests=float(done),
        text=text,
    )
    settings = Settings(max_num_seqs=max(256, int(streams)))
    common: dict[str, Any] = {"load": load, "settings": settings, "spread": 0.03}
    found = [Observation("closed", 1 / fields["total_token_throughput"], metric="total", **common)]
    if fields.get("mean_tpot_ms"):
        found.append(Observation("closed", fields["mean_tpot_ms"] / 1e3, metric="tpot", **common))
    return found
