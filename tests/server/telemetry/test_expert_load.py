"""Tokens by expert on the metrics page, and by how much experts and ranks are out of balance."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from millrace.protocol import EngineStats
from millrace.server.telemetry.metrics import MetricsPage, RequestMetrics, imbalance


def page(stats: EngineStats) -> dict[tuple[str, str, str], float]:
    """(name, layer, expert) -> value, of the figures about experts."""
    text = MetricsPage("m", RequestMetrics(), lambda: stats).render().decode()
    return {
        (sample.name, sample.labels["layer"], sample.labels.get("expert", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "expert" in sample.name or "rank_load" in sample.name
    }


def test_load_by_expert_and_rank() -> None:
    stats = EngineStats(
        expert_tokens={"layers.0": [6, 2, 0, 0], "layers.1": [2, 2, 2, 2]}, expert_ranks=2
    )
    found = page(stats)
    assert found["millrace:expert_tokens_total", "layers.0", "0"] == 6
    assert found["millrace:expert_tokens_total", "layers.1", "3"] == 2
    assert found["millrace:expert_load_imbalance", "layers.0", ""] == 3.0
    assert found["millrace:expert_load_imbalance", "layers.1", ""] == 1.0
    assert found["millrace:rank_load_imbalance", "layers.0", ""] == 2.0
    assert found["millrace:rank_load_imbalance", "layers.1", ""] == 1.0


def test_nothing_is_said_of_models_without_experts() -> None:
    assert page(EngineStats()) == {}


def test_a_load_of_nothing_is_even() -> None:
    assert imbalance([0, 0, 0, 0], 2) == 1.0
