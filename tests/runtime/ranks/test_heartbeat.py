"""The heartbeat and the rendezvous: a rank that fails or differs is named in one line."""

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
from millrace.runtime.ranks.rendezvous import accept_ranks, connect_to_rank_0, listen

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
        first = pool.submit(attempt, lambda: accept_ranks(listener, hello(0), size, limit))
        rest = [
            pool.submit(attempt, lambda me=me: connect_to_rank_0(address, me, limit))
            for me in others
        ]
        return first.result(2 * LIMIT), [one.result(2 * LIMIT) for one in rest]


@contextmanager
def heartbeats(count: int = 2, **options: object) -> Iterator[list[Heartbeat]]:
    """The heartbeats of `count` ranks, all in this process."""
    others = [hello(rank) for rank in range(1, count)]
    first, rest = rendezvous(others)
    assert isinstance(first, list)
    ranks = [Heartbeat(hello(0), first, **options)]  # type: ignore[arg-type]
    ranks += [Heartbeat(me, [peer]) for me, peer in zip(others, rest, strict=True)]  # type: ignore[list-item]
    try:
        yield ranks
    finally:
        for one in ranks:
            one.leave()


def failure(one: Heartbeat) -> str:
    """The line with which this rank's heartbeat fails, soon."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            one.check()
        except RankError as error:
            return str(error)
        time.sleep(0.01)
    raise AssertionError("no failure was noticed")


def test_ranks_join_and_leave_normally() -> None:
    with heartbeats(4) as ranks:
        for one in ranks:
            one.begin(1)
        time.sleep(3 * heartbeat.BEAT)
        for one in reversed(ranks):
            one.leave()
        for one in ranks:
            one.check()


def test_a_rank_with_other_facts_is_named_to_all() -> None:
    first, rest = rendezvous([hello(1), hello(2, max_num_seqs="8")])
    expected = "rank 2 (pid 1002) has another max_num_seqs: 8, where rank 0 has 4; "
    expected += "start all ranks with the same"
    assert isinstance(first, ConfigError)
    assert [str(first), *map(str, rest)] == [expected] * 3


def test_a_missing_rank_is_named() -> None:
    with listen("127.0.0.1") as listener:
        with pytest.raises(RankError, match=r"rank 1, rank 2 did not join within 0 s"):
            accept_ranks(listener, hello(0), 3, 0.0)
        with pytest.raises(RankError, match="rank 1 died with signal 9 before it had joined"):
            accept_ranks(listener, hello(0), 2, LIMIT, lambda rank: "died with signal 9")


def test_connections_without_the_token_are_refused() -> None:
    with listen("127.0.0.1") as listener, ThreadPoolExecutor(1) as pool:
        address = listener.getsockname()[:2]
        first = pool.submit(accept_ranks, listener, hello(0), 2, LIMIT)
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x02\x00\x00\x00\xff\xff"):
            with socket.create_connection(address) as stranger:
                stranger.sendall(noise)
        with pytest.raises(RankError):
            connect_to_rank_0(address, hello(1, token="guess"), LIMIT)
        assert not first.done()
        connect_to_rank_0(address, hello(1), LIMIT)
        assert len(first.result(LIMIT)) == 1


def test_rank_0_that_is_not_there() -> None:
    with listen("127.0.0.1") as listener:
        address = listener.getsockname()[:2]
    with pytest.raises(RankError, match=r"rank 0 at 127\.0\.0\.1 port .* does not answer"):
        connect_to_rank_0(address, hello(1), 1.0)


def test_a_lost_connection_is_reported_to_all_and_to_the_owner() -> None:
    failures: list[str] = []
    with heartbeats(
        3, exit_reason=lambda rank: "died with signal 9", on_failure=failures.append
    ) as ranks:
        ranks[1].peers[0].sock.shutdown(socket.SHUT_RDWR)
        expected = "rank 1 (pid 1001) died with signal 9"
        assert failure(ranks[0]) == failure(ranks[2]) == expected
        ranks[0].thread.join(LIMIT)
        assert failures == [expected]


def test_the_end_of_rank_0_is_noticed() -> None:
    with heartbeats(2) as ranks:
        ranks[0].peers[0].sock.shutdown(socket.SHUT_RDWR)
        assert failure(ranks[1]) == "rank 0 (pid 1000) is gone: its connection has ended"


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


def test_a_rank_that_stays_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEHIND_LIMIT", 1.0)
    with heartbeats(3) as ranks:
        for step in (1, 2):
            ranks[0].begin(step)
            ranks[2].begin(step)
        ranks[1].begin(1)
        line = failure(ranks[0])
        assert line.startswith("rank 1 (pid 1001) has been in step 1 for ")
        assert line.endswith("rank 0 is in step 2")


def test_a_rank_that_fails_is_named() -> None:
    with heartbeats(3) as ranks:
        ranks[2].fail("rank 2 (pid 7): out of memory")
        assert failure(ranks[0]) == failure(ranks[1]) == "rank 2 (pid 7): out of memory"


def test_a_collectives_error_names_the_rank_that_failed() -> None:
    with heartbeats(2) as ranks:
        threading.Timer(0.2, ranks[1].fail, ["rank 1: why"]).start()
        assert str(ranks[0].explain(RuntimeError("Connection closed"))) == "rank 1: why"
    with heartbeats(2) as ranks:
        error = ranks[0].explain(RuntimeError("first line\nmore"), limit=0.0)
        assert str(error) == "rank 0: first line"


def test_a_block_beyond_its_limit_names_its_rank() -> None:
    with heartbeats(3) as ranks:
        with ranks[2].limited("measuring", 60.0):
            pass
        with ranks[1].limited("measuring", 0.2, "; leave it out"):
            lines = {failure(one) for one in ranks}
    (line,) = lines
    assert re.fullmatch(r"rank 1 \(pid 1001\) has been measuring for \d+ s; leave it out", line)


def test_a_limit_holds_within_and_after_another() -> None:
    with heartbeats() as ranks:
        first, one = ranks
        with one.limited("trying", 60.0), one.limited("starting", 0.2):
            with one.limited("measuring", 60.0):
                pass
            assert re.search(r"rank 1 .* starting for", failure(first))
    with heartbeats() as ranks:
        first, one = ranks
        with one.limited("starting", 0.2), one.limited("measuring", 60.0):
            assert re.search(r"rank 1 .* starting for", failure(first))
