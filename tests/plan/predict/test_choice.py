"""The best settings, why others lost, and command lines that the engine takes."""

from __future__ import annotations

import shlex
from itertools import pairwise

import pytest

from millrace.config import EngineArgs
from millrace.errors import ConfigError
from millrace.plan.predict.choice import Slo, Space, choose
from millrace.plan.predict.flags import gateway_command, serve_command
from millrace.plan.predict.load import Load
from millrace.plan.predict.prediction import Planner

PLANNER = Planner()
LOAD = Load(input=768, output=384, concurrency=2000, text="policies")
SPACE = Space(gpus=["h200"], count=8, drafts=(0, 1), sequences=(64, 256), states=("fp32",))


def test_replicas_beat_ranks_for_throughput_and_lose_for_latency() -> None:
    """As the write-up found: DP = 8 for tokens a second, ranks for a short TPOT."""
    many = choose(PLANNER, "qwen3.5-27b", LOAD, SPACE)
    assert many.best.prediction.deployment.description.tensor == 1
    assert many.best.prediction.deployment.replicas == 8
    assert many.best.prediction.deployment.description.drafts == 1
    few = Load(input=768, output=384, concurrency=4, text="policies")
    quick = choose(PLANNER, "qwen3.5-27b", few, SPACE, objective="latency")
    assert quick.best.prediction.deployment.description.tensor > 1
    assert quick.best.tpot <= min(one.tpot for one in quick.others)


def test_the_front_has_no_row_that_another_beats() -> None:
    found = choose(PLANNER, "qwen3.5-27b", LOAD, SPACE)
    points = [(one.tokens / one.prediction.deployment.gpus, one.tpot) for one in found.pareto]
    assert points == sorted(points, key=lambda point: (-point[0], point[1]))
    assert all(b[1] < a[1] for a, b in pairwise(points))
    assert all(one.why for one in found.others)


def test_limits_are_met_and_losers_say_which_they_break() -> None:
    found = choose(PLANNER, "qwen3.5-27b", LOAD, SPACE, Slo(tpot=30))
    assert found.best.tpot <= 30e-3
    assert any("TPOT" in one.why and "is more than 30" in one.why for one in found.others)


def test_cost_prefers_the_cheaper_gpu() -> None:
    space = Space(gpus=["h200", "h100"], count=8, drafts=(1,), sequences=(128,), states=("fp32",))
    prices = {"h200": 10.0, "h100": 1.0}
    found = choose(PLANNER, "qwen3.5-27b", LOAD, space, objective="cost", price=prices.__getitem__)
    assert found.best.prediction.deployment.description.gpu == "h100"
    assert found.best.dollars > 0


@pytest.mark.parametrize(
    ("model", "load", "slo", "message"),
    [
        ("qwen3.5-27b", LOAD, Slo(tpot=0.1), r"no settings meet these limits: .* the shortest TPOT "
         r"is \d.* more GPUs or fewer streams"),
        ("qwen3.5-397b-a17b", LOAD, Slo(), "do not fit into"),
        ("qwen3.5-27b", Load(input=1, output=1), Slo(), "give a concurrency or a rate"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(
    model: str, load: Load, slo: Slo, message: str
) -> None:
    space = Space(gpus=["h200"], count=1, drafts=(1,), sequences=(64,), states=("fp32",))
    with pytest.raises(ConfigError, match=message) as error:
        choose(PLANNER, model, load, space, slo)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("engine", ["millrace", "vllm"])
def test_command_lines_name_options_of_the_engine(engine: str) -> None:
    space = Space(gpus=["h200"], count=2, ranks=(2,), drafts=(1,), sequences=(64,), engine=engine)
    found = choose(PLANNER, "qwen3.5-35b-a3b", LOAD, space).best.prediction.deployment
    program, command, model, *flags = shlex.split(serve_command(found))
    assert (program, command, model) == (engine, "serve", "qwen3.5-35b-a3b")
    names = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    assert names - {"data_parallel_size"} <= set(EngineArgs.__struct_fields__)
    assert "tensor_parallel_size" in names


def test_several_replicas_get_a_gateway() -> None:
    found = choose(PLANNER, "qwen3.5-27b", LOAD, SPACE).best.prediction.deployment
    command = shlex.split(gateway_command(found))
    assert command[:3] == ["millrace", "gateway", "--worker-urls"]
    assert command[3].count("http://") == 8
