"""Ops that change logits, each against a loop over plain numbers."""

from __future__ import annotations

import math
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.kernels.logits import (
    apply_masks,
    apply_min_p,
    apply_penalties,
    completes_sequence,
    force_reasoning_end,
    token_logprobs,
)

VOCAB = 40
contexts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(contexts, st.integers(0, 12)), min_size=1, max_size=4),
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_count_what_the_context_holds(
    rows: list[tuple[list[int], int]], repetition: float, presence: float, frequency: float
) -> None:
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
    tapes = torch.full((len(rows), 16), 7)  # what lies behind the context must not count
    for row, (context, _) in enumerate(rows):
        tapes[row, : len(context)] = torch.tensor(context)
    rates = [torch.full((len(rows),), x) for x in (repetition, presence, frequency)]
    ends = torch.tensor([len(context) for context, _ in rows])
    got = apply_penalties(logits, tapes, ends, torch.tensor([n for _, n in rows]), *rates)
    for row, (context, prompt_len) in enumerate(rows):
        for token in range(VOCAB):
            want = float(logits[row, token])
            if token in context:
                want = want / repetition if want > 0 else want * repetition
            count = context[prompt_len:].count(token)
            want -= frequency * count + presence * (count > 0)
            assert math.isclose(float(got[row, token]), want, rel_tol=1e-4, abs_tol=1e-4)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(contexts, st.integers(0, 12), st.integers(0, 6)), min_size=1))
def test_reasoning_ends_when_it_is_due(rows: list[tuple[list[int], int, int]]) -> None:
    end = 3
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(4))
    tapes = torch.full((len(rows), 16), end)  # what lies behind the context must not count
    for row, (context, _, _) in enumerate(rows):
        tapes[row, : len(context)] = torch.tensor(context)
    ends = torch.tensor([len(context) for context, _, _ in rows])
    begin = torch.tensor([prompt_len for _, prompt_len, _ in rows])
    limit = begin + torch.tensor([budget for _, _, budget in rows])
    got = torch.cat([logits, logits]).flip(0)  # rows in any order, among others
    at = torch.arange(2 * len(rows) - 1, -1, -1)[: len(rows)]
    force_reasoning_end(got, at, tapes, ends, begin, limit, torch.full_like(ends, end))
    assert torch.equal(got[: len(rows)], logits.flip(0))
    got = got[at]
    for row, (context, prompt_len, budget) in enumerate(rows):
        generated = len(context) - prompt_len
        if generated >= budget and end not in context[prompt_len:]:
            assert torch.isfinite(got[row]).nonzero().flatten().tolist() == [end]
        else:
            assert torch.equal(got[row], logits[row])


def test_min_p_keeps_what_is_probable_enough() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    min_p, heat = torch.tensor([0.0, 0.1, 1.0]), torch.tensor([1.0, 0.7, 1.0])
    got = apply_min_p(logits, min_p, heat)
    for row in range(3):
        p = torch.softmax(logits[row] / heat[row], 0)
        keep = p >= min_p[row] * p.max()
        assert torch.equal(torch.isfinite(got[row]), keep)
    assert int(torch.isfinite(got[2]).sum()) == 1


def test_masks_hold_a_bit_for_each_token() -> None:
    rng = random.Random(3)
    allowed = [sorted(rng.sample(range(70), n)) for n in (1, 35, 70)]
    words = [[0] * 3 for _ in allowed]
    for row, tokens in enumerate(allowed):
        for token in tokens:
            words[row][token // 32] |= 1 << (token % 32)
    signed = [[w - (1 << 32) if w >> 31 else w for w in row] for row in words]
    got = apply_masks(torch.zeros(3, 70), torch.tensor(signed, dtype=torch.int32))
    for row, tokens in enumerate(allowed):
        assert torch.isfinite(got[row]).nonzero().flatten().tolist() == tokens


def test_a_sequence_is_completed_only_behind_all_its_tokens() -> None:
    tapes = torch.tensor([[1, 2, 3, 4, 0, 0]] * 5)
    ends = torch.tensor([4, 4, 3, 1, 0])
    sequences = torch.tensor([[-1, 4, 9], [3, 4, 9], [2, 3, 9], [9, 1, 5], [-1, -1, 5]])
    assert completes_sequence(tapes, ends, sequences).tolist() == [True, True, True, False, True]


def test_logprobs_are_of_the_softmax() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4))
    tokens = torch.tensor([3, 0, 39, -1])
    ids, values, rank = token_logprobs(logits, tokens, 5)
    want = torch.log_softmax(logits, 1)
    for row, token in enumerate([3, 0, 39, 0]):
        order = want[row].argsort(descending=True).tolist()
        assert ids[row].tolist() == [token, *order[:5]]
        assert torch.allclose(values[row], want[row, ids[row]], atol=1e-5)
        assert int(rank[row]) == order.index(token) + 1
    assert token_logprobs(logits, tokens, 0)[0].shape == (4, 1)
