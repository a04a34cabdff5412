"""The HTML report: one file, no script, no request; tables, charts, and where they came from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from itertools import pairwise
from typing import Any

from millrace.bench.report.results import ResultFile, grouped, interactivity, load_words
from millrace.bench.report.save import read_table
from millrace.bench.report.svg import Series, binned, chart, cumulative, frontier
from millrace.bench.report.sweep_table import sweep_rows
from millrace.errors import UserError
from millrace.version import __version__

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2126; --soft: #5b6670; --line: #dde2e6;
  --s0: #1f6fb4; --s1: #c4581b; --s2: #2c8a4b; --s3: #8a3f9e; --s4: #a8801a; --s5: #b23a5a; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181c; --fg: #e4e8eb; --soft: #9aa5ae;
  --line: #2e363d; --s0: #63a9e6; --s1: #ee9158; --s2: #66c185; --s3: #c583d6; --s4: #d9b552;
  --s5: #e67c98; } }
body { margin: 0 auto; max-width: 1180px; padding: 20px 16px 60px; background: var(--bg);
  color: var(--fg); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6em; margin: 0 0 4px; } h2 { font-size: 1.2em; margin: 36px 0 8px; }
h3 { font-size: 1em; margin: 12px 0 4px; } p { margin: 4px 0 10px; } .soft { color: var(--soft); }
.warn { border-left: 4px solid var(--s1); padding: 4px 10px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13.5px; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; }
h3 { overflow-wrap: anywhere; }
.charts > div { max-width: 640px; } .from { white-space: pre-wrap; overflow-wrap: anywhere; }
.charts { display: grid; gap: 12px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 12px; }
.mid { text-anchor: middle; } .end { text-anchor: end; } .label { font-size: 11px; }
.grid { stroke: var(--line); } .axis, .tick { stroke: var(--soft); }
.line { fill: none; stroke-width: 1.8; } .legend { font-size: 13px; color: var(--soft); }
.key { margin-right: 14px; white-space: nowrap; }
@media (max-width: 600px) { svg text { font-size: 16px; } .label { font-size: 15px; }
  .side { display: none; } }
.key i { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 5px; }
""" + "".join(
    f".line.s{n} {{ stroke: var(--s{n}); }} .dot.s{n} {{ fill: var(--s{n}); }}"
    f" .k{n} {{ background: var(--s{n}); }}\n"
    for n in range(6)
)

_SHOWN = 6  # runs with charts of their own in one picture


def report_page(results: Sequence[ResultFile]) -> str:
    """The page of some results. Files that cannot be read are named in it."""
    runs = sorted((r for r in results if r.is_run), key=_order)
    body = [_head(results)]
    if runs:
        body += [_summary(runs), _pareto(runs), _over_time(runs), _latencies(runs)]
        body += [_server(runs), _accuracy(runs), _client(runs)]
    body += [_scaling(result) for result in results if not result.is_run]
    body.append(_provenance(results))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Benchmark report</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


# --- parts of the page -------------------------------------------------------------------------


def _head(results: Sequence[ResultFile]) -> str:
    models = sorted({str(r.fields.get("model_id") or r.fields.get("model")) for r in results})
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f"<h1>{escape(', '.join(models))}</h1>"
        f'<p class="soft">Benchmark report of {len(results)} result file(s), made {now} by '
        f"millrace {__version__}</p>"
    )


def _section(title: str, *parts: str) -> str:
    """A heading and what stands under it; nothing where all of it is empty."""
    kept = [part for part in parts if part]
    return f"<h2>{escape(title)}</h2>{''.join(kept)}" if kept else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return (
        f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _charts(*pictures: tuple[str, str]) -> str:
    shown = [f"<div><h3>{escape(title)}</h3>{svg}</div>" for title, svg in pictures if svg]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


def _summary(runs: Sequence[ResultFile]) -> str:
    note = '<p class="soft">Latencies are mean / median / p99.</p>'
    return _section("Runs", note, _table(sweep_rows([run.fields for run in runs])))


def _pareto(runs: Sequence[ResultFile]) -> str:
    """Throughput against what one user sees, a point for each kind of load (median of repeats)."""
    per_gpu = all("total_token_throughput_per_gpu" in run.fields for run in runs)
    figure = "total_token_throughput_per_gpu" if per_gpu else "total_token_throughput"
    points, labels = [], []
    for repeats in grouped(runs).values():
        x = statistics.median(interactivity(run.fields) for run in repeats)
        points.append((x, statistics.median(run.fields[figure] for run in repeats)))
        users = repeats[0].fields.get("max_concurrency")
        labels.append(f"{users} users" if users else load_words(repeats[0].fields))
    if len(points) < 2:
        return ""
    series = [
        Series("measured", points, dots=True, labels=labels),
        Series("frontier", frontier(points)),
    ]
    y = "total tok/s a GPU" if per_gpu else "total tok/s"
    return _section(
        "Throughput against interactivity",
        _charts((f"{y} against tok/s a user", chart(series, x="tok/s a user (1 / TPOT)", y=y))),
    )


def _over_time(runs: Sequence[ResultFile]) -> str:
    tokens, flying, notes = [], [], []
    for run in runs[:_SHOWN]:
        try:
            table = _requests(run)
        except (UserError, OSError, ValueError) as error:
            notes.append(f'<p class="soft">{escape(str(error))}</p>')
            continue
        if table is not None:
            name = _name(run, runs)
            tokens.append(Series(name, _token_rate(table)))
            flying.append(Series(name, _in_flight(table)))
    more = len(runs) - _SHOWN
    if more > 0 and tokens:
        notes.append(f'<p class="soft">The first {_SHOWN} runs; {more} more are not drawn.</p>')
    return _section(
        "Over time",
        _charts(
            ("Output tokens a second", chart(tokens, x="seconds", y="tok/s")),
            ("Requests in flight", chart(flying, x="seconds", y="requests")),
        ),
        *notes,
    )


def _latencies(runs: Sequence[ResultFile]) -> str:
    """Distributions: the share of requests (of gaps) that were no slower."""
    kinds: dict[str, list[Series]] = {"TTFT": [], "TPOT": [], "ITL": []}
    for run in runs[:_SHOWN]:
        try:
            table = _requests(run)
        except (UserError, OSError, ValueError):
            continue
        if table is not None:
            for kind, values in _samples(table).items():
                kinds[kind].append(Series(_name(run, runs), cumulative(values)))
    pictures = [
        (f"{kind}: share that was no slower", chart(s, x="ms", y="share", log_x=True))
        for kind, s in kinds.items()
    ]
    return _section("Latency distributions", _charts(*pictures))


def _server(runs: Sequence[ResultFile]) -> str:
    rows = [("run", "replicas", "acceptance", "by position", "prefix hits", "J / token")]
    for run in runs:
        server = run.fields.get("server") or {}
        spec, prefix = server.get("speculation"), server.get("prefix_cache")
        energy = server.get("joules_per_token")
        cells = (
            _name(run, runs),
            str(len(server.get("replicas") or [])),
            f"{spec['acceptance_rate']:.1%}" if spec else "",
            " ".join(f"{s:.1%}" for s in spec["acceptance_by_position"]) if spec else "",
            f"{prefix['hit_rate']:.1%}" if prefix else "",
            f"{energy:.3g}" if energy is not None else "",
        )
        if any(cells[2:]):
            rows.append(cells)
    table = _table(rows) if len(rows) > 1 else ""
    return _section("Servers", table, _charts(*_server_charts(runs)))


def _server_charts(runs: Sequence[ResultFile]) -> list[tuple[str, str]]:
    wanted = {
        "server_num_requests_running": ("Requests that run", "requests"),
        "server_num_requests_waiting": ("Requests that wait", "requests"),
        "server_kv_cache_usage_perc": ("KV pages in use", "share"),
        "gpu_power_w": ("GPU power", "W"),
        "gpu_utilization": ("GPU utilisation", "share"),
        "gpu_tensor_active": ("Tensor pipes active", "share"),
        "gpu_dram_active": ("DRAM active", "share"),
    }
    series: dict[str, list[Series]] = {name: [] for name in wanted}
    for run in runs[:_SHOWN]:
        path = run.raw("samples")
        try:
            table = read_table(path) if path else {}
        except (UserError, OSError, ValueError):
            continue
        begin = min(table.get("at_ns") or [0])
        for name in wanted:
            if name in table:
                at = [(t - begin) / 1e9 for t in table["at_ns"]]
                pairs = zip(at, table[name], strict=True)
                points = [(t, float(v)) for t, v in pairs if v is not None]
                series[name].append(Series(_name(run, runs), points))
    return [
        (title, chart(series[name], x="seconds", y=unit))
        for name, (title, unit) in wanted.items()
        if any(len(one.points) > 1 and any(y for _, y in one.points) for one in series[name])
    ]


def _accuracy(runs: Sequence[ResultFile]) -> str:
    rows = [("run", "task", "accuracy", "under load")]
    for run in runs:
        for task, found in (run.fields.get("accuracy") or {}).items():
            rows.append((_name(run, runs), task, found["text"], "yes"))
    return _section("Accuracy", _table(rows) if len(rows) > 1 else "")


def _client(runs: Sequence[ResultFile]) -> str:
    """What the generator cost, and how far off the figures may be for that."""
    rows: list[tuple[str, ...]] = [("run", "processes", "CPU of a core", "us a chunk",
             "send delay p99 ms",
             "TTFT error p50 / p99 ms", "ITL error p50 / p99 ms", "verdict")]  # fmt: skip
    warnings = []
    for run in runs:
        client = run.fields.get("client")
        if client is None or "error_ms" not in client:
            continue
        errors = [
            f"{client['error_ms'][n]['p50']:.2f} / {client['error_ms'][n]['p99']:.2f}"
            for n in ("ttft", "itl")
        ]
        name = _name(run, runs)
        rows.append(
            (name, str(client["processes"]), f"{client['cpu_share']:.0%}",
             f"{client['us_per_chunk']:.1f}", f"{client['p99_send_delay_ms']:.2f}", *errors,
             "client-bound" if client["client_bound"] else "fine")
        )  # fmt: skip
        if client["client_bound"]:
            text = f"{name}: {client['advice']} ({'; '.join(client['reasons'])})"
            warnings.append(f'<p class="warn">{escape(text)}</p>')
    omission = sorted({str(r.fields["coordinated_omission"]) for r in runs
                       if r.fields.get("coordinated_omission")})  # fmt: skip
    notes = [f'<p class="soft">{escape(text)}</p>' for text in omission]
    return _section(
        "The generator itself", *([_table(rows)] if len(rows) > 1 else []), *warnings, *notes
    )


def _scaling(result: ResultFile) -> str:
    table = result.fields["table"]
    rows: list[tuple[str, ...]] = [("replicas", "total tok/s", "per replica", "efficiency",
             "TTFT ms", "TPOT ms",
             "ITL ms", "accuracy")]  # fmt: skip
    for row in table:
        latencies = [
            " / ".join(f"{row[f'{figure}_{name}_ms']:,.1f}" for figure in ("mean", "median", "p99"))
            for name in ("ttft", "tpot", "itl")
        ]
        accuracy = row.get("accuracy")
        rows.append(
            (str(row["replicas"]), f"{row['total_token_throughput']:,.0f}",
             f"{row['per_replica']:,.0f}", f"{row['efficiency']:.1%}", *latencies,
             "n/a" if accuracy is None else f"{accuracy:.1%}")
        )  # fmt: skip
    measured = [(float(r["replicas"]), float(r["total_token_throughput"])) for r in table]
    first = measured[0][1] / measured[0][0] if measured else 0.0
    ideal = [(x, first * x) for x, _ in measured]
    series = [Series("measured", measured), Series("linear", ideal)]
    picture = chart(series, x="replicas", y="total tok/s")
    return _section("Scaling over replicas", _table(rows), _charts(("Total tok/s", picture)))


def _provenance(results: Sequence[ResultFile]) -> str:
    """How each file came to be: repeats of one command on one machine are told once."""
    seen: dict[str, list[str]] = {}
    for result in results:
        told = result.fields.get("provenance") or {}
        packages = " ".join(f"{n} {v}" for n, v in (told.get("packages") or {}).items())
        facts = {
            "command": " ".join(told.get("command") or []),
            "millrace": str(told.get("millrace", "")),
            "server": str(told.get("server_version") or ""),
            "Python": f"{told.get('python', '')} {packages}",
            "machine": f"{told.get('processor', '')}, {told.get('cores', '?')} cores, "
            f"{told.get('system', '')}",
            "GPUs": ", ".join((result.fields.get("server") or {}).get("gpus") or []),
        }
        text = "\n".join(f"{k}: {v}" for k, v in facts.items() if v.strip(" ,?"))
        seen.setdefault(text, []).append(f"{result.path.name} ({told.get('date_utc', 'undated')})")
    parts = [
        f'<h3>{escape(", ".join(files))}</h3><p class="from soft">{escape(text)}</p>'
        for text, files in seen.items()
    ]
    return _section("Provenance", *parts)


def _order(run: ResultFile) -> tuple[float, ...]:
    """By what was asked, repeats by their date."""
    rate = run.fields.get("request_rate")
    asked = (
        0.0 if rate in (None, "inf") else float(rate or 0.0),
        float(run.fields.get("max_concurrency") or 0),
        float(run.fields.get("mean_input_len") or 0),
    )
    return (*asked, float(str(run.fields.get("date", "0")).replace("-", "") or 0))


# --- from raw data to points -------------------------------------------------------------------


def _name(run: ResultFile, runs: Sequence[ResultFile]) -> str:
    """A run in a legend: what it asked, and its number among its repeats."""
    words = load_words(run.fields)
    same = [other for other in runs if load_words(other.fields) == words]
    return f"{words}, run {same.index(run) + 1}" if len(same) > 1 else words


def _requests(run: ResultFile) -> dict[str, list[Any]] | None:
    """The columns of a run's requests that succeeded, None where there are no raw data."""
    path = run.raw("requests")
    if path is None:
        return None
    table = read_table(path)
    good = [e is None and bool(c) for e, c in zip(table["error"], table["chunk_ns"], strict=True)]
    return {
        name: [v for v, kept in zip(column, good, strict=True) if kept]
        for name, column in table.items()
    }


def _begin_end(table: Mapping[str, list[Any]]) -> tuple[int, int]:
    return min(table["start_ns"], default=0), max(table["end_ns"], default=0)


def _token_rate(table: Mapping[str, list[Any]]) -> list[tuple[float, float]]:
    """Output tokens a second over time; those of an answer spread evenly over its chunks."""
    begin, end = _begin_end(table)
    seconds = (end - begin) / 1e9
    events = [
        ((at - begin) / 1e9, tokens / len(chunks))
        for chunks, tokens in zip(table["chunk_ns"], table["output_tokens"], strict=True)
        for at in chunks
    ]
    return binned(events, max(0.25, seconds / 120), seconds)


def _in_flight(table: Mapping[str, list[Any]], most: int = 400) -> list[tuple[float, float]]:
    begin, _ = _begin_end(table)
    edges = sorted([(t, 1) for t in table["start_ns"]] + [(t, -1) for t in table["end_ns"]])
    level, points = 0, []
    for at, change in edges:
        level += change
        points.append(((at - begin) / 1e9, float(level)))
    step = max(1, len(points) // most)
    return points[::step]


def _samples(table: Mapping[str, list[Any]]) -> dict[str, list[float]]:
    """TTFT, TPOT and ITL in ms."""
    rows = list(zip(table["start_ns"], table["chunk_ns"], table["output_tokens"], strict=True))
    return {
        "TTFT": [(chunks[0] - start) / 1e6 for start, chunks, _ in rows],
        "TPOT": [(c[-1] - c[0]) / 1e6 / (n - 1) for _, c, n in rows if n > 1],
        "ITL": [(b - a) / 1e6 for _, c, _ in rows for a, b in pairwise(c)],
    }
