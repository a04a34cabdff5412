"""Plans as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from millrace.plan.calibration.holdout import Held
from millrace.plan.predict.capacity import NodeRow
from millrace.plan.predict.choice import Candidate, Choice, label
from millrace.plan.predict.cost import Against, Cost
from millrace.plan.predict.flags import gateway_command, serve_command
from millrace.plan.predict.prediction import Bar, Prediction

GIB = 1 << 30
# name of a metric -> (title, unit, factor)
ROWS = {
    "total_tokens": ("throughput", "tok/s", 1.0), "output_tokens": ("output", "tok/s", 1.0),
    "requests": ("requests", "/s", 1.0), "ttft": ("TTFT", "ms", 1e3), "tpot": ("TPOT", "ms", 1e3),
    "itl_p50": ("ITL p50", "ms", 1e3), "itl_p99": ("ITL p99", "ms", 1e3),
    "joules": ("energy", "J a token", 1.0),
}  # fmt: skip
SHOWN = 8
WIDE = 112


def console() -> Console:
    """Wide enough for the tables; a terminal that is narrower wraps them."""
    found = Console()
    return found if found.width >= WIDE else Console(width=WIDE)


def short(value: float) -> str:
    """Three digits, or whole thousands with commas."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def span(bar: Bar, factor: float = 1.0) -> tuple[str, str]:
    found = bar.times(factor)
    return short(found.value), f"{short(found.low)} to {short(found.high)}"


def prediction_table(found: Prediction) -> Table:
    table = Table(title=label(found.deployment), title_justify="left")
    table.add_column("")
    for name in ("predicted", "80% bar"):
        table.add_column(name, justify="right")
    table.add_column("unit")
    for name, bar in found.bars.items():
        title, unit, factor = ROWS[name]
        table.add_row(title, *span(bar, factor), unit)
    memory = found.memory
    table.add_row("sequences that fit", str(memory.sequences), "", "a replica")
    table.add_row("weights", f"{memory.weights / GIB:.1f}", "", "GiB a GPU")
    table.add_row("caches", f"{memory.caches / GIB:.1f}", "", "GiB a GPU")
    return table


def print_prediction(console: Console, found: Prediction) -> None:
    console.print(prediction_table(found))
    if found.overload:
        console.print(found.overload)
    console.print(f"rests on: {found.rests_on}; what takes most of a step: {found.steady.limit}")
    if found.shares:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in found.shares.items() if share)
        console.print(f"the bar of the throughput comes from: {shares}")
    for warning in found.memory.warnings:
        console.print(f"warning: {warning}")


def print_choice(console: Console, found: Choice) -> None:
    print_prediction(console, found.best.prediction)
    if found.best.dollars:
        console.print(f"${found.best.dollars:.3f} for a million tokens, if the fleet is full")
    deployment = found.best.prediction.deployment
    console.print("\nstart each replica with:", style="bold")
    console.print(serve_command(deployment), soft_wrap=True)
    if gateway := gateway_command(deployment):
        console.print("and in front of them:", style="bold")
        console.print(gateway, soft_wrap=True)
    console.print(_candidates("no other has more tokens a GPU and a shorter TPOT", found.pareto))
    console.print(_candidates("why others lost", found.others[:SHOWN], why=True))
    for name, why in list(found.refused.items())[:SHOWN]:
        console.print(f"refused: {name}: {why}")


def _candidates(title: str, rows: Sequence[Candidate], *, why: bool = False) -> Table:
    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), box=SIMPLE_HEAD)
    for name in ("replicas", "GPU", "weights", "state"):
        table.add_column(name)
    for name in ("drafts", "seqs", "tok/s", "a GPU", "TPOT", "TTFT ms", "$/M"):
        table.add_column(name, justify="right")
    if why:
        table.add_column("why")
    for one in rows:
        p = one.prediction
        d, replicas = p.deployment.description, p.deployment.replicas
        cells = [
            f"{replicas} x TP{d.tensor}", d.gpu, d.weights, d.state, str(d.drafts),
            str(p.deployment.settings.max_num_seqs), short(one.tokens),
            short(one.tokens / p.deployment.gpus), short(one.tpot * 1e3),
            short(p.steady.ttft * 1e3), f"{one.dollars:.3f}" if one.dollars else "",
        ]  # fmt: skip
        table.add_row(*cells, *([one.why] if why else []))
    return table


def print_cost(console: Console, found: Cost, rows: Iterable[Against]) -> None:
    console.print(
        f"${found.hour:.2f} an hour, full {found.utilisation:.0%} of the time: "
        f"${found.million.value:.3f} for a million tokens ({found.million.low:.3f} to "
        f"{found.million.high:.3f}), input {found.input.value:.3f}, output {found.output.value:.3f}"
    )
    table = Table(title="against hosted models", title_justify="left")
    table.add_column("model")
    for name in ("$ a million", "cheaper above", "80% bar"):
        table.add_column(name, justify="right")
    table.add_column("of")
    for row in rows:
        even = f"{row.break_even:.0%}" if row.break_even <= 1 else "never"
        span_text = f"{row.low:.0%} to {row.high:.0%}"
        table.add_row(row.name, f"{row.dollars:.3f}", even, span_text, f"{row.date}, {row.source}")
    console.print(table)


def print_parts(console: Console, title: str, parts: dict[str, float]) -> None:
    """Seconds by name, largest first."""
    table = Table(title=title, title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    total = sum(parts.values())
    for name, seconds in sorted(parts.items(), key=lambda pair: -pair[1]):
        if seconds > 0:
            table.add_row(name, f"{seconds * 1e3:.3g}", f"{seconds / total:.0%}")
    table.add_row("all", f"{total * 1e3:.4g}", "")
    console.print(table)


def print_nodes(console: Console, rows: Sequence[NodeRow], measured: dict[int, float]) -> None:
    table = Table(title="what nodes serve", title_justify="left")
    names = ["nodes", "GPUs", "users", "requests/s", "tok/s", "80% bar"]
    for name in [*names, *(["measured tok/s"] if measured else [])]:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [str(row.nodes), str(row.gpus), short(row.users), short(row.requests.value)]
        cells += span(row.tokens)
        if measured:
            cells.append(short(measured.get(row.nodes, 0.0)))
        table.add_row(*cells)
    console.print(table)


def print_accuracy(console: Console, rows: Sequence[Held]) -> None:
    table = Table(title="every measured row, predicted", title_justify="left")
    table.add_column("row")
    for name in ("metric", "measured", "predicted", "error", "80% bar", "AISimulate 0.13"):
        table.add_column(name, justify="right")
    for one in rows:
        peer = one.row.aisimulate
        table.add_row(
            one.row.id, one.row.metric, short(one.row.value), short(one.predicted),
            f"{one.error:+.0%}", f"{short(one.low)} to {short(one.high)}",
            f"{peer / one.row.value - 1:+.0%}" if peer else "",
        )  # fmt: skip
    console.print(table)
