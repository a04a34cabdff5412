"""Repeats, sets and valid runs: what a report makes of many files."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from millrace.bench.command import bench
from millrace.bench.report.cards import cards_of
from millrace.bench.report.html_report import report_page
from millrace.bench.report.loads import Load, drawn, loads_of, problems
from millrace.bench.report.page import CardLine
from millrace.bench.report.results import ResultFile, load_results
from millrace.bench.report.sweep_table import sweep_table
from millrace.bench.report.tables import TERMINAL, aligned
from millrace.bench.runs.parallelism import parallelism_fields
from millrace.bench.workload.prompts import PolicySpec, RandomSpec, workload_digest
from tests.bench.report.test_html_report import fields
from tests.bench.runs.test_parallelism import parallel_row
from tests.dashboard.browser import Browser, require_browser
from tests.support.mock_replica import MockReplica
from tests.support.running import run

FINE = {**fields()["client"], "client_bound": False}


def file(users: int, total: float, **changes: Any) -> ResultFile:
    made = {"max_concurrency": users, "total_token_throughput": total, "client": FINE, **changes}
    return ResultFile(Path(f"{users}.json"), fields(**made))


def test_repeats_are_one_load_though_their_prompts_are_drawn_anew() -> None:
    spec = RandomSpec(count=9, input_len=64, output_len=32, range_ratio=0.5)
    again = msgspec.structs.replace(spec, seed=7, count=20)
    longer = msgspec.structs.replace(spec, input_len=65)
    digest, other = workload_digest(spec), workload_digest(longer)
    assert workload_digest(again) == digest != other
    assert workload_digest(PolicySpec(count=9)) not in (digest, other)
    runs = [file(8, 700.0 + i, workload=digest, mean_input_len=63.0 + i / 3) for i in range(3)]
    loads = loads_of({"": [*runs, file(8, 500.0, workload=other)]})
    assert sorted(len(load.runs) for load in loads) == [1, 3]
    (three,) = (load for load in loads if len(load.runs) == 3)
    spread = three.spread("total_token_throughput")
    assert spread is not None
    assert (spread.low, spread.median, spread.high) == (700.0, 701.0, 702.0)
    older = file(8, 1.0, mean_input_len=63.0)  # of a version that did not say what was asked for
    assert len(loads_of({"": [runs[0], older]})) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"failed": 0, "completed": 0}, "no request succeeded"),
        ({"failed": 5, "completed": 5}, "5 of 10 requests failed"),
        ({"interrupted": True}, "interrupted"),
        ({"client": {**FINE, "client_bound": True}}, "client-bound"),
        ({"dataset_name": "random", "prefix_cache_hit_rate": 0.9}, "from a prefix cache"),
    ],
)
def test_only_valid_runs_are_in_the_frontier(changes: dict[str, Any], problem: str | None) -> None:
    """A run that is not valid is the highest of all: it is drawn, but nothing counts it."""
    wrong = file(64, 9000.0, median_tpot_ms=1.0, **changes)
    page = report_page([file(8, 700.0), file(16, 900.0), wrong])
    found = problems(wrong.fields)
    assert bool(found) == (problem is not None)
    assert "64 users" in page
    assert ("9,000 tok/s" in page) == (problem is None)
    assert ("1 of 3 runs do not count" in page) == (problem is not None)
    assert page.count('class="ring') == (problem is not None)
    if problem is not None:
        assert problem in found[0]


@given(
    users=st.lists(st.integers(1, 10**6), min_size=1, max_size=40, unique=True),
    most=st.integers(2, 8),
    sets=st.sampled_from([[""], ["A", "B"]]),
)
def test_the_highest_load_of_each_set_is_always_drawn(
    users: list[int], most: int, sets: list[str]
) -> None:
    loads = [Load(name, str(n), []) for n in sorted(users) for name in sets]
    found = drawn(loads, most * len(sets))
    assert len(found) <= most * len(sets)
    for name in sets:
        own = [int(load.label) for load in found if load.name == name]
        assert own == sorted(own)
        assert max(own) == max(users)
        assert min(own) == min(users)


@given(
    cells=st.lists(st.text("x1 ", min_size=1, max_size=60), min_size=2, max_size=16),
    keys=st.integers(1, 2),
)
def test_a_table_fits_a_terminal_and_loses_nothing(cells: list[str], keys: int) -> None:
    lines = aligned([[f"h{n}" for n in range(len(cells))], cells], keys)
    widest = sum(len(cell) + 3 for cell in cells[:keys]) + max(len(cell) for cell in cells) + 4
    assert max(map(len, lines)) <= max(TERMINAL, widest + 3)
    heads = re.findall(r"h\d+", "\n".join(lines))
    assert sorted(set(heads)) == sorted(f"h{n}" for n in range(len(cells)))
    assert all(heads.count(f"h{n}") == 1 for n in range(keys, len(cells)))


def test_a_sweeps_table_has_a_row_a_load_and_fits() -> None:
    late = dict.fromkeys(("median_ttft_ms", "p99_ttft_ms", "p99_itl_ms"), 123456.7)
    runs = [file(n, 1e6 * n + i, gpus=8, **late) for i in range(3) for n in (8, 256)]
    lines = sweep_table([one.fields for one in runs]).splitlines()
    assert max(map(len, lines)) <= TERMINAL
    assert sum(line.startswith("|   256 |") for line in lines) == 2  # one row, in two tables


def test_arrangements_are_a_grid_of_ranks_and_replicas() -> None:
    rows = [parallel_row(1, 1, 100, 20), parallel_row(1, 2, 190, 20), parallel_row(2, 1, 150, 12)]
    failed = {"ranks": 2, "replicas": 2, "problem": "no memory"}
    said = [*({"ranks": r.ranks, "replicas": r.replicas, "problem": None} for r in rows), failed]
    content = {"model": "m", "table": parallelism_fields(rows), "rows": said}
    page = report_page([ResultFile(Path("p.json"), content)])
    grid = page[page.index("<h3>Total tok/s</h3>") : page.index("<h3>Tok/s a user</h3>")]
    cells = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", grid)
    assert cells == [
        *("", "DP 1", "DP 2"),
        *("TP 1", "100", "190<small>best</small>"),
        *("TP 2", "150", ""),
    ]
    assert "2x2 n/a: no memory" in page


def test_a_gateways_table_makes_a_section() -> None:
    names = ("median_ttft_ms", "median_tpot_ms", "p99_itl_ms")
    row = {"replicas": 2, "users": 8.0, "direct": 60.0, "gateway": 54.0, "lost": 0.1, "failed": 0}
    row |= {f"{side}_{name}": 8.0 for side in ("direct", "gateway") for name in names}
    page = report_page([ResultFile(Path("g.json"), {"model": "m", "table": [row], "rows": []})])
    assert "What the gateway costs" in page
    assert "10.0%" in page


@pytest.mark.parametrize(
    ("row", "best", "detail"),
    [
        (
            {"direct": 60.0, "gateway": 54.0, "lost": 0.1},
            54.0,
            "2 replicas behind the gateway, 10.0% lost",
        ),
        ({"total_token_throughput": 70.0, "efficiency": 0.9}, 70.0, "2 replicas, 90.0% of linear"),
        ({"total_token_throughput": 80.0, "tensor_parallel_size": 4}, 80.0, "TP 4, DP 2"),
    ],
)
def test_cards_of_servers_that_the_command_started(
    row: dict[str, float], best: float, detail: str
) -> None:
    """The best row, the lowest accuracy; nothing is said of objectives and energy."""
    figures = {"gateway", "total_token_throughput"} & {*row}
    lower = {**row, **dict.fromkeys(figures, 1.0), "replicas": 1, "accuracy": 0.99}
    table = [lower, {**row, "replicas": 2, "accuracy": 0.98}]
    result = ResultFile(Path("s.json"), {"model": "m", "table": table, "rows": []})
    cards = {card.title: card.lines for card in cards_of({"": [result]}, [], {})}
    assert cards["Best throughput"] == [CardLine(f"{best:.0f} tok/s", detail)]
    assert [line.value for line in cards["Accuracy"]] == ["98.0%"]
    assert not [title for title in cards if title.startswith(("Best under", "Energy"))]


def written(folder: Path, files: list[ResultFile]) -> str:
    folder.mkdir()
    for number, one in enumerate(files):
        (folder / f"{number}.json").write_text(json.dumps(one.fields))
    return str(folder)


def test_a_comparison_says_first_what_it_can_and_what_differs(tmp_path: Path) -> None:
    """By load in order, however the files are named; what only one set has is named too."""
    jitter = (0.99, 1.0, 1.01)
    before = [file(n, 100 * n * x) for n in (64, 8, 1) for x in jitter]
    after = [file(n, 100 * n * x * (2 if n == 8 else 1)) for n in (8, 2, 64) for x in jitter]
    a, b = written(tmp_path / "a", before), written(tmp_path / "b", after)
    result = CliRunner().invoke(bench, ["compare", a, b])
    assert result.exit_code == 0, result.output
    first, second, *rest = result.output.splitlines()
    assert first.startswith("8 users, 100 in / 50 out: total_token_throughput +100.0% (better)")
    assert second.startswith("64 users, 100 in / 50 out: no difference shown in ")
    assert [line[:7] for line in rest[:2]] == ["1 user,", "2 users"]
    assert [line.partition(": ")[2] for line in rest[:2]] == ["in A alone", "in B alone"]
    assert max(len(line) for line in rest if line.startswith("|")) <= TERMINAL
    for count, words in ((1, "one run is too few"), (2, "two runs are too few")):
        some = written(tmp_path / str(count), after[:count])
        assert CliRunner().invoke(bench, ["compare", a, some]).output.startswith(words)


# --- from a server to a page in a browser ------------------------------------------------------


async def sweep(url: str, folder: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "millrace.cli", "bench", "sweep", "--base-url", url),
        *("--over", "max-concurrency=1,4", "--num-runs", "2", "--num-prompts", "6"),
        *("--random-input-len", "12", "--random-output-len", "12", "--random-range-ratio", "0.5"),
        *("--goodput", "ttft:5000", "--save-result", "--result-dir", str(folder)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0


def test_a_report_of_a_sweep_is_read_at_a_glance_at_any_width(tmp_path: Path) -> None:
    """Before and after a change that is none: the same files as both sets."""

    async def scenario() -> None:
        replica = await MockReplica(gap_s=0.004).start()
        await sweep(replica.url, tmp_path)
        await replica.stop()

    program = require_browser()
    run(scenario())
    page = tmp_path / "page.html"
    command = ["report", str(tmp_path), str(tmp_path), "--output", str(page)]
    made = CliRunner().invoke(bench, command)
    assert made.exit_code == 0, made.output
    loads = loads_of({"": load_results(str(tmp_path))})
    assert [(load.label, len(load.runs)) for load in loads] == [("1 user", 2), ("4 users", 2)]
    with Browser(program) as browser:
        for width, dark in ((1400, False), (420, False), (420, True)):
            browser.open(page.as_uri(), width=width, dark=dark)
            browser.until("document.querySelectorAll('.card').length === 6")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            cut = "[...document.querySelectorAll('.scroll, .card, svg')]"
            wide = "(e) => e.scrollWidth > e.clientWidth + 1"
            assert browser.evaluate(f"{cut}.filter({wide}).length") == 0
        text = str(browser.evaluate("document.querySelector('.cards').textContent"))
        assert "TTFT p99 ≤ 5000 ms" in text
        medians = [load.spread("total_token_throughput") for load in loads]
        assert any(one and f"{one.median:,.0f} tok/s" in text for one in medians)
        rows = "[...document.querySelectorAll('tbody th')].map((e) => e.textContent)"
        assert {"A: 1 user", "B: 1 user", "A: 4 users", "B: 4 users"} <= set(browser.evaluate(rows))
        assert "two runs are too few" in str(browser.evaluate("document.body.textContent"))
        assert browser.problems == []
