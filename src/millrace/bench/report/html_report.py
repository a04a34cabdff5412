"""The HTML report: which tables, charts and sources it shows.

One file, without scripts and without requests. This module collects what is on the page; the
templates beside it, which escape every text, turn that into HTML. Raw data are read by
`request_series`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
import msgspec

from millrace.bench.report.chart import COLOURS, Picture, Series, chart, cumulative, frontier
from millrace.bench.report.request_series import (
    in_flight,
    latencies_ms,
    read_requests,
    sample_series,
    token_rate,
)
from millrace.bench.report.results import (
    ResultFile,
    grouped,
    hit_rate,
    hit_text,
    interactivity,
    load_label,
)
from millrace.bench.report.sweep_table import sweep_rows
from millrace.errors import UserError
from millrace.version import __version__

_MOST_DRAWN = 6  # runs in one chart
_UNREADABLE = (UserError, OSError, ValueError)

Table = Sequence[Sequence[str]]  # the first row holds the headings


class Chart(msgspec.Struct, frozen=True):
    """A picture under a title."""

    title: str
    picture: Picture


class Source(msgspec.Struct, frozen=True):
    """How some result files were made."""

    files: list[str]
    facts: list[str]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """A heading and what is under it, in the order of the fields."""

    title: str
    introduction: Sequence[str] = ()
    table: Table = ()
    charts: Sequence[Chart] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    sources: Sequence[Source] = ()

    @property
    def empty(self) -> bool:
        """Whether it shows nothing; an introduction alone shows nothing."""
        return not (self.table or self.charts or self.warnings or self.notes or self.sources)


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """The whole report. files: how many results are in it; 0 for one that is in no file."""

    models: list[str]
    files: int
    made: str
    version: str
    sections: list[Section]
    title: str = "Benchmark report"


def report_page(results: Sequence[ResultFile]) -> str:
    """The HTML page of some results. Raw data that cannot be read are named in it."""
    runs = sorted((r for r in results if r.is_run), key=_order)
    sections = []
    if runs:
        parts = (_summary, _frontier, _over_time, _latencies, _servers, _accuracy, _client)
        sections += [part(runs) for part in parts]
    sections += [_scaling(result) for result in results if not result.is_run]
    sections.append(_provenance(results))
    page = Page(
        models=sorted({str(r.fields.get("model_id") or r.fields.get("model")) for r in results}),
        files=len(results),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=[section for section in sections if not section.empty],
    )
    return environment().get_template("report.html.j2").render(page=page)


def environment() -> jinja2.Environment:
    """The templates of the report; every value that they insert is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("millrace.bench.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["px"] = lambda value: f"{value:.1f}"
    templates.globals["colours"] = COLOURS
    return templates


# --- sections ----------------------------------------------------------------------------------


def _chart(title: str, picture: Picture | None) -> list[Chart]:
    return [] if picture is None else [Chart(title, picture)]


def _table_of(rows: Sequence[Sequence[str]]) -> Table:
    """A table; nothing where there are headings alone."""
    return rows if len(rows) > 1 else ()


def _summary(runs: Sequence[ResultFile]) -> Section:
    return Section(
        title="Runs",
        introduction=["Latencies are mean / median / p99."],
        table=sweep_rows([run.fields for run in runs]),
    )


def _frontier(runs: Sequence[ResultFile]) -> Section:
    """Throughput against what one user sees, a point for each kind of load (median of repeats)."""
    title = "Throughput against interactivity"
    per_gpu = all("total_token_throughput_per_gpu" in run.fields for run in runs)
    figure = "total_token_throughput_per_gpu" if per_gpu else "total_token_throughput"
    points, labels = [], []
    for repeats in grouped(runs).values():
        x = statistics.median(interactivity(run.fields) for run in repeats)
        points.append((x, statistics.median(run.fields[figure] for run in repeats)))
        users = repeats[0].fields.get("max_concurrency")
        labels.append(f"{users} users" if users else load_label(repeats[0].fields))
    if len(points) < 2:
        return Section(title=title)
    series = [
        Series("measured", points, dots=True, labels=labels),
        Series("frontier", frontier(points)),
    ]
    y = "total tok/s a GPU" if per_gpu else "total tok/s"
    picture = chart(series, x="tok/s a user (1 / TPOT)", y=y)
    return Section(title=title, charts=_chart(f"{y} against tok/s a user", picture))


def _over_time(runs: Sequence[ResultFile]) -> Section:
    tokens, flying, notes = [], [], []
    for run in runs[:_MOST_DRAWN]:
        try:
            table = read_requests(run)
        except _UNREADABLE as error:
            notes.append(str(error))
            continue
        if table is not None:
            name = _name(run, runs)
            tokens.append(Series(name, token_rate(table)))
            flying.append(Series(name, in_flight(table)))
    more = len(runs) - _MOST_DRAWN
    if more > 0 and tokens:
        notes.append(f"The first {_MOST_DRAWN} runs; {more} more are not drawn.")
    return Section(
        title="Over time",
        charts=[
            *_chart("Output tokens a second", chart(tokens, x="seconds", y="tok/s")),
            *_chart("Requests in flight", chart(flying, x="seconds", y="requests")),
        ],
        notes=notes,
    )


def _latencies(runs: Sequence[ResultFile]) -> Section:
    """Distributions: the share of requests (of gaps) that were no slower."""
    kinds: dict[str, list[Series]] = {"TTFT": [], "TPOT": [], "ITL": []}
    for run in runs[:_MOST_DRAWN]:
        try:
            table = read_requests(run)
        except _UNREADABLE:
            continue  # named under "Over time"
        if table is not None:
            for kind, values in latencies_ms(table).items():
                kinds[kind].append(Series(_name(run, runs), cumulative(values)))
    charts: list[Chart] = []
    for kind, series in kinds.items():
        picture = chart(series, x="ms", y="share", log_x=True)
        charts += _chart(f"{kind}: share that was no slower", picture)
    return Section(title="Latency distributions", charts=charts)


def _servers(runs: Sequence[ResultFile]) -> Section:
    rows = [("run", "replicas", "acceptance", "by position", "prefix hits", "J / token")]
    for run in runs:
        server = run.fields.get("server") or {}
        spec = server.get("speculation")
        energy = server.get("joules_per_token")
        cells = (
            _name(run, runs),
            str(len(server.get("replicas") or [])),
            f"{spec['acceptance_rate']:.1%}" if spec else "",
            " ".join(f"{s:.1%}" for s in spec["acceptance_by_position"]) if spec else "",
            hit_text(hit_rate(run.fields)),
            f"{energy:.3g}" if energy is not None else "",
        )
        if any(cells[2:]):
            rows.append(cells)
    return Section(title="Servers", table=_table_of(rows), charts=_server_charts(runs))


_SAMPLED = {
    "server_num_requests_running": ("Requests running", "requests"),
    "server_num_requests_waiting": ("Requests waiting", "requests"),
    "server_kv_cache_usage_perc": ("KV pages in use", "share"),
    "gpu_power_w": ("GPU power", "W"),
    "gpu_utilization": ("GPU utilisation", "share"),
    "gpu_tensor_active": ("Tensor pipes active", "share"),
    "gpu_dram_active": ("DRAM active", "share"),
}


def _server_charts(runs: Sequence[ResultFile]) -> list[Chart]:
    """What was sampled of servers and GPUs; figures that were 0 all the time are left out."""
    series: dict[str, list[Series]] = {name: [] for name in _SAMPLED}
    for run in runs[:_MOST_DRAWN]:
        try:
            found = sample_series(run, _SAMPLED)
        except _UNREADABLE:
            continue
        for name, points in found.items():
            series[name].append(Series(_name(run, runs), points))
    charts: list[Chart] = []
    for name, (title, unit) in _SAMPLED.items():
        if any(len(one.points) > 1 and any(y for _, y in one.points) for one in series[name]):
            charts += _chart(title, chart(series[name], x="seconds", y=unit))
    return charts


def _accuracy(runs: Sequence[ResultFile]) -> Section:
    rows = [("run", "task", "accuracy", "under load")]
    for run in runs:
        for task, found in (run.fields.get("accuracy") or {}).items():
            rows.append((_name(run, runs), task, found["text"], "yes"))
    return Section(title="Accuracy", table=_table_of(rows))


_CLIENT_HEADINGS = (
    *("run", "processes", "CPU of a core", "us a chunk", "send delay p99 ms"),
    *("TTFT error p50 / p99 ms", "ITL error p50 / p99 ms", "verdict"),
)


def _client(runs: Sequence[ResultFile]) -> Section:
    """What the load generator cost, and how far off the figures may be for that."""
    rows: list[tuple[str, ...]] = [_CLIENT_HEADINGS]
    warnings = []
    for run in runs:
        client = run.fields.get("client")
        if client is None or "error_ms" not in client:
            continue
        name = _name(run, runs)
        rows.append((name, *_client_cells(client)))
        if client["client_bound"]:
            warnings.append(f"{name}: {client['advice']} ({'; '.join(client['reasons'])})")
    omission = {str(r.fields.get("coordinated_omission") or "") for r in runs}
    return Section(
        title="The load generator",
        table=_table_of(rows),
        warnings=warnings,
        notes=sorted(omission - {""}),
    )


def _client_cells(client: dict[str, Any]) -> tuple[str, ...]:
    errors = [client["error_ms"][name] for name in ("ttft", "itl")]
    return (
        str(client["processes"]),
        f"{client['cpu_share']:.0%}",
        f"{client['us_per_chunk']:.1f}",
        f"{client['p99_send_delay_ms']:.2f}",
        *(f"{error['p50']:.2f} / {error['p99']:.2f}" for error in errors),
        "client-bound" if client["client_bound"] else "fine",
    )


_SCALING_HEADINGS = (
    *("replicas", "total tok/s", "per replica", "efficiency"),
    *("TTFT ms", "TPOT ms", "ITL ms", "prefix hits", "accuracy"),
)


def _scaling(result: ResultFile) -> Section:
    table = result.fields["table"]
    measured = [(float(r["replicas"]), float(r["total_token_throughput"])) for r in table]
    first = measured[0][1] / measured[0][0] if measured else 0.0
    series = [
        Series("measured", measured),
        Series("linear", [(replicas, first * replicas) for replicas, _ in measured]),
    ]
    return Section(
        title="Scaling over replicas",
        table=[_SCALING_HEADINGS, *(_scaling_cells(row) for row in table)],
        charts=_chart("Total tok/s", chart(series, x="replicas", y="total tok/s")),
    )


def _scaling_cells(row: dict[str, Any]) -> tuple[str, ...]:
    accuracy = row.get("accuracy")
    return (
        str(row["replicas"]),
        f"{row['total_token_throughput']:,.0f}",
        f"{row['per_replica']:,.0f}",
        f"{row['efficiency']:.1%}",
        *(
            " / ".join(f"{row[f'{figure}_{name}_ms']:,.1f}" for figure in ("mean", "median", "p99"))
            for name in ("ttft", "tpot", "itl")
        ),
        hit_text(row.get("prefix_cache_hit_rate")),
        "n/a" if accuracy is None else f"{accuracy:.1%}",
    )


def _provenance(results: Sequence[ResultFile]) -> Section:
    """How each file was made; files that were made alike are listed together."""
    files: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        origin = result.fields.get("provenance") or {}
        name = f"{result.path.name} ({origin.get('date_utc', 'undated')})"
        files.setdefault(tuple(_facts(result, origin)), []).append(name)
    sources = [Source(names, list(facts)) for facts, names in files.items()]
    return Section(title="Provenance", sources=sources)


def _facts(result: ResultFile, origin: dict[str, Any]) -> list[str]:
    packages = " ".join(f"{n} {v}" for n, v in (origin.get("packages") or {}).items())
    facts = {
        "command": " ".join(origin.get("command") or []),
        "millrace": str(origin.get("millrace", "")),
        "server": str(origin.get("server_version") or ""),
        "Python": f"{origin.get('python', '')} {packages}",
        "machine": f"{origin.get('processor', '')}, {origin.get('cores', '?')} cores, "
        f"{origin.get('system', '')}",
        "GPUs": ", ".join((result.fields.get("server") or {}).get("gpus") or []),
    }
    return [f"{name}: {value}" for name, value in facts.items() if value.strip(" ,?")]


def _order(run: ResultFile) -> tuple[float, ...]:
    """By what was asked, repeats by their date."""
    rate = run.fields.get("request_rate")
    asked = (
        0.0 if rate in (None, "inf") else float(rate or 0.0),
        float(run.fields.get("max_concurrency") or 0),
        float(run.fields.get("mean_input_len") or 0),
    )
    return (*asked, float(str(run.fields.get("date", "0")).replace("-", "") or 0))


def _name(run: ResultFile, runs: Sequence[ResultFile]) -> str:
    """A run in a legend: what it asked, and its number among its repeats."""
    words = load_label(run.fields)
    same = [other for other in runs if load_label(other.fields) == words]
    return f"{words}, run {same.index(run) + 1}" if len(same) > 1 else words
