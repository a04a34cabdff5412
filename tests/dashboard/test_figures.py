"""Samples and their sums, the hour that is kept, and the messages that viewers get."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from millrace.dashboard.files import HEADERS, PATHS, file_at
from millrace.dashboard.history import History
from millrace.dashboard.sample import BOUNDS, FIELDS, Sample, of_replicas, of_seconds
from millrace.dashboard.stream import Cursor, Event, Feed, ReplicaRow
from millrace.server.telemetry.metrics import RequestMetrics

FIRST = Sample(
    at=10, tokens_in=100, tokens_out=30, running=2, waiting=1, pages=(10, 100), states=(1, 8),
    queries=100, hits=40, drafts=5, draft_tokens=15, accepted=[4, 2], steps=[3, 0.03, 0.0],
    ttft=[(2, 1), (5, 3)], power=100.0, clock=1000, ended=1,
)  # fmt: skip
SECOND = Sample(
    at=11, tokens_in=50, tokens_out=10, running=1, pages=(20, 100), states=(2, 8),
    accepted=[1, 1, 1], steps=[1, 0.01, 0.005], ttft=[(5, 1)], power=300.0, clock=2000, failed=1,
)  # fmt: skip


def test_replicas_add_up() -> None:
    whole = of_replicas(12, [FIRST, SECOND])
    assert (whole.at, whole.tokens_in, whole.tokens_out) == (12, 150, 40)
    assert (whole.running, whole.waiting, whole.pages, whole.states) == (3, 1, (30, 200), (3, 16))
    assert (whole.accepted, whole.steps) == ([5, 3, 1], [4, 0.04, 0.005])
    assert (whole.ttft, whole.itl) == ([(2, 1), (5, 4)], [])
    assert (whole.power, whole.clock) == (400.0, 1500)
    assert of_replicas(12, []) == Sample(at=12)


def test_seconds_add_up_and_levels_are_the_last_ones() -> None:
    whole = of_seconds([FIRST, SECOND])
    assert (whole.at, whole.tokens_in, whole.ended, whole.failed) == (11, 150, 1, 1)
    assert (whole.running, whole.waiting, whole.pages, whole.power) == (1, 0, (20, 100), 300.0)
    assert whole.ttft == [(2, 1), (5, 4)]


def decoded(history: History, number: int) -> list[int]:
    return [json.loads(one)[0] for one in history.since(number)]


def test_the_history_is_bounded_and_gives_what_is_new() -> None:
    history = History(length=3)
    for at in range(1, 6):
        history.add(Sample(at=at))
    assert decoded(history, 0) == [3, 4, 5]
    assert decoded(history, 4) == [5]
    assert decoded(history, 5) == []
    assert decoded(history, 99) == [3, 4, 5]  # a number of another life


def test_a_coarser_history_adds_up_seconds() -> None:
    history = History(length=20, every=5)
    for at in range(1, 13):
        history.add(Sample(at=at, tokens_out=at))
    rows = [msgspec.json.decode(one, type=Sample) for one in history.since(0)]
    assert [(row.at, row.tokens_out) for row in rows] == [(5, 15), (10, 40)]


def parts(message: bytes) -> tuple[str, str, Any]:
    """Kind, id and data of a server-sent event."""
    kind, id, data, *rest = message.decode().split("\n")
    assert rest == ["", ""]
    return kind, id.removeprefix("id: "), json.loads(data.removeprefix("data: "))


def test_a_viewer_gets_everything_first_and_then_what_is_new() -> None:
    history = History()
    feed = Feed("life", {"kind": "server"}, history)
    history.add(FIRST)
    events = [Event(1, 10.0, "up", "")]
    row = ReplicaRow(0, "a", "up", "", None)
    message, seen = feed.message(Cursor(), events, [row])
    kind, id, data = parts(message)
    assert (kind, id) == ("event: all", "life.1.1.1")
    assert Cursor.parse(id) == seen
    assert data["about"]["fields"] == list(FIELDS)
    assert data["samples"] == [json.loads(msgspec.json.encode(FIRST))]
    assert data["replicas"] == [[0, "a", "up", "", None]]
    history.add(SECOND)
    kind, id, data = parts(feed.message(seen, events, [row])[0])
    assert (kind, id, data["events"]) == ("event: new", "life.2.1.1", [])
    assert [row[0] for row in data["samples"]] == [11]
    assert "about" not in data
    assert data["replicas"] == []


@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.integers(0, 4), st.sampled_from(["up", "down"])),
            st.lists(st.sampled_from(["a", "b"]), max_size=2),
        ),
        max_size=12,
    )
)
def test_viewers_that_get_changed_rows_alone_know_them_all(
    moments: list[tuple[dict[int, str], list[str]]],
) -> None:
    """Two viewers look at moments of their own; rows come, go and change between them."""
    feed = Feed("life", {}, History())
    cursors = {"a": Cursor(), "b": Cursor()}
    known: dict[str, dict[int, str]] = {"a": {}, "b": {}}
    for states, viewers in [*moments, ({1: "up"}, ["a", "b"])]:
        rows = [ReplicaRow(id, "", state, "", None) for id, state in states.items()]
        for name in viewers:
            message, cursors[name] = feed.message(cursors[name], [], rows)
            data = parts(message)[2]
            seen = known[name]
            seen |= {row[0]: row[2] for row in data["replicas"]}
            known[name] = {id: seen[id] for id in data.get("ids", seen)}
            assert known[name] == states


def test_a_viewer_of_another_life_begins_anew() -> None:
    history = History()
    history.add(FIRST)
    feed = Feed("new", {}, history)
    for sent in (
        "old.50.3",
        "",
        "new",
        "new.x.1",
        "new.1.1",
        "new.1.1.1.1",
        "new." + "9" * 40 + ".1.1",
    ):
        kind, _, data = parts(feed.message(Cursor.parse(sent), [], [])[0])
        assert (kind, len(data["samples"])) == ("event: all", 1)


def test_every_bound_of_the_metrics_page_is_one_of_ours() -> None:
    metrics = RequestMetrics()
    for name, histogram in (
        ("ttft", metrics.time_to_first_token),
        ("itl", metrics.inter_token_latency),
        ("tpot", metrics.time_per_output_token),
    ):
        theirs = [float(bound) for bound, _ in histogram.buckets(vllm=False)[:-1]]
        assert tuple(theirs) == BOUNDS[name]


def test_pages_load_nothing_from_elsewhere_and_have_no_script_or_style_within() -> None:
    for path in PATHS:
        found = file_at(path)
        assert found is not None
        assert found.body
        if found.media_type.startswith("text/html"):
            page = found.body.decode()
            assert "http:" not in page
            assert "https:" not in page
            assert "<style" not in page
            assert " style=" not in page
            assert page.count("<script") == page.count("<script src=")
    assert file_at("/dashboard/../page.js") is None
    policy = dict(HEADERS)["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
