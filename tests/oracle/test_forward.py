"""In float32 our logits are those of `transformers`, however the tokens are cut into steps."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from millrace.kernels.batch import GDNState
from millrace.model.tiny import UNIT_TEST
from tests.oracle.conftest import MakePair, Pair, random_shape
from tests.support.driver import Driver

TOLERANCE = 1e-4


def assert_close(pair: Pair, hidden: Tensor, reference: Tensor) -> None:
    difference = (pair.model.logits(hidden) - reference).abs().max()
    assert difference < TOLERANCE, f"logits differ by {difference:.2e}"


def assert_as_near_as_transformers(pair: Pair, exact: Pair, ids: list[int], hidden: Tensor) -> None:
    """The log-probabilities of `ids` by our hidden vectors, [T, H], are as near to the float32
    reference, `exact`, as those of `transformers` in the format of `pair`."""
    target = torch.tensor(ids[1:])[:, None]

    def log_prob(logits: Tensor) -> Tensor:
        return logits[:-1].log_softmax(-1).gather(1, target)

    truth = log_prob(exact.reference(ids))
    ours = (log_prob(pair.model.logits(hidden).float()) - truth).abs().mean()
    theirs = (log_prob(pair.reference(ids)) - truth).abs().mean()
    assert ours < 1.25 * theirs + 1e-3, f"ours {ours:.4f}, transformers {theirs:.4f}"


def decode(
    pair: Pair, driver: Driver, slot: int, ids: list[int], drafts: int, rng: random.Random
) -> None:
    """Verify the rest of `ids` in rows of drafts + 1, with wrong drafts at random places.

    Of each row the tokens up to the first wrong draft are compared and kept.
    """
    reference, width = pair.reference(ids), drafts + 1
    while (start := int(driver.lengths[slot])) < len(ids):
        right = min(rng.randint(1, width), len(ids) - start)
        row = ids[start : start + right]
        row += [(ids[start] + 1 + t) % pair.model.config.vocab_size for t in range(width - right)]
        [hidden], _ = driver.step(decode=[(slot, row)], padded=rng.randint(0, 2))
        assert_close(pair, hidden[:right], reference[start : start + right])
        driver.accept(slot, right, width)


@pytest.mark.parametrize("seed", range(18))
def test_random_shapes(make_pair: MakePair, seed: int) -> None:
    """Prefill in two chunks of any size, then verify rows with rejections."""
    rng = random.Random(seed)
    pair, drafts = make_pair(random_shape(seed), seed=seed), seed % 6
    ids = pair.ids(rng.randint(100, 140), seed)
    cut, prompt = sorted(rng.sample(range(1, 90), 2))
    driver = pair.driver(drafts=drafts)
    reference = pair.reference(ids)
    for start, stop in ((0, cut), (cut, prompt)):
        _, [hidden] = driver.step(prefill=[(2, ids[start:stop])])
        assert_close(pair, hidden, reference[start:stop])
    decode(pair, driver, 2, ids, drafts, rng)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 200])
def test_awkward_chunks(make_pair: MakePair, size: int) -> None:
    pair = make_pair()
    ids = pair.ids(200 if size > 5 else 41, seed=size)
    driver, reference = pair.driver(), pair.reference(ids)
    for start in range(0, len(ids), size):
        _, [hidden] = driver.step(prefill=[(1, ids[start : start + size])])
        assert_close(pair, hidden, reference[start : start + size])


@pytest.mark.parametrize("drafts", range(6))
def test_decode_with_rejections(make_pair: MakePair, drafts: int) -> None:
    """Long enough to fold the window many times, at every k, through the end of its pages."""
    pair = make_pair()
    ids = pair.ids(96, seed=drafts)
    driver = pair.driver(tokens=96, drafts=drafts)
    driver.step(prefill=[(3, ids[:5])])
    decode(pair, driver, 3, ids, drafts, random.Random(drafts))


def test_rows_of_many_lengths_share_a_step(make_pair: MakePair) -> None:
    """Decode rows, prompts of several lengths and padding, together and each as if alone."""
    pair, drafts = make_pair(), 1
    driver = pair.driver(slots=7, drafts=drafts)
    sequences = {slot: pair.ids(150, seed=slot) for slot in range(1, 8)}
    references = {slot: pair.reference(ids) for slot, ids in sequences.items()}
    first = {1: 3, 2: 64, 3: 17}
    driver.step(prefill=[(slot, sequences[slot][:count]) for slot, count in first.items()])
    chunks = {4: 2, 5: 65, 6: 130, 7: 1}
    for _ in range(2):
        starts = driver.lengths.tolist()
        rows = [(s, sequences[s][starts[s] : starts[s] + 2]) for s in (3, 1, 2)]
        prompts = [
            (s, sequences[s][starts[s] : min(150, starts[s] + n)]) for s, n in chunks.items()
        ]
        verified, prefilled = driver.step(decode=rows, prefill=prompts, padded=2)
        for (slot, ids), hidden in zip([*rows, *prompts], [*verified, *prefilled], strict=True):
            assert_close(pair, hidden, references[slot][starts[slot] : starts[slot] + len(ids)])
        for slot, _ in rows:
            driver.accept(slot, 2, 2)


@pytest.mark.parametrize("drafts", [1, 2, 5])
def test_prompt_of_k_plus_1_tokens(make_pair: MakePair, drafts: int) -> None:
    """A prompt as long as a verify row is a prompt: its state is folded and its window empty."""
    pair = make_pair()
    ids = pair.ids(40, seed=9)
    driver = pair.driver(drafts=drafts)
    _, [hidden] = driver.step(prefill=[(1, ids[: drafts + 1])])
    assert_close(pair, hidden, pair.reference(ids)[: drafts + 1])
    states = [c for c in driver.caches.layers if isinstance(c, GDNState)]
    assert all(bool(c.state[1].abs().sum() > 0) for c in states)
    assert all(bool(c.window_u[1].isnan().all()) for c in states)
    decode(pair, driver, 1, ids, drafts, random.Random(1))


@pytest.mark.parametrize("last", ["full_attention", "linear_attention"])
def test_only_the_ends_of_prompts_are_asked_for(make_pair: MakePair, last: str) -> None:
    """Selected tokens are right, and read the keys and values of the others correctly."""
    types = ("full_attention", "linear_attention", "linear_attention", last)
    pair = make_pair(dataclasses.replace(UNIT_TEST, layer_types=types))
    driver, ids = pair.driver(drafts=1), pair.ids(60)
    reference = pair.reference(ids)
    for stops in ({1: 20, 2: 1}, {1: 40, 3: 33}, {2: 35, 3: 36}, {2: 37}):
        starts = driver.lengths.tolist()
        verify = [(1, ids[40:42])] if starts[1] == 40 else []
        prompts = [(slot, ids[starts[slot] : stop]) for slot, stop in stops.items()]
        verified, prefilled = driver.step(verify, prompts, padded=1, ends=True)
        for hidden in verified:
            assert_close(pair, hidden, reference[40:42])
            driver.accept(1, 1, 2)
        for stop, hidden in zip(stops.values(), prefilled, strict=True):
            assert_close(pair, hidden[-1:], reference[stop - 1 : stop])
            skipped = hidden[:-1].isnan()
            assert bool((skipped if last == "full_attention" else ~skipped).all())
    decode(pair, driver, 2, ids, 1, random.Random(0))


def test_padded_rows_change_nothing(make_pair: MakePair) -> None:
    """With NaN in the null slot and page, results and live memory are the same bits."""
    pair, ids = make_pair(), make_pair().ids(30)
    outcomes = []
    for padded in (0, 3):
        driver = pair.driver(drafts=1)
        driver.step(prefill=[(1, ids[:9]), (2, ids[9:20])])
        for _ in range(4):
            hidden, _ = driver.step(decode=[(1, ids[20:22]), (2, ids[22:24])], padded=padded)
            driver.accept(1, 2, 2)
            driver.accept(2, 1, 2)
        live = [c.state[1:] for c in driver.caches.layers if isinstance(c, GDNState)]
        outcomes.append([*hidden, *live])
    for alone, beside in zip(*outcomes, strict=True):
        assert bool(alone.isfinite().all())
        torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)


def test_freed_slot_starts_afresh(make_pair: MakePair) -> None:
    """A slot's next request sees nothing of the last one's state, window or inputs."""
    pair = make_pair()
    driver = pair.driver(drafts=2)
    old, new = pair.ids(70, seed=1), pair.ids(70, seed=2)
    driver.step(prefill=[(1, old[:11])])
    decode(pair, driver, 1, old[:40], 2, random.Random(0))
    driver.admit(1)
    driver.step(prefill=[(1, new[:2])])
    decode(pair, driver, 1, new, 2, random.Random(1))


def test_strong_and_weak_decay(make_pair: MakePair) -> None:
    """Decay from 1 - 1e-4 to exp(-2000) a token stays exact over folds and chunks."""
    pair = make_pair(dataclasses.replace(UNIT_TEST, layer_types=("linear_attention",) * 2), seed=5)
    spread = torch.tensor([1e-4, 0.5, 20.0, 2000.0])
    for ours, theirs in zip(pair.model.layers, pair.reference_model.model.layers, strict=True):
        bias = torch.linspace(-1, 1, 4)
        theirs.linear_attn.A_log.data = spread.log()
        theirs.linear_attn.dt_bias.data = bias.clone()
        ours.mixer.A_log.data = spread.log()
        ours.mixer.dt_bias.data = bias.clone()
    ids = pair.ids(150, seed=3)
    driver = pair.driver(drafts=1)
    _, [hidden] = driver.step(prefill=[(1, ids[:100])])
    assert_close(pair, hidden, pair.reference(ids)[:100])
    decode(pair, driver, 1, ids, 1, random.Random(2))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_log_probabilities(make_pair: MakePair, state_dtype: torch.dtype) -> None:
    """In bfloat16 we are as near to the float32 reference as `transformers` in bfloat16 is."""
    shape = dataclasses.replace(UNIT_TEST, dtype="bfloat16", hidden_size=128)
    pair = make_pair(shape, dtype=torch.bfloat16)
    exact = make_pair(shape, dtype=torch.float32)
    ids = pair.ids(200)
    driver = pair.driver(tokens=200, drafts=1, state_dtype=state_dtype)
    hidden = [driver.step(prefill=[(1, ids[:100])])[1][0]]
    for start in range(100, 200, 2):
        hidden += driver.step(decode=[(1, ids[start : start + 2])])[0]
        driver.accept(1, 2, 2)
    assert_as_near_as_transformers(pair, exact, ids, torch.cat(hidden))
