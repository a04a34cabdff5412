"""Predictions with bars, their causes, and what they cost; the write-up's figures."""

from __future__ import annotations

import math

import pytest

from millrace.errors import ConfigError
from millrace.plan.model.step_model import Description
from millrace.plan.predict.capacity import OFFICE_DAY, batch, day, efficiency, node_table
from millrace.plan.predict.cost import against, cost, million
from millrace.plan.predict.load import Load, settings_of
from millrace.plan.predict.prediction import Deployment, Planner
from millrace.plan.presets import NODE_HOUR, WRITE_UP, write_up_load, write_up_node

PLANNER = Planner()
LOAD = Load(input=768, output=384, concurrency=256, text="policies")


def deployment(replicas: int = 1, engine: str = "millrace", **changes: object) -> Deployment:
    base = {"gpu": "h200", "model": "qwen3.5-27b", "drafts": 1, "max_model_len": 2560}
    return Deployment(
        Description(**{**base, "engine": engine, **changes}), settings_of(engine), replicas
    )


def test_bars_hold_the_value_and_say_what_they_come_from() -> None:
    found = PLANNER.predict(deployment(), LOAD)
    for name, bar in found.bars.items():
        assert 0 < bar.low < bar.value < bar.high, name
    assert sum(found.shares.values()) == pytest.approx(1, abs=0.01)
    assert found.bars["total_tokens"].low < 14_230 < found.bars["total_tokens"].high
    assert "measured rows of millrace on h200" in found.rests_on


def test_bars_are_wider_where_nothing_was_measured() -> None:
    def width(gpu: str, model: str = "qwen3.5-9b") -> float:
        bar = PLANNER.predict(deployment(gpu=gpu, model=model), LOAD).bars["total_tokens"]
        return math.log(bar.high / bar.low)

    assert width("rtx-pro-6000") > 1.3 * width("h200")


def test_text_moves_throughput() -> None:
    code, prose = (
        PLANNER.predict(deployment(), Load(input=64, output=384, concurrency=8, text=text))
        for text in ("code", "prose")
    )
    assert code.bars["output_tokens"].value > 1.2 * prose.bars["output_tokens"].value


def test_beyond_the_knee_there_is_a_band_and_no_latency() -> None:
    most = PLANNER.predict(deployment(), LOAD).bars["requests"].value
    calm = PLANNER.predict(deployment(), Load(input=768, output=384, rate=most / 2))
    over = PLANNER.predict(deployment(), Load(input=768, output=384, rate=most * 3))
    assert "ttft" in calm.bars
    assert not calm.overload
    assert "ttft" not in over.bars
    assert "beyond the knee: TTFT stays bounded up to some" in over.overload


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu": "a100-80"}, "a100-80 has no FP8 unit; weights in bf16 or int4 would run"),
        ({"weights": "nvfp4"}, "h200 has no FP4 unit; weights in fp8 or int4 would run"),
        ({"tensor": 5}, "5 ranks do not divide 24 heads .*; 1, 2, 4, 8 do"),
        ({"model": "qwen3-32b"}, "qwen3-32b has no draft head: use 0 drafts"),
        ({"max_model_len": 10**6}, "more than the 262144 positions"),
    ],
)
def test_what_cannot_run_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PLANNER.predict(deployment(**changes), LOAD)


# --- cost ---------------------------------------------------------------------------------------


def test_the_write_ups_dollars() -> None:
    """$0.30 in the text is $0.269."""
    assert million(12 * NODE_HOUR["reserved"], WRITE_UP[12]) == pytest.approx(0.2685, abs=5e-4)
    assert million(12 * NODE_HOUR["spot"], WRITE_UP[12]) == pytest.approx(0.0985, abs=5e-4)


def test_input_and_output_prices_add_up_to_the_bill() -> None:
    found = PLANNER.predict(deployment(), LOAD)
    for ratio in (1.0, 5.0):
        costs = cost(found, dollars=3.0, ratio=ratio)
        parts = LOAD.input * costs.input.value + LOAD.output * costs.output.value
        assert parts / 1e6 == pytest.approx(costs.request.value)
        assert costs.output.value == pytest.approx(ratio * costs.input.value)
        assert costs.million.value * (LOAD.input + LOAD.output) / 1e6 == pytest.approx(
            costs.request.value
        )
    half = cost(found, dollars=3.0, utilisation=0.5)
    assert half.million.value == pytest.approx(2 * costs.million.value)
    with pytest.raises(ConfigError, match=r"utilisation 1\.5: use a share above 0, up to 1"):
        cost(found, 3.0, utilisation=1.5)


def test_break_even_is_a_share_of_full_use() -> None:
    found = PLANNER.predict(write_up_node(), write_up_load())
    rows = {row.name: row for row in against(cost(found, NODE_HOUR["reserved"] / 8, 0.5), 2 / 3)}
    full = cost(found, NODE_HOUR["reserved"] / 8).million.value
    flash = rows["Gemini 3.1 Flash-Lite"]
    assert flash.break_even == pytest.approx(full / 0.6667, rel=1e-3)
    assert rows["Gemini 3.1 Flash-Lite, batch"].dollars == pytest.approx(flash.dollars / 2)
    assert rows["Qwen3.5-27B at EmpirioLabs"].same_model


# --- capacity -----------------------------------------------------------------------------------


def test_the_table_of_nodes_is_the_write_ups() -> None:
    rows = node_table(PLANNER, write_up_node(), write_up_load(), list(WRITE_UP))
    for row in rows:
        assert row.requests.value == pytest.approx(row.tokens.value / (768 + 384), rel=1e-3)
        assert row.tokens.low < WRITE_UP[row.nodes] < row.tokens.high
        assert row.users == 2000 * row.nodes
    assert efficiency(12) == pytest.approx(0.965, abs=0.003)


def test_a_batch_takes_its_tokens_over_the_rate() -> None:
    found = batch(PLANNER, write_up_node(), write_up_load(), 50_000, 11.11625)
    seconds = 50_000 * (768 + 384) / 95_317
    assert found.hours.value * 3600 == pytest.approx(seconds + 104, rel=0.12)
    assert found.dollars.value == pytest.approx(found.hours.value * 88.93, rel=1e-3)


def test_a_day_that_follows_its_load_costs_less() -> None:
    found = day(PLANNER, deployment(), LOAD, peak=100.0)
    assert found.scaled < 0.75 * found.fixed
    assert found.peak_replicas == pytest.approx(max(OFFICE_DAY) * 100 / 12.3 / 0.8, rel=0.25)
    quiet = day(PLANNER, deployment(), LOAD, peak=1.0, curve=[0.0] * 12 + [1.0] * 12)
    assert quiet.to_zero == 12
    assert quiet.starts == 1
    with pytest.raises(ConfigError, match="a load curve has 24 shares"):
        day(PLANNER, deployment(), LOAD, peak=1.0, curve=[1.0])
