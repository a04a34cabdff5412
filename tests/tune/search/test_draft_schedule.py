"""Drafts by batch size: measured after the finals, and read by the servers that take them."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import pytest

from millrace.config import engine_args
from millrace.engine.draft_depth import DraftDepth
from millrace.protocol import Limits
from millrace.server.command import serve
from millrace.speculation import resolve_speculation
from millrace.tune.results import results_of
from millrace.tune.search.draft_schedule import (
    DraftSchedule,
    batch_sizes,
    draft_schedule,
)
from millrace.tune.search.study import Rules, run_study
from millrace.tune.servers.command_line import Served
from millrace.tune.text_report import text_of
from millrace.tune.trials.history import History
from millrace.tune.trials.journal import Journal
from tests.tune.fake_engine import SPACE, FakeEngine, Hidden, gain_of_drafts

STREAMS = 256  # on the engines of the best together
RULES = Rules(trials=25, draft_rounds=2, streams=STREAMS)


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    return studied(tmp_path_factory.mktemp("study"))


def studied(directory: Path) -> History:
    history = History(SPACE, RULES.goal, [])
    with Journal(directory) as journal:
        asyncio.run(run_study(journal, history, RULES, FakeEngine(hidden=Hidden(room=1.4))))
    return history


def schedule(history: History) -> DraftSchedule:
    found = draft_schedule(history)
    assert found is not None
    return found


def test_sizes_reach_from_one_to_the_load() -> None:
    for streams in range(1, 300):
        sizes = batch_sizes(streams)
        assert sizes[0] == 1
        assert sizes[-1] == streams
        assert all(1 < high / low < 8 for low, high in pairwise(sizes))


def test_the_schedule_is_the_hidden_one_and_has_no_gap(history: History) -> None:
    found = schedule(history)
    alive = [0, 1, 2, 3]  # five die under load
    for row in found.rows:
        best = max(gain_of_drafts(drafts, row.batch) for drafts in alive)
        assert gain_of_drafts(row.best, row.batch) >= 0.96 * best
        assert set(row.speeds) == set(alive)
    depths = [row.best for row in found.rows]
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > depths[-1]
    least = 1
    for low, high, _ in found.ranges:
        assert low == least <= high
        least = high + 1
    assert least > 10_000  # no engine has so many rows
    assert len({drafts for _, _, drafts in found.ranges}) <= 3


def test_five_drafts_fail_once_and_are_not_started_again(history: History) -> None:
    visits = [visit for visit, _ in history.draft_visits]
    assert sum(visit.settings["drafts"] == 5 for visit in visits) <= 1
    assert all(visit.settings["replicas"] == 1 for visit in visits)
    assert len(history.trials) == RULES.trials  # visits for the schedule are no trials


def test_millrace_reads_what_was_written(history: History, tmp_path: Path) -> None:
    found = schedule(history)
    served = Served(engine="millrace", model="m")
    results = results_of(history, SPACE, served, finished=True)
    assert results.drafts is not None
    path = tmp_path / "best-drafts.yaml"
    spec = results.drafts.options["speculative-config"]
    path.write_text(json.dumps({"speculative-config": spec}))
    params = serve.make_context("serve", ["m", "--config", str(path)]).params
    args = engine_args(model="m", speculative_config=params["speculative_config"])
    read = resolve_speculation(args.speculative_config, mtp_layers=1)
    limits = Limits(
        max_num_seqs=STREAMS, max_num_batched_tokens=8192, max_model_len=4096, page_size=16,
        num_pages=1, num_snapshots=0, drafts=read.drafts, depths=list(read.depths),
        depth_schedule=list(read.schedule),
    )  # fmt: skip
    for row in found.rows:
        assert DraftDepth(limits).choose([None] * row.batch) == row.best  # type: ignore[list-item]
    said = text_of(results)
    assert "drafts by batch size" in said
    assert "num_speculative_tokens_per_batch_size" in said
