"""Other servers: how they are started, in which order, and what their ratios say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from millrace import cli
from millrace.errors import ConfigError
from millrace.report.sections.versus import (
    peer_serving,
    read_peers,
    versus_steps,
)
from millrace.report.steps.document import StepRecord
from millrace.report.steps.profiles import PROFILES
from millrace.report.steps.step import ModelFacts, Serving
from millrace.report.summary import summary_of

SMOKE = PROFILES["smoke"]
FACTS = ModelFacts(
    name="m", directory=Path("/models/m"), longest=4096, drafts=True, text_only=False
)


def value(words: tuple[str, ...], flag: str) -> str:
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("gpus", ["0", ""])
def test_peers_run_with_their_own_recommended_flags(
    gpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    vllm, plain, replay = (
        peer_serving(name, FACTS, SMOKE, program="/opt/peer", more="--more 1").command
        for name in ("vllm", "sglang", "sglang-replay")
    )
    assert vllm[:3] == ("/opt/peer", "serve", "/models/m")
    assert "--language-model-only" in vllm
    assert value(vllm, "--max-model-len") == value(plain, "--context-length") == "4096"
    assert value(plain, "--mamba-ssm-dtype") == "bfloat16"
    assert "--enable-linear-replayssm-spec" not in plain
    assert "--enable-linear-replayssm-spec" in replay
    assert "--mamba-ssm-dtype" not in replay  # it wants float32
    assert all(words[-2:] == ("--more", "1") for words in (vllm, plain, replay))
    drafts = "--speculative-config" in vllm
    assert drafts == ("--speculative-algorithm" in plain) == bool(gpus)  # none on a CPU


def test_a_name_may_mean_several_and_an_unknown_one_is_refused() -> None:
    assert read_peers("vllm, sglang") == ["vllm", "sglang", "sglang-replay"]
    assert read_peers("sglang-replay,sglang") == ["sglang-replay", "sglang"]
    assert read_peers("") == []
    with pytest.raises(ConfigError, match="use vllm, sglang, sglang-replay"):
        read_peers("vllm,tgi")


def test_a_peer_that_is_not_installed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", "millrace-mini", "--dry-run", "--versus", "sglang", "--profile", "smoke"]
    assert cli.run(words) == 2
    assert "the package is not installed here" in capsys.readouterr().err


def test_each_round_has_every_server_once_in_an_order_that_turns() -> None:
    servings = [Serving(name=name, command=(name,)) for name in "abc"]
    steps = versus_steps(servings, SMOKE, rounds=4)
    names = [step.name.split("/") for step in steps]
    rounds = [[n for _, n, number in names if number == str(r)] for r in (1, 2, 3, 4)]
    assert rounds == [list("abc"), list("bca"), list("cab"), list("abc")]
    # No two visits share a start, so that no round profits from an earlier one.
    assert len({step.serving.name for step in steps if step.serving}) == 12


def run(speed: float, lag: float = 0.0) -> dict[str, Any]:
    return {
        "output_throughput": speed,
        "total_token_throughput": 2 * speed,
        "median_ttft_ms": 10.0,
        "median_tpot_ms": 1e3 / speed,
        "p99_itl_ms": 5.0,
        "mean_e2el_ms": 100.0,
        "client": {
            "lag_ms": {"p50": lag}, "client_bound": False,
            "error_ms": {name: {"p50": 0.0, "p99": 0.0} for name in ("ttft", "itl")},
        },
    }  # fmt: skip


def ratio(ours: list[float], theirs: list[float], lag: float = 0.0) -> dict[str, Any]:
    """Our output throughput over the peer's, of rounds with these speeds."""
    records = [
        StepRecord(
            name=f"versus/{name}/{number}", section="versus", status="done",
            result={"headline": run(speed, lag)},
        )
        for name, speeds in (("millrace", ours), ("vllm", theirs))
        for number, speed in enumerate(speeds, 1)
    ]  # fmt: skip
    found = summary_of(records)["versus"]["ratios"]["vllm"]["headline"]["output_throughput"]
    assert isinstance(found, dict)
    return found


def test_ratios_are_paired_by_rounds() -> None:
    """A machine that gets slower by half changes no ratio, and widens no interval."""
    found = ratio([300.0, 200.0, 150.0], [200.0, 133.4, 100.0])
    assert found["ratio"] == pytest.approx(1.5, rel=1e-3)
    assert 1.49 < found["low"] < found["ratio"] < found["high"] < 1.51
    assert found["rounds"] == 3
    noisy = ratio([300.0, 200.0, 150.0], [200.0, 200.0, 200.0])
    assert noisy["low"] < 1 < noisy["high"]  # shows nothing


def test_the_interval_is_wider_by_the_clients_own_error() -> None:
    still, late = (ratio([300.0, 310.0], [200.0, 200.0], lag) for lag in (0.0, 5.0))
    assert late["ratio"] == still["ratio"]
    assert late["low"] < still["low"]
    assert late["high"] > still["high"]


def test_a_round_that_one_server_lacks_counts_for_none() -> None:
    found = ratio([300.0, 999.0], [200.0])
    assert (found["ratio"], found["low"], found["rounds"]) == (pytest.approx(1.5), None, 1)
