"""The journal: whole lines, a torn end, one process at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.errors import ConfigError
from millrace.tune.trials.failures import Failure
from millrace.tune.trials.journal import FILE, Began, Ended, Header, Journal, read_journal
from millrace.tune.trials.outcome import Outcome, Run, Visit
from tests.tune.fake_engine import SPACE

VISIT = Visit(number=0, trial=0, settings=SPACE.defaults, purpose="short", seeds=(7,))
OUTCOME = Outcome(
    runs=(Run(seed=7, total=1.5),), failure=Failure("hang", "run", "no token"), seconds=2.0
)
RECORDS = [Header(space=SPACE, request={"trials": 2}), Began(VISIT), Ended(0, OUTCOME)]


def test_records_come_back(tmp_path: Path) -> None:
    with Journal(tmp_path / "new") as journal:
        for record in RECORDS:
            journal.write(record)
    assert read_journal(tmp_path / "new") == RECORDS
    with Journal(tmp_path / "new") as journal:
        assert journal.records == RECORDS


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path) as journal:
        for record in RECORDS:
            journal.write(record)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_journal(tmp_path) == RECORDS[:2]
    with Journal(tmp_path) as journal:
        assert journal.records == RECORDS[:2]
        journal.write(RECORDS[2])
    assert read_journal(tmp_path) == RECORDS


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        for record in RECORDS:
            journal.write(record)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes().replace(b'"Began"', b'"Begun"'))
    with pytest.raises(ConfigError, match="line 2 is no record"):
        Journal(tmp_path)


@pytest.mark.parametrize("order", [(0, 2), (0, 1, 2, 2), (0, 2, 1)])
def test_the_end_of_a_visit_needs_its_beginning(tmp_path: Path, order: tuple[int, ...]) -> None:
    with Journal(tmp_path) as journal:
        for at in order:
            journal.write(RECORDS[at])
    with pytest.raises(ConfigError, match="ends visit 0, not under way"):
        read_journal(tmp_path)


def test_two_processes_cannot_write_one_journal(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(ConfigError, match="another `millrace tune`"):
        Journal(tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="give another --dir"):
        Journal(tmp_path / "file" / "study")
