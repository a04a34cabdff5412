"""From a command line to a run and its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from millrace.bench.flags.command_line import read_flags
from millrace.errors import UserError
from millrace.simulate.aggregated.fleet import AggregatedFleet
from millrace.simulate.common.options import Scenario
from millrace.simulate.common.outcome import Outcome
from millrace.simulate.events.fleet import Fleet
from millrace.simulate.flags import SimulateFlags
from millrace.simulate.report import Result, fields, page, result_of, rows, warnings
from millrace.simulate.scenario import objectives_of, scenario_of

EVENT_REPLICAS = 16  # up to so many, `auto` simulates every event


def run_flags(values: Mapping[str, Any]) -> None:
    """Run a command line and print or write what it asks for."""
    flags = read_flags(SimulateFlags, {**values, "gpus": _gpus(values)})
    for path in (flags.json, flags.html):
        _check_writable(path)
    objectives_of(flags)  # before a long run
    scenario = scenario_of(flags)
    result = report_on(scenario, flags, run(scenario, flags))
    _show(result)
    if flags.json is not None:
        _write(flags.json, msgspec.json.format(msgspec.json.encode(fields(result)), indent=1))
    if flags.html is not None:
        _write(flags.html, page(result).encode())


def run(scenario: Scenario, flags: SimulateFlags) -> Outcome:
    """Simulate in the mode that the flags ask for."""
    if flags.prefill_replicas:
        if flags.mode == "aggregated":
            raise UserError("--mode aggregated: use event with --prefill-replicas")
        return Fleet(scenario).run()
    most = max(flags.replicas, scenario.life.scale.most if scenario.life.scale else 0)
    if flags.mode == "aggregated" or (flags.mode == "auto" and most > EVENT_REPLICAS):
        return AggregatedFleet(scenario).run()
    return Fleet(scenario).run()


def report_on(scenario: Scenario, flags: SimulateFlags, outcome: Outcome) -> Result:
    """The figures of a run."""
    load = scenario.load
    return result_of(
        outcome,
        _facts(flags),
        begin=flags.warmup,
        end=load.duration,
        open_loop=load.schedule.open_loop,
        objectives=objectives_of(flags),
        price=flags.price,
    )


def _facts(flags: SimulateFlags) -> dict[str, str]:
    kind = (
        flags.step_model
        or " ".join(flags.plan_log)
        or (f"{flags.model} {flags.weights} on {flags.tensor_parallel_size} x {flags.gpu}")
    )
    drafts = f", {flags.drafts} drafts" if flags.drafts else ""
    noun = "replica" if flags.replicas == 1 else "replicas"
    return {
        "model": kind + drafts,
        "fleet": f"{flags.replicas} {noun}{_pools(flags)}, policy {flags.policy}",
        "seed": str(flags.seed),
    }


def _pools(flags: SimulateFlags) -> str:
    prefill = flags.prefill_replicas
    if not prefill:
        return ""
    answer = flags.replicas - prefill
    return f" ({prefill} for prompts, {answer} for answers, {flags.link:g} GB/s)"


def _gpus(values: Mapping[str, Any]) -> int:
    """For presets, whose concurrency is for each GPU: as a whole replica is one of theirs."""
    return int(values.get("replicas") or 1)


def _show(result: Result) -> None:
    console = Console()
    table = Table(title="Simulated fleet", show_header=False)
    for name, text in rows(result):
        table.add_row(name, text)
    console.print(table)
    for text in warnings(result):
        console.print(f"warning: {text}", style="yellow")


def _check_writable(path: str | None) -> None:
    """Before a long run: the directory of a result is there."""
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise UserError(f"{path}: there is no such directory")


def _write(path: str, data: bytes) -> None:
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
