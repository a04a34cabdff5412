"""The short way: what it takes, it passes on as the long way would; the rest it leaves alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.gateway.relay.fast_path import FastPath
from millrace.gateway.resume.journal import Journal
from millrace.gateway.routing.load_account import LoadAccount
from millrace.gateway.routing.replicas import ReplicaSet
from tests.support.gateways import replica_set


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


EVENT = b'data: {"choices":[{"text":"a","token_ids":[1, 22]}]}\n\n'
PLAIN = b'data: {"choices":[{"text":"a"}]}\n\n'
ERROR = b'data: {"error":{"message":"gone"}}\n\n'


class Way:
    """A lane and what it wrote."""

    def __init__(self, fleet: ReplicaSet, journal: Journal | None) -> None:
        self.written: list[bytes] = []
        self.account = LoadAccount(fleet)
        self.fast_path = FastPath(self.account, self.written.append, journal)


def way(journal: Journal | None = None) -> Way:
    return Way(replica_set(), journal)


def test_an_event_is_forwarded_counted_and_buffered() -> None:
    journal = Journal(strip=False)
    one = way(journal)
    assert one.fast_path.try_forward(chunk(EVENT))
    assert one.written == [chunk(EVENT)] == [journal.raw]
    assert (one.account.chunks, one.account.bytes) == (1, len(chunk(EVENT)))
    assert journal.size == len(chunk(EVENT))


def test_token_ids_are_removed_and_buffered() -> None:
    journal = Journal(strip=True)
    one = way(journal)
    assert one.fast_path.try_forward(chunk(EVENT))
    assert one.written == [chunk(PLAIN)]
    assert journal.raw == chunk(EVENT)


def test_other_pieces_are_refused_unchanged() -> None:
    whole = chunk(EVENT)
    for piece in (
        whole + whole,
        whole[:-1],
        whole[1:],
        b"0\r\n\r\n",
        chunk(EVENT) + b"0\r\n\r\n",
        chunk(EVENT[:-1]),
        chunk(ERROR),
        chunk(EVENT + ERROR),
        b"%x;name=value\r\n%b\r\n" % (len(EVENT), EVENT),
        b"0%x\r\n%b\r\n" % (len(EVENT), EVENT),
        b"no piece is so long\n\n\r\n",
        b"",
    ):
        one = way(Journal(strip=False))
        assert not one.fast_path.try_forward(piece)
        assert one.written == []
        assert one.account.chunks == 0


def test_ids_in_several_places_take_the_long_way() -> None:
    prompt = b'data: {"prompt_token_ids":[3],"choices":[{"text":"a","token_ids":[1]}]}\n\n'
    for payload in (EVENT + EVENT, prompt, PLAIN, b'data: {"token_ids":null}\n\n'):
        assert not way(Journal(strip=True)).fast_path.try_forward(chunk(payload))
        assert way(Journal(strip=False)).fast_path.try_forward(chunk(payload))


def test_the_bounds_are_looked_at_now_and_then() -> None:
    """Every 16 KiB, in however large pieces they come."""
    large = chunk(b'data: {"choices":[{"text":"%b"}]}\n\n' % (b"x" * 4000))
    for piece in (chunk(PLAIN), large):
        one = way(Journal(strip=False))
        count = 24000 // len(piece) + 1
        taken = [one.fast_path.try_forward(piece) for _ in range(count)]
        assert 0 < sum(taken) < count
        assert one.account.bytes < 16384 + len(piece)
        free = way()
        assert all(free.fast_path.try_forward(piece) for _ in range(count))


@given(
    texts=st.lists(st.text(max_size=5), min_size=1, max_size=3),
    ids=st.lists(st.lists(st.integers(0, 9), max_size=2), min_size=3, max_size=3),
    strip=st.booleans(),
    cut=st.integers(0, 400),
)
def test_what_it_takes_is_what_the_long_way_would_pass(
    texts: list[str], ids: list[list[int]], strip: bool, cut: int
) -> None:
    payload = b"".join(
        b'data: {"text":"%b","token_ids":[%b]}\n\n'
        % (said.encode(), b", ".join(b"%d" % one for one in some))
        for said, some in zip(texts, ids, strict=False)
    )
    piece = chunk(payload)
    piece = piece if cut > len(piece) else piece[:cut]
    one, longer = way(Journal(strip)), Journal(strip)
    if one.fast_path.try_forward(piece):
        assert one.written == [longer.feed(piece)]
