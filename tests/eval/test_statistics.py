"""Intervals and McNemar's test against values known from elsewhere."""

from __future__ import annotations

import math

import pytest

from millrace.eval.statistics import compare, mcnemar, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.25527, 0.36621),  # Newcombe 1998, table I
    ],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == pytest.approx((low, high), abs=2e-4)


def test_nothing_counted_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 6, 0.03125), (1, 9, 0.021484375), (2, 12, 0.012939453125)],
)
def test_mcnemar_is_the_binomial_test(b: int, c: int, p: float) -> None:
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(p)


def test_mcnemar_of_many_flips_agrees_with_the_normal_approximation() -> None:
    z = (abs(520 - 440) - 1) / math.sqrt(960)
    assert mcnemar(520, 440) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_compare_counts_flips_each_way() -> None:
    a = {"1": True, "2": True, "3": False, "4": False}
    b = {"1": True, "2": False, "3": True, "4": False}
    paired = compare(a, b)
    assert (paired.right_a, paired.right_b, paired.lost, paired.gained) == (2, 2, 1, 1)
    with pytest.raises(ValueError):
        compare(a, {"1": True})
