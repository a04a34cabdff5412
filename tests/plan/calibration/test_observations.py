"""Plan logs, forward pass metrics and results become observations, and a fit to them predicts."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from millrace.engine.plan_log import PlanLog
from millrace.errors import ConfigError
from millrace.model.work import StepShape
from millrace.plan.calibration.observations import from_result, read, shape_of
from millrace.plan.calibration.refit import refit, step_model_of
from millrace.plan.model.posterior import posterior, read_calibration
from millrace.plan.model.profiles import step_model
from millrace.plan.model.step_model import Description, StepModel
from millrace.protocol import StepTiming

HIDDEN = Description(gpu="epyc-2", model="tiny-9m", weights="bf16", kv="bf16", draft_head="bf16")


def hidden_truth() -> StepModel:
    """An engine that is not what the prior thinks: half the bandwidth, more time of the host."""
    model = step_model("epyc-2", "tiny-9m", weights="bf16", kv="bf16", draft_head="bf16")
    factors = {"stream": 0.5, "gemm": 1.4, "step_host": 3.0, "token_host": 2.0}
    return replace(model, rates={k: v * factors.get(k, 1.0) for k, v in model.rates.items()})


def timings(model: StepModel, count: int, seed: int = 0) -> Iterator[StepTiming]:
    """Steps one after the other, with 3% of noise."""
    rng, now = np.random.default_rng(seed), 0.0
    for step in range(count):
        rows = int(rng.choice([1, 2, 4, 8, 16, 32]))
        prompts = int(rng.random() < 0.3)
        length = int(rng.choice([32, 128, 512])) * prompts
        context = int(rng.integers(64, 800))
        shape = StepShape.of(rows, 1, context, prompts, length)
        seconds = float(model.seconds(shape)) * float(np.exp(0.03 * rng.normal()))
        yield StepTiming(
            step=step, planned=now, launched=now, ended=now + seconds, committed=now + seconds,
            planning=0.0, wall=seconds, num_prefill_requests=prompts, sum_prefill_tokens=length,
            num_decode_requests=rows, sum_decode_kv_tokens=rows * context,
            num_sampled=rows + prompts, decode_tokens=rows,
        )  # fmt: skip
        now += seconds


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "plan.log"
    writer = PlanLog(path)
    for timing in timings(hidden_truth(), 600):
        writer.write(timing)
    writer.close()
    return path


def test_a_fit_to_a_plan_log_predicts_other_steps(log: Path, tmp_path: Path) -> None:
    """Within 8% where the prior is wrong by more, and with smaller uncertainty."""
    found = refit(HIDDEN, read(log))
    assert found.error < 0.03 < 0.1 < found.before
    model = step_model_of(found)
    for shape in (
        StepShape.of(rows=24, width=1, context=500),
        StepShape.of(rows=6, width=1, context=200, prompts=2, length=200),
        StepShape.of(prompts=4, length=300),
    ):
        truth = float(hidden_truth().seconds(shape))
        assert float(model.seconds(shape)) == pytest.approx(truth, rel=0.08)
    assert found.jitter == pytest.approx(0.03, rel=0.5)
    path = tmp_path / "calibration.json"
    path.write_bytes(msgspec.json.encode(found))
    known = read_calibration(path)
    assert known.rates("millrace", "epyc-2") == pytest.approx(model.rates)
    assert "a calibration of" in known.source("millrace", "epyc-2")
    before = posterior().covariance("millrace", "epyc-2")
    assert np.trace(known.covariance("millrace", "epyc-2")) < 0.9 * np.trace(before)


def test_lengths_give_the_pairs_of_attention() -> None:
    timing = next(t for t in timings(hidden_truth(), 50) if t.sum_prefill_tokens)
    shape, length = shape_of(timing), timing.sum_prefill_tokens
    assert shape.prompt_attention == pytest.approx(length * (length + 1) / 2)


def test_forward_pass_metrics_give_device_times(tmp_path: Path) -> None:
    """As messages with their lengths, and as JSON lines; heartbeats are left out."""
    model = hidden_truth()
    messages = []
    for rows in (4, 4, 4, 16, 16, 16):
        sizes = {"num_decode_requests": rows, "sum_decode_kv_tokens": rows * 300}
        seconds = float(model.times(StepShape.of(rows, 1, 300)).device)
        messages.append({"wall_time": seconds, "scheduled_requests": sizes})
    messages.append({"wall_time": 0.0, "scheduled_requests": {}})
    packed, lines = tmp_path / "fpm.bin", tmp_path / "fpm.jsonl"
    bodies = [msgspec.msgpack.encode(message) for message in messages]
    packed.write_bytes(b"".join(struct.pack("<I", len(body)) + body for body in bodies))
    lines.write_text("\n".join(json.dumps(message) for message in messages))
    for path in (packed, lines):
        found = read(path)
        assert [(one.kind, one.count, one.shape.decode_rows) for one in found] == [
            ("device", 3, 4), ("device", 3, 16),
        ]  # fmt: skip
        assert found[0].predicted(model) == pytest.approx(found[0].seconds)


def test_results_of_the_benchmark_give_closed_loops() -> None:
    fields = {
        "max_concurrency": 32, "completed": 100, "total_input_tokens": 12_800,
        "total_output_tokens": 6_400, "total_token_throughput": 4_000.0, "mean_tpot_ms": 12.0,
    }  # fmt: skip
    total, tpot = from_result(fields, "mixed")
    assert total.seconds == pytest.approx(1 / 4000)
    assert tpot.seconds == pytest.approx(0.012)
    assert total.predicted(hidden_truth()) > 0
    with pytest.raises(ConfigError, match="run it with one"):
        from_result({**fields, "max_concurrency": None}, "mixed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing like it", "neither a plan log .* nor a result of `millrace bench serve"),
        (b'{"a": 1}', "there is no result of `millrace bench` in it"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(Exception, match=message):
        read(path)
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none")


def test_too_short_a_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.log"
    writer = PlanLog(path)
    for timing in timings(hidden_truth(), 4):
        writer.write(timing)
    writer.close()
    with pytest.raises(ConfigError, match="a plan log of 4 steps says too little"):
        read(path)
    with pytest.raises(ConfigError, match="there is nothing to fit"):
        refit(HIDDEN, [])
