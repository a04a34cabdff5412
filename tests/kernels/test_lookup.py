"""Looking up a sequence's last tokens: against a search that is easy to read."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from millrace.kernels.lookup import continuation, longest_match, split_match


def searched(known: list[int], longest: int) -> tuple[int, int]:
    """Tokens that are the same, and the position behind them; the longest, then the last match."""
    found = (0, 0)
    for end in range(1, len(known)):
        length = 0
        while length < min(end, longest) and known[end - 1 - length] == known[-1 - length]:
            length += 1
        if length:
            found = max(found, (length, end))
    return found


def tape(rows: list[list[int]], spare: int = 5) -> Tensor:
    """Rows by slot, from slot 1 on, with tokens behind them that may not be looked at."""
    width = max(map(len, rows)) + spare
    table = torch.full((len(rows) + 1, width), 1, dtype=torch.int64)
    for slot, row in enumerate(rows, start=1):
        table[slot, : len(row)] = torch.tensor(row)
    return table


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=4)


@given(sequences, st.integers(1, 6))
def test_the_longest_match_and_of_these_the_last(rows: list[list[int]], longest: int) -> None:
    tokens, slots = tape(rows), torch.arange(len(rows), 0, -1)
    ends = torch.tensor([len(rows[slot - 1]) for slot in slots])
    match = split_match(longest_match(tokens, slots, ends, longest, int(ends.max())))
    want = [searched(rows[slot - 1], longest) for slot in slots]
    assert list(zip(match.length.tolist(), match.next.tolist(), strict=True)) == want


def test_what_follows_a_match_comes_again_and_again_where_it_is_short() -> None:
    rows = [[7, 1, 2, 3, 9, 9, 1, 2, 3], [5, 6, 5, 6], [4, 4, 4]]
    tokens, slots = tape(rows), torch.tensor([1, 2, 3])
    ends = torch.tensor([len(row) for row in rows])
    match = split_match(longest_match(tokens, slots, ends, 8, 9))
    drafts = continuation(tokens, slots, ends, match, 4)
    assert drafts.tolist() == [[9, 9, 1, 2], [5, 6, 5, 6], [4, 4, 4, 4]]
