from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.download import journal as journal_module
from millrace.download.journal import Journal, Ranges

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=20)


@given(SPANS)
def test_ranges_are_a_set_of_numbers(spans: list[tuple[int, int]]) -> None:
    ranges, model = Ranges(), set[int]()
    for start, length in spans:
        ranges.add(start, start + length)
        model |= set(range(start, start + length))
    missing = ranges.missing(60)
    assert {n for start, end in missing for n in range(start, end)} == set(range(60)) - model
    assert all(start < end for start, end in missing)
    assert all(a[1] < b[0] for a, b in pairwise(missing))
    assert ranges.total() == len(model)
    assert ranges.prefix() == next(n for n in range(61) if n not in model)


def reopened(path: Path, size: int = 100, identity: str = "a") -> Journal:
    return Journal(path, size, identity)


def written(path: Path) -> Journal:
    found = reopened(path)
    found.write(0, b"x" * 10)
    found.write(30, b"y" * 20)
    return found


def test_a_killed_process_loses_nothing_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "f.part"
    first = written(path)  # neither synchronised nor closed: as after a kill
    again = reopened(path)
    assert again.missing() == [(10, 30), (50, 100)]
    assert again.done() == 30
    assert again.prefix() == 10
    assert again.read(30, 20) == b"y" * 20
    first.close()


@pytest.mark.parametrize("torn", range(1, 24))
def test_a_torn_record_is_cut_off(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "f.part"
    written(path).close()
    log = path.with_name("f.part.journal")
    os.truncate(log, log.stat().st_size - torn)
    again = reopened(path)
    lost = 1 if torn <= 20 else 2
    assert again.done() == (10 if lost == 1 else 0)
    again.write(60, b"z" * 5)
    again.close()
    assert reopened(path).done() == (15 if lost == 1 else 5)


def test_after_a_power_cut_pieces_behind_the_last_mark_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "f.part"
    first = reopened(path)
    first.write(0, b"a" * 10)
    first.sync()
    first.write(10, b"b" * 10)
    first.write(20, b"c" * 10)
    first.close()
    with path.open("r+b") as file:  # the second piece never reached the disk
        file.seek(10)
        file.write(b"\0" * 10)
    assert reopened(path).missing() == [(10, 20), (30, 100)]


@pytest.mark.parametrize(("size", "identity"), [(100, "b"), (90, "a")])
def test_a_partial_file_of_another_version_is_begun_anew(
    tmp_path: Path, size: int, identity: str
) -> None:
    path = tmp_path / "f.part"
    written(path).close()
    again = reopened(path, size, identity)
    assert again.missing() == [(0, size)]
    assert path.stat().st_size == size


def test_a_finished_file_has_its_name_and_no_journal(tmp_path: Path) -> None:
    path, target = tmp_path / "f.part", tmp_path / "sub" / "f"
    part = reopened(path, 4)
    part.write(0, b"data")
    part.finish(target)
    assert target.read_bytes() == b"data"
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "sub", target]


def test_marks_come_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SYNC_BYTES", 16)
    path = tmp_path / "f.part"
    written(path).close()
    with path.open("r+b") as file:
        file.write(b"\0" * 100)  # not compared: the mark says that they are on the disk
    assert reopened(path).done() == 30
