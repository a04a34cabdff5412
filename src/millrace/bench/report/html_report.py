"""The HTML report of runs: which cards, tables, charts and sources it shows.

One file, without scripts and without requests. Runs of one load are repeats: the report shows their
median and range. Tables of servers that were started for a comparison are for `host_tables`, raw
data are read by `request_series`, and `page` makes HTML of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from millrace.bench.report.cards import cards_of, objectives_of
from millrace.bench.report.chart import Point, Series, chart, cumulative, frontier
from millrace.bench.report.compare import (
    Comparison,
    Ratio,
    compare,
    differing_lines,
    too_few,
    unmatched,
)
from millrace.bench.report.host_tables import host_section
from millrace.bench.report.loads import Load, Spread, drawn, loads_of, problems
from millrace.bench.report.page import (
    Chart,
    NamedTable,
    Page,
    Section,
    Source,
    environment,
    figure_text,
    one_chart,
    table_of,
)
from millrace.bench.report.request_series import (
    Columns,
    in_flight,
    latencies_ms,
    read_requests,
    sample_series,
    token_rate,
)
from millrace.bench.report.results import ResultFile, hit_rate, mean_lengths
from millrace.errors import UserError
from millrace.version import __version__

_MOST_DRAWN = 6  # loads in one chart
_UNREADABLE = (UserError, OSError, ValueError)
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL"}


def report_page(
    results: Sequence[ResultFile],
    others: Sequence[ResultFile] = (),
    objectives: Mapping[str, float] | None = None,
) -> str:
    """The HTML page of some results, or of two sets of them, A and B. Raw data that cannot be read
    are named in it.

    objectives: milliseconds by latency, instead of those of the runs.
    """
    sets = {"A": results, "B": others} if others else {"": results}
    every = [*results, *others]
    wanted = dict(objectives or objectives_of(every))
    sections = [*_of_runs(sets), *(host_section(one) for one in every if not one.is_run)]
    sections.append(_provenance(every))
    page = Page(
        models=sorted({str(r.fields.get("model_id") or r.fields.get("model")) for r in every}),
        files=len(every),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=[section for section in sections if not section.empty],
        cards=cards_of(sets, loads_of(sets), wanted),
        warnings=_not_valid(every),
    )
    return environment().get_template("report.html.j2").render(page=page)


def _of_runs(sets: Mapping[str, Sequence[ResultFile]]) -> list[Section]:
    loads = loads_of(sets)
    if not loads:
        return []
    parts = (_loads, _frontier, _over_time, _latencies, _servers, _accuracy, _client)
    first = [_comparison(sets["A"], sets["B"])] if "B" in sets else []
    return [*first, *(part(loads) for part in parts)]


def _not_valid(results: Sequence[ResultFile]) -> list[str]:
    """A line for each reason why runs do not count."""
    counts: dict[str, int] = {}
    for run in results:
        for problem in problems(run.fields) if run.is_run else ():
            kind = re.sub(r"^\d+ of \d+ requests", "too many requests", problem)
            counts[kind] = counts.get(kind, 0) + 1
    runs = sum(run.is_run for run in results)
    return [
        f"{count} of {runs} runs do not count: {kind}" for kind, count in sorted(counts.items())
    ]


# --- the loads ---------------------------------------------------------------------------------


def _comparison(a: Sequence[ResultFile], b: Sequence[ResultFile]) -> Section:
    """What differs between the sets."""
    title = "B against A"
    try:
        found = compare(a, b)
    except UserError as error:
        return Section(title=title, warnings=[f"not compared: {error}"])
    few = too_few(found)
    return Section(
        title=title,
        introduction=[
            "B / A with its 95% interval; a difference is claimed where it excludes 1. "
            "All figures: millrace bench compare A B."
        ],
        table=[["load", *_COMPARED.values()], *(_ratio_cells(one) for one in found)],
        warnings=[*([few] if few else []), *(one.warning for one in found if one.warning)],
        notes=[*differing_lines(found), *unmatched(a, b)],
    )


_COMPARED = {
    "total_token_throughput": "total tok/s",
    **{
        f"{part}_{name}_ms": f"{_LATENCIES[name]} {part}"
        for name in ("ttft", "tpot", "itl")
        for part in ("median", "p99")
    },
}


def _ratio_cells(comparison: Comparison) -> list[str]:
    """The ratios of the chief figures of one load, each over its interval and its verdict."""
    known = {ratio.figure: ratio for ratio in comparison.ratios}
    return [comparison.load, *(_ratio_cell(known.get(figure)) for figure in _COMPARED)]


def _ratio_cell(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    interval = "" if ratio.low is None else f"\n{ratio.low:.2f} – {ratio.high:.2f}"
    verdict = f"\nB {ratio.direction}" if ratio.differs else ""
    return f"{ratio.ratio:.3f}{interval}{verdict}"


def _loads(loads: Sequence[Load]) -> Section:
    """What was served, and how late: the median of the repeats, and their range."""
    throughput = [["load", *_THROUGHPUT], *(_throughput_cells(load) for load in loads)]
    names = _percentiles(loads)
    columns = [(f"{part}_{name}_ms", name, part) for name in _LATENCIES for part in names]
    late = [
        ["load", *(f"{_LATENCIES[name]} {part} ms" for _, name, part in columns)],
        *([load.title, *(_cell(load.spread(one[0])) for one in columns)] for load in loads),
    ]
    return Section(
        title="Loads",
        introduction=["Each figure is the median over the runs of a load; below it, their range."],
        tables=[
            NamedTable("Throughput", _without_empty(throughput)),
            NamedTable("Latency", _without_empty(late)),
        ],
    )


_THROUGHPUT = {
    "runs": "",
    "in / out": "",
    "req/s": "request_throughput",
    "good req/s": "request_goodput",
    "total tok/s": "total_token_throughput",
    "output tok/s": "output_throughput",
    "tok/s a GPU": "total_token_throughput_per_gpu",
    "tok/s a user": "interactivity",
    "prefix hits": "prefix_cache_hit_rate",
    "J / token": "joules_per_token",
    "failed": "",
}


def _throughput_cells(load: Load) -> list[str]:
    valid, runs = len(load.valid), len(load.runs)
    special = {
        "runs": str(runs) if valid == runs else f"{valid} of {runs}\nvalid",
        "in / out": " / ".join(f"{n:.0f}" for n in mean_lengths(load.middle.fields)),
        "failed": str(sum(run.fields.get("failed") or 0 for run in load.runs)),
        "prefix hits": _hits(load),
    }
    cells = [
        special[head] if head in special else _cell(load.spread(figure))
        for head, figure in _THROUGHPUT.items()
    ]
    return [load.title, *cells]


def _hits(load: Load) -> str:
    known = [rate for run in load.shown if (rate := hit_rate(run.fields)) is not None]
    return _range(known, lambda rate: f"{rate:.1%}")


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The median, and the range where it shows; empty for no values."""
    if not values:
        return ""
    ordered = sorted(values)
    low, middle, high = (text(ordered[i]) for i in (0, len(ordered) // 2, -1))
    return middle if low == high else f"{middle}\n{low} – {high}"


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return ""
    low, middle, high = (figure_text(v) for v in (spread.low, spread.median, spread.high))
    return middle if low == high else f"{middle}\n{low} – {high}"


def _percentiles(loads: Sequence[Load]) -> list[str]:
    """The median and the percentiles that the files have, in order."""
    names = {name for load in loads for run in load.runs for name in run.fields}
    found = {m[1] for name in names if (m := re.fullmatch(r"p([\d.]+)_[a-z0-9]+_ms", name))}
    return ["median", *(f"p{number}" for number in sorted(found, key=float))]


def _without_empty(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The columns that have a cell which is not empty."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _frontier(loads: Sequence[Load]) -> Section:
    """Throughput against what one user sees: a point for each load, the valid ones under a line
    that none of them beats."""
    title = "Throughput against interactivity"
    per_gpu = all(load.spread("total_token_throughput_per_gpu") for load in loads)
    figure = "total_token_throughput_per_gpu" if per_gpu else "total_token_throughput"
    if len(loads) < 2:
        return Section(title=title)
    series: list[Series] = []
    for colour, name in enumerate(dict.fromkeys(load.name for load in loads)):
        own = [load for load in loads if load.name == name]
        series += _points(name, own, figure, colour)
    y = "total tok/s a GPU" if per_gpu else "total tok/s"
    picture = chart(series, x="tok/s a user (1 / TPOT)", y=y)
    return Section(title=title, charts=one_chart(f"{y} against tok/s a user", picture))


def _points(name: str, loads: Sequence[Load], figure: str, colour: int) -> list[Series]:
    """The frontier of a set, its loads, and what is not valid."""

    def of(some: Sequence[Load]) -> tuple[list[Point], list[str]]:
        spreads = [(load, load.spread("interactivity"), load.spread(figure)) for load in some]
        known = [(load, x, y) for load, x, y in spreads if x and y]
        return [(x.median, y.median) for _, x, y in known], [load.label for load, _, _ in known]

    good, labels = of([load for load in loads if load.valid])
    bad, bad_labels = of([load for load in loads if not load.valid])
    before = f"{name}, " if name else ""
    return [
        Series(f"{before}frontier", frontier(good), colour=colour),
        Series(f"{before}measured", good, dots=True, labels=labels, colour=colour),
        Series(f"{before}not valid", bad, True, bad_labels, hollow=True, colour=colour),
    ]


# --- over time, distributions ------------------------------------------------------------------


def _tables(loads: Sequence[Load]) -> tuple[list[tuple[Load, Columns]], list[str]]:
    """The requests of one run of each load that is drawn, and what could not be read."""
    found, notes = [], []
    for load in drawn(loads, _MOST_DRAWN):
        try:
            table = read_requests(load.middle)
        except _UNREADABLE as error:
            notes.append(str(error))
            continue
        if table is not None:
            found.append((load, table))
    if len(loads) > _MOST_DRAWN and found:
        notes.append(f"{_MOST_DRAWN} of {len(loads)} loads, from the lightest to the highest.")
    return found, notes


def _over_time(loads: Sequence[Load]) -> Section:
    found, notes = _tables(loads)
    tokens = [Series(load.title, token_rate(table)) for load, table in found]
    flying = [Series(load.title, in_flight(table)) for load, table in found]
    introduction = ["The run with the median throughput of each load."]
    return Section(
        title="Over time",
        introduction=introduction if any(len(load.runs) > 1 for load in loads) else (),
        charts=[
            *one_chart("Output tokens a second", chart(tokens, x="seconds", y="tok/s")),
            *one_chart("Requests in flight", chart(flying, x="seconds", y="requests")),
        ],
        notes=notes,
    )


def _latencies(loads: Sequence[Load]) -> Section:
    """Distributions: the share of requests (of gaps) that were no slower."""
    kinds: dict[str, list[Series]] = {"TTFT": [], "TPOT": [], "ITL": []}
    for load, table in _tables(loads)[0]:
        for kind, values in latencies_ms(table).items():
            kinds[kind].append(Series(load.title, cumulative(values)))
    charts: list[Chart] = []
    for kind, series in kinds.items():
        picture = chart(series, x="ms", y="share", log_x=True)
        charts += one_chart(f"{kind}: share that was no slower", picture)
    return Section(title="Latency distributions", charts=charts)


# --- servers, accuracy, the load generator -----------------------------------------------------


def _servers(loads: Sequence[Load]) -> Section:
    """What the servers said of the run with the median throughput."""
    rows = [("load", "replicas", "acceptance", "by position")]
    for load in loads:
        server = load.middle.fields.get("server") or {}
        spec = server.get("speculation")
        if spec:
            shares = " ".join(f"{s:.1%}" for s in spec["acceptance_by_position"])
            replicas = str(len(server.get("replicas") or []))
            rows.append((load.title, replicas, f"{spec['acceptance_rate']:.1%}", shares))
    return Section(title="Servers", table=table_of(rows), charts=_server_charts(loads))


_SAMPLED = {
    "server_num_requests_running": ("Requests running", "requests"),
    "server_num_requests_waiting": ("Requests waiting", "requests"),
    "server_kv_cache_usage_perc": ("KV pages in use", "share"),
    "gpu_power_w": ("GPU power", "W"),
    "gpu_utilization": ("GPU utilisation", "share"),
    "gpu_tensor_active": ("Tensor pipes active", "share"),
    "gpu_dram_active": ("DRAM active", "share"),
}


def _server_charts(loads: Sequence[Load]) -> list[Chart]:
    """What was sampled of servers and GPUs; figures that were 0 all the time are left out."""
    series: dict[str, list[Series]] = {name: [] for name in _SAMPLED}
    for load in drawn(loads, _MOST_DRAWN):
        try:
            found = sample_series(load.middle, _SAMPLED)
        except _UNREADABLE:
            continue
        for name, points in found.items():
            series[name].append(Series(load.title, points))
    charts: list[Chart] = []
    for name, (title, unit) in _SAMPLED.items():
        if any(len(one.points) > 1 and any(y for _, y in one.points) for one in series[name]):
            charts += one_chart(title, chart(series[name], x="seconds", y=unit))
    return charts


def _accuracy(loads: Sequence[Load]) -> Section:
    rows = [("load", "task", "accuracy", "under load")]
    for load in loads:
        for run in load.runs:
            for task, found in (run.fields.get("accuracy") or {}).items():
                rows.append((load.title, task, found["text"], "yes"))
    return Section(title="Accuracy", table=table_of(list(dict.fromkeys(rows))))


_CLIENT_HEADINGS = (
    *("load", "processes", "CPU of a core", "us a chunk", "send delay p99 ms"),
    *("TTFT error p50 / p99 ms", "ITL error p50 / p99 ms", "verdict"),
)


def _client(loads: Sequence[Load]) -> Section:
    """What the load generator cost, and how far off the figures may be for that."""
    rows: list[tuple[str, ...]] = [_CLIENT_HEADINGS]
    warnings = []
    for load in loads:
        client = load.middle.fields.get("client")
        if client is None or "error_ms" not in client:
            continue
        rows.append((load.title, *_client_cells(client)))
        if client["client_bound"]:
            warnings.append(f"{load.title}: {client['advice']} ({'; '.join(client['reasons'])})")
    runs = [run for load in loads for run in load.runs]
    omission = {str(run.fields.get("coordinated_omission") or "") for run in runs}
    return Section(
        title="The load generator",
        table=table_of(rows),
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
