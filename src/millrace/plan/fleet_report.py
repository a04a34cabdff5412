"""The write-up's fleet: its table, its costs, a batch and a day, beside what was measured."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from millrace.errors import ConfigError
from millrace.hardware.gpus import gpus
from millrace.plan.facts.prices import gpu_prices, price_of
from millrace.plan.predict.capacity import BatchRun, Day, NodeRow, batch, day, node_table
from millrace.plan.predict.cost import Against, Cost, against, cost, million
from millrace.plan.predict.prediction import Planner
from millrace.plan.presets import NODE_HOUR, NODES, WRITE_UP, write_up_load, write_up_node


class Fleet(msgspec.Struct, frozen=True):
    """measured: nodes -> tok/s, where the settings are those that were measured. paid: kind of
    price -> dollars for a million tokens at the measured rate of twelve nodes."""

    nodes: list[NodeRow]
    measured: dict[int, float]
    paid: dict[str, float]
    cost: Cost
    against: list[Against]
    batch: BatchRun
    day: Day
    dollars: float
    price_source: str


def fleet(
    engine: str, gpu: str, policies: float, peak: float, kind: str | None, given: float | None
) -> Fleet:
    """Everything of the preset. Raises ConfigError if no price is known."""
    planner, load, node = Planner(), write_up_load(), write_up_node(engine, gpu)
    price = price_of(gpu, kind or ("reserved" if gpu == "b200" and not given else None), given)
    if policies < 1 or peak <= 0:
        raise ConfigError("--batch needs 1 policy or more, --peak more than 0 requests a second")
    one = planner.predict(node, load)
    costs = cost(one, price.dollars)
    as_measured = engine == "vllm" and gpu == "b200"
    replica = msgspec.structs.replace(load, concurrency=load.concurrency / node.replicas)
    return Fleet(
        nodes=node_table(planner, node, load, NODES),
        measured=WRITE_UP if as_measured else {},
        paid={name: million(12 * hour, WRITE_UP[12]) for name, hour in NODE_HOUR.items()},
        cost=costs,
        against=against(costs, load.input / (load.input + load.output)),
        batch=batch(planner, node, load, policies, price.dollars),
        day=day(planner, replace(node, replicas=1), replica, peak),
        dollars=price.dollars,
        price_source=f"{price.provider}, {price.kind}, {price.date}: {price.source}",
    )


def print_fleet(found: Fleet) -> None:
    """As tables."""
    from millrace.plan.text_report import console as wide
    from millrace.plan.text_report import print_cost, print_nodes

    console = wide()
    print_nodes(console, found.nodes, found.measured)
    for kind, dollars in found.paid.items():
        console.print(
            f"twelve nodes as measured, {kind}: ${dollars:.3f} for a million tokens"
            + (" (the write-up rounds it to $0.30)" if kind == "reserved" else "")
        )
    console.print(f"price: ${found.dollars:.2f} a GPU-hour ({found.price_source})")
    print_cost(console, found.cost, found.against)
    run = found.batch
    console.print(
        f"a batch of {run.requests:,.0f} on {run.gpus} GPUs: {run.hours.value:.2f} h "
        f"({run.hours.low:.2f} to {run.hours.high:.2f}), ${run.dollars.value:.2f}"
    )
    d = found.day
    console.print(
        f"a day: {d.peak_replicas} replicas at the peak, {d.fixed:.0f} GPU-hours if they stay, "
        f"{d.scaled:.0f} if they follow the load ({d.starts} starts, {d.to_zero} hours at zero, "
        f"after which the first request waits {d.waits:.0f} s)"
    )


def print_gpus() -> None:
    """The table of GPUs."""
    from rich.table import Table

    from millrace.plan.text_report import console as wide

    table = Table(title="dense rates; sheets that count sparsity print twice as much",
                  title_justify="left")  # fmt: skip
    table.add_column("name")
    for name in ("GB", "GB/s", "bf16 TF/s", "fp8", "fp4", "W", "link GB/s", "$ from"):
        table.add_column(name, justify="right")
    for gpu in gpus().values():
        prices = gpu_prices(gpu.name)
        rates = (f"{rate:g}" if rate else "-" for rate in (gpu.bf16, gpu.fp8, gpu.fp4))
        cheapest = f"{prices[0].dollars:.2f}" if prices else "-"
        table.add_row(
            gpu.name, f"{gpu.memory / 1e9:.0f}", f"{gpu.bandwidth:g}", *rates, f"{gpu.watts:g}",
            f"{gpu.link_gb_s:g}", cheapest,
        )  # fmt: skip
    wide().print(table)
