"""Step models: sensible in every direction, the same for arrays, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from millrace.errors import ConfigError
from millrace.hardware.gpus import gpus
from millrace.model.work import StepShape
from millrace.plan.model.profiles import step_model
from millrace.plan.model.step_model import StepModel

DECODE = StepShape.of(rows=256, width=2, context=900)


def h200(**options: object) -> StepModel:
    return step_model("h200", "qwen3.5-27b", **{"drafts": 1, **options})


def test_times_of_arrays_are_those_of_single_steps() -> None:
    model, rows = h200(tensor=2), np.array([0.0, 1.0, 8.0, 256.0])
    together = model.times(StepShape.of(rows, 2, 900, 1.0 * (rows > 4), 700))
    for i, count in enumerate(rows):
        alone = model.times(StepShape.of(float(count), 2, 900, 1.0 * (count > 4), 700))
        assert together.device[i] == pytest.approx(alone.device)
        assert together.host[i] == pytest.approx(alone.host)
    assert np.all(np.isfinite(together.device))
    assert np.all(np.diff(together.device) >= 0)


def test_a_step_of_the_27b_on_an_h200() -> None:
    """The step that is best known: 48.8 ms, 25 of them in linear layers and 14 in states."""
    parts = h200().parts(DECODE)
    assert float(h200().seconds(DECODE)) == pytest.approx(48.8e-3, rel=0.1)
    assert parts["linear"] == pytest.approx(25e-3, rel=0.15)
    assert parts["states"] == pytest.approx(13.5e-3, rel=0.25)


@pytest.mark.parametrize("name", [g.name for g in gpus().values() if not g.cpu])
def test_more_work_takes_longer_on_every_gpu(name: str) -> None:
    model = step_model(name, "qwen3.5-27b", weights="bf16", kv="bf16")
    base = float(model.seconds(DECODE))
    for more in (
        StepShape.of(rows=300, width=2, context=900),
        StepShape.of(rows=256, width=2, context=9000),
        StepShape.of(rows=256, width=3, context=900),
        StepShape.of(rows=256, width=2, context=900, prompts=1, length=64),
    ):
        assert float(model.seconds(more)) > base


def test_fewer_bits_and_more_ranks_are_faster_where_they_should_be() -> None:
    one = StepShape.of(rows=1, width=2, context=900)
    bf16, fp8, int4 = (float(h200(weights=w).seconds(one)) for w in ("bf16", "fp8", "int4"))
    assert bf16 > fp8 > int4  # bytes bind
    assert float(h200(weights="int4").seconds(DECODE)) > float(h200().seconds(DECODE))  # FLOPs do
    assert float(h200(tensor=2).seconds(DECODE)) < float(h200().seconds(DECODE))
    assert float(h200(state="bf16").seconds(DECODE)) < float(h200().seconds(DECODE))
    assert float(h200(window=0).seconds(DECODE)) > float(h200().seconds(DECODE))


def test_energy_is_within_the_power_limit() -> None:
    model = h200()
    assert 0.3 * 700 < model.joules(DECODE) / model.seconds(DECODE) <= 700
    assert model.joules(DECODE) == pytest.approx(33.0, rel=0.2)  # measured with 226 rows: 32.7


def test_a_step_model_is_the_same_after_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    h200().save(path)
    again = StepModel.load(path)
    assert float(again.seconds(DECODE)) == pytest.approx(float(h200().seconds(DECODE)))
    assert again.sources["gemm"] == h200().sources["gemm"]
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"no step model .*`millrace plan calibrate` writes one"):
        StepModel.load(path)


def test_an_engine_without_rows_rests_on_priors() -> None:
    known, unknown = h200(), step_model("l4", "qwen3.5-9b", "sglang")
    assert "measured rows of millrace on h200" in known.sources["gemm"]
    assert "no row of sglang on l4" in unknown.sources["gemm"]
    assert unknown.uncertainty > known.uncertainty
