"""Formats that ops and a model's configuration share; without torch, so that both can import it."""

from __future__ import annotations

from dataclasses import dataclass

# Rows and columns of e4m3 weights that share one scale.
FP8_BLOCK = 128


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """RoPE extended to `factor` times the original context (YaRN, arXiv 2309.00071).

    magnitude multiplies cosines and sines; truncate rounds the blended range outwards.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    magnitude: float = 1.0
    truncate: bool = True
