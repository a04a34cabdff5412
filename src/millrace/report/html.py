"""A report as one HTML page, in the benchmark's own form: no scripts, nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from millrace.bench.report.chart import Series, chart
from millrace.bench.report.page import Chart, Page, Section, Source, environment
from millrace.report.steps.document import Report, StepRecord

_TITLES = {
    "output_throughput": "output tok/s",
    "total_token_throughput": "total tok/s",
    "median_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "median_tpot_ms": "TPOT p50, ms",
    "median_itl_ms": "ITL p50, ms",
    "p99_itl_ms": "ITL p99, ms",
}


def report_html(report: Report) -> str:
    """The page of a report."""
    parts = (
        _summary, _accuracy, _logprobs, _acceptance, _throughput, _batches, _long, _prefix,
        _startup, _energy, _versus, _client, _environment, _steps, _hashes,
    )  # fmt: skip
    page = Page(
        models=[report.model.name],
        files=0,
        made=report.made,
        version=report.millrace,
        sections=[section for part in parts if not (section := part(report)).empty],
        title=f"Report, profile {report.profile['name']}",
    )
    return environment().get_template("report.html.j2").render(page=page)


def _summary(report: Report) -> Section:
    profile = report.profile
    notes = [
        f"Profile {profile['name']}: {profile['says']}. Figures of another profile are not "
        "comparable with these.",
        f"SHA-256 of the report: {report.sha256}",
    ]
    missing = [r for r in report.steps if r.status != "done"]
    warnings = [f"{r.name} is {r.status}: {r.reason}" for r in missing]
    return Section(title="What this is", notes=notes, warnings=warnings)


def _of(report: Report, name: str) -> Any:
    return report.summary.get(name) or {}


def _table(rows: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    return rows if len(rows) > 1 else ()


def _number(value: Any) -> str:
    """Three digits or more, without exponents."""
    if value is None:
        return ""
    value = float(value)
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(value: Mapping[str, float]) -> str:
    if value["least"] == value["most"]:
        return _number(value["median"])
    return f"{_number(value['median'])} ({_number(value['least'])} to {_number(value['most'])})"


def _accuracy(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [("task", "right", "of", "share", "95% interval")]
    notes = []
    for task, found in _of(report, "accuracy").items():
        if "right" in found:
            low, high = found["interval_95"]
            share = f"{found['accuracy']:.1%}"
            cells = (task, str(found["right"]), str(found["total"]), share)
            rows.append((*cells, f"{low:.1%} to {high:.1%}"))
        else:
            notes += [f"lm-evaluation-harness, {task}, {line}" for line in _harness_lines(found)]
    return Section(title="Accuracy", table=_table(rows), notes=notes)


def _harness_lines(results: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: "
        + ", ".join(f"{k} {_number(v)}" for k, v in one.items() if isinstance(v, int | float))
        for name, one in (results or {}).items()
    ]


def _logprobs(report: Report) -> Section:
    found = _of(report, "logprobs")
    rows: list[tuple[str, ...]] = [("difference of log-probabilities", "median", "p99", "most")]
    for key, name in (
        ("engine", "the engine"), ("noise_of_bfloat16", "transformers in bfloat16"),
    ):  # fmt: skip
        if one := found.get(key):
            rows.append((name, *(f"{one[part]:.4f}" for part in ("median", "p99", "most"))))
    said = f"{found.get('tokens')} sampled tokens; the truth is {found.get('truth')}."
    return Section(
        title="Log-probabilities against transformers", introduction=[said], table=_table(rows)
    )


def _acceptance(report: Report) -> Section:
    found = _of(report, "acceptance")
    rows: list[tuple[str, ...]] = [
        ("text", "temperature", "by position", "tokens a step with 1 / 3 / 5 drafts")
    ]
    series = []
    for kind, by_temperature in found.items():
        for temperature, one in by_temperature.items():
            shares = " ".join(f"{share:.1%}" for share in one["by_position"])
            lengths = one["length_at_depth"]
            at = " / ".join(f"{lengths[d]:.2f}" for d in ("1", "3", "5") if d in lengths)
            rows.append((kind, temperature.removeprefix("temperature-"), shares, at))
            points = [(float(at + 1), share) for at, share in enumerate(one["by_position"])]
            if temperature == "temperature-0":
                series.append(Series(kind, points))
    picture = chart(series, x="position of the draft", y="share accepted") if series else None
    charts = [Chart("Accepted, greedy", picture)] if picture is not None else []
    return Section(title="Drafts by kind of text", table=_table(rows), charts=charts)


def _run_rows(found: Mapping[str, Any], what: str) -> Sequence[Sequence[str]]:
    rows: list[tuple[str, ...]] = [(what, "runs", "failed", *_TITLES.values(), "tokens a step")]
    for name, one in found.items():
        cells = [name, str(one["runs"]), str(one["failed"])]
        cells += [_spread(one[figure]) for figure in _TITLES]
        length = one.get("acceptance_length")
        rows.append((*cells, _spread(length) if length else ""))
    return _table(rows)


def _throughput(report: Report) -> Section:
    low, high = report.profile["lengths"]
    said = (
        f"{report.profile['streams']} streams of random tokens: prompts of {low // 2} to {low}, "
        f"answers of {high // 2} to {high}."
    )
    table = _run_rows(_of(report, "throughput"), "load")
    return Section(title="Headline and write-up", introduction=[said], table=table)


def _batches(report: Report) -> Section:
    table = _run_rows(_of(report, "batches"), "streams")
    said = "Texts of all four kinds; answers of one length."
    return Section(title="Batches", introduction=[said], table=table)


def _long(report: Report) -> Section:
    prompt, answer = report.profile["long_lengths"]
    said = f"Random tokens: {prompt:,} in, {answer:,} out, three drafts."
    table = _run_rows(_of(report, "long"), "streams")
    return Section(title="Long prompts", introduction=[said], table=table)


def _prefix(report: Report) -> Section:
    found = _of(report, "prefix")
    if not found:
        return Section(title="Cached prefixes")
    rate = found["hit_rate"]
    rows = [
        ("prompt tokens", "TTFT p50, first, ms", "TTFT p50, cached, ms", "hits"),
        (
            _number(found["input_tokens"]), _number(found["cold_ttft_ms"]),
            _number(found["cached_ttft_ms"]), "unknown" if rate is None else f"{rate:.1%}",
        ),
    ]  # fmt: skip
    return Section(title="Cached prefixes", table=rows)


def _startup(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [("start", "healthy, s", "first answer, s")]
    for name, one in _of(report, "startup").items():
        rows.append((name, *(_spread(one[f"{f}_seconds"]) for f in ("healthy", "first_answer"))))
    said = "Cold: with empty caches of kernels. The system may hold the weights' files in memory."
    return Section(title="Start-up", introduction=[said], table=_table(rows))


def _energy(report: Report) -> Section:
    found = _of(report, "energy")
    if "absent" in found:
        return Section(title="Energy", notes=[found["absent"]])
    rows: list[tuple[str, ...]] = [("run", "joules a token", "joules an output token")]
    for name, one in found.items():
        rows.append((name, *(_number(value) for value in one.values())))
    return Section(title="Energy", table=_table(rows))


def _versus(report: Report) -> Section:
    found = _of(report, "versus")
    titles = {name: title for name, title in _TITLES.items() if name in _VERSUS}
    rows: list[tuple[str, ...]] = [("load", "server", "rounds", *titles.values())]
    ratios = found.get("ratios") or {}
    for server, loads in (found.get("medians") or {}).items():
        for load, one in loads.items():
            rows.append((load, server, "", *(_number(one[name]) for name in titles)))
            compared = (ratios.get(server) or {}).get(load)
            if compared:
                rounds = max((c["rounds"] for c in compared.values() if c), default=0)
                cells = (_ratio(compared[name]) for name in titles)
                rows.append((load, f"millrace / {server}", str(rounds), *cells))
    rows[1:] = sorted(rows[1:], key=lambda row: row[0])
    notes = sorted({f"{r.name.split('/')[1]}: {' '.join(r.server)}" for r in _visits(report)})
    said = "By turns, the same prompts and client; ratios are paired by rounds, with 95% intervals."
    return Section(title="Other servers", introduction=[said], table=_table(rows), notes=notes)


_VERSUS = frozenset(
    ("output_throughput", "total_token_throughput", "median_ttft_ms", "median_tpot_ms")
)


def _visits(report: Report) -> list[StepRecord]:
    return [record for record in report.steps if record.section == "versus"]


def _ratio(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return ""
    if one["low"] is None:
        return f"x {one['ratio']:.3f}"
    return f"x {one['ratio']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def _client(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [("streams", "largest relative error", "throughput", "within")]
    for level in _of(report, "client") or []:
        worst = max(abs(e) for by in level["errors"].values() for e in by.values())
        cells = (f"{worst:.2%}", f"{level['throughput_error']:+.2%}")
        rows.append((str(level["streams"]), *cells, "yes" if level["within"] else "no"))
    notes, found = [], _of(report, "client_error")
    if found:
        worst = found["worst"]
        notes.append(
            f"Over {found['runs']} runs the client's own error was at most "
            f"{worst['ttft']['p50']:.2f} / {worst['ttft']['p99']:.2f} ms of TTFT (p50 / p99) and "
            f"{worst['itl']['p50']:.2f} / {worst['itl']['p99']:.2f} ms of ITL."
        )
    warnings = [f"limited by the client: {name}" for name in found.get("client_bound", ())]
    return Section(title="The load generator", table=_table(rows), notes=notes, warnings=warnings)


def _environment(report: Report) -> Section:
    found = _of(report, "environment")
    notes = [f"{name}: {value}" for name, value in (found.get("devices") or {}).items()]
    warnings = [
        f"{one['topic']}, {one['name']}: {one['value']}" for one in found.get("warnings") or ()
    ]
    return Section(title="Environment", notes=notes, warnings=warnings)


def _steps(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [("step", "status", "seconds", "load average", "sha256")]
    rows += [
        (r.name, r.status, f"{r.seconds:.1f}", f"{r.load_average}", r.sha256[:16])
        for r in report.steps
    ]
    sources: dict[tuple[str, str], list[str]] = {}
    for r in report.steps:
        sources.setdefault((" ".join(r.server), " ".join(r.command)), []).append(r.name)
    listed = [
        Source(names, [line for line in (server and f"server: {server}", command) if line])
        for (server, command), names in sources.items()
    ]
    return Section(title="What ran", table=_table(rows), sources=listed)


def _hashes(report: Report) -> Section:
    rows: list[tuple[str, ...]] = [("file of the model", "bytes", "sha256")]
    rows += [(one.name, f"{one.bytes:,}", one.sha256) for one in report.model.files.files]
    notes = [
        f"model: {report.model.files.sha256}",
        f"package: {report.package.sha256} ({len(report.package.files)} files, commit "
        f"{report.commit or 'unknown'})",
        f"installed versions and locks: {report.installed.sha256}",
    ]
    return Section(title="Hashes", table=rows, notes=notes)
