"""The journal: exactly one result for each request, whatever happens between two instructions."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.batch import journal as journal_module
from millrace.batch.input_file import InputFile
from millrace.batch.journal import InputError, Journal, Result, StopError
from millrace.batch.lines import Usage, error_line, response_line
from millrace.errors import UserError
from tests.batch.counting_server import chat_line

LINES = 12
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # a disk's syncs would take seconds


def write_input(path: Path, count: int = LINES) -> Path:
    path.write_text("".join(json.dumps(chat_line(i)) + "\n" for i in range(count)))
    return path


def opened(folder: Path, source: InputFile) -> Journal:
    journal = Journal(folder / "out.jsonl", folder / "out.errors.jsonl")
    try:
        journal.load(source)
    except BaseException:
        journal.close()
        raise
    return journal


def result(number: int, custom_id: str, failed: bool = False) -> Result:
    if failed:
        return Result(number, error_line(custom_id, "no_answer", "gone"), True)
    return Result(number, response_line(custom_id, 200, "r", b"{}"), False, Usage(3, 2, 1))


def custom_ids(path: Path) -> list[str]:
    """Of every line of a result file; each has to be whole."""
    text = path.read_text() if path.exists() else ""
    assert not text or text.endswith("\n")
    return [json.loads(line)["custom_id"] for line in text.splitlines()]


def test_results_are_in_the_files_and_survive(tmp_path: Path) -> None:
    source = InputFile(write_input(tmp_path / "in.jsonl"))
    with closing(opened(tmp_path, source)) as journal:
        assert not (tmp_path / "out.errors.jsonl").exists()
        first = [one.custom_id for one in journal.pending()]
        assert sorted(first) == sorted(f"id-{i}" for i in range(LINES))
        keys = {one.custom_id: one.key for one in journal.pending()}
        assert len(set(keys.values())) == LINES
        journal.record([result(1, "id-0"), result(3, "id-2", failed=True)], 1.5)
        journal.finish()
    with closing(opened(tmp_path, source)) as journal:
        counts = journal.counts
        assert (counts.total, counts.done, counts.failed) == (LINES, 2, 1)
        assert (counts.usage, counts.seconds) == (Usage(3, 2, 1), 1.5)
        left = list(journal.pending())
        assert sorted(one.custom_id for one in left) == sorted(set(first) - {"id-0", "id-2"})
        assert all(keys[one.custom_id] == one.key for one in left)
    assert custom_ids(tmp_path / "out.jsonl") == ["id-0"]
    assert custom_ids(tmp_path / "out.errors.jsonl") == ["id-2"]


def test_every_bad_line_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    bad = {**chat_line(5), "url": "/v1/embeddings"}
    rows = [json.dumps(row) for row in (chat_line(1), bad, chat_line(2), chat_line(1))]
    path.write_text("\n".join([*rows[:2], "", *rows[2:], "{"]))
    with pytest.raises(InputError) as raised:
        opened(tmp_path, InputFile(path))
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "line 2", "line 5", "line 6",
    ]  # fmt: skip
    assert "custom_id 'id-1' stands in line 1 too" in str(raised.value)
    assert "Nothing was sent" in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_second_runner_is_refused(tmp_path: Path) -> None:
    source = InputFile(write_input(tmp_path / "in.jsonl"))
    with (
        closing(opened(tmp_path, source)),
        pytest.raises(UserError, match="another process is writing it"),
    ):
        opened(tmp_path, source)
    opened(tmp_path, source).close()


def test_another_input_or_model_is_refused(tmp_path: Path) -> None:
    path = write_input(tmp_path / "in.jsonl")
    opened(tmp_path, InputFile(path)).close()
    with pytest.raises(UserError, match="has changed since"):
        opened(tmp_path, InputFile(path, model="other"))
    path.write_text(path.read_text().replace("document 3", "document 4"))
    with pytest.raises(UserError, match="has changed since"):
        opened(tmp_path, InputFile(path))


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    source = InputFile(write_input(tmp_path / "in.jsonl"))
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    with pytest.raises(UserError, match="without a journal"):
        opened(tmp_path, source)
    (tmp_path / "out.jsonl.journal").touch()
    with pytest.raises(UserError, match="is not"):
        opened(tmp_path, source)
    assert output.read_text() == "precious"


def test_an_output_that_became_shorter_is_refused(tmp_path: Path) -> None:
    source = InputFile(write_input(tmp_path / "in.jsonl"))
    with closing(opened(tmp_path, source)) as journal:
        journal.record([result(1, "id-0")], 0.0)
        journal.finish()
    (tmp_path / "out.jsonl").write_text("")
    with pytest.raises(UserError, match="something else changed it"):
        opened(tmp_path, source)


def test_a_full_disk_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = InputFile(write_input(tmp_path / "in.jsonl"))
    real = journal_module.ResultFile.append

    def append(self: journal_module.ResultFile, data: bytes) -> None:
        real(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with closing(opened(tmp_path, source)) as journal:
        monkeypatch.setattr(journal_module.ResultFile, "append", append)
        with pytest.raises(StopError, match=r"No space left on device.*the same command again"):
            journal.record([result(1, "id-0"), result(2, "id-1")], 0.0)
    monkeypatch.undo()
    opened(tmp_path, source).close()
    assert custom_ids(tmp_path / "out.jsonl") == ["id-0", "id-1"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_loss_of_power_anywhere_costs_no_committed_result(data: st.DataObject) -> None:
    """Behind the last size that was synchronised the files hold anything, or nothing."""
    with TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        source = InputFile(write_input(folder / "in.jsonl"))
        committed = Counter[str]()
        while sum(committed.values()) < LINES:
            with closing(opened(folder, source)) as journal:
                left = list(journal.pending())
                count = data.draw(st.integers(1, len(left)))
                for one in left[:count]:
                    if data.draw(st.integers(0, 3)) == 0:
                        journal.finish()
                    failed = data.draw(st.booleans())
                    journal.record([result(one.place.number, one.custom_id, failed)], 0.1)
                    committed[one.custom_id] += 1
                crash(folder, data)
        with closing(opened(folder, source)) as journal:
            assert list(journal.pending()) == []
        found = custom_ids(folder / "out.jsonl") + custom_ids(folder / "out.errors.jsonl")
        assert Counter(found) == committed == Counter(f"id-{i}" for i in range(LINES))


def crash(folder: Path, data: st.DataObject) -> None:
    """Put the folder into the state that a loss of power leaves: what SQLite has committed, and of
    the result files what was synchronised, with anything behind it."""
    saved = folder / "saved"
    saved.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(folder / f"out.jsonl.journal{suffix}", saved / f"j{suffix}")
    database = sqlite3.connect(saved / "j")
    facts = dict(database.execute("SELECT name, value FROM facts"))
    database.close()
    for index, name in enumerate(("out.jsonl", "out.errors.jsonl")):
        path = folder / name
        if path.exists():
            whole, size = path.read_bytes(), int(facts[f"size{index}"])
            kept = data.draw(st.integers(size, len(whole)))
            path.write_bytes(whole[:kept] + b"\0" * data.draw(st.integers(0, 5)))
    shutil.rmtree(saved)
