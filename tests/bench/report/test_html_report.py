"""Reports: the table, raw data, provenance, llama-benchy's columns, and the page of HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.command import bench
from millrace.bench.load.records import RequestTiming
from millrace.bench.measure.telemetry import Sample
from millrace.bench.report.chart import (
    Axis,
    Picture,
    Series,
    binned,
    chart,
    cumulative,
    frontier,
    number,
)
from millrace.bench.report.html_report import report_page
from millrace.bench.report.page import Page, Section, environment, wordy_columns
from millrace.bench.report.results import load_results
from millrace.bench.report.run_report import benchy_table, table
from millrace.bench.report.save import check_raw, hide_secrets, new_file, read_table, save_run
from millrace.bench.report.sweep_table import sweep_table
from millrace.bench.runs.sweep_grid import grid
from millrace.errors import UserError

MS = 1_000_000


def fields(**changes: Any) -> dict[str, Any]:
    latencies = {
        f"{figure}_{name}_ms": 10.0 + i
        for i, figure in enumerate(("mean", "median", "p99"))
        for name in ("ttft", "tpot", "itl", "e2el")
    }
    made = {
        "date": "20261121-120000",
        "model_id": "<b>model</b>",
        "backend": "openai",
        "request_rate": "inf",
        "max_concurrency": 8,
        "num_prompts": 10,
        "completed": 10,
        "failed": 0,
        "cancelled": 0,
        "duration": 2.0,
        "total_input_tokens": 1000,
        "total_output_tokens": 500,
        "mean_input_len": 100.0,
        "mean_output_len": 50.0,
        "request_throughput": 5.0,
        "request_goodput": None,
        "output_throughput": 250.0,
        "total_token_throughput": 750.0,
        "max_concurrent_requests": 8,
        "interactivity": 90.0,
        "steady_state": None,
        "coordinated_omission": "closed loop: and so on",
        "accuracy": {"math": {"value": 0.9, "items": 10, "reason": None, "text": "90.0% of 10"}},
        "client": {
            "processes": 2,
            "cpu_share": 0.2,
            "us_per_chunk": 12.0,
            "median_send_delay_ms": 0.0,
            "p99_send_delay_ms": 0.1,
            "error_ms": {n: {"p50": 0.1, "p99": 0.5, "max": 1.0} for n in ("ttft", "itl")},
            "client_bound": True,
            "advice": "client-bound: use --processes 8",
            "reasons": ["a load process used 97% of a core"],
        },
        "server": {
            "replicas": ["http://a"],
            "gpus": [],
            "joules_per_token": 0.25,
            "speculation": {
                "acceptance_rate": 0.8,
                "acceptance_length": 1.8,
                "acceptance_by_position": [0.8],
            },
            "prefix_cache": {"queries": 10, "hits": 5, "hit_rate": 0.5},
        },
        "provenance": {"command": ["millrace", "bench"], "cores": 2, "packages": {"numpy": "2"}},
        **latencies,
    }
    return {**made, **changes}


def some_records() -> list[RequestTiming]:
    return [
        RequestTiming(
            index=i,
            scheduled_ns=i * 100 * MS,
            start_ns=i * 100 * MS,
            end_ns=(i * 100 + 400) * MS,
            chunk_ns=[(i * 100 + 50 * n) * MS for n in range(1, 8)],
            input_tokens=5,
            output_tokens=14,
            error=None if i else "refused",
        )
        for i in range(6)
    ]


SAMPLES = [
    Sample(n * 1000 * MS, {"num_requests_running": float(n + 1)}, {"power_w": 300.0 + n})
    for n in range(3)
]


@pytest.mark.parametrize("raw", ["parquet", "jsonl"])
def test_raw_data_come_back_as_they_were(tmp_path: Path, raw: Any) -> None:
    assert check_raw(raw) == ""
    paths = save_run(
        tmp_path / "a.json", fields(), some_records(), SAMPLES, detailed=False, raw=raw
    )
    assert [p.name for p in paths] == ["a.json", f"a.requests.{raw}", f"a.samples.{raw}"]
    requests = read_table(paths[1])
    assert requests["chunk_ns"] == [list(r.chunk_ns) for r in some_records()]
    assert requests["error"] == [r.error for r in some_records()]
    assert requests["start_ns"] == [r.start_ns for r in some_records()]
    assert read_table(paths[2])["gpu_power_w"] == [300.0, 301.0, 302.0]
    assert json.loads(paths[0].read_text())["raw_data"] == [p.name for p in paths[1:]]


def test_keys_are_not_written_into_a_report() -> None:
    shown = hide_secrets(
        ["/usr/bin/millrace", "bench", "--header", "Authorization=Bearer x", "--header=X-API-Key=y"]
    )
    assert shown == ["millrace", "bench", "--header", "Authorization=...", "--header=X-API-Key=..."]


class _Reader(HTMLParser):
    """Collects what a page would fetch, and checks that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.fetched += [v for k, v in attrs if k in ("src", "href", "data", "srcset")]
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.fetched += [v for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path: Path) -> None:
    for users in (8, 16, 32):
        client = {**fields()["client"], "client_bound": users == 32}
        made = fields(max_concurrency=users, client=client)
        save_run(
            tmp_path / f"{users}.json", made, some_records(), SAMPLES, detailed=False, raw="jsonl"
        )
    row = {**fields(), "replicas": 1, "per_replica": 750.0, "efficiency": 1.0, "accuracy": 0.5}
    (tmp_path / "scaling.json").write_text(json.dumps({"model": "m", "table": [row], "rows": []}))
    result = CliRunner().invoke(bench, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    assert reader.fetched == []
    assert not re.search(r"<script|@import|url\(", page)
    for text in (
        *("<b>model</b>", "Output tokens a second", "TTFT: share that was no slower"),
        *("client-bound: use --processes 8", "90.0% of 10", "GPU power", "Scaling over replicas"),
        *("closed loop: and so on", "frontier", "8 users", "Provenance", "millrace bench"),
    ):
        assert text in reader.text
    assert page.count("<svg") >= 8


def test_a_result_of_another_tool_still_makes_a_page(tmp_path: Path) -> None:
    """`vllm bench serve` writes no client, no server, no raw data."""
    bare = {k: v for k, v in fields().items() if k not in ("client", "server", "provenance")}
    del bare["accuracy"], bare["interactivity"], bare["mean_input_len"], bare["mean_output_len"]
    (tmp_path / "r.json").write_text(json.dumps(bare))
    assert "750" in report_page(load_results(str(tmp_path)))


def test_the_table_shows_server_client_and_accuracy() -> None:
    text = table(fields(), ["ttft"], [99.0])
    assert re.search(r"Acceptance by position \(%\): +80.0\n", text)
    assert re.search(r"Accuracy, math: +90.0% of 10\n", text)
    assert re.search(r"Error of TTFT, p50 / p99 \(ms\): +0.10 / 0.50\n", text)
    assert re.search(r"Energy per token \(J\): +0.25\n", text)


def test_llama_benchys_columns() -> None:
    head, _, prompt, answer = benchy_table([fields()]).splitlines()
    assert [c.strip() for c in head.split("|")[1:-1]] == [
        *("model", "test", "t/s", "peak t/s", "ttfr (ms)", "est_ppt (ms)", "e2e_ttft (ms)")
    ]
    assert "pp100 (c8)" in prompt
    assert "10000.00" in prompt  # 100 tokens in 10 ms
    assert "tg50 (c8)" in answer
    assert "250.00" in answer


def test_a_grid_has_every_combination_and_knows_the_flags() -> None:
    command = bench.commands["sweep"]
    points = grid(command, ["max-concurrency=1,8", "--request-rate=2.5,inf"])
    assert points[0] == {"max_concurrency": 1, "request_rate": 2.5}
    assert len(points) == 4
    for wrong in ("max-concurrency", "speed=1", "max-concurrency=one", "ignore-eos=1"):
        with pytest.raises(UserError, match="--over"):
            grid(command, [wrong])
    assert isinstance(command, click.Command)
    assert "11.0 / 12.0" in sweep_table([fields()])


# --- charts ------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), max_size=400))
def test_a_cumulative_curve_rises_to_one(values: list[float]) -> None:
    points = cumulative(values)
    assert points == sorted(points)
    if values:
        assert points[-1] == (max(values), 1.0)


@given(
    events=st.lists(st.tuples(st.floats(0, 9.99), st.floats(0, 100)), max_size=50),
    width=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_bins_hold_every_event_once(events: list[tuple[float, float]], width: float) -> None:
    total = sum(rate * width for _, rate in binned(events, width, 10.0))
    assert total == pytest.approx(sum(value for _, value in events))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=20))
def test_nothing_beats_the_frontier(points: list[tuple[int, int]]) -> None:
    best = frontier([(float(x), float(y)) for x, y in points])
    for x, y in points:
        assert any(bx >= x and by >= y for bx, by in best)
    assert best == sorted(best)


def drawn(picture: Picture) -> str:
    """A picture as the page draws it."""
    parts: Any = environment().get_template("parts.html.j2").make_module()
    return str(parts.svg(picture))


def test_a_chart_of_anything_is_well_formed() -> None:
    for points in ([(0.0, 0.0)], [(1.0, 5.0), (1.0, 5.0)], [(1e-3, 1e9), (1e3, 0.0)]):
        for log_x in (False, True):
            picture = chart([Series("a<b", list(points))] * 2, x="x&y", y="y", log_x=log_x)
            if picture is None:
                assert log_x  # no point of it is above 0
                continue
            reader = _Reader()
            reader.feed(text := drawn(picture))
            assert reader.open == []
            assert "a<b" in reader.text
            assert "x&y" in reader.text
            assert "nan" not in text
    assert chart([Series("none", [])], x="x", y="y") is None


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 50)), min_size=1, max_size=9))
def test_labels_are_never_cut(points: list[tuple[float, float]]) -> None:
    picture = chart([Series("a", points, True, ["16 users"] * len(points))], x="x", y="y")
    assert picture is not None
    for label in picture.series[0].labels:
        ends = label.x + (-1 if label.at_end else 1) * 6 * len(label.text)
        assert 0 <= ends <= picture.frame.width
        assert 0 <= label.y <= picture.frame.height


def test_a_narrow_logarithmic_axis_has_ticks_too() -> None:
    assert Axis(51, 55, 0, 200, log=True).ticks() == [51, 52, 53, 54, 55]
    assert Axis(1, 1000, 0, 200, log=True).ticks() == [1, 10, 100, 1000]


def test_texts_of_result_files_are_escaped(tmp_path: Path) -> None:
    hostile = '"><script>alert(1)</script>'
    made = fields(model_id=hostile, provenance={"command": [hostile]}, accuracy={})
    made["client"]["advice"] = hostile
    (tmp_path / "r.json").write_text(json.dumps(made))
    page = report_page(load_results(str(tmp_path)))
    assert "<script" not in page
    reader = _Reader()
    reader.feed(page)
    assert reader.text.count(hostile) == 3


def test_numbers_and_axes() -> None:
    assert number(12_345) == "12.35k"
    assert number(0.05) == "0.05"
    assert Axis(1, 100, 0, 200, log=True).at(10) == pytest.approx(100)


# --- names of files ----------------------------------------------------------------------------


def test_names_with_dots_keep_their_raw_data_apart(tmp_path: Path) -> None:
    written = [
        save_run(tmp_path / name, fields(), some_records(), SAMPLES, detailed=False, raw="jsonl")
        for name in ("qwen3.5-rate1.4", "qwen3.5-rate1.8", "a.json")
    ]
    paths = [path for run_paths in written for path in run_paths]
    assert len(set(paths)) == len(paths) == len(list(tmp_path.iterdir()))
    assert [path.name for path in written[0]] == [
        *("qwen3.5-rate1.4", "qwen3.5-rate1.4.requests.jsonl", "qwen3.5-rate1.4.samples.jsonl")
    ]
    found = load_results(str(tmp_path))
    assert [result.path.name for result in found] == ["a.json", *(p[0].name for p in written[:2])]
    assert all(result.raw("requests") in paths for result in found)


def test_a_default_name_is_given_once(tmp_path: Path) -> None:
    names = [new_file(tmp_path / "d" / "run-1.5qps.json").name for _ in range(3)]
    assert names == ["run-1.5qps.json", "run-1.5qps-2.json", "run-1.5qps-3.json"]


def test_sentences_are_told_from_figures() -> None:
    sentence = "requests wait while 2% of the KV cache is in use"
    rows = [("a", "b", "c"), ("1", "1,234", sentence), (sentence, "x 1.2\n(95%: 1.1 to 1.3)", "")]
    assert wordy_columns(rows) == [2]
    section = Section(title="t", table=rows)
    page = Page(models=["m"], files=0, made="", version="", sections=[section])
    html = environment().get_template("report.html.j2").render(page=page)
    assert html.count('<td class="words"') == 2
    assert '<th scope="col" class="words">c</th>' in html
