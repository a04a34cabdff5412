"""Sections for the files of `bench scaling`, `parallelism` and `gateway`: servers that the command
started, a row of the table for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from millrace.bench.report.chart import Series, chart, frontier
from millrace.bench.report.page import NamedTable, Section, Table, figure_text, one_chart
from millrace.bench.report.results import ResultFile, hit_text

Row = dict[str, Any]


def host_section(result: ResultFile) -> Section:
    """The section of one file, by the kind of its rows."""
    table: list[Row] = result.fields["table"]
    if any("direct" in row for row in table):
        return _gateway(table)
    if any("tensor_parallel_size" in row for row in table):
        return _arrangements(table, result.fields["rows"])
    return _scaling(table)


def best_of(result: ResultFile) -> tuple[float, str] | None:
    """The highest total throughput of a file, tokens a second, and the row's name; of a gateway's
    file, through the gateway. None: it has no rows."""
    table: list[Row] = result.fields["table"]
    if not table:
        return None
    if any("direct" in row for row in table):
        row = max(table, key=lambda row: float(row["gateway"]))
        return float(row["gateway"]), f"{_replicas(row)} behind the gateway, {row['lost']:.1%} lost"
    row = max(table, key=lambda row: float(row["total_token_throughput"]))
    if "tensor_parallel_size" in row:
        name = f"TP {row['tensor_parallel_size']}, DP {row['replicas']}"
    else:
        name = f"{_replicas(row)}, {row['efficiency']:.1%} of linear"
    return float(row["total_token_throughput"]), name


def accuracy_of(result: ResultFile) -> float | None:
    """The lowest accuracy of its rows."""
    known = [row["accuracy"] for row in result.fields["table"] if row.get("accuracy") is not None]
    return min(known, default=None)


def _replicas(row: Row) -> str:
    return f"{row['replicas']} replica{'' if row['replicas'] == 1 else 's'}"


def _latencies(row: Row, names: Sequence[str]) -> list[str]:
    """Median, and below it the mean and the 99th percentile."""
    return [
        f"{row[f'median_{name}_ms']:,.1f}\n"
        f"mean {row[f'mean_{name}_ms']:,.1f}, p99 {row[f'p99_{name}_ms']:,.1f}"
        for name in names
    ]


def _accuracy(row: Row) -> str:
    accuracy = row.get("accuracy")
    return "n/a" if accuracy is None else f"{accuracy:.1%}"


# --- replicas ----------------------------------------------------------------------------------

_SCALING_HEADINGS = (
    *("replicas", "total tok/s", "per replica", "efficiency"),
    *("TTFT ms", "TPOT ms", "ITL ms", "prefix hits", "accuracy"),
)


def _scaling(table: Sequence[Row]) -> Section:
    measured = [(float(r["replicas"]), float(r["total_token_throughput"])) for r in table]
    first = measured[0][1] / measured[0][0] if measured else 0.0
    series = [
        Series("measured", measured),
        Series("linear", [(replicas, first * replicas) for replicas, _ in measured]),
    ]
    return Section(
        title="Scaling over replicas",
        table=[_SCALING_HEADINGS, *(_scaling_cells(row) for row in table)],
        charts=one_chart("Total tok/s", chart(series, x="replicas", y="total tok/s")),
    )


def _scaling_cells(row: Row) -> tuple[str, ...]:
    return (
        str(row["replicas"]),
        f"{row['total_token_throughput']:,.0f}",
        f"{row['per_replica']:,.0f}",
        f"{row['efficiency']:.1%}",
        *_latencies(row, ("ttft", "tpot", "itl")),
        hit_text(row.get("prefix_cache_hit_rate")),
        _accuracy(row),
    )


# --- TP x DP -----------------------------------------------------------------------------------

_ARRANGEMENT_HEADINGS = (
    *("TP x DP", "devices", "total tok/s", "a device", "tok/s a user"),
    *("TTFT ms", "TPOT ms", "prefix hits", "accuracy"),
)


def _arrangements(table: Sequence[Row], rows: Sequence[Row]) -> Section:
    """Ranks down, replicas across: a grid for throughput and one for what a user sees."""
    points = [(row["tokens_per_user"], row["per_device"]) for row in table]
    series = [
        Series("frontier", frontier(points)),
        Series("arrangements", points, dots=True, labels=[_name(row) for row in table]),
    ]
    picture = chart(series, x="tok/s a user (1 / TPOT)", y="tok/s a device")
    problems = [f"{r['ranks']}x{r['replicas']} n/a: {r['problem']}" for r in rows if r["problem"]]
    return Section(
        title="TP x DP",
        introduction=["TP is the number of ranks that share a model, DP the number of replicas."],
        tables=[
            NamedTable("Total tok/s", _grid(table, lambda row: row["total_token_throughput"])),
            NamedTable("Tok/s a user", _grid(table, lambda row: row["tokens_per_user"])),
            NamedTable("All figures", [_ARRANGEMENT_HEADINGS, *map(_arrangement_cells, table)]),
        ],
        charts=one_chart("Tok/s a device against tok/s a user", picture),
        notes=problems,
    )


def _name(row: Row) -> str:
    return f"{row['tensor_parallel_size']}x{row['replicas']}"


def _grid(table: Sequence[Row], value: Callable[[Row], float]) -> Table:
    """One figure of every arrangement; empty where it was not measured, the best one marked."""
    cells = {(row["tensor_parallel_size"], row["replicas"]): value(row) for row in table}
    across = sorted({replicas for _, replicas in cells})
    best = max(cells.values(), default=0.0)

    def text(at: tuple[int, int]) -> str:
        if at not in cells:
            return ""
        return figure_text(cells[at]) + ("\nbest" if cells[at] == best else "")

    lines = [
        [f"TP {ranks}", *(text((ranks, replicas)) for replicas in across)]
        for ranks in sorted({ranks for ranks, _ in cells})
    ]
    return [["", *(f"DP {replicas}" for replicas in across)], *lines]


def _arrangement_cells(row: Row) -> tuple[str, ...]:
    return (
        _name(row),
        str(row["devices"]),
        f"{row['total_token_throughput']:,.0f}",
        f"{row['per_device']:,.0f}",
        figure_text(row["tokens_per_user"]),
        *_latencies(row, ("ttft", "tpot")),
        hit_text(row.get("prefix_cache_hit_rate")),
        _accuracy(row),
    )


# --- a gateway ---------------------------------------------------------------------------------

_GATEWAY_LATENCIES = {
    "median_ttft_ms": "TTFT p50 ms",
    "median_tpot_ms": "TPOT p50 ms",
    "p99_itl_ms": "ITL p99 ms",
}


def _gateway(table: Sequence[Row]) -> Section:
    headings = ("replicas", "users", "direct tok/s", "gateway tok/s", "lost")
    series = [
        Series(name, [(float(row["replicas"]), float(row[name])) for row in table])
        for name in ("direct", "gateway")
    ]
    rows = [(*headings, *_GATEWAY_LATENCIES.values(), "failed", "accuracy")]
    return Section(
        title="What the gateway costs",
        introduction=["Latencies are direct / through the gateway."],
        table=[*rows, *(_gateway_cells(row) for row in table)],
        charts=one_chart("Total tok/s", chart(series, x="replicas", y="total tok/s")),
    )


def _gateway_cells(row: Row) -> tuple[str, ...]:
    return (
        str(row["replicas"]),
        f"{row['users']:.0f}",
        f"{row['direct']:,.0f}",
        f"{row['gateway']:,.0f}",
        f"{row['lost']:.1%}",
        *(
            f"{row[f'direct_{name}']:,.1f} / {row[f'gateway_{name}']:,.1f}"
            for name in _GATEWAY_LATENCIES
        ),
        str(row["failed"]),
        _accuracy(row),
    )
