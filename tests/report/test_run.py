"""Steps are done once, whatever ends the process; what they are of is checked."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace.errors import ConfigError
from millrace.report.plan import Request, steps_of
from millrace.report.run import make_report
from millrace.report.steps.document import Report, StepRecord
from millrace.report.steps.journal import Journal
from millrace.report.verify import read_report


def record(name: str = "batches/1/1", **fields: Any) -> StepRecord:
    return StepRecord(name=name, section="batches", status="done", result={"a": 1.5}, **fields)


def test_a_report_has_a_record_of_every_step(made: Path, request_of: Request) -> None:
    report = read_report(made / "report.json")
    assert [one.name for one in report.steps] == [step.name for step in steps_of(request_of)]
    by_name = {one.name: one for one in report.steps}
    absent = {name for name, one in by_name.items() if one.status == "absent"}
    assert absent == {
        name for name in by_name if name.startswith(("acceptance/", "accuracy/local-"))
    }
    assert all(one.reason for one in report.steps if one.status == "absent")
    assert by_name["batches/2/1"].server[:3] == ["millrace", "serve", "MODEL"]
    assert by_name["batches/2/1"].result["completed"] == 4
    assert report.summary["prefix"]["cold_ttft_ms"] > 0
    assert report.summary["accuracy"]["math"]["total"] == 3


def test_a_second_call_does_what_is_missing(
    made: Path, request_of: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are done are not done again; one whose file was damaged is, like one without."""
    began: list[str] = []
    lost, kept = made / "steps" / "batches-1-1.json", made / "steps" / "batches-2-2.json"
    before = kept.read_bytes()
    lost.write_bytes(lost.read_bytes()[:-40])
    monkeypatch.setattr("millrace.report.run.say", began.append)
    monkeypatch.setenv("MILLRACE_FAKE_ENGINE", "{}")
    assert make_report(request_of, made, start_limit=60) == 0
    names = [line.split("] ")[1] for line in began if line.startswith("[")]
    assert [name for name in names if not name.startswith(("acceptance", "accuracy"))] == [
        "batches/1/1"
    ]
    assert kept.read_bytes() == before
    assert read_report(made / "report.json").summary["batches"]["1"]["runs"] == 2


def test_a_directory_of_another_model_is_refused(made: Path, request_of: Request) -> None:
    other = msgspec.structs.replace(request_of, serve_arguments=("--seed", "3"))
    with pytest.raises(ConfigError, match="a report of another serve arguments"):
        make_report(other, made, start_limit=60)


def test_a_step_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        written = journal.write(record(seconds=2.0))
        path = next((tmp_path / "steps").glob("*.json"))
        whole = path.read_bytes()
        assert journal.read(written.name) == written
        for size in range(0, len(whole), 7):
            path.write_bytes(whole[:size])
            assert journal.read(written.name) is None
        path.write_bytes(whole.replace(b"1.5", b"2.5"))
        assert journal.read(written.name) is None
        path.write_bytes(whole)
        assert journal.read(written.name) == written


def test_two_processes_do_not_work_in_one_directory(tmp_path: Path) -> None:
    with Journal(tmp_path):
        pass
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another `millrace report` works there"):
            Journal(tmp_path)


def test_the_schema_is_that_of_what_is_written(made: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    content = msgspec.json.decode((made / "report.json").read_bytes())
    jsonschema.validate(content, msgspec.json.schema(Report))


def test_the_page_stands_alone(made: Path) -> None:
    page = (made / "report.html").read_text()
    assert read_report(made / "report.json").sha256 in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
