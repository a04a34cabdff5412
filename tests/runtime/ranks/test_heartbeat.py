"""Ranks that meet, part, fall silent or are unlike: each is noticed, and named in one line."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from millrace.errors import ConfigError, RankError
from millrace.runtime.ranks import heartbeat
from millrace.runtime.ranks.heartbeat import Heartbeat, Hello, this_host
from millrace.runtime.ranks.rendezvous import gather, introduce, listen

FACTS = {"torch": "2.13", "max_num_seqs": "4"}
LIMIT = 20.0


def hello(rank: int, pid: int = 1000, token: str = "t", **facts: str) -> Hello:
    return Hello(rank, pid + rank, this_host(), token, {**FACTS, **facts})


def rendezvous(others: list[Hello], limit: float = LIMIT) -> tuple[object, list[object]]:
    """What rank 0 and the others each got: their connections, or the error."""

    def attempt(call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as error:
            return error

    with listen("127.0.0.1") as listener, ThreadPoolExecutor(len(others) + 1) as pool:
        address = listener.getsockname()[:2]
        size = len(others) + 1
        first = pool.submit(attempt, lambda: gather(listener, hello(0), size, limit))
        rest = [pool.submit(attempt, lambda me=me: introduce(address, me, limit)) for me in others]
        return first.result(2 * LIMIT), [one.result(2 * LIMIT) for one in rest]


@contextmanager
def watching(count: int = 2, **options: object) -> Iterator[list[Heartbeat]]:
    """The watches of `count` ranks, all in this process."""
    others = [hello(rank) for rank in range(1, count)]
    first, rest = rendezvous(others)
    assert isinstance(first, list)
    watches = [Heartbeat(hello(0), first, **options)]  # type: ignore[arg-type]
    watches += [Heartbeat(me, [peer]) for me, peer in zip(others, rest, strict=True)]  # type: ignore[list-item]
    try:
        yield watches
    finally:
        for one in watches:
            one.leave()


def failure(one: Heartbeat) -> str:
    """The line with which this rank's watch fails, soon."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            one.check()
        except RankError as error:
            return str(error)
        time.sleep(0.01)
    raise AssertionError("no failure was noticed")


def test_ranks_meet_and_part_in_order() -> None:
    with watching(4) as watches:
        for one in watches:
            one.begin(1)
        time.sleep(3 * heartbeat.BEAT)
        for one in reversed(watches):
            one.leave()
        for one in watches:
            one.check()


def test_one_that_is_unlike_is_named_to_all() -> None:
    first, rest = rendezvous([hello(1), hello(2, max_num_seqs="8")])
    expected = (
        "rank 2 (pid 1002) has another max_num_seqs: 8, where rank 0 has 4; start all ranks alike"
    )
    assert isinstance(first, ConfigError)
    assert [str(first), *map(str, rest)] == [expected] * 3


def test_one_that_does_not_come_is_named() -> None:
    with listen("127.0.0.1") as listener:
        with pytest.raises(RankError, match=r"rank 1, rank 2 did not join within 0 s"):
            gather(listener, hello(0), 3, 0.0)
        with pytest.raises(RankError, match="rank 1 died with signal 9 before it had joined"):
            gather(listener, hello(0), 2, LIMIT, lambda rank: "died with signal 9")


def test_strangers_are_turned_away() -> None:
    with listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as pool:
        address = listener.getsockname()[:2]
        first = pool.submit(gather, listener, hello(0), 2, LIMIT)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x02\x00\x00\x00\xff\xff"):
            with socket.create_connection(address) as stranger:
                stranger.sendall(noise)
        with pytest.raises(RankError):
            introduce(address, hello(1, token="guess"), LIMIT)
        assert not first.done()
        introduce(address, hello(1), LIMIT)
        assert len(first.result(LIMIT)) == 1


def test_rank_0_that_is_not_there() -> None:
    with listen("127.0.0.1") as listener:
        address = listener.getsockname()[:2]
    with pytest.raises(RankError, match=r"rank 0 at 127\.0\.0\.1 port .* does not answer"):
        introduce(address, hello(1), 1.0)


def test_a_lost_connection_is_told_to_all_and_to_the_owner() -> None:
    told: list[str] = []
    with watching(3, fate=lambda rank: "died with signal 9", on_failure=told.append) as watches:
        watches[1]._peers[0].sock.shutdown(socket.SHUT_RDWR)
        expected = "rank 1 (pid 1001) died with signal 9"
        assert failure(watches[0]) == failure(watches[2]) == expected
        watches[0]._thread.join(LIMIT)
        assert told == [expected]


def test_the_end_of_rank_0_is_noticed() -> None:
    with watching(2) as watches:
        watches[0]._peers[0].sock.shutdown(socket.SHUT_RDWR)
        assert failure(watches[1]) == "rank 0 (pid 1000) is gone: its connection has ended"


def test_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "STOPPED_LIMIT", 0.5)
    monkeypatch.setattr(heartbeat, "is_stopped", lambda pid: pid == 1001)
    first, (other,) = rendezvous([hello(1)])
    assert isinstance(first, list)
    one = Heartbeat(hello(0), first)  # nobody speaks at the other end
    assert failure(one).startswith("rank 1 (pid 1001) has not answered for ")
    assert failure(one).endswith("and is stopped")
    one.leave()
    other.sock.close()  # type: ignore[attr-defined]


def test_one_that_stays_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEHIND_LIMIT", 1.0)
    with watching(3) as watches:
        for step in (1, 2):
            watches[0].begin(step)
            watches[2].begin(step)
        watches[1].begin(1)
        line = failure(watches[0])
        assert line.startswith("rank 1 (pid 1001) has been in step 1 for ")
        assert line.endswith("rank 0 is in step 2")


def test_a_rank_that_gives_up_is_heard() -> None:
    with watching(3) as watches:
        watches[2].fail("rank 2 (pid 7): out of memory")
        assert failure(watches[0]) == failure(watches[1]) == "rank 2 (pid 7): out of memory"


def test_a_collectives_error_is_explained_by_the_watch() -> None:
    with watching(2) as watches:
        threading.Timer(0.2, watches[1].fail, ["rank 1: why"]).start()
        assert str(watches[0].explain(RuntimeError("Connection closed"))) == "rank 1: why"
    with watching(2) as watches:
        error = watches[0].explain(RuntimeError("first line\nmore"), limit=0.0)
        assert str(error) == "rank 0: first line"


def test_what_takes_too_long_names_who_does_it() -> None:
    with watching(3) as watches:
        with watches[2].limited("measuring", 60.0):
            pass
        with watches[1].limited("measuring", 0.2, "; leave it out"):
            lines = {failure(one) for one in watches}
    (line,) = lines
    assert re.fullmatch(r"rank 1 \(pid 1001\) has been measuring for \d+ s; leave it out", line)


def test_a_limit_holds_within_and_after_another() -> None:
    with watching() as watches:
        first, one = watches
        with one.limited("trying", 60.0), one.limited("starting", 0.2):
            with one.limited("measuring", 60.0):
                pass
            assert re.search(r"rank 1 .* starting for", failure(first))
    with watching() as watches:
        first, one = watches
        with one.limited("starting", 0.2), one.limited("measuring", 60.0):
            assert re.search(r"rank 1 .* starting for", failure(first))
