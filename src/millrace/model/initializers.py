"""Random numbers for weights, scaled as in trained models.

Hardly any of them is zero, so speed that is measured with them is that of real weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Initializer = Callable[[Tensor, Generator], None]
"""Fills a tensor, which may be a part of a checkpoint's, in place."""


def matrix(data: Tensor, generator: Generator) -> None:
    """[out, in]: keeps the size of what it is multiplied with."""
    data.normal_(0, 1 / math.sqrt(data.shape[1]), generator=generator)


def around(center: float) -> Initializer:
    """Numbers near `center`, such as the weights of norms."""

    def fill(data: Tensor, generator: Generator) -> None:
        data.normal_(center, 0.1, generator=generator)

    return fill


def convolution(data: Tensor, generator: Generator) -> None:
    """The taps of a short convolution."""
    data.uniform_(-0.5, 0.5, generator=generator)


def log_decay(data: Tensor, generator: Generator) -> None:
    """`A_log`: the log of rates between 1 and 16."""
    data.uniform_(1, 16, generator=generator).log_()


def step_bias(data: Tensor, generator: Generator) -> None:
    """`dt_bias`: softplus of it is spread over 0.001 .. 0.1."""
    step = data.uniform_(math.log(0.001), math.log(0.1), generator=generator).exp_()
    step.expm1_().log_()


def in_bfloat16(draw: Initializer, rows: int = 4096) -> Initializer:
    """For dtypes without random numbers of their own: drawn in bfloat16, `rows` at a time."""

    def fill(data: Tensor, generator: Generator) -> None:
        for part in data.split(rows):
            drawn = torch.empty(part.shape, dtype=torch.bfloat16, device=part.device)
            draw(drawn, generator)
            part.copy_(drawn)

    return fill
