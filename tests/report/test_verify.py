"""A report that was changed is found out, also where its hashes were made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace import cli
from millrace.report.steps.document import Report, sealed, sealed_step
from millrace.report.verify import findings, read_report

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def report(made: Path) -> Report:
    return read_report(made / "report.json")


def step(content: dict[str, Any], name: str) -> dict[str, Any]:
    return next(one for one in content["steps"] if one["name"] == name)


def result(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = step(content, "batches/2/1")["result"]
    return found


def changed(report: Report, change: Change, *, seal: bool) -> Report:
    """The report after a change. seal: whether its hashes are made anew."""
    content = msgspec.json.decode(msgspec.json.encode(report))
    change(content)
    found = msgspec.convert(content, Report)
    if not seal:
        return found
    steps = [sealed_step(one) for one in found.steps]
    return sealed(msgspec.structs.replace(found, steps=steps))


def test_a_report_is_whole(report: Report, made: Path, text_model: Path) -> None:
    page = (made / "report.html").read_text()
    assert findings(report, model=text_model, page=page) == []


CHANGES: dict[str, Change] = {
    "total_token_throughput": lambda c: result(c).update(total_token_throughput=9e9),
    "total_input_tokens": lambda c: result(c).update(total_input_tokens=1),
    "median_ttft_ms": lambda c: result(c).update(median_ttft_ms=0.1),
    "completed": lambda c: result(c).update(completed=3),
    "failed": lambda c: result(c)["errors"].__setitem__(0, "no"),
    "cannot be worked out": lambda c: result(c).pop("ttfts"),
    "by its text": lambda c: step(c, "accuracy/math")["result"]["items"][0].update(correct=True),
    "answers are right": lambda c: step(c, "accuracy/math")["result"]["summary"]["items"].update(
        right=3
    ),
    "summary, batches": lambda c: c["summary"]["batches"]["2"]["output_throughput"].update(
        median=9e9
    ),
    "summary, prefix": lambda c: c["summary"].pop("prefix"),
    "model's hash": lambda c: c["model"]["files"]["files"][0].update(sha256="0" * 64),
    "package's hash": lambda c: c["package"].update(sha256="0" * 64),
    "installed versions": lambda c: c["installed"]["packages"].update(msgspec="99"),
    "twice": lambda c: c["steps"].append(c["steps"][0]),
    "says otherwise": lambda c: c["steps"][0].update(result=None),
}


@pytest.mark.parametrize("words", sorted(CHANGES))
def test_a_change_with_new_hashes_is_found(report: Report, words: str) -> None:
    found = findings(changed(report, CHANGES[words], seal=True))
    assert any(words in line for line in found), found


@pytest.mark.parametrize("words", sorted(CHANGES))
def test_a_change_without_new_hashes_is_found(report: Report, words: str) -> None:
    found = findings(changed(report, CHANGES[words], seal=False))
    assert any("changed after it was written" in line for line in found)


def test_another_model_and_another_page_are_found(report: Report, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = findings(report, model=tmp_path, page="a page")
    assert any("is another than the one that was measured" in line for line in found)
    assert any("is in the report and not in" in line for line in found)
    assert any("the HTML file is not of this report" in line for line in found)


def test_the_command_says_what_is_wrong(
    made: Path, tmp_path: Path, report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["report", "verify", str(made / "report.json")]) == 0
    assert "whole: sha256" in capsys.readouterr().out
    path = tmp_path / "report.json"
    wrong = changed(report, CHANGES["completed"], seal=True)
    path.write_bytes(msgspec.json.encode(wrong))
    assert cli.run(["report", "verify", str(path)]) == 1
    assert "wrong: batches/2/1: completed is 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("no json", "no JSON object"),
        ("{}", "not written by `millrace report`"),
        ('{"format": "millrace-report", "version": 99}', "its version is 99"),
        ('{"format": "millrace-report", "version": 1}', "not of the form of a report"),
    ],
)
def test_a_file_that_is_no_report(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert cli.run(["report", "verify", str(path)]) == 2
    assert words in capsys.readouterr().err
