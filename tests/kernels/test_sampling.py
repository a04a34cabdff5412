"""Sampling: the noise is the hash its docstring states, and draws follow the distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from millrace.kernels.sampling import (
    NOT_FINITE,
    NOTHING,
    best,
    checked,
    checked_token_of,
    gumbel,
    keep_threshold,
    sample,
    token_of,
)

M = 0xFFFFFFFF


def mix(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & M
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & M
    return x ^ (x >> 16)


def noise_of(seed: int, position: int, token: int) -> float:
    """The module's formula in Python integers."""
    seed &= 2**64 - 1
    a = mix(mix(mix(seed & M) ^ (seed >> 32)) ^ (position & M))
    b = mix((a + 0x9E3779B9) & M)
    x = (token * 0x9E3779B1 & M) ^ a
    x = ((x ^ (x >> 16)) * 0x85EBCA6B & M) ^ b
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & M
    x ^= x >> 16
    w = min((x + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-w))


def rows(count: int, **values: float) -> dict[str, torch.Tensor]:
    """Sampling arguments for `count` rows, plain temperature-1 draws unless told otherwise."""
    return {
        "temperature": torch.full((count,), float(values.get("temperature", 1.0))),
        "top_p": torch.full((count,), float(values.get("top_p", 1.0))),
        "top_k": torch.full((count,), int(values.get("top_k", 0))),
        "seed": torch.full((count,), int(values.get("seed", 7))),
        "position": torch.arange(count),
    }


def test_noise_is_the_stated_hash() -> None:
    seeds = [0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF]
    places = [0, 1, 2**31, 2**32 - 1, 5, 262144]
    drawn = gumbel(torch.tensor(seeds), torch.tensor(places), 3000)
    for row, (seed, place) in enumerate(zip(seeds, places, strict=True)):
        for token in (0, 1, 2, 1500, 2999):
            expected = noise_of(seed, place, token)
            assert drawn[row, token].item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


def test_noise_has_the_moments_of_gumbel_and_no_correlation() -> None:
    drawn = gumbel(torch.arange(8).repeat_interleave(8), torch.arange(8).repeat(8), 8192).double()
    assert drawn.isfinite().all()
    assert drawn.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    off_diagonal = torch.corrcoef(drawn) - torch.eye(64, dtype=torch.float64)
    assert off_diagonal.abs().max().item() < 6 / math.sqrt(8192)
    lagged = [(drawn[:, lag:] - 0.577).mul(drawn[:, :-lag] - 0.577).mean() for lag in (1, 2, 3, 8)]
    assert max(abs(x.item()) for x in lagged) < 6 * math.pi**2 / 6 / math.sqrt(64 * 8192)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    torch.manual_seed(3)
    row = torch.randn(50) * 2
    count = 20000
    drawn = sample(row.expand(count, -1), **rows(count, temperature=temperature), filters=False)
    expected = (row / temperature).softmax(0) * count
    seen = torch.bincount(drawn, minlength=50)
    busy = expected > 5
    chi2 = ((seen - expected) ** 2 / expected)[busy].sum().item()
    freedom = int(busy.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)
    assert seen[~busy].sum().item() < 5 * expected[~busy].sum().item() + 20


def test_temperature_zero_takes_the_lowest_of_the_largest() -> None:
    logits = torch.randn(4, 100)
    logits[:, [17, 60]] = 9.0
    logits[3, 17] = -torch.inf
    args = rows(4, temperature=0.0)
    for noise in (False, True):
        assert sample(logits, **args, noise=noise).tolist() == [17, 17, 17, 60]


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(6, 300)
    args = rows(6)
    together = sample(logits, **args)
    order = torch.tensor([5, 3, 1])
    apart = sample(logits[order], **{name: value[order] for name, value in args.items()})
    assert together[order].tolist() == apart.tolist()


@pytest.mark.parametrize("noise", [False, True])
def test_the_best_of_the_parts_is_the_best_of_all(noise: bool) -> None:
    torch.manual_seed(8)
    logits = torch.randn(6, 300).bfloat16()
    logits[0, [40, 41, 250]] = 9.0
    logits[1] = -torch.inf
    logits[2] = -logits[2].abs()
    logits[2, [120, 240]] = torch.tensor([-0.0, 0.0]).bfloat16()
    logits[3, :100] = -torch.inf
    logits[4] = -100.0
    args = {**rows(6), "temperature": torch.tensor([0.0, 0, 0, 1, 1, 1])}
    want = sample(logits, **args, noise=noise, filters=False)
    given = [args[name] for name in ("temperature", "seed", "position")]
    for cuts in ([0, 150, 300], [0, 41, 104, 232, 300], [0, 300, 300]):
        parts = [
            best(logits[:, start:stop], *given, start, noise=noise)
            for start, stop in itertools.pairwise(cuts)
        ]
        assert token_of(torch.stack(parts).amax(0)).tolist() == want.tolist()
    assert best(logits[:, :0], *given, 300).tolist() == [NOTHING] * 6


def test_top_k_keeps_k_and_ties() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 3.0, -torch.inf]])
    for k, kept in ((1, 5.0), (2, 3.0), (3, 3.0), (4, 1.0), (0, -torch.inf), (-1, -torch.inf)):
        assert keep_threshold(logits, **_filter(rows(1, top_k=k))).item() == kept
    assert keep_threshold(logits, **_filter(rows(1, top_k=99))).item() == -torch.inf


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set_that_reaches_p(top_p: float, temperature: float) -> None:
    torch.manual_seed(5)
    logits = torch.randn(20, 400) * 3
    args = _filter(rows(20, top_p=top_p, temperature=temperature, top_k=0))
    floor = keep_threshold(logits, **args)
    probability = (logits.double() / temperature).softmax(1)
    kept = logits >= floor[:, None]
    mass = (probability * kept).sum(1)
    without_last = mass - probability.masked_fill(~kept, torch.inf).amin(1)
    assert (mass >= top_p - 1e-6).all()
    assert (without_last < top_p + 1e-6).all()


def test_filters_and_temperature_zero_together() -> None:
    logits = torch.randn(3, 64)
    args = rows(3, temperature=0.0, top_p=0.2, top_k=5)
    assert sample(logits, **args).tolist() == logits.argmax(1).tolist()


def test_samples_are_in_the_filtered_set() -> None:
    torch.manual_seed(6)
    logits = torch.randn(1, 200).expand(500, -1)
    args = rows(500, top_k=4, temperature=1.5)
    drawn = set(sample(logits, **args).tolist())
    assert drawn == set(logits[0].topk(4).indices.tolist())


def _filter(args: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: args[name] for name in ("temperature", "top_p", "top_k")}


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("noise", [False, True])
def test_rows_that_are_not_finite_are_found_by_the_sampled_token(
    filters: bool, noise: bool
) -> None:
    torch.manual_seed(4)
    logits = torch.randn(7, 500)
    logits[0] = torch.nan
    logits[1, 77] = torch.nan
    logits[2, 77] = -torch.tensor(torch.nan)
    logits[3, 400] = torch.inf
    logits[4, 3:] = -torch.inf
    logits[5] = -torch.inf  # every token is forbidden: it is finite as far as the model goes
    args = rows(7, top_p=0.9, top_k=20)
    tokens = sample(logits, **args, noise=noise, filters=filters)
    usable = [False, False, False, False, True, True, True]
    assert (checked(logits, tokens) != NOT_FINITE).tolist() == usable
    assert checked(logits, tokens)[4:].tolist() == tokens[4:].tolist()
    parts = [(0, 100), (100, 101), (101, 500), (500, 500)]
    given = (args["temperature"], args["seed"], args["position"])
    found = [best(logits[:, a:b], *given, a, noise=noise) for a, b in parts]
    largest = torch.stack(found).amax(0)
    assert (checked_token_of(largest) != NOT_FINITE).tolist() == usable
    assert checked_token_of(largest)[4:].tolist() == token_of(largest)[4:].tolist()
