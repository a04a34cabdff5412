"""Prometheus' own tool reads the rules, and planted faults fire the alerts that name them."""

from __future__ import annotations

import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

RULES = Path(str(resources.files("millrace.observe") / "prometheus"))
FILES = sorted(RULES.glob("*.yml"))
ONE = 'job="m", instance="a:1", model_name="q", engine="0"'
TWO = 'job="m", instance="a:2", model_name="q", engine="0"'
# Alert -> (series of a fault, minutes until it must fire). Each is quiet in the healthy fleet.
FAULTS: dict[str, tuple[dict[str, str], int]] = {
    "MillraceEngineDown": ({f"millrace:engine_up{{{ONE}}}": "1x9 0x20"}, 14),
    "MillraceEngineNotStarted": ({f"millrace:engine_up{{{ONE}}}": "0x60"}, 40),
    "MillraceEngineRestarts": (
        {f"millrace:engine_restarts_total{{{ONE}}}": "0x5 1x3 2x3 3x20"}, 18,
    ),
    "MillraceTargetDown": (
        {f"millrace:engine_up{{{ONE}}}": "1x9 _x20", 'up{job="m", instance="a:1"}': "1x9 0x20"}, 14,
    ),
    "MillraceEngineStuck": ({f"vllm:iteration_tokens_total_count{{{ONE}}}": "0+60x9 540x20"}, 16),
    "MillraceKvCacheFull": (
        {f"vllm:kv_cache_usage_perc{{{ONE}}}": "0.99x30", f"vllm:kv_cache_usage_perc{{{TWO}}}":
         "0.98x30", f"vllm:num_requests_waiting{{{ONE}}}": "7x30"}, 10,
    ),
    "MillraceQueueGrowing": ({f"vllm:num_requests_waiting{{{ONE}}}": "0+10x30"}, 20),
    "MillraceAcceptanceFell": (
        {f"vllm:spec_decode_num_accepted_tokens_total{{{ONE}}}": "0+48x380 18240+12x60"}, 410,
    ),
    "MillraceImbalance": (
        {f"vllm:kv_cache_usage_perc{{{ONE}}}": "0.9x30", f"vllm:kv_cache_usage_perc{{{TWO}}}":
         "0.1x30", f"vllm:num_requests_waiting{{{ONE}}}": "80x30"}, 15,
    ),
    "MillracePreemptions": ({f"vllm:num_preemptions_total{{{ONE}}}": "0+30x30"}, 20),
    "MillraceNotFinite": ({f"vllm:corrupted_requests_total{{{ONE}}}": "0x5 1x25"}, 8),
    "MillraceErrorBudgetFast": (
        {'millrace_gateway_requests_total{job="g", status="503"}': "0+12x120",
         'millrace_gateway_requests_total{job="g", status="200"}': "0+600x120"}, 100,
    ),
    "MillraceErrorBudgetSlow": (
        {f'vllm:request_success_total{{{ONE}, finished_reason="error"}}': "0+2x420"}, 400,
    ),
    "MillraceFiguresContradict": (
        {f'millrace:gpu_power_watts{{{ONE}, gpu="0"}}': "680x40",
         f"millrace:estimated_peak_compute_seconds_total{{{ONE}}}": "0+1x40",
         f"millrace:estimated_peak_memory_seconds_total{{{ONE}}}": "0+2x40"}, 30,
    ),
    "MillraceWorkAbovePeak": (
        {f"millrace:estimated_peak_compute_seconds_total{{{ONE}}}": "0+90x30"}, 20,
    ),
}  # fmt: skip

# Two that load: one for the first time, and one that was up and whose server was started again.
LOADING = {
    f"millrace:engine_up{{{ONE}}}": "0x30",
    f"millrace:engine_up{{{TWO}}}": "1x5 0x30",
    'process_start_time_seconds{job="m", instance="a:2"}': "300x30",
}
ALSO = {"MillraceErrorBudgetFast": ["MillraceErrorBudgetFast", "MillraceErrorBudgetSlow"]}


def healthy(minutes: int) -> dict[str, str]:
    """Two replicas under load, with nothing wrong."""
    found = {'up{job="m", instance="a:1"}': "1", 'up{job="m", instance="a:2"}': "1"}
    for labels in (ONE, TWO):
        found |= {
            f"millrace:engine_up{{{labels}}}": "1",
            f"millrace:engine_restarts_total{{{labels}}}": "0",
            f"vllm:num_requests_running{{{labels}}}": "20",
            f"vllm:num_requests_waiting{{{labels}}}": "0",
            f"vllm:kv_cache_usage_perc{{{labels}}}": "0.6",
            f"vllm:iteration_tokens_total_count{{{labels}}}": "0+600",
            f"vllm:num_preemptions_total{{{labels}}}": "0",
            f"vllm:corrupted_requests_total{{{labels}}}": "0",
            f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}}": "0+48",
            f"vllm:spec_decode_num_draft_tokens_total{{{labels}}}": "0+60",
            f'vllm:request_success_total{{{labels}, finished_reason="stop"}}': "0+100",
            f'vllm:request_success_total{{{labels}, finished_reason="error"}}': "0",
            f'millrace:gpu_power_watts{{{labels}, gpu="0"}}': "680",
            f'millrace:gpu_power_limit_watts{{{labels}, gpu="0"}}': "700",
            f"millrace:estimated_peak_compute_seconds_total{{{labels}}}": "0+15",
            f"millrace:estimated_peak_memory_seconds_total{{{labels}}}": "0+30",
            f'millrace:gpu_energy_joules_total{{{labels}, gpu="0"}}': "0+30000",
            f"millrace:generation_tokens_total{{{labels}}}": "0+60000",
            f'millrace:requests_finished_total{{{labels}, finished_reason="stop"}}': "0+100",
        }
    return {series: f"{values}x{minutes}" for series, values in found.items()}


def case(name: str, faults: dict[str, str], at: int) -> dict[str, Any]:
    """A test of promtool's: after so many minutes this alert fires and no other."""
    series = {**healthy(at + 5), **faults}
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": value} for key, value in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": f"{at}m",
                "exp_samples": [
                    {"labels": f'{{alertname="{one}"}}', "value": 1}
                    for one in ALSO.get(name, [name])
                ] if name else [],
            }
        ],
    }  # fmt: skip


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=120)


def test_promtool_reads_the_rules() -> None:
    done = promtool("check", "rules", *map(str, FILES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_planted_fault_and_says_what_it_means() -> None:
    (group,) = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    assert {rule["alert"] for rule in group["rules"]} == set(FAULTS)
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_faults_fire_their_alerts_and_a_healthy_fleet_none(tmp_path: Path) -> None:
    cases = [case(name, faults, at) for name, (faults, at) in FAULTS.items()]
    cases.append(case("", {}, 30))
    cases.append(case("", LOADING, 14))
    document = {"rule_files": list(map(str, FILES)), "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document))
    done = promtool("test", "rules", str(tmp_path / "test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_recorded_figures_are_those_of_the_planted_load(tmp_path: Path) -> None:
    labels = '{job="m", instance="a:1", model_name="q"}'
    wanted = {
        "replica:millrace_mfu:ratio_rate5m": 0.25,
        "replica:millrace_mbu:ratio_rate5m": 0.5,
        "replica:millrace_joules_per_output_token:rate5m": 0.5,
        "replica:millrace_joules_per_request:rate5m": 300,
        "replica:vllm_spec_decode_acceptance:ratio_rate5m": 0.8,
        "replica:vllm_output_tokens:rate5m": None,  # no series of vLLM's name is planted
    }
    checks = [
        {
            "expr": f'{name}{{instance="a:1"}}',
            "eval_time": "20m",
            "exp_samples": [] if value is None else [{"labels": f"{name}{labels}", "value": value}],
        }
        for name, value in wanted.items()
    ]
    one = {**case("", {}, 30), "promql_expr_test": checks}
    document = {"rule_files": list(map(str, FILES)), "evaluation_interval": "1m", "tests": [one]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document))
    done = promtool("test", "rules", str(tmp_path / "test.yml"))
    assert done.returncode == 0, done.stdout + done.stderr
