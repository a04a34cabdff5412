"""The simulator against two real CPU replicas behind the real gateway.

Step times are fitted to the run's plan logs. With the steps of a load itself, the simulation must
bring what the load generator measured. With those of another load it predicts workloads of other
lengths, concurrency and arrivals, as far as the machine itself keeps its speed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace.bench.flags.structs import LoadFlags
from millrace.bench.runs.options_from_flags import load_options
from millrace.fleet.supervisor import FleetOptions, Supervisor
from millrace.gateway.processes.options import GatewayOptions as RealGatewayOptions
from millrace.simulate.common.fitted_steps import FittedSteps, fit_plan_logs
from millrace.simulate.common.lifecycle import LifeOptions
from millrace.simulate.common.options import ApiServerCost, GatewayOptions, ReplicaKind, Scenario
from millrace.simulate.common.outcome import Figures, figures
from millrace.simulate.events.fleet import Fleet
from millrace.target import Target
from tests.simulate.scenarios import LIMITS
from tests.support.running import run

MODEL = Path(__file__).parents[2] / "models" / "millrace-mini"
REPLICAS, SEQUENCES, LONGEST = 2, 16, 1024
# Each replica has a plan log of its own.
WRAPPER = (
    "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'millrace.cli', "
    "*sys.argv[2:], '--plan-log', f'{sys.argv[1]}/{os.getpid()}.log'])"
)
LIMITS_OF_A_CPU = msgspec.structs.replace(
    LIMITS,
    max_num_seqs=SEQUENCES,
    max_num_batched_tokens=2048,
    mixed_prefill_tokens=2048,
    long_prefill_token_threshold=1024,
    max_model_len=LONGEST,
    num_pages=SEQUENCES * LONGEST // 16 + 1,
    num_snapshots=4 * SEQUENCES,
    snapshot_distance=64,
    eos_ids=frozenset(),
)


def flags(**given: Any) -> LoadFlags:
    return LoadFlags(**{"random_range_ratio": 0.5, "ignore_eos": True, "seed": 1, **given})


FITTED = flags(num_prompts=60, random_input_len=100, random_output_len=48, max_concurrency=10)
PREDICTED = flags(num_prompts=60, random_input_len=220, random_output_len=30, max_concurrency=20)


def trace(path: Path, gap: float) -> LoadFlags:
    """A trace in Azure's form, with bursts."""
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for number in range(60):
        at = gap * (number // 3 * 3) + 0.01 * (number % 3)
        rows.append(f"2026-01-01 00:00:{at:09.6f},{60 + 37 * number % 300},{10 + 7 * number % 50}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return flags(dataset_name="trace", dataset_path=str(path))


def command_line(load: LoadFlags) -> list[str]:
    """The same flags for `millrace bench serve`."""
    defaults, words = LoadFlags(), list[str]()
    for name in LoadFlags.__struct_fields__:
        value = getattr(load, name)
        if value != getattr(defaults, name):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return words


async def measured(port: int, load: LoadFlags, folder: Path) -> dict[str, Any]:
    """What `millrace bench serve` measures."""
    result = folder / f"{time.monotonic_ns()}.json"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "millrace.cli", "bench", "serve", "--disable-tqdm"),
        *("--base-url", f"http://127.0.0.1:{port}", "--model", "mini"),
        *("--result-filename", str(result), *command_line(load)),
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await asyncio.wait_for(process.wait(), 240) == 0
    found: dict[str, Any] = json.loads(result.read_text())
    return found


async def real(folder: Path, loads: list[LoadFlags]) -> tuple[list[dict[str, Any]], list[float]]:
    """Figures of each load, and the moments between them on the clock of the plan logs."""
    serve = ["serve", str(MODEL), "--device", "cpu", "--max-model-len", str(LONGEST)]
    serve += ["--max-num-seqs", str(SEQUENCES), "--served-model-name", "mini"]
    options = FleetOptions(
        command=[sys.executable, "-c", WRAPPER, str(folder), *serve],
        count=REPLICAS,
        port=0,
        device="cpu",
        gateway=RealGatewayOptions(policy="least_loaded"),
    )
    fleet = Supervisor(options, lambda line: None)
    await fleet.start()
    try:
        port = fleet.gateway.port
        await measured(port, flags(num_prompts=16, max_concurrency=8, random_input_len=64), folder)
        figures_of, moments = [], [time.monotonic()]
        for load in loads:
            figures_of.append(await measured(port, load, folder))
            moments.append(time.monotonic())
        return figures_of, moments
    finally:
        await fleet.stop()


def simulated(load: LoadFlags, steps: FittedSteps) -> Figures:
    options = load_options(load, Target("simulated", 80))
    outcome = Fleet(
        Scenario(
            load=msgspec.structs.replace(options, vocab_size=1000),
            kind=ReplicaKind(
                limits=LIMITS_OF_A_CPU,
                model=steps,
                api_server=ApiServerCost(steps.server.request_seconds, steps.server.chunk_seconds),
                depth=0,
            ),
            gateway=GatewayOptions(policy="least_loaded", chunk_seconds=3.5e-5),
            life=LifeOptions(replicas=REPLICAS),
        )
    ).run()
    assert not any(outcome.records.errors)
    return figures(outcome.records, 0.0, outcome.seconds)


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_what_was_simulated_is_what_is_measured(tmp_path: Path) -> None:
    loads = [FITTED, PREDICTED, trace(tmp_path / "trace.csv", 0.25), FITTED]
    found, moments = run(real(tmp_path, loads), timeout=800)
    logs = sorted(tmp_path.glob("*.log"))
    assert len(logs) == REPLICAS
    fits = [fit_plan_logs(logs, *pair) for pair in pairwise(moments)]
    # The fitted load is measured before and behind the others: so much did the machine change.
    first, last = (one["total_token_throughput"] for one in (found[0], found[3]))
    drift = abs(last / first - 1)
    for name, load, one, own in zip(
        ("first", "other", "trace", "last"), loads, found, fits, strict=True
    ):
        seen = simulated(load, own)
        show(f"{name} load, steps of its own", seen, one)
        assert one["completed"] == seen.completed
        assert one["total_output_tokens"] == seen.output_tokens
        assert one["total_input_tokens"] == seen.prompt_tokens
        assert seen.total_rate == pytest.approx(one["total_token_throughput"], rel=0.10)
        assert 1e3 * seen.tpot.mean == pytest.approx(one["mean_tpot_ms"], rel=0.10)
        assert 1e3 * seen.ttft.mean == pytest.approx(one["mean_ttft_ms"], rel=0.25)
    for name, load, one in zip(("other", "trace"), loads[1:3], found[1:3], strict=True):
        rates = []
        for fit in (fits[0], fits[3]):
            rates.append(simulated(load, fit).total_rate)
            show(f"{name} load, steps of another one", simulated(load, fit), one)
        low, high = min(rates) * (0.9 - drift), max(rates) * (1.1 + drift)
        assert low <= one["total_token_throughput"] <= high


def show(name: str, seen: Figures, one: dict[str, Any]) -> None:
    """Beside each other, for who runs it with -s."""
    print(
        f"{name}: tokens/s {seen.total_rate:.0f} simulated, {one['total_token_throughput']:.0f} "
        f"measured; TPOT {1e3 * seen.tpot.mean:.1f}, {one['mean_tpot_ms']:.1f} ms; "
        f"TTFT {1e3 * seen.ttft.mean:.0f}, {one['mean_ttft_ms']:.0f} ms"
    )
