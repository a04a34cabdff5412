"""A study that is killed (SIGKILL) at any moment, and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from millrace.tune.trials.journal import Began, Ended, Record, read_journal
from tests.tune.killed_study import study

ROOT = Path(__file__).parents[3]


def ended(records: list[Record]) -> list[tuple[object, object]]:
    """(visit, outcome) of each visit, in order; a visit that began again counts once."""
    found: list[tuple[object, object]] = []
    visit: object = None
    for record in records:
        if isinstance(record, Began):
            visit = record.visit
        elif isinstance(record, Ended):
            found.append((visit, record.outcome))
    return found


def test_twenty_kills_lose_and_repeat_nothing(tmp_path: Path) -> None:
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    command = [sys.executable, "-m", "tests.tune.killed_study", str(killed), "20"]
    killed.mkdir()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20
    study(calm)
    assert ended(read_journal(killed)) == ended(read_journal(calm))

    visits = [json.loads(line) for line in (killed / "visits").read_text().splitlines()]
    settings: dict[int, str] = {}
    for _, trial, given, purpose in visits:
        if purpose != "drafts":
            assert settings.setdefault(trial, json.dumps(given)) == json.dumps(given)
    assert purpose == "drafts"  # also the last part of a study was gone through
    assert len(set(settings.values())) == len(settings) == 25
    again = len(visits) - len({number for number, *_ in visits})
    assert again <= 20  # a kill costs the visit that was under way, and no more
