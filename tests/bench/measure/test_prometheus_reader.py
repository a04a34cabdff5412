"""Metrics pages: under any name, over all replicas, between two readings."""

from __future__ import annotations

import pytest

from millrace.bench.measure.prometheus_reader import (
    MetricsPage,
    difference,
    expert_load,
    prefix_hits,
    read_dcgm,
    read_page,
    speculation,
)
from millrace.bench.measure.telemetry import integrate

VLLM = """
# HELP vllm:prefix_cache_hits_total Hits.
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 30.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 10.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="0"} 50.0
vllm:spec_decode_num_draft_tokens_total{engine="0"} 100.0
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 70.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 45.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 25.0
vllm:num_requests_running{engine="0"} 3.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
millrace:prefix_cache_hits_total 40.0
process_cpu_seconds_total 12.0
"""


def test_a_page_is_read_once_whatever_names_it_uses() -> None:
    page = read_page(VLLM)
    assert page.counters["prefix_cache_hits"] == 40
    assert page.gauges == {"num_requests_running": 3, "kv_cache_usage_perc": 0.25}
    assert page.accepted == {0: 45, 1: 25}
    own = read_page(VLLM.replace("vllm:", "millrace:").replace("40.0", "0.0"))
    assert own.counters["spec_decode_num_drafts"] == 50


@pytest.mark.parametrize("text", ["", "<html>404</html>", "vllm:num_requests_running {{{", "\x00"])
def test_what_is_no_page_has_no_figures(text: str) -> None:
    page = read_page(text)
    assert (page.counters, page.gauges, page.accepted) == ({}, {}, {})


def test_replicas_are_added_and_a_restart_counts_from_nothing() -> None:
    first, later = read_page(VLLM), read_page(VLLM.replace(" 50.0", " 80.0"))
    restarted = read_page(VLLM.replace(" 50.0", " 5.0"))
    totals = difference([first, first], [later, restarted])
    assert totals.counters["spec_decode_num_drafts"] == 30 + 5
    assert totals.counters["prefix_cache_hits"] == 0


def test_acceptance_is_over_drafts_and_its_length_is_one_more() -> None:
    found = speculation(difference([read_page("")], [read_page(VLLM)]))
    assert found is not None
    assert found["acceptance_rate"] == pytest.approx(0.7)
    assert found["acceptance_length"] == pytest.approx(1 + 70 / 50)
    assert found["acceptance_by_position"] == pytest.approx([0.9, 0.5])
    assert speculation(difference([read_page("")], [read_page("")])) is None


def test_prefix_hits() -> None:
    found = prefix_hits(difference([read_page("")], [read_page(VLLM)]))
    assert found == {"queries": 100, "hits": 40, "hit_rate": 0.4}


def test_dcgm_sums_power_and_averages_shares() -> None:
    page = """
DCGM_FI_DEV_POWER_USAGE{gpu="0"} 400
DCGM_FI_DEV_POWER_USAGE{gpu="1"} 300
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{gpu="0"} 0.5
DCGM_FI_PROF_PIPE_TENSOR_ACTIVE{gpu="1"} 0.3
DCGM_FI_DEV_SM_CLOCK{gpu="0"} 1980
"""
    assert read_dcgm(page) == {"power_w": 700, "tensor_active": 0.4}


def test_energy_is_the_integral_of_power() -> None:
    second = 1_000_000_000
    assert integrate([(0, 100.0), (second, 300.0), (3 * second, 300.0)]) == pytest.approx(800.0)
    assert integrate([(0, 100.0)]) is None


def test_acceptance_by_method() -> None:
    """Methods that made no drafts meanwhile are left out."""

    def page(drafts: int, first: int, second: int) -> MetricsPage:
        name = "millrace:spec_decode_num"
        lines = [
            f"{name}_drafts_total {drafts}",
            f'{name}_drafts_by_method_total{{method="suffix"}} {drafts}',
            f'{name}_drafts_by_method_total{{method="mtp"}} 7',
            f'{name}_draft_tokens_by_method_total{{method="suffix"}} {2 * drafts}',
            f'{name}_accepted_tokens_by_method_total{{method="suffix",position="1"}} {second}',
            f'{name}_accepted_tokens_by_method_total{{method="suffix",position="0"}} {first}',
        ]
        return read_page("\n".join(lines))

    found = speculation(difference([page(10, 5, 1)], [page(20, 13, 6)]))
    assert found is not None
    assert found["methods"] == {
        "suffix": {
            "drafts": 10,
            "draft_tokens": 20,
            "acceptance_rate": 13 / 20,
            "acceptance_length": 2.3,
            "acceptance_by_position": [0.8, 0.5],
        }
    }


def test_load_of_experts() -> None:
    """Of what happened between both readings; layers without tokens are left out."""

    def page(*counts: int) -> MetricsPage:
        name = "millrace:expert_tokens_total"
        places = [("layers.0", 0), ("layers.0", 1), ("layers.1", 0), ("layers.1", 1)]
        return read_page(
            "\n".join(
                f'{name}{{layer="{layer}",expert="{expert}"}} {count}'
                for (layer, expert), count in zip(places, counts, strict=True)
            )
        )

    found = expert_load(difference([page(5, 5, 9, 0)], [page(6, 8, 9, 0)]))
    assert found == {
        "mean": 1.5,
        "largest": 1.5,
        "layers": {"layers.0": {"imbalance": 1.5, "tokens": {"0": 1.0, "1": 3.0}}},
    }
    assert expert_load(difference([page(1, 1, 1, 1)], [page(1, 1, 1, 1)])) is None
    assert expert_load(difference([read_page(VLLM)], [read_page(VLLM)])) is None


def test_cached_tokens_are_split_by_tier() -> None:
    def page(host: int, prefix: str = "vllm:") -> MetricsPage:
        lines = ["vllm:prefix_cache_queries_total 1000.0", "vllm:prefix_cache_hits_total 500.0"]
        for name in dict.fromkeys((prefix, "millrace:")):
            for tier, count in (("device", 10), ("host", host), ("disk", 0)):
                source = f'{{engine="0",source="{tier}"}}'
                lines.append(f"{name}prompt_tokens_cached_by_source_total{source} {count}.0")
        return read_page("\n".join(lines) + "\n")

    totals = difference([page(0), page(5)], [page(70), page(25)])
    assert totals.tiers == {"device": 0, "host": 90, "disk": 0}
    later = difference([MetricsPage()], [page(70, "millrace:")])
    found = prefix_hits(later)
    assert found is not None
    assert found["by_tier"] == {"device": 10, "host": 70, "disk": 0}
    assert "by_tier" not in (prefix_hits(difference([MetricsPage()], [read_page(VLLM)])) or {})
