"""Runs a study in a child that is killed again and again, until it has ended.

python -m tests.tune.killed_study DIRECTORY KILLS; prints how often it was killed. The child is
forked from one process, so that packages are imported once.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from millrace.common.optional import require
from millrace.tune.search.study import Rules, run_study
from millrace.tune.trials.history import History
from millrace.tune.trials.journal import FILE, Header, Journal
from millrace.tune.trials.outcome import Outcome, Visit
from tests.tune.fake_engine import SPACE, FakeEngine, Hidden

RULES = Rules(trials=25, rounds=(3, 3), draft_rounds=2, seed=5)


class Slow:
    """The fake engine, with a moment in which it can be killed."""

    def __init__(self, log: Path) -> None:
        self._engine = FakeEngine(log, hidden=Hidden(room=0.75), seed=5)

    async def visit(self, visit: Visit) -> Outcome:
        outcome = await self._engine.visit(visit)
        await asyncio.sleep(0.003)
        return outcome


def study(directory: Path) -> None:
    """Go on with the study in a directory, or begin it."""
    with Journal(directory) as journal:
        if not journal.records:
            journal.write(Header(space=SPACE))
        history = History(SPACE, RULES.goal, journal.records)
        asyncio.run(run_study(journal, history, RULES, Slow(directory / "visits")))


def main(directory: Path, kills: int) -> None:
    require("optuna", "a test")
    rng, killed = random.Random(1), 0
    while True:
        begun = size(directory / FILE)
        child = os.fork()
        if child == 0:
            study(directory)
            os._exit(0)
        if killed == kills:
            assert os.waitpid(child, 0)[1] == 0
            break
        while size(directory / FILE) < begun + rng.randrange(400, 1500):
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.004)
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            killed += 1
        else:
            break
    print(killed)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
