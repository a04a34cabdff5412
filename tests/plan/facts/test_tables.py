"""The tables: complete, consistent, and refused by name where there is no such row."""

from __future__ import annotations

import pytest

from millrace.errors import ConfigError
from millrace.hardware.gpus import gpu, gpus
from millrace.plan.facts.measured import measured
from millrace.plan.facts.models import catalogue, model_config
from millrace.plan.facts.prices import api_prices, gpu_prices, price_of
from millrace.plan.facts.texts import acceptance, text, texts, tokens_per_step

WANTED = {
    "gb10", "l4", "l40s", "a100-40", "a100-80", "h100", "h200", "b200", "b300", "gb200", "gb300",
    "rtx-pro-6000", "mi300x", "mi355x",
}  # fmt: skip


def test_rates_are_dense() -> None:
    """A rate with sparsity would be four times that of the next wider unit."""
    assert set(gpus()) >= WANTED
    for found in gpus().values():
        for wide, narrow in ((found.bf16, found.fp8), (found.fp8, found.fp4)):
            if wide and narrow and found.name not in ("b300", "gb300"):  # with more FP4 units
                assert 1.9 < narrow / wide < 2.1, found.name
        assert found.source
        assert found.idle_watts < found.watts


def test_what_has_no_unit_is_computed_in_the_next_wider_one() -> None:
    assert gpu("a100-80").rate("fp8") == gpu("a100-80").rate("bf16") == 312e12
    assert gpu("h200").rate("fp4") == gpu("H200").rate("fp8") == 1979e12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gpu("h2000"), "unknown GPU 'h2000'; known are gb10, l4"),
        (lambda: model_config("llama"), "unknown model 'llama'.*qwen3.5-27b"),
        (lambda: text("poems"), "unknown text 'poems'; known are code.*or a share from 0 to 1"),
        (lambda: price_of("l4"), "no  price of l4 is known; give --price DOLLARS"),
        (lambda: price_of("h200", "reserved"), "on-demand and spot have one; or give --price"),
        (lambda: price_of("h200", "free"), "unknown kind of price 'free'; use on-demand"),
        (lambda: price_of("h200", given=-1), "price -1: use dollars a GPU-hour above 0"),
    ],
)
def test_what_is_unknown_is_refused_with_what_is_known(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_every_model_of_the_catalogue_can_be_read() -> None:
    assert model_config("Qwen/Qwen3.5-27B-FP8").num_gdn_layers == 48
    for name in catalogue():
        assert model_config(name).num_layers > 0


def test_prices_have_dates_and_sources() -> None:
    found = [price for name in gpus() for price in gpu_prices(name)]
    assert len(found) >= 19
    assert all(price.date and price.source and price.dollars > 0 for price in found)
    assert price_of("b200", "spot").dollars * 8 == pytest.approx(32.61)
    assert price_of("h200").provider == "hyperstack"  # the cheapest


def test_hosted_models_cost_what_the_package_of_prices_says() -> None:
    """The table that ships, and genai-prices where it knows a model."""
    blended = {api.name: api.blended(2 / 3) for api in api_prices()}
    assert blended["Gemini 3.1 Flash-Lite"] == pytest.approx(0.667, abs=0.001)
    assert blended["Claude Opus 4.6"] == pytest.approx(11.67, abs=0.01)
    assert blended["Qwen3.5-27B at EmpirioLabs"] == pytest.approx(0.287, abs=0.001)
    assert {api.source for api in api_prices()} == {"table", "genai-prices"}


def test_acceptance_depends_on_the_text() -> None:
    assert acceptance("code", 1) == (0.908,)
    assert tokens_per_step("code", 1) - tokens_per_step("technical", 1) == pytest.approx(0.428)
    shares = (0.847, 0.587, 0.493, 0.441, 0.412)
    assert tokens_per_step("policies-deep", 5) == pytest.approx(1 + sum(shares))
    assert tokens_per_step("0.9", 2) == pytest.approx(1 + 0.9 + 0.81)
    assert tokens_per_step("chat", 3) == pytest.approx(3.2)
    for name in texts():
        given = acceptance(name, 5)
        assert len(given) == 5
        assert all(0 <= share <= 1 for share in given)


def test_measured_rows_are_told_apart_and_have_sources() -> None:
    rows = measured()
    assert len({row.id for row in rows}) == len(rows) > 150
    assert all(row.source and row.value > 0 for row in rows)
    assert {row.engine for row in rows} >= {"millrace", "vllm", "sglang"}
    assert sum(row.aisimulate is not None for row in rows) >= 9
