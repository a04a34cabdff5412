"""The dispatcher: every request gets its result, however its endpoints behave."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from millrace.batch.dispatcher import Dispatcher
from millrace.batch.endpoint import Answer, seconds_to_wait
from millrace.batch.input_file import InputFile
from millrace.batch.journal import Counts, Journal, StopError
from millrace.batch.options import DispatchOptions
from millrace.batch.window import Window
from tests.batch.counting_server import answer, chat_line
from tests.support.running import run

GOOD = Answer(200, json.dumps(answer("x")).encode())


class Scripted:
    """An endpoint that says what `reply` says for a content and its attempt there, from 0."""

    def __init__(self, name: str, reply: Callable[[str, int], Answer], seconds: float = 0.0):
        self.name = name
        self.asked: Counter[str] = Counter()
        self.order: list[str] = []
        self.open = self.most_open = 0
        self._reply = reply
        self._seconds = seconds

    async def send(self, path: str, body: bytes, key: str, timeout: float) -> Answer:
        content = json.loads(body)["messages"][-1]["content"]
        attempt = self.asked[content]
        self.asked[content] += 1
        self.order.append(content)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(self._seconds)
        self.open -= 1
        return self._reply(content, attempt)

    async def close(self) -> None: ...


class Silent:
    """An observer that remembers who was set aside."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def progressed(self) -> None: ...

    def set_aside(self, window: Window) -> None:
        self.names.append(window.endpoint.name)


def good(content: str, attempt: int) -> Answer:
    return GOOD


class Outcome:
    """What a run has written."""

    def __init__(self, folder: Path, whole: bool, counts: Counts, observer: Silent) -> None:
        self.whole, self.counts, self.set_aside = whole, counts, observer.names
        self.output = self._rows(folder / "out.jsonl")
        self.errors = self._rows(folder / "out.errors.jsonl")

    def _rows(self, path: Path) -> dict[str, dict[str, object]]:
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [json.loads(line) for line in lines]
        assert len({row["custom_id"] for row in rows}) == len(rows)
        return {row["custom_id"]: row for row in rows}


def dispatched(
    folder: Path,
    endpoints: Sequence[Scripted],
    count: int = 40,
    contents: Sequence[str] = (),
    stop_after: float | None = None,
    **options: float,
) -> Outcome:
    lines = [chat_line(i, contents[i] if contents else None) for i in range(count)]
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source, observer = InputFile(path), Silent()
    with closing(Journal(folder / "out.jsonl", folder / "out.errors.jsonl")) as journal:
        journal.load(source)

        async def main() -> bool:
            dispatcher = Dispatcher(
                journal, source, endpoints, DispatchOptions(**options), observer  # type: ignore[arg-type]
            )  # fmt: skip
            if stop_after is not None:
                asyncio.get_running_loop().call_later(stop_after, dispatcher.stop)
            return await dispatcher.run()

        whole = run(main())
        return Outcome(folder, whole, journal.counts, observer)


def test_every_request_gets_one_result(tmp_path: Path) -> None:
    servers = [Scripted("one", good), Scripted("two", good)]
    outcome = dispatched(tmp_path, servers, max_in_flight=4)
    assert outcome.whole
    assert set(outcome.output) == {f"id-{i}" for i in range(40)}
    assert outcome.errors == {}
    assert outcome.counts.usage.prompt == 40 * 7
    assert sum(sum(server.asked.values()) for server in servers) == 40
    assert all(0 < server.most_open <= 4 for server in servers)


def test_a_slow_endpoint_gets_what_it_finishes(tmp_path: Path) -> None:
    fast, slow = Scripted("fast", good, 0.01), Scripted("slow", good, 0.2)
    dispatched(tmp_path, [fast, slow], 150, max_in_flight=4)
    assert sum(fast.asked.values()) > 4 * sum(slow.asked.values())


def test_an_endpoint_that_dies_is_set_aside_and_tried_again(tmp_path: Path) -> None:
    gone = Answer(error="cannot connect", reached=False)

    def dying(content: str, attempt: int) -> Answer:
        return GOOD if len(bad.order) in range(5, 9) or len(bad.order) > 9 else gone

    bad, healthy = Scripted("bad", dying), Scripted("good", good, 0.05)
    outcome = dispatched(tmp_path, [bad, healthy], 120, max_in_flight=2)
    assert set(outcome.output) == {f"id-{i}" for i in range(120)}
    assert "bad" in outcome.set_aside
    assert "good" not in outcome.set_aside
    assert len(bad.order) < 60  # it was asked little while it was set aside


def test_what_fails_once_is_asked_elsewhere_and_what_always_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reply(content: str, attempt: int) -> Answer:
        if content == "document 3":
            return Answer(500, b'{"error": {"message": "this one kills me"}}')
        if content == "document 4":
            return Answer(error="the server closed the connection")
        if content == "document 5":
            return Answer(400, b'{"error": {"message": "bad temperature"}}')
        if content == "document 6":
            return Answer(200, b"<html>")
        return GOOD

    monkeypatch.setattr("millrace.batch.dispatcher._RETRIES", _quick())
    servers = [Scripted("one", reply), Scripted("two", reply)]
    outcome = dispatched(tmp_path, servers, max_retries=1, max_in_flight=2)
    assert set(outcome.errors) == {"id-3", "id-4", "id-5", "id-6"}
    assert len(outcome.output) == 36
    assert "this one kills me" in json.dumps(outcome.errors["id-3"])
    assert "closed the connection (2 attempts)" in json.dumps(outcome.errors["id-4"])
    assert "bad temperature" in json.dumps(outcome.errors["id-5"])
    for number in (3, 4, 6):  # sent again, to the other endpoint
        assert [server.asked[f"document {number}"] for server in servers] == [1, 1]
    assert sum(server.asked["document 5"] for server in servers) == 1


def _quick() -> object:
    from millrace.common.backoff import BackoffPolicy

    return BackoffPolicy(first=0.01, longest=0.02)


def test_busy_answers_cost_no_attempt_and_retry_after_is_kept(tmp_path: Path) -> None:
    refused_at: list[float] = []
    asked_at: list[float] = []

    def reply(content: str, attempt: int) -> Answer:
        now = asyncio.get_running_loop().time()
        asked_at.append(now)
        if len(asked_at) == 10:
            refused_at.append(now)
            return Answer(429, b"{}", retry_after=0.5)
        return GOOD

    server = Scripted("one", reply)
    outcome = dispatched(tmp_path, [server], max_retries=0, max_in_flight=1)
    assert len(outcome.output) == 40
    (moment,) = refused_at
    assert all(not moment < at < moment + 0.5 for at in asked_at)


def test_wrong_keys_stop_the_run_and_cost_no_request(tmp_path: Path) -> None:
    closed = Scripted("closed", lambda content, attempt: Answer(401, b'{"error": "no key"}'))
    with pytest.raises(StopError, match=r"no endpoint works: closed: status 401.*no key"):
        dispatched(tmp_path, [closed])
    outcome = dispatched(tmp_path, [Scripted("open", good)])
    assert len(outcome.output) == 40
    assert outcome.errors == {}


def test_an_outage_ends_the_run_after_a_while(tmp_path: Path) -> None:
    gone = Scripted("gone", lambda content, attempt: Answer(error="refused", reached=False))
    with pytest.raises(StopError, match=r"for 0\.1 s: gone: refused"):
        dispatched(tmp_path, [gone], give_up_after=0.1)


def test_a_run_can_be_stopped_and_goes_on(tmp_path: Path) -> None:
    slow = Scripted("slow", good, 0.05)
    first = dispatched(tmp_path, [slow], stop_after=0.2, max_in_flight=2)
    assert not first.whole
    assert 0 < len(first.output) < 40
    assert dispatched(tmp_path, [slow]).whole
    assert set(slow.asked.values()) == {1}  # what was in flight had time to end


def test_requests_that_begin_alike_are_sent_together(tmp_path: Path) -> None:
    shared = [f"{chr(97 + i % 3)} rules. " * 100 + str(i) for i in range(30)]
    server = Scripted("one", good)
    dispatched(tmp_path, [server], 30, shared, max_in_flight=1)
    firsts = [content[0] for content in server.order]
    assert sum(a != b for a, b in pairwise(firsts)) == 2


def test_retry_after_is_seconds_or_a_date() -> None:
    assert seconds_to_wait("2") == 2.0
    assert seconds_to_wait("1.5") == 1.5
    assert seconds_to_wait("1e9") == 300.0
    assert seconds_to_wait("Fri, 31 Dec 1999 23:59:59 GMT") == 0.0
    assert seconds_to_wait("soon") is None
    assert seconds_to_wait("") is None
